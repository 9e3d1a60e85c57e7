// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file of an emulated device.

mod ioctl; // the ioctls of the file

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_core::host::GroupId;
use dirty_core::migration::v1::Region;
use dirty_core::migration::{Features, Migration, State};
use dirty_core::{Errno, Error};

use crate::container::Container;
use crate::device_log::{DeviceLog, Holes, LogOptions};
use crate::emulated::bus::Bus;
use crate::emulated::data::DataFile;
use crate::emulated::dma::{Dma, Told};
use crate::emulated::irqs::{IrqData, Irqs, Span};
use crate::emulated::model::DeviceModel;
use crate::emulated::transfer::Migrating;
use crate::emulated::uapi::*;

#[cfg(feature = "vfio-user")]
pub(crate) use self::ioctl::{irq_flags, region_flags, DEVICE_FLAGS};

/// Which version of migration a device offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MigrationVersion {
    /// The device does not migrate.
    #[default]
    None,
    /// Today's, with the features MIGRATION and MIG_DEVICE_STATE.
    V2(Features),
    /// The first one, by a region of the device. QEMU up to 7.2 uses it.
    V1,
}

/// What a device offers to the program, besides what its model does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// How the device migrates.
    pub migration: MigrationVersion,
    /// Whether the device has a log of its own (the features DMA_LOGGING). A program that
    /// finds one asks it which pages are dirty, and not the container.
    pub own_log: bool,
}

/// Where a program puts the data files of a device's migration.
pub trait DataDescriptors {
    /// Gives a data file a descriptor, which exec closes.
    ///
    /// # Errors
    ///
    /// Any, as EMFILE. The file is closed then, and the state has changed nevertheless.
    fn install_data(&self, file: DataFile) -> Result<i32, Errno>;

    /// Closes a descriptor that nobody has learned of.
    fn remove(&self, fd: i32);
}

/// The IOVAs that a device's log takes marks for: 52 bits, as an x86 IOMMU has at most.
const LOGGED: u64 = 1 << 52;
/// The index of the region for version 1, where its data section begins, and the bytes of
/// that.
const V1_INDEX: u32 = VFIO_PCI_NUM_REGIONS;
const V1_DATA: u64 = 0x1000;
const V1_SIZE: u64 = 0x1_0000;
/// A region's bytes are at its index times this, in the device's file.
pub(crate) const REGION_SHIFT: u32 = 40;

/// An open device. It closes by [`close`](DeviceFile::close), or when its last handle goes.
///
/// Any thread may call it. Changes of the migration state and resets come one at a time.
pub struct DeviceFile {
    name: String,
    model: Arc<dyn DeviceModel>,
    dma: Dma,
    irqs: Irqs,
    log: DeviceLog,
    settings: Settings,
    /// Locked before the machine.
    migrating: Mutex<Migrating>,
    machine: Arc<Mutex<Migration>>,
    /// Of version 1. Locked after `migrating`.
    v1: Option<Mutex<Region>>,
    /// The file of the device's group, which the device keeps open.
    _group: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for DeviceFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceFile")
            .field("name", &self.name)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

/// What it takes to open a device.
pub(crate) struct Opening<'a> {
    pub(crate) container: &'a Container,
    pub(crate) id: GroupId,
    pub(crate) name: &'a str,
    pub(crate) settings: Settings,
    pub(crate) make: &'a dyn Fn(Dma, Irqs) -> Arc<dyn DeviceModel>,
    pub(crate) group: Arc<dyn Any + Send + Sync>,
    /// What stands between the device and the container. If there is one, it adds to the
    /// device's log what is mapped, and a device does DMA only as a bus master.
    pub(crate) bus: Option<Arc<dyn Bus>>,
}

impl DeviceFile {
    pub(crate) fn open(opening: Opening<'_>) -> Result<DeviceFile, Errno> {
        let log = DeviceLog::with_options(LogOptions {
            holes: Holes::Clean,
            ..LogOptions::default()
        });
        if opening.bus.is_none() {
            let all = log.add_range(0, LOGGED);
            all.map_err(|error| error.errno())?; // unreachable: the log is new and off
        }
        let told = Told::default();
        let dma = Dma::open(
            opening.container,
            opening.id,
            log.clone(),
            Arc::clone(&told),
            opening.bus,
        );
        let dma = dma.map_err(Error::errno)?;
        let irqs = Irqs::default();
        let model = (opening.make)(dma.clone(), irqs.clone());
        let _ = told.set(Arc::downgrade(&model)); // unreachable error: it is set here only
        let features = match opening.settings.migration {
            MigrationVersion::V2(features) => features,
            MigrationVersion::None | MigrationVersion::V1 => Features::default(),
        };
        let v1 = match opening.settings.migration {
            MigrationVersion::V1 => Region::new(V1_DATA, V1_SIZE).map(Mutex::new),
            _ => None,
        };
        let machine = Arc::new(Mutex::new(Migration::new(features)));
        let migrating = Migrating::new(Arc::clone(&model), dma.clone(), Arc::clone(&machine));
        migrating.follow_bus_master(true);
        Ok(DeviceFile {
            name: opening.name.to_owned(),
            model,
            dma,
            irqs,
            log,
            settings: opening.settings,
            migrating: Mutex::new(migrating),
            machine,
            v1,
            _group: opening.group,
        })
    }

    fn migrating(&self) -> MutexGuard<'_, Migrating> {
        self.migrating
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn machine(&self) -> MutexGuard<'_, Migration> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn v1(&self) -> Option<MutexGuard<'_, Region>> {
        let region = self.v1.as_ref()?.lock();
        Some(region.unwrap_or_else(PoisonError::into_inner))
    }

    /// Returns the device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the device's log, which is on between DMA_LOGGING_START and STOP.
    #[must_use]
    pub fn log(&self) -> &DeviceLog {
        &self.log
    }

    /// Returns how many pages the device has pinned.
    #[must_use]
    pub fn pinned(&self) -> u64 {
        self.dma.pinned()
    }

    /// Returns the migration state.
    #[must_use]
    pub fn state(&self) -> State {
        match self.v1() {
            Some(region) => region.state(),
            None => self.machine().state(),
        }
    }

    /// Takes the device to the migration state with the number `to`, as
    /// VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE does. The file is that of a transfer that
    /// begins.
    ///
    /// # Errors
    ///
    /// ENOTTY if the device does not offer version 2; then as
    /// [`Migration::set_state`](dirty_core::migration::Migration::set_state).
    pub fn set_state(&self, to: u32) -> Result<Option<DataFile>, Errno> {
        if self.offers().migration.is_none() {
            return Err(Errno::ENOTTY);
        }
        let mut migrating = self.migrating();
        let changed = self.machine().set_state(&mut *migrating, to);
        changed.map_err(Error::errno)
    }

    /// Resets the device: ends its DMA, drops its pins, and ends a transfer. Its log stays
    /// on, because a guest may reset the device in the middle of a migration. The migration
    /// state is RUNNING.
    pub fn reset(&self) {
        let mut migrating = self.migrating();
        self.model.quiesce();
        migrating.end();
        self.dma.unpin_all();
        self.model.reset();
        migrating.follow_bus_master(false);
        self.machine().reset();
        if let Some(mut region) = self.v1() {
            region.reset();
        }
        self.model.resume();
    }

    /// Closes the device: ends its DMA and a transfer, drops its pins, and lets its group
    /// leave the container. The model's [`Dma`] fails from now on. A second `close` does
    /// nothing.
    pub fn close(&self) {
        let mut migrating = self.migrating();
        self.model.quiesce();
        migrating.end();
        self.machine().close();
        if let Some(mut region) = self.v1() {
            region.reset();
        }
        self.log.stop();
        self.irqs.disable_all();
        self.dma.close();
    }

    // ---- what the device has

    /// Returns how many regions there are: those of PCI, and the one for version 1 of migration.
    #[must_use]
    pub fn regions(&self) -> u32 {
        VFIO_PCI_NUM_REGIONS + u32::from(self.v1.is_some())
    }

    /// Returns the size of a region in bytes, 0 if the device does not have it.
    ///
    /// # Errors
    ///
    /// EINVAL for an index from [`regions`](DeviceFile::regions) on.
    pub fn region_size(&self, index: u32) -> Result<u64, Errno> {
        match index {
            0..VFIO_PCI_NUM_REGIONS => Ok(self.model.region_size(index)),
            V1_INDEX => Ok(self.v1().ok_or(Errno::EINVAL)?.size()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Returns how many interrupts an index has.
    ///
    /// # Errors
    ///
    /// EINVAL for an index from 5 on.
    pub fn irq_count(&self, index: u32) -> Result<u32, Errno> {
        match index {
            VFIO_PCI_MSI_IRQ_INDEX | VFIO_PCI_MSIX_IRQ_INDEX => Ok(self.model.irq_count(index)),
            0..VFIO_PCI_NUM_IRQS => Ok(0),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Answers VFIO_DEVICE_SET_IRQS for the `count` interrupts of an index from `start` on:
    /// raises them, sets what signals them, or disables the index. `action` is one of
    /// `VFIO_IRQ_SET_ACTION_*`.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - EINVAL for interrupts that the device does not have, and for data that are not for
    ///   `count` interrupts.
    /// - ENOTTY unless the action is TRIGGER.
    /// - EINVAL to raise interrupts of an index that has none enabled, and for a descriptor
    ///   that is no eventfd.
    pub fn set_irqs(
        &self,
        action: u32,
        index: u32,
        start: u32,
        count: u32,
        data: IrqData<'_>,
    ) -> Result<(), Errno> {
        let span = Span {
            index,
            start,
            count,
        };
        self.irqs.set_to(action, span, data, self.irq_count(index)?)
    }

    // ---- regions

    fn region(&self, offset: u64, len: usize) -> Result<(u32, u64, usize), Errno> {
        let region = u32::try_from(offset >> REGION_SHIFT).map_err(|_| Errno::EINVAL)?;
        if region >= VFIO_PCI_NUM_REGIONS {
            return Err(Errno::EINVAL);
        }
        let at = offset & ((1 << REGION_SHIFT) - 1);
        let left = self.model.region_size(region).checked_sub(at);
        let left = left.filter(|left| *left != 0).ok_or(Errno::EINVAL)?;
        let len = usize::try_from(left).map_or(len, |left| left.min(len));
        Ok((region, at, len))
    }

    /// Reads at `offset` of the device's file, as pread(2), and returns how many bytes: no
    /// more than the region has left.
    ///
    /// # Errors
    ///
    /// EINVAL if no region is there. The region of version 1 takes whole registers, and
    /// fails as [`Region`] says.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
        if let Some(at) = v1_offset(offset) {
            let mut migrating = self.migrating();
            let mut region = self.v1().ok_or(Errno::EINVAL)?;
            let done = region.read(&mut *migrating, at, data);
            return done.map(|()| data.len()).map_err(Error::errno);
        }
        let (region, at, len) = self.region(offset, data.len())?;
        self.model.read(region, at, &mut data[..len]);
        Ok(len)
    }

    /// Writes at `offset` of the device's file, as pwrite(2), and returns how many bytes: no
    /// more than the region has left.
    ///
    /// # Errors
    ///
    /// EINVAL if no region is there. The region of version 1 takes whole registers, and
    /// fails as [`Region`] says.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        if let Some(at) = v1_offset(offset) {
            let mut migrating = self.migrating();
            let mut region = self.v1().ok_or(Errno::EINVAL)?;
            let done = region.write(&mut *migrating, at, data);
            return done.map(|()| data.len()).map_err(Error::errno);
        }
        let (region, at, len) = self.region(offset, data.len())?;
        if region != VFIO_PCI_CONFIG_REGION_INDEX {
            self.model.write(region, at, &data[..len]);
            return Ok(len);
        }
        // The migration state stays as it is until the device has followed its command register.
        let migrating = self.migrating();
        self.model.write(region, at, &data[..len]);
        migrating.follow_bus_master(self.machine().state().may_write_memory());
        Ok(len)
    }
}

/// Where `offset` of the device's file is in the region for version 1, if it is there.
fn v1_offset(offset: u64) -> Option<u64> {
    let start = u64::from(V1_INDEX) << REGION_SHIFT;
    let at = offset.checked_sub(start)?;
    (at < 1 << REGION_SHIFT).then_some(at)
}

impl Drop for DeviceFile {
    fn drop(&mut self) {
        self.close();
    }
}
