// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a device reaches guest memory.

use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

use dirty_core::host::{GroupId, Prot};
use dirty_core::Error;

use super::model::DeviceModel;
use crate::container::{device::Device, guard::PinGuard, Container};
use crate::device_log::DeviceLog;
use crate::error::TrackError;

/// The guest memory of an emulated device, by IOVA.
///
/// Each write is marked in the container and in the device's own log before the call
/// returns. A clone is another handle, and any thread may use it. It outlives its device:
/// every call fails then with [`Error::UnknownDevice`].
#[derive(Clone)]
pub struct Dma {
    device: Arc<Device>,
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dma")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// The model that a device tells of unmaps. It is there as soon as the device has one.
pub(super) type Told = Arc<OnceLock<Weak<dyn DeviceModel>>>;

impl Dma {
    /// Opens a device of `group`. What it writes is marked in `log` too.
    pub(super) fn open(
        container: &Container,
        group: GroupId,
        log: DeviceLog,
        told: Told,
    ) -> Result<Dma, Error> {
        let on_unmap = move |device: &Device, iova, size| {
            if let Some(model) = told.get().and_then(Weak::upgrade) {
                model.unmapped(iova, size);
            }
            device.unpin_range(iova, size);
        };
        let on_mark = move |iova, size| match log.mark(iova, size) {
            Ok(()) | Err(TrackError::Cause(Error::NotTracking)) => Ok(()),
            Err(TrackError::Cause(cause)) => Err(cause),
            Err(_) => Err(Error::Unmapped),
        };
        let device =
            container.open_logged_device(group, Some(Box::new(on_unmap)), Box::new(on_mark))?;
        Ok(Dma { device })
    }

    /// Reads as many bytes at `iova` as `data` has.
    ///
    /// # Errors
    ///
    /// As [`Device::read`](crate::Device::read).
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        self.device.read(iova, data)
    }

    /// Writes `data` at `iova`, and marks it.
    ///
    /// # Errors
    ///
    /// As [`Device::write`](crate::Device::write).
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        self.device.write(iova, data)
    }

    /// Pins every page that the `size` bytes at `iova` touch, until the guard is dropped or
    /// the pages are unmapped. What is written through the guard is marked.
    ///
    /// # Errors
    ///
    /// As [`Device::pin`](crate::Device::pin).
    pub fn pin(&self, iova: u64, size: u64, prot: Prot) -> Result<PinGuard, Error> {
        self.device.pin(iova, size, prot)
    }

    /// Marks what the device has written by other means.
    ///
    /// # Errors
    ///
    /// As [`Device::mark`](crate::Device::mark).
    pub fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
        self.device.mark(iova, size)
    }

    /// Returns how many pages are pinned. A page that was pinned twice counts twice.
    #[must_use]
    pub fn pinned(&self) -> u64 {
        self.device.pinned()
    }

    pub(super) fn unpin_all(&self) {
        self.device.unpin_range(0, u64::MAX);
    }

    pub(super) fn close(&self) {
        self.device.close();
    }
}
