// SPDX-License-Identifier: MIT OR Apache-2.0
//! An open device, which pins, reads, writes and marks.

use std::fmt;
use std::sync::atomic::Ordering;
use std::sync::Arc;

use dirty_core::host::{DeviceId, GroupId, Prot};
use dirty_core::Error;

use super::guard::PinGuard;
use super::host::{Call, Caller};
use super::pinned::OnMark;
use super::pins::DevicePins;
use super::shared::Shared;

/// A device's dma_unmap callback. It gets the device, and the first IOVA and the
/// length in bytes of a mapping whose pages the device must unpin.
///
/// It may call the container and the device, and even unmap. But such an unmap tells no
/// device: it fails with [`Error::StillPinned`] if there are pins in its range.
pub type OnUnmap = Box<dyn Fn(&Device, u64, u64) + Send + Sync>;

/// An open device of a container.
///
/// Any thread may call it. It closes by [`close`](Device::close), or when its last
/// handle is dropped: then its pins go. It keeps its container open.
pub struct Device {
    pins: Arc<DevicePins>,
    on_unmap: Option<OnUnmap>,
    on_mark: Option<Arc<OnMark>>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("id", &self.pins.id)
            .finish_non_exhaustive()
    }
}

impl Device {
    pub(super) fn open(
        shared: &Arc<Shared>,
        group: GroupId,
        on_unmap: Option<OnUnmap>,
        on_mark: Option<OnMark>,
    ) -> Result<Arc<Device>, Error> {
        let id = DeviceId(shared.next_device.fetch_add(1, Ordering::Relaxed));
        let can_unpin = on_unmap.is_some();
        shared.write().open_device(id, group, can_unpin)?;
        let pins = Arc::new(DevicePins::new(shared, id));
        let device = Arc::new(Device {
            pins: Arc::clone(&pins),
            on_unmap,
            on_mark: on_mark.map(Arc::new),
        });
        if can_unpin {
            let weak = Arc::downgrade(&device);
            let notify = move |iova, size| match weak.upgrade() {
                Some(device) => device.dma_unmap(iova, size),
                // Its last handle is being dropped, and it takes its pins along.
                None => pins.wait_closed(),
            };
            shared.callbacks().insert(id.0, Arc::new(notify));
        }
        Ok(device)
    }

    fn shared(&self) -> &Shared {
        &self.pins.shared
    }

    fn dma_unmap(&self, iova: u64, size: u64) {
        if let Some(on_unmap) = &self.on_unmap {
            on_unmap(self, iova, size);
        }
    }

    /// Closes the device: drops its pins, and lets its group be removed. Every later
    /// call but [`mark`](Device::mark) fails with [`Error::UnknownDevice`], also
    /// through other handles, and [`PinGuard`]s reach no memory any more. A second
    /// `close` does nothing.
    ///
    /// It waits for reads and writes that are under way. An unmap waits for it.
    pub fn close(&self) {
        self.pins.close();
    }

    /// Pins every page that the `size` bytes at `iova` touch. `prot` says what the
    /// device will do.
    ///
    /// The guard reaches the bytes, and unpins the pages when it is dropped. Until then
    /// they are dirty in every report.
    ///
    /// # Errors
    ///
    /// In this order. Nothing stays pinned then, but pages that were pinned for a
    /// moment are dirty:
    ///
    /// - [`Error::ZeroSize`], [`Error::Wraps`].
    /// - [`Error::UnknownDevice`] if the device has closed.
    /// - [`Error::NoDmaUnmap`] if the device has no callback.
    /// - [`Error::NotV2`] if the IOMMU type is version 1.
    /// - [`Error::VaddrInvalid`] while the vaddr of a mapping is invalid.
    /// - For the first page that fails: [`Error::Unmapped`]; [`Error::Denied`] if the
    ///   mapping does not allow `prot`; [`Error::PinCount`]; while tracking is on,
    ///   if the mapping had no pins yet, [`Error::BitmapBudget`] or
    ///   [`Error::NoMemory`]; [`Error::Pin`] if the page cannot be faulted in or
    ///   locked; [`Error::Charge`] beyond RLIMIT_MEMLOCK; [`Error::NoMemory`].
    pub fn pin(&self, iova: u64, size: u64, prot: Prot) -> Result<PinGuard, Error> {
        let (key, pages) = self.pins.pin(iova, size, prot)?;
        Ok(PinGuard::new(&self.pins, key, pages, self.on_mark.clone()))
    }

    /// Pins as the kernel's `vfio_pin_pages` does: the page at `iova` and the pages after
    /// it, as many as `pfns` has entries. Pages have the size that the container was
    /// created with, [`Options::page_size`]. Stores their pfns, which are the numbers of
    /// the pages in this process: `pfn * page_size` is an address.
    ///
    /// A pinned page is dirty in every report, up to and including the first one after
    /// it is unpinned. A device with an [`OnMark`] tells it of its writes to these pages
    /// by [`mark`](Device::mark).
    ///
    /// # Errors
    ///
    /// In this order. Nothing stays pinned then, but pages that were pinned for a
    /// moment are dirty:
    ///
    /// - [`Error::UnknownDevice`] if the device has closed.
    /// - [`Error::NoPages`] if `pfns` is empty.
    /// - [`Error::NoDmaUnmap`] if the device has no callback.
    /// - [`Error::TooManyPins`] for more than `page_size / 8` pages: 512 of 4 KiB.
    /// - [`Error::NotV2`], [`Error::Wraps`], [`Error::VaddrInvalid`], and those of the
    ///   first page that fails, as [`pin`](Device::pin).
    ///
    /// [`Options::page_size`]: dirty_core::Options::page_size
    pub fn pin_pages(&self, iova: u64, prot: Prot, pfns: &mut [u64]) -> Result<(), Error> {
        self.pins.pin_pages(iova, prot, pfns)
    }

    /// Unpins as the kernel's `vfio_unpin_pages` does: drops one pin of the page at
    /// `iova` and of each page after it, `npages` in all. It stops at the first page
    /// that is not mapped, and passes over pages that are not pinned.
    ///
    /// Call it after the last write to the pages: it leaves them dirty for one more
    /// report. As in the kernel, nothing checks that this device pinned them: unpin
    /// only what [`pin_pages`](Device::pin_pages) pinned, or the page of a [`PinGuard`]
    /// is no longer dirty in every report.
    pub fn unpin_pages(&self, iova: u64, npages: u64) {
        self.pins.unpin_pages(iova, npages);
    }

    /// Drops every pin that this device has in the `size` bytes of IOVAs from `iova`
    /// on. A dma_unmap callback calls it with its arguments.
    ///
    /// A [`PinGuard`] that has a page there goes as a whole, when the reads and writes
    /// through it have ended.
    pub fn unpin_range(&self, iova: u64, size: u64) {
        if let Some(more) = size.checked_sub(1) {
            self.pins.unpin_range(iova, iova.saturating_add(more));
        }
    }

    /// Returns how many pins this device has. A page that it pinned twice counts twice.
    #[must_use]
    pub fn pinned(&self) -> u64 {
        self.pins.pinned()
    }

    /// Writes `data` at `iova` as the device would, and marks the pages.
    ///
    /// Devices write at the same time. A report and an unmap wait until a write is
    /// marked. So does every call that needs the container for itself: each ioctl, map
    /// and pin. If a page of the guest memory has to come first, from a disk or from a
    /// handler of userfaultfd, they wait for that page too. So the handler must not call
    /// this container. A [`PinGuard`] writes without the container's lock.
    ///
    /// # Errors
    ///
    /// In this order. The bytes before the error are written and marked; the device's
    /// [`OnMark`] gets all of them:
    ///
    /// - [`Error::UnknownDevice`] if the device has closed.
    /// - [`Error::ZeroSize`].
    /// - [`Error::VaddrInvalid`] while the vaddr of a mapping is invalid.
    /// - For the first mapping that fails: [`Error::Unmapped`]; [`Error::Denied`]
    ///   unless it allows READ and WRITE (Linux wants both); [`Error::OtherMm`] if
    ///   another process mapped it, as after a fork; [`Error::BadAddress`].
    /// - The error of the device's [`OnMark`].
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        self.write_by(Caller::Process, iova, data)
    }

    /// Reads as many bytes at `iova` as `data` has, as the device would. The same calls
    /// wait for it as for a [`write`](Device::write).
    ///
    /// # Errors
    ///
    /// As [`write`](Device::write), but a mapping need only allow READ.
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        let mut call = Call::new(&self.shared().state, Caller::Process);
        let id = self.pins.id;
        let read = self
            .shared()
            .read(|core| core.read(&mut call, id, iova, data));
        read.map_err(Error::from)
    }

    /// As [`write`](Device::write), but as a kernel thread that adopts the address
    /// space of the mapping.
    ///
    /// # Errors
    ///
    /// As [`write`](Device::write), but [`Error::MmGone`] in place of
    /// [`Error::OtherMm`].
    pub fn write_as_kernel_thread(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        self.write_by(Caller::KernelThread, iova, data)
    }

    fn write_by(&self, caller: Caller, iova: u64, data: &[u8]) -> Result<(), Error> {
        let mut call = Call::new(&self.shared().state, caller);
        self.shared().read(|core| {
            let written = core.write(&mut call, self.pins.id, iova, data);
            let written = written.map_err(Error::from);
            match written {
                Err(
                    Error::UnknownDevice | Error::NoIommu | Error::ZeroSize | Error::VaddrInvalid,
                ) => written, // nothing was written
                _ => written.and(self.tell(iova, data.len() as u64)),
            }
        })
    }

    /// Marks as dirty every page that the `size` bytes at `iova` touch, which the
    /// device has written by itself, through a mapping of its own. It marks them in the
    /// container, unless tracking is off there, and tells the device's [`OnMark`]. It
    /// may still be called when the device has closed.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is done:
    /// by a completion, by an interrupt, or by saying that the device has stopped.
    /// Any number of marks run at once, and none beside a report. So a copy made
    /// after the report that has the mark also has the write, and a mark that comes
    /// too late for one report is in the next.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::ZeroSize`], [`Error::Wraps`]; nothing is marked then, and nobody told.
    /// - [`Error::NoIommu`] if the container has no group any more.
    /// - [`Error::Unmapped`] if some of the bytes are in no mapping, so that no report
    ///   has them; the others are marked all the same.
    /// - The error of the device's [`OnMark`].
    pub fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        iova.checked_add(more).ok_or(Error::Wraps)?;
        self.shared().read(|core| {
            let marked = core.backend().and_then(|type1| type1.mark(iova, size));
            marked.and(self.tell(iova, size))
        })
    }

    /// Tells the device's own log. Whoever wrote memory of the container has its lock during
    /// this call: an unmap comes when both know.
    pub(crate) fn tell(&self, iova: u64, size: u64) -> Result<(), Error> {
        match &self.on_mark {
            Some(on_mark) => on_mark(iova, size),
            None => Ok(()),
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.pins.close();
    }
}
