// SPDX-License-Identifier: MIT OR Apache-2.0
//! The container that a program holds: shared by threads, with its own lock.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{atomic::AtomicU64, Weak};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::host::{GroupId, Prot};
use dirty_core::uapi;
use dirty_core::{
    Dest, Error, Extent, Map, Options, Outcome, PageSize, Progress, Target, Type1, Unmap,
};

use crate::device::Device;
use crate::heap::Heap;
use crate::host::{Call, Caller, State};
use crate::iommu::IommuSpec;
use crate::memory::GuestMemory;

type Core = dirty_core::Container<Heap>;

/// A group of devices to put into a container.
#[derive(Clone, Debug)]
pub struct Group {
    id: GroupId,
    iommu: Option<IommuSpec>,
}

impl Group {
    /// A group of emulated devices: they pin, or read and write through the
    /// container, and no IOMMU is behind them.
    #[must_use]
    pub fn emulated(id: GroupId) -> Self {
        Group { id, iommu: None }
    }

    /// A group behind a simulated IOMMU: mappings are pinned as a whole.
    #[must_use]
    pub fn iommu(id: GroupId, spec: IommuSpec) -> Self {
        Group {
            id,
            iommu: Some(spec),
        }
    }
}

/// The IOMMU types that a container can be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuType {
    /// Version 1: no dirty pages, no pins, and UNMAP of parts of a range.
    Type1,
    /// Version 2.
    Type1v2,
}

/// What a container and its devices share.
pub(crate) struct Shared {
    core: RwLock<Core>,
    pub(crate) state: State,
    devices: Mutex<BTreeMap<u64, Weak<Device>>>,
    pub(crate) next_device: AtomicU64,
}

impl Shared {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Core> {
        self.core.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Core> {
        self.core.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn devices(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<Device>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells every device to unpin a range. No lock is held, so that devices
    /// can call the container, and be called while they do.
    fn notify(&self, iova: u64, size: u64) {
        let devices: Vec<Weak<Device>> = self.devices().values().cloned().collect();
        for device in devices.iter().filter_map(Weak::upgrade) {
            device.dma_unmap(iova, size);
        }
    }

    /// Takes an unmap through its steps.
    fn unmap(
        &self,
        mut step: impl FnMut(&mut Type1<Heap>, &mut Call<'_>) -> Result<Progress, Error>,
    ) -> Result<u64, Error> {
        let mut call = Call::new(&self.state, Caller::Process);
        loop {
            let progress = step(self.write().backend_mut()?, &mut call)?;
            match progress {
                Progress::Done(size) => return Ok(size),
                Progress::Notify { iova, size } => self.notify(iova, size),
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut call = Call::new(&self.state, Caller::KernelThread);
        let core = self.core.get_mut();
        core.unwrap_or_else(PoisonError::into_inner)
            .close(&mut call);
    }
}

/// A VFIO container with type1 semantics, in this process.
///
/// Clones are handles to one container; it closes with the last handle and the
/// last [`Device`]. Errors are Linux's: see [`Error::errno`].
#[derive(Clone)]
pub struct Container {
    shared: Arc<Shared>,
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tracking = self.shared.read();
        let tracking = tracking.backend().ok().and_then(|b| b.tracking());
        f.debug_struct("Container")
            .field("tracking", &tracking)
            .finish_non_exhaustive()
    }
}

impl Container {
    /// An empty container.
    #[must_use]
    pub fn new(options: Options) -> Self {
        Container {
            shared: Arc::new(Shared {
                core: RwLock::new(Core::new(Heap, options)),
                state: State::default(),
                devices: Mutex::default(),
                next_device: AtomicU64::new(0),
            }),
        }
    }

    fn call(&self) -> Call<'_> {
        Call::new(&self.shared.state, Caller::Process)
    }

    /// An ioctl on the container's file: the number, and the argument as a
    /// value or as an address in this process. A bad address is EFAULT.
    ///
    /// # Errors
    ///
    /// As Linux.
    pub fn ioctl(&self, nr: u32, arg: u64) -> Result<u32, Error> {
        let mut outcome = self.shared.write().ioctl(&mut self.call(), nr, arg)?;
        loop {
            match outcome {
                Outcome::Done(value) => return Ok(value),
                Outcome::Notify(pending) => {
                    self.shared.notify(pending.iova, pending.size);
                    let mut core = self.shared.write();
                    outcome = core.backend_mut()?.resume(&mut self.call(), pending)?;
                }
            }
        }
    }

    /// Adds a group.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Container::attach_group`].
    pub fn add_group(&self, group: Group) -> Result<(), Error> {
        let mut core = self.shared.write();
        let emulated = group.iommu.is_none();
        if core.has_group(group.id) {
            return Err(Error::DuplicateGroup);
        }
        if let Some(spec) = group.iommu {
            self.shared.state.iommus().insert(group.id, spec);
        }
        let attached = core.attach_group(&mut self.call(), group.id, emulated);
        if attached.is_err() {
            self.shared.state.iommus().remove(group.id);
        }
        attached
    }

    /// Removes a group; with the last one go the IOMMU type and all mappings.
    ///
    /// # Errors
    ///
    /// `UnknownGroup`; `GroupBusy` while a device of it is open.
    pub fn remove_group(&self, id: GroupId) -> Result<(), Error> {
        self.shared.write().detach_group(&mut self.call(), id)?;
        self.shared.state.iommus().remove(id);
        Ok(())
    }

    /// Chooses the IOMMU type. A group must be there.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Container::set_iommu`].
    pub fn set_iommu(&self, kind: IommuType) -> Result<(), Error> {
        let kind = match kind {
            IommuType::Type1 => uapi::VFIO_TYPE1_IOMMU,
            IommuType::Type1v2 => uapi::VFIO_TYPE1v2_IOMMU,
        };
        self.shared.write().set_iommu(&mut self.call(), kind)
    }

    /// Maps `size` bytes of `memory` from `offset` on at `iova`. The memory
    /// stays alive as long as the mapping, and no access to it needs a system
    /// call.
    ///
    /// # Errors
    ///
    /// `Wraps` if the range is not in `memory`, then in the order of A4.
    pub fn map(
        &self,
        iova: u64,
        memory: &Arc<GuestMemory>,
        offset: u64,
        size: u64,
        prot: Prot,
    ) -> Result<(), Error> {
        let end = offset.checked_add(size).ok_or(Error::Wraps)?;
        if end > memory.len() {
            return Err(Error::Wraps);
        }
        let map = Map {
            iova,
            vaddr: memory.addr() + offset,
            size,
            prot: Some(prot),
        };
        let mut call = Call::with_backing(&self.shared.state, memory);
        self.shared.write().backend_mut()?.map(&mut call, &map)
    }

    /// Maps `size` bytes of this process from `vaddr` on at `iova`. Nothing is
    /// held of them: an access to memory that is gone is EFAULT.
    ///
    /// # Errors
    ///
    /// In the order of A4.
    pub fn map_process(&self, iova: u64, vaddr: u64, size: u64, prot: Prot) -> Result<(), Error> {
        let map = Map {
            iova,
            vaddr,
            size,
            prot: Some(prot),
        };
        let mut call = self.call();
        self.shared.write().backend_mut()?.map(&mut call, &map)
    }

    /// Removes the mappings in a range and returns their bytes. Devices are
    /// told to unpin first.
    ///
    /// # Errors
    ///
    /// In the order of A5; `StillPinned` if a device does not unpin.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64, Error> {
        let mut unmap = Unmap::new(Target::Range { iova, size });
        self.shared
            .unmap(|type1, call| type1.unmap(call, &mut unmap))
    }

    /// Removes every mapping.
    ///
    /// # Errors
    ///
    /// `StillPinned` if a device does not unpin.
    pub fn unmap_all(&self) -> Result<u64, Error> {
        let mut unmap = Unmap::new(Target::All);
        self.shared
            .unmap(|type1, call| type1.unmap(call, &mut unmap))
    }

    /// Removes the mappings in a range and reports their dirty pages, pages of
    /// `pgsize` bytes: bit k of `bitmap` is the page at `iova + k * pgsize`.
    /// Words that overlap a mapping are overwritten, others are left alone.
    ///
    /// # Errors
    ///
    /// In the order of A5; nothing is removed then.
    pub fn unmap_dirty(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &mut [u64],
    ) -> Result<u64, Error> {
        let pgsize = PageSize::new(pgsize).ok_or(Error::WrongPageSize)?;
        let mut unmap = Unmap::new(Target::Range { iova, size });
        self.shared
            .unmap(|type1, call| type1.unmap_dirty(call, &mut unmap, pgsize, Dest::Words(bitmap)))
    }

    /// Starts dirty-page tracking; no effect if it is on. Reports tell what is
    /// written from now on: copy everything after this call.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Type1::start`].
    pub fn start(&self) -> Result<(), Error> {
        self.shared.write().backend_mut()?.start()
    }

    /// Stops dirty-page tracking and forgets what was dirty.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Type1::stop`].
    pub fn stop(&self) -> Result<(), Error> {
        self.shared.write().backend_mut()?.stop()
    }

    /// Reports the dirty pages of a range, pages of `pgsize` bytes (any power
    /// of two): bit k of `bitmap` is the page at `iova + k * pgsize`. They are
    /// clean afterwards, unless a device pins them; copy them after this call.
    ///
    /// # Errors
    ///
    /// In the order of A6; nothing is cleared then.
    pub fn dirty_bitmap(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &mut [u64],
    ) -> Result<(), Error> {
        self.report(iova, size, pgsize, Dest::Words(bitmap))
    }

    /// Likewise into words that are zero: only words with dirty pages are
    /// written, which is faster when few are.
    ///
    /// # Errors
    ///
    /// In the order of A6; nothing is cleared then.
    pub fn dirty_bitmap_zeroed(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &mut [u64],
    ) -> Result<(), Error> {
        self.report(iova, size, pgsize, Dest::Zeroed(bitmap))
    }

    fn report(&self, iova: u64, size: u64, pgsize: u64, to: Dest<'_>) -> Result<(), Error> {
        let pgsize = PageSize::new(pgsize).ok_or(Error::WrongPageSize)?;
        let mut core = self.shared.write();
        core.backend_mut()?.get_bitmap(iova, size, pgsize, to)
    }

    /// Marks `size` bytes from `iova` on as written: *after* the write, and
    /// before telling anybody that it is done; see [`Device::mark`].
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Type1::mark`].
    pub fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
        self.shared.read().backend()?.mark(iova, size)
    }

    /// A handle that does not keep the container open, for callbacks.
    #[must_use]
    pub fn downgrade(&self) -> WeakContainer {
        WeakContainer {
            shared: Arc::downgrade(&self.shared),
        }
    }

    /// Marks the pages that another tracker found dirty: after the writes, as
    /// [`mark`](Container::mark).
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Type1::mark_bitmap`].
    pub fn mark_bitmap(&self, words: &[u64], extent: Extent) -> Result<(), Error> {
        self.shared.read().backend()?.mark_bitmap(words, extent)
    }

    /// Opens a device of a group. `on_unmap` is its dma_unmap callback: it is
    /// called, without any lock held, when a range that has pins is unmapped,
    /// and must end the device's writes to what it pinned there, then unpin it.
    /// Without one the device can read and write, and may not pin.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Container::open_device`].
    pub fn open_device(
        &self,
        group: GroupId,
        on_unmap: Option<OnUnmap>,
    ) -> Result<Arc<Device>, Error> {
        Device::open(&self.shared, group, on_unmap)
    }
}

/// A handle to a container that does not keep it open.
#[derive(Clone)]
pub struct WeakContainer {
    shared: Weak<Shared>,
}

impl WeakContainer {
    /// The container, if it is open still.
    #[must_use]
    pub fn upgrade(&self) -> Option<Container> {
        let shared = self.shared.upgrade()?;
        Some(Container { shared })
    }
}

impl fmt::Debug for WeakContainer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakContainer").finish_non_exhaustive()
    }
}

/// A device's dma_unmap callback: the device, first address and bytes.
pub type OnUnmap = Box<dyn Fn(&Device, u64, u64) + Send + Sync>;
