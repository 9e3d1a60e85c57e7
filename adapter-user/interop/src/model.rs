// SPDX-License-Identifier: MIT OR Apache-2.0
//! The callbacks of a test as a device model.

use std::ffi::{c_int, c_void};
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapter_user::emulated::{DeviceModel, Dma};

pub(crate) type Transition = extern "C" fn(*mut c_void, c_int) -> c_int;
pub(crate) type Data = extern "C" fn(*mut c_void, *mut c_void, u64) -> isize;

/// A device's callbacks for migration.
#[derive(Clone, Copy)]
pub(crate) struct MigrationCallbacks {
    pub(crate) transition: Transition,
    pub(crate) read: Data,
    pub(crate) write: Data,
}

/// What a test has set up.
#[derive(Default)]
pub(crate) struct Setup {
    /// The address by which the test knows the device.
    pub(crate) context: usize,
    pub(crate) regions: [u64; 9],
    pub(crate) irqs: [u32; 5],
    pub(crate) migration: Option<MigrationCallbacks>,
    pub(crate) dma: Option<Dma>,
}

/// A handle to what a test has set up.
#[derive(Clone, Default)]
pub(crate) struct SharedSetup(Arc<Mutex<Setup>>);

impl SharedSetup {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Setup> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn migration(&self) -> Option<(MigrationCallbacks, *mut c_void)> {
        let setup = self.lock();
        Some((setup.migration?, setup.context as *mut c_void))
    }
}

/// A device that does what the test's callbacks do.
pub(crate) struct Model {
    pub(crate) setup: SharedSetup,
    pub(crate) config: Mutex<[u8; 4096]>,
}

impl DeviceModel for Model {
    fn region_size(&self, region: u32) -> u64 {
        let setup = self.setup.lock();
        setup.regions.get(region as usize).copied().unwrap_or(0)
    }

    fn irq_count(&self, index: u32) -> u32 {
        let setup = self.setup.lock();
        setup.irqs.get(index as usize).copied().unwrap_or(0)
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if region == 7 {
            let config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
            data.copy_from_slice(&config[offset as usize..][..data.len()]);
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        if region == 7 {
            let mut config = self.config.lock().unwrap_or_else(PoisonError::into_inner);
            config[offset as usize..][..data.len()].copy_from_slice(data);
        }
    }

    fn reset(&self) {}

    fn quiesce(&self) {}

    fn resume(&self) {}

    fn state_size(&self) -> u64 {
        0
    }

    fn save(&self, stream: &mut dyn Write) -> io::Result<()> {
        let Some((callbacks, context)) = self.setup.migration() else {
            return Ok(());
        };
        let mut data = [0; 4];
        let done = (callbacks.read)(context, data.as_mut_ptr().cast(), data.len() as u64);
        match usize::try_from(done) {
            Ok(done) => stream.write_all(&data[..done.min(data.len())]),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    fn load(&self, stream: &mut dyn Read) -> io::Result<()> {
        let mut data = Vec::new();
        stream.read_to_end(&mut data)?;
        let Some((callbacks, context)) = self.setup.migration() else {
            return Ok(());
        };
        let done = (callbacks.write)(context, data.as_mut_ptr().cast(), data.len() as u64);
        match done < 0 {
            true => Err(io::Error::last_os_error()),
            false => Ok(()),
        }
    }
}
