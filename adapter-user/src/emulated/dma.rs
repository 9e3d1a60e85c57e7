// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a device reaches guest memory.

use std::fmt;
use std::sync::{Arc, OnceLock, Weak};

use dirty_core::host::{GroupId, Prot};
use dirty_core::{Errno, Error};

use super::bus::Bus;
use super::model::DeviceModel;
use super::uapi::VFIO_PCI_CONFIG_REGION_INDEX;
use crate::container::{device::Device, guard::PinGuard, Container};
use crate::device_log::DeviceLog;
use crate::error::TrackError;

/// The guest memory of an emulated device, by IOVA.
///
/// Each write is marked in the container and in the device's own log before the call
/// returns. A clone is another handle, and any thread may use it. It outlives its device:
/// every call fails then with [`Error::UnknownDevice`].
///
/// The device of a vfio-user server may only do DMA while the bus-master bit
/// of its command register is set. Otherwise every call but [`mark`](Dma::mark) fails with
/// [`Error::Denied`], and when the bit is cleared, the device's pins go.
#[derive(Clone)]
pub struct Dma {
    device: Arc<Device>,
    bus: Option<Arc<dyn Bus>>,
}

impl fmt::Debug for Dma {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dma")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// Where the command register is in the configuration space, and its bit for DMA.
const PCI_COMMAND: u64 = 4;
const PCI_COMMAND_MASTER: u16 = 4;

/// The model that a device tells of unmaps. It is there as soon as the device has one.
pub(super) type Told = Arc<OnceLock<Weak<dyn DeviceModel>>>;

impl Dma {
    /// Opens a device of `group`. What it writes is marked in `log` too.
    pub(super) fn open(
        container: &Container,
        group: GroupId,
        log: DeviceLog,
        told: Told,
        bus: Option<Arc<dyn Bus>>,
    ) -> Result<Dma, Error> {
        let on_unmap = move |device: &Device, iova, size| {
            if let Some(model) = told.get().and_then(Weak::upgrade) {
                model.unmapped(iova, size);
            }
            device.unpin_range(iova, size);
        };
        let told_bus = bus.clone();
        let on_mark = move |iova, size| {
            let marked = log.mark(iova, size);
            if let Some(bus) = &told_bus {
                bus.wrote(iova, size);
            }
            match marked {
                Ok(()) | Err(TrackError::Cause(Error::NotTracking)) => Ok(()),
                Err(TrackError::Cause(cause)) => Err(cause),
                Err(_) => Err(Error::Unmapped),
            }
        };
        let device =
            container.open_logged_device(group, Some(Box::new(on_unmap)), Box::new(on_mark))?;
        Ok(Dma { device, bus })
    }

    /// Reads as many bytes at `iova` as `data` has.
    ///
    /// # Errors
    ///
    /// As [`Device::read`](crate::Device::read).
    pub fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        match &self.bus {
            Some(bus) => bus.read(&self.device, iova, data),
            None => self.device.read(iova, data),
        }
    }

    /// Writes `data` at `iova`, and marks it.
    ///
    /// # Errors
    ///
    /// As [`Device::write`](crate::Device::write).
    pub fn write(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        match &self.bus {
            Some(bus) => bus.write(&self.device, iova, data),
            None => self.device.write(iova, data),
        }
    }

    /// Pins every page that the `size` bytes at `iova` touch, until the guard is dropped or
    /// the pages are unmapped. What is written through the guard is marked.
    ///
    /// # Errors
    ///
    /// As [`Device::pin`](crate::Device::pin).
    pub fn pin(&self, iova: u64, size: u64, prot: Prot) -> Result<PinGuard, Error> {
        match &self.bus {
            Some(bus) => bus.pin(&self.device, iova, size, prot),
            None => self.device.pin(iova, size, prot),
        }
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

    /// Lets the device do DMA if its command register allows bus mastering, and else no longer:
    /// its writes have ended then, and its pins are gone. `running` says whether the device is
    /// in a migration state in which it may write memory.
    pub(super) fn follow_bus_master(&self, model: &dyn DeviceModel, running: bool) {
        let Some(bus) = &self.bus else { return };
        let mut command = [0; 2];
        model.read(VFIO_PCI_CONFIG_REGION_INDEX, PCI_COMMAND, &mut command);
        let on = u16::from_le_bytes(command) & PCI_COMMAND_MASTER != 0;
        if on == bus.is_master() {
            return;
        }
        if on {
            return bus.set_master(true);
        }
        if running {
            model.quiesce();
        }
        bus.set_master(false);
        self.unpin_all();
        if running {
            model.resume();
        }
    }

    /// What a device's state has besides that of its model.
    pub(super) fn save(&self) -> Result<Option<Vec<u8>>, Errno> {
        match &self.bus {
            Some(bus) => bus.save(&self.device),
            None => Ok(None),
        }
    }

    /// Loads what [`save`](Self::save) returned.
    pub(super) fn load(&self, bytes: &[u8]) -> Result<(), Errno> {
        match &self.bus {
            Some(bus) => bus.load(&self.device, bytes),
            None => Err(Errno::EINVAL),
        }
    }

    pub(super) fn unpin_all(&self) {
        self.device.unpin_range(0, u64::MAX);
    }

    pub(super) fn close(&self) {
        self.device.close();
    }
}
