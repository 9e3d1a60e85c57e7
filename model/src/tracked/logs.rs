// SPDX-License-Identifier: MIT OR Apache-2.0
//! The logs that devices and KVM keep. Some are sets of pages, and some are the
//! library's own logs, whose answers must then lead to the same reports.

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use adapter_user::device_log::DeviceLog;
use adapter_user::guest::{DirtyIovas, DirtyLog, IovaRange, IovaView, Mapping, SourceError};
use adapter_user::{Container, Device, Group, GroupId, GuestMemory, IommuType, Options, Prot};

use super::ops::{LogKind, PAGE, VIEWS};
use super::world::Page;

/// What devices and KVM share with the sources that read their logs.
#[derive(Default)]
pub(super) struct Shared {
    /// The IOVAs that were written and that each view's log has not told.
    pub(super) pending: [BTreeSet<u64>; VIEWS],
    pub(super) fail_log: [bool; VIEWS],
    pub(super) kvm: BTreeSet<Page>,
    pub(super) fail_kvm: bool,
    /// What the guest does after the next read of each view's log.
    pub(super) remap: [Option<Remap>; VIEWS],
    /// What it has done in the take that is going on.
    pub(super) remapped: Vec<Remapped>,
}

/// The guest maps another page to an IOVA.
#[derive(Clone, Copy)]
pub(super) struct Remap {
    pub(super) iova: u64,
    pub(super) gpa: u64,
}

/// A remap that was done, and the new mapping.
pub(super) struct Remapped {
    pub(super) view: usize,
    pub(super) remap: Remap,
    /// Whether the device wrote through the old mapping after the read of the log.
    pub(super) wrote_before: bool,
    pub(super) mapping: Mapping,
}

#[derive(Clone, Default)]
pub(super) struct Logs(Arc<Mutex<Shared>>);

impl Logs {
    pub(super) fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who keeps the log of the devices behind a view.
#[derive(Clone)]
pub(super) enum Keeper {
    /// It has only what the model knows.
    Simulated {
        strict: bool,
    },
    Device(DeviceLog),
    Container(Container, Arc<Device>),
}

impl Keeper {
    pub(super) fn new(kind: LogKind) -> Result<Keeper, Box<dyn Error + Send + Sync>> {
        match kind {
            LogKind::Loose => Ok(Keeper::Simulated { strict: false }),
            LogKind::Strict => Ok(Keeper::Simulated { strict: true }),
            LogKind::Device => {
                let log = DeviceLog::new(None);
                log.set_tracking(true)?;
                Ok(Keeper::Device(log))
            }
            LogKind::Container => {
                let container = Container::new(Options::default());
                container.add_group(Group::emulated(GroupId(1)))?;
                container.set_iommu(IommuType::Type1v2)?;
                container.start()?;
                let device = container.open_device(GroupId(1), None)?;
                Ok(Keeper::Container(container, device))
            }
        }
    }

    /// Follows the map of the view. Each page is a range of its own, since a guest
    /// may unmap any of them.
    pub(super) fn map(&self, iovas: impl Iterator<Item = u64>) -> Result<(), SourceError> {
        for iova in iovas {
            match self {
                Keeper::Simulated { .. } => {}
                Keeper::Device(log) => log.add_range(iova * PAGE, PAGE)?,
                Keeper::Container(container, _) => {
                    container.map(iova * PAGE, memory()?, 0, PAGE, Prot::READ_WRITE)?;
                }
            }
        }
        Ok(())
    }

    /// Unmaps pages, all of which are mapped. Returns those of them that are dirty if
    /// the log does not keep them.
    pub(super) fn unmap(&self, iovas: &[u64]) -> Result<BTreeSet<u64>, SourceError> {
        let mut dirty = BTreeSet::new();
        for iova in iovas {
            match self {
                Keeper::Simulated { .. } => {}
                Keeper::Device(log) => log.remove_range(iova * PAGE, PAGE)?,
                Keeper::Container(container, _) => {
                    let mut words = [0];
                    container.unmap_dirty(iova * PAGE, PAGE, PAGE, &mut words)?;
                    dirty.extend((words[0] != 0).then_some(*iova));
                }
            }
        }
        Ok(dirty)
    }

    /// The device writes a page that is mapped.
    pub(super) fn write(&self, iova: u64) -> Result<(), SourceError> {
        match self {
            Keeper::Simulated { .. } => {}
            Keeper::Device(log) => log.mark(iova * PAGE + 5, 1)?,
            Keeper::Container(_, device) => device.write(iova * PAGE + 5, &[1])?,
        }
        Ok(())
    }

    /// Reads the log. A simulated one has `pending`.
    fn read(
        &mut self,
        ask: &[IovaRange],
        pending: &BTreeSet<u64>,
        dirty: &mut DirtyIovas,
    ) -> Result<(), SourceError> {
        match self {
            Keeper::Simulated { .. } => {
                for iova in pending {
                    dirty.or_range(iova * PAGE, PAGE)?;
                }
                Ok(())
            }
            Keeper::Device(log) => log.read(ask, dirty),
            Keeper::Container(container, _) => container.read(ask, dirty),
        }
    }
}

/// A page that all containers map for all IOVAs.
fn memory() -> Result<&'static Arc<GuestMemory>, &'static str> {
    static MEMORY: OnceLock<Option<Arc<GuestMemory>>> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| GuestMemory::new(PAGE).ok().map(Arc::new));
    memory.as_ref().ok_or("no guest memory")
}

/// The log of a view, as the tracker reads it.
pub(super) struct Log {
    pub(super) view: usize,
    pub(super) iommu: IovaView,
    pub(super) keeper: Keeper,
    pub(super) logs: Logs,
}

impl DirtyLog for Log {
    fn read(&mut self, ask: &[IovaRange], dirty: &mut DirtyIovas) -> Result<(), SourceError> {
        let mut shared = self.logs.lock();
        if std::mem::take(&mut shared.fail_log[self.view]) {
            return Err("the log fails".into());
        }
        let asked = |iova: &u64| {
            ask.iter()
                .any(|r| r.iova <= iova * PAGE && iova * PAGE <= r.last())
        };
        let loose = matches!(self.keeper, Keeper::Simulated { strict: false });
        let pending = std::mem::take(&mut shared.pending[self.view]);
        let (wanted, rest): (BTreeSet<u64>, _) =
            pending.into_iter().partition(|iova| loose || asked(iova));
        shared.pending[self.view] = rest;
        self.keeper.read(ask, &wanted, dirty)?;
        match shared.remap[self.view].take() {
            Some(remap) => self.remap(&mut shared, remap),
            None => Ok(()),
        }
    }
}

impl Log {
    /// The device writes, the guest maps another page to the IOVA, and the device
    /// writes again.
    fn remap(&self, shared: &mut Shared, remap: Remap) -> Result<(), SourceError> {
        let iova = remap.iova;
        let was_mapped = self.iommu.translate(iova * PAGE).is_some();
        // What a container tells at an unmap is in this take already.
        let wrote_before = was_mapped && !matches!(self.keeper, Keeper::Container(..));
        if wrote_before {
            self.keeper.write(iova)?;
        }
        if was_mapped {
            self.keeper.unmap(&[iova])?;
            self.iommu.unmap(iova * PAGE, PAGE)?;
        }
        let mapping = self.iommu.map(iova * PAGE, remap.gpa * PAGE, PAGE)?;
        self.keeper.map(iova..iova + 1)?;
        self.keeper.write(iova)?;
        shared.pending[self.view].insert(iova);
        shared.remapped.push(Remapped {
            view: self.view,
            remap,
            wrote_before,
            mapping,
        });
        Ok(())
    }
}
