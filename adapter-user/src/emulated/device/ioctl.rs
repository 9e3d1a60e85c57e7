// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ioctls of a device's file.

use dirty_core::migration::v1::{
    VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED, VFIO_REGION_TYPE_MIGRATION_DEPRECATED,
};
use dirty_core::migration::{DeviceFeature, MigrationCall, Offers};
use dirty_core::{Errno, Error};

use super::{DataDescriptors, DeviceFile, MigrationVersion, REGION_SHIFT, V1_INDEX};
use crate::device_log::uapi::VFIO_DEVICE_FEATURE;
use crate::emulated::data::DataFile;
use crate::emulated::uapi::*;
use crate::emulated::user::{get_words, offset, put};
use crate::process_memory::{read_process, write_process};

impl DeviceFile {
    /// Answers an ioctl of the device's file. `nr` is its number, and `arg` the address of
    /// its structure in this process.
    ///
    /// # Errors
    ///
    /// ENOTTY for an ioctl that the device does not have, and for a VFIO_DEVICE_SET_IRQS that
    /// masks. EFAULT for a bad address, EINVAL for an argsz that is too small and for an index
    /// or an interrupt that the device does not have. VFIO_DEVICE_FEATURE checks its argument as
    /// [`DeviceFeature::read`] says; then as the call of the same name, and as
    /// [`DeviceLog::ioctl`].
    ///
    /// [`DeviceLog::ioctl`]: crate::device_log::DeviceLog::ioctl
    ///
    /// # Safety
    ///
    /// It reads and writes memory of this process as the system call would: what the structure
    /// says is written, and nobody else may use it meanwhile. See [`DeviceLog::ioctl`].
    pub unsafe fn ioctl(
        &self,
        nr: u32,
        arg: u64,
        descriptors: &dyn DataDescriptors,
    ) -> Result<i32, Errno> {
        match nr {
            VFIO_DEVICE_GET_INFO => self.get_info(arg)?,
            VFIO_DEVICE_GET_REGION_INFO => self.get_region_info(arg)?,
            VFIO_DEVICE_GET_IRQ_INFO => {
                let [_argsz, _flags, index, _count] = get_words(arg)?;
                let count = self.irq_count(index)?;
                put_words(offset(arg, 4)?, &[irq_flags(count), index, count])?;
            }
            VFIO_DEVICE_SET_IRQS => self
                .irqs
                .set(arg, |index| self.irq_count(index).unwrap_or(0))?,
            VFIO_DEVICE_RESET => self.reset(),
            VFIO_DEVICE_FEATURE => self.feature(arg, descriptors)?,
            _ => return Err(Errno::ENOTTY),
        }
        Ok(0)
    }

    fn get_info(&self, arg: u64) -> Result<(), Errno> {
        let [argsz, _flags, _regions, _irqs] = get_words(arg)?;
        let answer = [DEVICE_FLAGS, self.regions(), VFIO_PCI_NUM_IRQS, 0, 0];
        let room = match argsz as usize >= size_of::<vfio_device_info>() {
            true => &answer[..],
            false => &answer[..3], // a program that knows no capabilities
        };
        put_words(offset(arg, 4)?, room)
    }

    fn get_region_info(&self, arg: u64) -> Result<(), Errno> {
        let [argsz, _flags, index, _cap_offset, _, _, _, _] = get_words(arg)?;
        let size = self.region_size(index)?;
        let mut flags = region_flags(size);
        const HEAD: u32 = size_of::<vfio_region_info>() as u32;
        const ALL: u32 = HEAD + size_of::<vfio_region_info_cap_type>() as u32;
        let (mut argsz, mut cap_offset) = (argsz, 0);
        if index == V1_INDEX {
            flags |= VFIO_REGION_INFO_FLAG_CAPS;
            match argsz >= ALL {
                true => cap_offset = HEAD,
                false => argsz = ALL, // the program asks again
            }
        }
        let (size, offset) = (size.to_ne_bytes(), u64::from(index) << REGION_SHIFT);
        let mut answer = bytes_of(&[argsz, flags, index, cap_offset]);
        answer.extend(size.into_iter().chain(offset.to_ne_bytes()));
        if cap_offset != 0 {
            let (id, version) = (VFIO_REGION_INFO_CAP_TYPE.to_ne_bytes(), 1u16.to_ne_bytes());
            let (kind, subtype) = (
                VFIO_REGION_TYPE_MIGRATION_DEPRECATED,
                VFIO_REGION_SUBTYPE_MIGRATION_DEPRECATED,
            );
            answer.extend(id.into_iter().chain(version));
            answer.extend(bytes_of(&[0, kind, subtype])); // no capability follows
        }
        put(arg, &answer)
    }

    /// Returns what the device offers of VFIO_DEVICE_FEATURE.
    pub(crate) fn offers(&self) -> Offers {
        Offers {
            migration: match self.settings.migration {
                MigrationVersion::V2(features) => Some(features),
                MigrationVersion::None | MigrationVersion::V1 => None,
            },
            logging: self.settings.own_log,
        }
    }

    fn feature(&self, arg: u64, descriptors: &dyn DataDescriptors) -> Result<(), Errno> {
        let call = DeviceFeature::read(self.offers(), arg, read_process).map_err(Error::errno)?;
        match call {
            DeviceFeature::Probe => Ok(()),
            DeviceFeature::Logging(call) => self.log.logging(call).map_err(|error| error.errno()),
            DeviceFeature::Migration(call) => self.migration(call, descriptors),
        }
    }

    fn migration(
        &self,
        call: MigrationCall,
        descriptors: &dyn DataDescriptors,
    ) -> Result<(), Errno> {
        let mut installed = None;
        let install = |file: &DataFile| {
            let fd = descriptors.install_data(file.clone());
            installed = Some(fd);
            fd.unwrap_or(-1)
        };
        let mut migrating = self.migrating();
        let mut machine = self.machine();
        let done = machine.run(&mut *migrating, call, install, write_process);
        match (done, installed) {
            (Ok(_), None | Some(Ok(_))) => Ok(()),
            (Ok(_), Some(Err(errno))) => Err(errno),
            (Err(error), installed) => {
                if let Some(Ok(fd)) = installed {
                    descriptors.remove(fd);
                }
                Err(error.errno())
            }
        }
    }
}

/// The flags of every device.
pub(crate) const DEVICE_FLAGS: u32 = VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI;

/// The flags of a region of `size` bytes.
pub(crate) fn region_flags(size: u64) -> u32 {
    match size {
        0 => 0,
        _ => VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
    }
}

/// The flags of a kind of interrupts, of which there are `count`.
pub(crate) fn irq_flags(count: u32) -> u32 {
    match count {
        0 => VFIO_IRQ_INFO_EVENTFD,
        _ => VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE,
    }
}

fn put_words(addr: u64, words: &[u32]) -> Result<(), Errno> {
    put(addr, &bytes_of(words))
}

fn bytes_of(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}
