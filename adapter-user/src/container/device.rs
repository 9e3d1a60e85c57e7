// SPDX-License-Identifier: MIT OR Apache-2.0
//! An open device, which pins, reads, writes and marks.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_core::host::{DeviceId, GroupId, Prot};
use dirty_core::Error;

use super::host::{Call, Caller};
use super::locked::PAGE_SHIFT;
use super::shared::Shared;

/// A device's dma_unmap callback. It gets the device, and the first IOVA and the
/// length in bytes of a mapping whose pages the device must unpin.
pub type OnUnmap = Box<dyn Fn(&Device, u64, u64) + Send + Sync>;

/// An open device of a container.
///
/// Any thread may call it. When its last handle is dropped, it unpins what it has
/// pinned and closes. It keeps its container open.
pub struct Device {
    shared: Arc<Shared>,
    id: DeviceId,
    on_unmap: Option<OnUnmap>,
    /// What it has pinned: how often, by IOVA.
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
    pub(super) fn open(
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
        let weak = Arc::downgrade(&device);
        let notify = move |iova, size| {
            if let Some(device) = weak.upgrade() {
                device.dma_unmap(iova, size);
            }
        };
        shared.callbacks().insert(id.0, Arc::new(notify));
        Ok(device)
    }

    fn pins(&self) -> MutexGuard<'_, BTreeMap<u64, u32>> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dma_unmap(&self, iova: u64, size: u64) {
        if let Some(on_unmap) = &self.on_unmap {
            on_unmap(self, iova, size);
        }
    }

    /// Pins the page of 4 KiB at `iova` and the pages after it, as many as `pfns` has
    /// entries, and stores their pfns. `prot` says what the device will do.
    ///
    /// A pinned page is dirty in every report, up to and including the first one after
    /// it is unpinned.
    ///
    /// # Errors
    ///
    /// In this order. Nothing stays pinned then, but pages that were pinned for a
    /// moment are dirty:
    ///
    /// - [`Error::NoPages`] if `pfns` is empty.
    /// - [`Error::NoDmaUnmap`] if the device has no callback.
    /// - [`Error::TooManyPins`] for more than 512 pages.
    /// - [`Error::NotV2`] if the IOMMU type is version 1.
    /// - [`Error::Wraps`].
    /// - [`Error::VaddrInvalid`] while the vaddr of a mapping is invalid.
    /// - For the first page that fails: [`Error::Unmapped`]; [`Error::Denied`] if the
    ///   mapping does not allow `prot`; [`Error::PinCount`]; [`Error::Pin`] if the
    ///   page cannot be faulted in or locked; [`Error::Charge`] beyond
    ///   RLIMIT_MEMLOCK; [`Error::NoMemory`].
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

    /// Drops one pin of the page at `iova` and of each page after it, `npages` in all.
    /// It stops at the first page that is not mapped, and passes over pages that are
    /// not pinned.
    ///
    /// Call it after the last write to the pages: it leaves them dirty for one more
    /// report. As in the kernel, nothing checks that this device pinned them.
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
        // This cannot fail: the device is open.
        let _ = core.unpin_pages(&mut call, self.id, iova, npages);
    }

    /// Drops every pin that this device has in the `size` bytes of IOVAs from `iova`
    /// on. A dma_unmap callback calls it with its arguments.
    pub fn unpin_range(&self, iova: u64, size: u64) {
        let Some(more) = size.checked_sub(1) else {
            return;
        };
        let last = iova.saturating_add(more);
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

    /// Returns how many pins this device has. A page that it pinned twice counts twice.
    #[must_use]
    pub fn pinned(&self) -> u64 {
        self.pins().values().map(|n| u64::from(*n)).sum()
    }

    /// Writes `data` at `iova` as the device would, and marks the pages.
    ///
    /// Devices write at the same time. A report and an unmap wait until a write is
    /// marked.
    ///
    /// # Errors
    ///
    /// In this order. The bytes before the error are written and marked:
    ///
    /// - [`Error::ZeroSize`].
    /// - [`Error::VaddrInvalid`] while the vaddr of a mapping is invalid.
    /// - For the first mapping that fails: [`Error::Unmapped`]; [`Error::Denied`]
    ///   unless it allows READ and WRITE (Linux wants both); [`Error::OtherMm`] if
    ///   another process mapped it, as after a fork; [`Error::BadAddress`].
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        let mut call = Call::new(&self.shared.state, Caller::Process);
        self.shared.read().write(&mut call, self.id, iova, data)
    }

    /// Reads as many bytes at `iova` as `data` has, as the device would.
    ///
    /// # Errors
    ///
    /// As [`write`](Device::write), but a mapping need only allow READ.
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        let mut call = Call::new(&self.shared.state, Caller::Process);
        self.shared.read().read(&mut call, self.id, iova, data)
    }

    /// As [`write`](Device::write), but as a kernel thread that adopts the address
    /// space of the mapping.
    ///
    /// # Errors
    ///
    /// As [`write`](Device::write), but [`Error::MmGone`] in place of
    /// [`Error::OtherMm`].
    pub fn write_as_kernel_thread(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        let mut call = Call::new(&self.shared.state, Caller::KernelThread);
        self.shared.read().write(&mut call, self.id, iova, data)
    }

    /// Marks as dirty every page that the `size` bytes at `iova` touch, which the
    /// device has written by itself, through a mapping of its own. It does nothing
    /// while tracking is off.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is done:
    /// by a completion, by an interrupt, or by saying that the device has stopped.
    /// Marks share the container's lock, and a report has it alone. So a copy made
    /// after the report that has the mark also has the write, and a mark that comes
    /// too late for one report is in the next.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::ZeroSize`], [`Error::Wraps`]; nothing is marked then.
    /// - [`Error::Unmapped`] if some of the bytes are in no mapping, so that no report
    ///   has them; the others are marked all the same.
    pub fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
        self.shared.read().backend()?.mark(iova, size)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.unpin_range(0, u64::MAX);
        self.shared.callbacks().remove(&self.id.0);
        self.shared.write().close_device(self.id);
    }
}
