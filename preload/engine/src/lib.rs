// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sample device: a DMA engine that a guest drives by doorbells.
//!
//! BAR 0 has 4 KiB of 32-bit registers. A write of COMMAND does the command and sets STATUS
//! before it returns. With 0x100 added to the command it returns at once, STATUS is 0 until the
//! command is done, and so COMMAND reads as what is to be done. STREAM writes by itself, until
//! it is stopped.
//!
//! | offset | register | |
//! |---|---|---|
//! | 0x00, 0x04 | IOVA | low and high half |
//! | 0x08 | LENGTH | bytes of each access |
//! | 0x0c | COUNT | how many accesses |
//! | 0x10 | STRIDE | bytes from one to the next |
//! | 0x14 | VALUE | what is written: VALUE + k in each word of access k |
//! | 0x18 | COMMAND | see `command.rs` |
//! | 0x1c | STATUS | 1 done, 2 failed |
//! | 0x20 | RESULT | of READ: the sum of all words |
//! | 0x24 | SEQUENCE | how many words STREAM has written |
//! | 0x28 | MAILBOX | the guest's and the test's |

mod command; // what the commands do
mod state; // how the state is saved and loaded
mod stream; // the thread that writes by itself

mod signals; // threads that take no signals

use std::collections::BTreeMap;
use std::fmt::Arguments;
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use adapter_user::emulated::{ConfigSpace, DeviceModel, Dma};
use adapter_user::PinGuard;

pub use self::signals::without_signals;
use self::stream::Stream;

const BAR_SIZE: u64 = 0x1000;
/// Added to a command that is to be done in the background.
const BACKGROUND: u32 = 0x100;
const REGISTERS: usize = 11;

const IOVA_LOW: usize = 0;
const IOVA_HIGH: usize = 1;
const LENGTH: usize = 2;
const COUNT: usize = 3;
const STRIDE: usize = 4;
const VALUE: usize = 5;
const COMMAND: usize = 6;
const STATUS: usize = 7;
const RESULT: usize = 8;
const SEQUENCE: usize = 9;

/// Writes bytes at an IOVA and marks nothing: what no device may do.
pub type WriteUnmarked = Box<dyn Fn(u64, &[u8]) -> Result<(), String> + Send + Sync>;

/// The device.
pub struct Engine(Arc<Inner>);

impl Deref for Engine {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

/// What the device and its threads share.
pub struct Inner {
    dma: Dma,
    write_unmarked: WriteUnmarked,
    say: fn(Arguments<'_>),
    config: Mutex<ConfigSpace>,
    registers: [AtomicU32; REGISTERS],
    /// Held during a command, so that there is one at a time and `quiesce` waits for it.
    work: Mutex<Work>,
    stream: Arc<Stream>,
}

/// What commands change.
#[derive(Default)]
struct Work {
    /// Between `quiesce` and `resume`.
    stopped: bool,
    /// The pins by IOVA and size. A pin that was loaded has no guard before the device runs.
    pins: BTreeMap<(u64, u64), Option<PinGuard>>,
}

impl Engine {
    /// Creates the device. `write_unmarked` is what the command WRITE_UNMARKED does, and `say`
    /// gets a line for each failure.
    #[must_use]
    pub fn new(dma: Dma, write_unmarked: WriteUnmarked, say: fn(Arguments<'_>)) -> Self {
        let config = ConfigSpace::new(0x1234, 0x0d3a, 0x08_8000);
        Engine(Arc::new(Inner {
            stream: Stream::start(dma.clone(), say),
            dma,
            write_unmarked,
            say,
            config: Mutex::new(config.with_memory_bar(0, BAR_SIZE as u32)),
            registers: Default::default(),
            work: Mutex::default(),
        }))
    }

    fn write_register(&self, index: usize, value: u32) {
        match index {
            COMMAND if value & BACKGROUND != 0 => {
                self.set(STATUS, 0);
                self.set(COMMAND, value);
                self.start_background();
            }
            COMMAND => self.command(value),
            STATUS | RESULT | SEQUENCE => {} // read-only
            _ => self.set(index, value),
        }
    }

    /// Starts a thread that does what is to be done in the background.
    fn start_background(&self) {
        let inner = Arc::clone(&self.0);
        let thread = thread::Builder::new().name("vfio-engine".into());
        let started = without_signals(|| thread.spawn(move || inner.background()));
        if let Err(error) = started {
            (self.say)(format_args!("no thread for a command: {error}"));
        }
    }
}

impl Inner {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, index: usize) -> u32 {
        match index {
            SEQUENCE => self.stream.sequence(),
            _ => self.registers[index].load(Ordering::Relaxed),
        }
    }

    fn set(&self, index: usize, value: u32) {
        self.registers[index].store(value, Ordering::Relaxed);
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
        if region != 0 {
            return self.config().read(offset, data);
        }
        for (at, byte) in (offset..).zip(data) {
            let index = at as usize / 4;
            let value = match index < REGISTERS {
                true => self.register(index),
                false => 0,
            };
            *byte = value.to_le_bytes()[at as usize % 4];
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        if region != 0 {
            return self.config().write(offset, data);
        }
        // Only whole registers: other writes have no effect.
        let index = offset as usize / 4;
        if let (0, Ok(value), true) = (offset % 4, data.try_into(), index < REGISTERS) {
            self.write_register(index, u32::from_le_bytes(value));
        }
    }

    fn unmapped(&self, iova: u64, size: u64) {
        let last = iova.saturating_add(size - 1);
        let touches = |(at, len): &(u64, u64)| *at <= last && at + (len - 1) >= iova;
        self.work().pins.retain(|pin, _| !touches(pin));
    }

    fn reset(&self) {
        for register in &self.registers {
            register.store(0, Ordering::Relaxed);
        }
        self.work().pins.clear();
        self.stream.reset();
    }

    fn quiesce(&self) {
        self.work().stopped = true; // no command is under way
        self.stream.pause();
    }

    fn resume(&self) {
        let mut work = self.work();
        work.stopped = false;
        self.pin_loaded(&mut work);
        drop(work);
        if self.register(COMMAND) != 0 {
            self.start_background();
        }
        self.stream.go_on();
    }

    fn state_size(&self) -> u64 {
        self.saved_size()
    }

    fn save(&self, stream: &mut dyn Write) -> io::Result<()> {
        self.save_to(stream)
    }

    fn load(&self, stream: &mut dyn Read) -> io::Result<()> {
        self.load_from(stream)
    }

    fn save_early(&self, stream: &mut dyn Write) -> io::Result<()> {
        self.save_early_to(stream)
    }

    fn load_early(&self, stream: &mut dyn Read) -> io::Result<()> {
        self.load_early_from(stream)
    }
}
