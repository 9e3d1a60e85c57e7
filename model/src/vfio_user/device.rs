// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device with a doorbell, and a client that serves its messages.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use adapter_user::emulated::{ConfigSpace, DeviceModel, Dma};
use adapter_user::vfio_user::Remote;
use adapter_user::{Error, Prot};

use super::ops::{Access, IOVAS, PAGE};

/// What the device did at the last doorbell. A read has its bytes.
pub(super) type Done = Option<Result<Vec<u8>, Error>>;

pub(super) struct Device {
    dma: Dma,
    config: Mutex<ConfigSpace>,
    pub(super) running: AtomicBool,
    last: Arc<Mutex<Done>>,
}

impl Device {
    pub(super) fn new(dma: Dma, last: Arc<Mutex<Done>>) -> Self {
        Device {
            dma,
            config: Mutex::new(ConfigSpace::new(0x1234, 0x5678, 0x08_8000)),
            running: AtomicBool::new(true),
            last,
        }
    }

    fn access(&self, access: Access, iova: u64, len: usize, seed: u8) -> Result<Vec<u8>, Error> {
        match access {
            Access::Read => {
                let mut data = vec![0; len];
                self.dma.read(iova, &mut data).map(|()| data)
            }
            Access::Write => self
                .dma
                .write(iova, &pattern(seed, len))
                .map(|()| Vec::new()),
            Access::Pin => {
                let pin = self.dma.pin(iova, len as u64, Prot::WRITE)?;
                pin.write(0, &pattern(seed, len)).map(|()| Vec::new())
            }
        }
    }
}

/// What the device writes.
pub(super) fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|k| seed.wrapping_add(k as u8)).collect()
}

impl DeviceModel for Device {
    fn region_size(&self, region: u32) -> u64 {
        match region {
            0 => 32,
            7 => 256,
            _ => 0,
        }
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        match (region, self.config.lock()) {
            (7, Ok(config)) => config.read(offset, data),
            _ => data.fill(0),
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        if region == 7 {
            if let Ok(mut config) = self.config.lock() {
                config.write(offset, data);
            }
            return;
        }
        let words = data
            .chunks_exact(8)
            .map(|word| word.try_into().map(u64::from_le_bytes));
        let words: Vec<u64> = words.map_while(Result::ok).collect();
        let [kind, iova, len, seed] = words[..] else {
            return;
        };
        let access = [Access::Read, Access::Write, Access::Pin][kind as usize];
        let running = self.running.load(Ordering::SeqCst);
        let done = running.then(|| self.access(access, iova, len as usize, seed as u8));
        if let Ok(mut last) = self.last.lock() {
            *last = done;
        }
    }

    fn reset(&self) {
        if let Ok(mut config) = self.config.lock() {
            config.write(4, &[0, 0]);
        }
    }

    fn quiesce(&self) {
        self.running.store(false, Ordering::SeqCst);
    }

    fn resume(&self) {
        self.running.store(true, Ordering::SeqCst);
    }

    fn state_size(&self) -> u64 {
        256
    }

    fn save(&self, stream: &mut dyn Write) -> io::Result<()> {
        match self.config.lock() {
            Ok(config) => stream.write_all(config.bytes()),
            Err(_) => Err(io::ErrorKind::Other.into()),
        }
    }

    fn load(&self, stream: &mut dyn Read) -> io::Result<()> {
        let mut bytes = [0; 256];
        stream.read_exact(&mut bytes)?;
        if let Ok(mut config) = self.config.lock() {
            config.restore(&bytes);
        }
        Ok(())
    }
}

/// The memory that the client has mapped without a descriptor: byte k is at IOVA k.
pub(super) struct Client {
    pub(super) memory: Mutex<Vec<u8>>,
    pub(super) refuse: AtomicBool,
}

impl Client {
    pub(super) fn new() -> Self {
        Client {
            memory: Mutex::new(vec![0; ((IOVAS + 8) * PAGE) as usize]),
            refuse: AtomicBool::new(false),
        }
    }

    fn access(&self, iova: u64, len: usize, copy: impl FnOnce(&mut [u8])) -> Result<(), Error> {
        let mut memory = self.memory.lock().map_err(|_| Error::BadAddress)?;
        let bytes = memory
            .get_mut(iova as usize..)
            .and_then(|rest| rest.get_mut(..len));
        match bytes.filter(|_| !self.refuse.load(Ordering::SeqCst)) {
            Some(bytes) => {
                copy(bytes);
                Ok(())
            }
            None => Err(Error::BadAddress),
        }
    }
}

impl Remote for Client {
    fn dma_read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        self.access(iova, data.len(), |bytes| data.copy_from_slice(bytes))
    }

    fn dma_write(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        self.access(iova, data.len(), |bytes| bytes.copy_from_slice(data))
    }
}
