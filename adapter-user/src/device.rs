// SPDX-License-Identifier: MIT OR Apache-2.0
//! An open device: what it pins, reads and writes.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_core::host::{DeviceId, GroupId, Prot};
use dirty_core::Error;

use crate::container::{OnUnmap, Shared};
use crate::host::{Call, Caller};
use crate::locked::PAGE_SHIFT;

/// An open device of a container; it closes, and its pins go, when it is
/// dropped.
pub struct Device {
    shared: Arc<Shared>,
    id: DeviceId,
    on_unmap: Option<OnUnmap>,
    /// What it has pinned: iova and how often.
    pins: Mutex<BTreeMap<u64, u32>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Device {
    pub(crate) fn open(
        shared: &Arc<Shared>,
        group: GroupId,
        on_unmap: Option<OnUnmap>,
    ) -> Result<Arc<Device>, Error> {
        let id = DeviceId(shared.next_device.fetch_add(1, Ordering::Relaxed));
        shared.write().open_device(id, group, on_unmap.is_some())?;
        let device = Arc::new(Device {
            shared: Arc::clone(shared),
            id,
            on_unmap,
            pins: Mutex::default(),
        });
        shared.devices().insert(id.0, Arc::downgrade(&device));
        Ok(device)
    }

    fn pins(&self) -> MutexGuard<'_, BTreeMap<u64, u32>> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn dma_unmap(&self, iova: u64, size: u64) {
        if let Some(on_unmap) = &self.on_unmap {
            on_unmap(self, iova, size);
        }
    }

    /// Pins the page at `iova` and those that follow, as many as `pfns` holds.
    /// A pinned page is dirty in every report, until it is unpinned and has
    /// been reported once more.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Container::pin_pages`]; nothing stays pinned then.
    pub fn pin(&self, iova: u64, prot: Prot, pfns: &mut [u64]) -> Result<(), Error> {
        let mut call = Call::new(&self.shared.state, Caller::Process);
        let mut pins = self.pins();
        let mut core = self.shared.write();
        core.pin_pages(&mut call, self.id, iova, prot, pfns)?;
        for page in 0..pfns.len() as u64 {
            *pins.entry(iova + (page << PAGE_SHIFT)).or_insert(0) += 1;
        }
        Ok(())
    }

    /// Unpins pages; stops at the first that is not mapped. As in the kernel
    /// nothing checks that this device pinned them. Call it after the last
    /// write to them: it marks them once more.
    pub fn unpin(&self, iova: u64, npages: u64) {
        if npages == 0 {
            return;
        }
        let mut call = Call::new(&self.shared.state, Caller::Process);
        let mut pins = self.pins();
        let last = iova.saturating_add(npages.saturating_mul(1 << PAGE_SHIFT).saturating_sub(1));
        let aligned = |at: &u64| (at - iova) % (1 << PAGE_SHIFT) == 0;
        let range = pins.range(iova..=last).map(|(at, _)| *at);
        let hits: Vec<u64> = range.filter(aligned).collect();
        for at in hits {
            if let Some(count) = pins.get_mut(&at) {
                *count -= 1;
                if *count == 0 {
                    pins.remove(&at);
                }
            }
        }
        let mut core = self.shared.write();
        // The device is open, so there is nothing to fail.
        let _ = core.unpin_pages(&mut call, self.id, iova, npages);
    }

    /// Unpins all that this device has pinned in a range: what a dma_unmap
    /// callback is for.
    pub fn unpin_range(&self, iova: u64, size: u64) {
        let last = iova.saturating_add(size.wrapping_sub(1));
        let mut call = Call::new(&self.shared.state, Caller::Process);
        let mut pins = self.pins();
        let inside: Vec<(u64, u32)> = pins.range(iova..=last).map(|(i, n)| (*i, *n)).collect();
        let mut core = self.shared.write();
        for (iova, count) in inside {
            for _ in 0..count {
                let _ = core.unpin_pages(&mut call, self.id, iova, 1);
            }
            pins.remove(&iova);
        }
    }

    /// Pages that this device has pinned, counting each pin.
    #[must_use]
    pub fn pinned(&self) -> u64 {
        self.pins().values().map(|n| u64::from(*n)).sum()
    }

    /// Writes memory as the device would, and marks it. Devices write at the
    /// same time; a report waits for a write until it is marked, and so does an
    /// unmap.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Container::write`]; what was written stays.
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        let mut call = Call::new(&self.shared.state, Caller::Process);
        self.shared.read().write(&mut call, self.id, iova, data)
    }

    /// Reads memory as the device would.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Container::read`].
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        let mut call = Call::new(&self.shared.state, Caller::Process);
        self.shared.read().read(&mut call, self.id, iova, data)
    }

    /// Writes memory as a kernel thread that adopts the owner's memory.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Container::write`].
    pub fn write_as_kernel_thread(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        let mut call = Call::new(&self.shared.state, Caller::KernelThread);
        self.shared.read().write(&mut call, self.id, iova, data)
    }

    /// Marks `size` bytes from `iova` on that the device has written by itself,
    /// through a mapping of its own.
    ///
    /// Call it *after* the write, and before telling anybody that the write is
    /// done (a completion, an interrupt, a device that is stopped). A report
    /// takes the container's lock alone, a mark shares it: so whoever copies
    /// pages after the report that has the mark copies the write too, and a
    /// mark that comes too late for one report is in the next.
    ///
    /// # Errors
    ///
    /// See [`dirty_core::Type1::mark`]: after `Unmapped` no report tells of
    /// the part that is in no mapping.
    pub fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
        self.shared.read().backend()?.mark(iova, size)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.unpin_range(0, u64::MAX);
        self.shared.devices().remove(&self.id.0);
        self.shared.write().close_device(self.id);
    }
}
