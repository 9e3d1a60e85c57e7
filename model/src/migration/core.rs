// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations on the core's machine.

use dirty_core::migration::{
    Device, DeviceFeature, Failure, Features, Migration, Offers, Precopy, PrecopyInfo, Transfer,
    Transition,
};
use dirty_core::{Errno, Error};

use super::memory::{Memory, ADDR};
use super::op::{Op, PATTERN};
use super::text;
use super::uart::{Uart, TOTAL};

/// What the caller finds as the number of a data file.
const FD: i32 = 0x1234;

/// The core's machine, with a device that it drives.
#[derive(Debug)]
pub struct Core {
    features: Option<Features>,
    migration: Migration,
    device: Driven,
}

/// The device that the machine drives.
#[derive(Debug, Default)]
struct Driven {
    uart: Uart,
    /// The transitions that it was asked for, as numbers.
    transitions: Vec<(u32, u32)>,
    /// How it fails the transition after so many.
    fail: Option<(usize, Failure)>,
}

impl Driven {
    fn note(&mut self, transition: Transition) -> Result<(), Failure> {
        if let Some((left, failure)) = &mut self.fail {
            let Some(less) = left.checked_sub(1) else {
                let failure = *failure;
                self.fail = None;
                return Err(failure);
            };
            *left = less;
        }
        let Transition { from, to } = transition;
        self.transitions.push((from.raw(), to.raw()));
        Ok(())
    }
}

impl Device for Driven {
    type File = usize;

    fn begin(&mut self, transition: Transition) -> Result<usize, Failure> {
        self.note(transition)?;
        Ok(match transition.transfer() {
            Transfer::BeginLoad => self.uart.begin_load(),
            _ => self.uart.begin_save(!transition.to.may_write_memory()),
        })
    }

    fn step(&mut self, transition: Transition) -> Result<(), Failure> {
        self.note(transition)?;
        match transition.transfer() {
            Transfer::SaveRest => self.uart.save_rest(),
            Transfer::EndSave => self.uart.end(),
            Transfer::EndLoad => {
                if let Err(errno) = self.uart.end_load() {
                    self.transitions.pop();
                    return Err(Failure::Unchanged(errno));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn stop_copy_length(&mut self) -> Result<u64, Errno> {
        Ok(TOTAL as u64)
    }
}

impl Core {
    /// A device with these features, as bits; without STOP_COPY it does not migrate.
    #[must_use]
    pub fn new(features: u64) -> Self {
        let features = Features::from_bits(features);
        Core {
            features,
            migration: Migration::new(features.unwrap_or_default()),
            device: Driven::default(),
        }
    }

    /// The state's number.
    #[must_use]
    pub fn state(&self) -> u32 {
        self.migration.state().raw()
    }

    /// The transitions that the device has done since the last call, as numbers.
    pub fn transitions(&mut self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.device.transitions)
    }

    /// Lets the device fail a transition, after it has done `after` more. A device
    /// that breaks goes into ERROR.
    pub fn fail(&mut self, after: usize, errno: Errno, breaks: bool) {
        let failure = match breaks {
            true => Failure::Broken(errno),
            false => Failure::Unchanged(errno),
        };
        self.device.fail = Some((after, failure));
    }

    /// Runs an operation and returns its answer as text.
    pub fn run(&mut self, op: &Op) -> String {
        match *op {
            Op::Feature {
                n,
                flags,
                argsz,
                at,
                state,
            } => {
                let mut memory = Memory::new(at, &[argsz, n | flags, state, PATTERN]);
                let opened = self.feature(&mut memory);
                let file = opened.as_ref().ok().copied().flatten();
                let answer = opened.map(|_| ()).map_err(Error::errno);
                text::feature(answer, at, &memory, file)
            }
            Op::Precopy {
                file,
                nr,
                argsz,
                flags,
                at,
            } => {
                let words = [argsz, flags, PATTERN, PATTERN, PATTERN, PATTERN];
                let mut memory = Memory::new(at, &words);
                let answer = self.precopy(file, nr, &mut memory);
                text::precopy(answer, at, &memory)
            }
            Op::Read { file, len } => text::count(self.device.uart.read(file, len)),
            Op::Write { file, len } => text::count(self.device.uart.write(file, &vec![0; len])),
            Op::Copy { from, to } => {
                let bytes = self.device.uart.taken(from);
                text::count(self.device.uart.write(to, &bytes))
            }
            Op::Close { file } => text::done(self.device.uart.close(file)),
            Op::Reset => {
                self.migration.reset();
                self.device.uart.end();
                text::done(Ok(()))
            }
            Op::Reopen => {
                self.device.uart.close_all();
                self.device.uart.end();
                self.migration.close();
                text::done(Ok(()))
            }
        }
    }

    fn feature(&mut self, memory: &mut Memory) -> Result<Option<usize>, Error> {
        let offers = Offers {
            migration: self.features,
            logging: true,
        };
        let call = DeviceFeature::read(offers, ADDR, |addr, bytes| memory.read(addr, bytes))?;
        let DeviceFeature::Migration(call) = call else {
            return Ok(None);
        };
        let put = |addr, bytes: &[u8]| memory.write(addr, bytes);
        let (migration, device) = (&mut self.migration, &mut self.device);
        let opened = migration.run(device, call, |_| FD, put)?;
        Ok(opened.map(|index| device.uart.give(index)))
    }

    fn precopy(&mut self, file: usize, nr: u32, memory: &mut Memory) -> Result<(), Errno> {
        let uart = &mut self.device.uart;
        if !uart.has_precopy(file)? {
            return Err(Errno::ENOTTY);
        }
        let info = PrecopyInfo::read(nr, ADDR, |addr, bytes| memory.read(addr, bytes));
        let info = info.map_err(Error::errno)?;
        let estimate = || {
            Ok(Precopy {
                initial_bytes: uart.left(file)?,
                ..Precopy::default()
            })
        };
        let put = |addr, bytes: &[u8]| memory.write(addr, bytes);
        let done = self.migration.precopy_info(info, estimate, put);
        done.map_err(Error::errno)
    }
}
