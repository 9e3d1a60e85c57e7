// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sample device: a DMA engine that is told where to write, and then writes by itself.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapter_user::emulated::{ConfigSpace, DeviceModel, Dma};

use super::places::Places;
use super::registers::*;
use super::stream::Stream;

const BAR_SIZE: u64 = 0x1000;
/// Registers that can be written, and STATUS.
const WRITABLE: usize = 8;
/// The first number of a saved state: "VFDIRTY" and the version.
const MAGIC: u64 = u64::from_le_bytes(*b"VFDIRTY\x01");
/// The numbers of a saved state: the magic one, registers, and the stream.
const NUMBERS: usize = 1 + WRITABLE + 9;

pub(super) struct Engine {
    dma: Dma,
    config: Mutex<ConfigSpace>,
    /// Held during a command, so that there is one at a time and `quiesce` waits for it.
    work: Mutex<Work>,
    stream: Arc<Stream>,
}

#[derive(Default)]
struct Work {
    registers: [u64; WRITABLE],
    /// Between `quiesce` and `resume`.
    stopped: bool,
}

impl Engine {
    pub(super) fn new(dma: Dma) -> Self {
        let config = ConfigSpace::new(0x1234, 0x0d3b, 0x08_8000);
        Engine {
            stream: Stream::start(dma.clone()),
            dma,
            config: Mutex::new(config.with_memory_bar(0, BAR_SIZE as u32)),
            work: Mutex::default(),
        }
    }

    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, offset: u64) -> u64 {
        match offset {
            SEQUENCE => self.stream.lock().sequence,
            REFUSED => self.stream.lock().refused,
            _ => {
                let index = usize::try_from(offset / 8).ok();
                let work = self.work();
                let register = index.and_then(|index| work.registers.get(index));
                register.copied().unwrap_or_default()
            }
        }
    }

    fn set_register(&self, offset: u64, value: u64) {
        let mut work = self.work();
        match offset {
            STATUS => {}
            COMMAND => {
                work.registers[COMMAND as usize / 8] = value;
                let done = self.command(&work, value);
                let status = if done { DONE } else { FAILED };
                work.registers[STATUS as usize / 8] = status;
            }
            _ => {
                let index = usize::try_from(offset / 8).ok();
                if let Some(register) = index.and_then(|index| work.registers.get_mut(index)) {
                    *register = value;
                }
            }
        }
    }

    /// Does a command. Returns whether that worked.
    fn command(&self, work: &Work, command: u64) -> bool {
        let register = |offset: u64| work.registers[offset as usize / 8];
        let places = Places {
            iova: register(IOVA),
            stride: register(STRIDE),
            count: register(COUNT),
            length: register(LENGTH),
            seed: register(SEED),
        };
        match command {
            WRITE => !work.stopped && places.are_valid() && places.write_all(&self.dma).is_ok(),
            STREAM if places.are_valid() => {
                let rate = register(RATE);
                self.stream.change(|inner| {
                    (inner.on, inner.places, inner.rate) = (true, places, rate);
                });
                true
            }
            END => {
                self.stream.change(|inner| inner.on = false);
                true
            }
            _ => false,
        }
    }
}

impl DeviceModel for Engine {
    fn region_size(&self, region: u32) -> u64 {
        match region {
            0 => BAR_SIZE,
            7 => 256,
            _ => 0,
        }
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        match (region, <&mut [u8; 8]>::try_from(&mut *data)) {
            (0, Ok(word)) if offset % 8 == 0 => *word = self.register(offset).to_le_bytes(),
            (0, _) => data.fill(0xff),
            _ => self.config().read(offset, data),
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        match (region, data.try_into()) {
            (0, Ok(word)) if offset % 8 == 0 => {
                self.set_register(offset, u64::from_le_bytes(word));
            }
            (0, _) => {}
            _ => self.config().write(offset, data),
        }
    }

    fn reset(&self) {
        self.work().registers = Default::default();
        self.stream.reset();
    }

    fn quiesce(&self) {
        self.work().stopped = true; // no command is under way
        self.stream.pause();
    }

    fn resume(&self) {
        self.work().stopped = false;
        self.stream.go_on();
    }

    fn state_size(&self) -> u64 {
        8 * NUMBERS as u64 + 256
    }

    fn save(&self, to: &mut dyn Write) -> io::Result<()> {
        let (registers, stream) = (self.work().registers, *self.stream.lock());
        let Places {
            iova,
            stride,
            count,
            length,
            seed,
        } = stream.places;
        let stream = [
            stream.on.into(),
            iova,
            stride,
            count,
            length,
            seed,
            stream.rate,
            stream.sequence,
            stream.refused,
        ];
        for number in [MAGIC].into_iter().chain(registers).chain(stream) {
            to.write_all(&number.to_le_bytes())?;
        }
        to.write_all(self.config().bytes())
    }

    fn load(&self, from: &mut dyn Read) -> io::Result<()> {
        let mut numbers = [0; NUMBERS];
        for number in &mut numbers {
            let mut bytes = [0; 8];
            from.read_exact(&mut bytes)?;
            *number = u64::from_le_bytes(bytes);
        }
        let mut config = [0; 256];
        from.read_exact(&mut config)?;
        let [magic, i, s, c, l, r, e, command, status, on, iova, stride, count, length, seed, rate, sequence, refused] =
            numbers;
        let places = Places {
            iova,
            stride,
            count,
            length,
            seed,
        };
        if magic != MAGIC || on > 1 || (on == 1 && !places.are_valid()) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.work().registers = [i, s, c, l, r, e, command, status];
        self.stream.change(|inner| {
            (inner.on, inner.places, inner.rate) = (on == 1, places, rate);
            (inner.sequence, inner.refused) = (sequence, refused);
        });
        self.config().restore(&config);
        Ok(())
    }
}
