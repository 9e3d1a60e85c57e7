// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the commands do.
//!
//! | COMMAND | does, COUNT times |
//! |---|---|
//! | 1 WRITE | writes LENGTH bytes |
//! | 2 READ | reads LENGTH bytes |
//! | 3 PIN | pins LENGTH bytes, until they are unpinned or unmapped |
//! | 4 WRITE_PINNED | writes LENGTH bytes through the pin that has them |
//! | 5 UNPIN | drops the pin of these LENGTH bytes |
//! | 6 SHORT_PIN | pins LENGTH bytes, writes them, and unpins them |
//! | 7 WRITE_UNMARKED | writes LENGTH bytes and marks nothing: what no device may do |
//! | 8 STREAM | from now on writes words by itself, see [`stream`](super::stream) |
//! | 9 STOP_STREAM | ends that |

use std::collections::BTreeMap;

use adapter_user::{PinGuard, Prot};

use super::stream::Window;
use super::{Inner, Work};
use super::{
    BACKGROUND, COMMAND, COUNT, IOVA_HIGH, IOVA_LOW, LENGTH, RESULT, STATUS, STRIDE, VALUE,
};

/// No access is longer.
const MAX_LENGTH: u32 = 1 << 20;

impl Inner {
    /// Does a command, and sets STATUS.
    pub(super) fn command(&self, command: u32) {
        let mut work = self.work();
        let done = match work.stopped {
            true => Err("the device is stopped".into()),
            false => self.run(&mut work, command),
        };
        self.done(command, done);
    }

    /// Does the command in COMMAND, unless the device is stopped: then it is part of its state.
    pub(super) fn background(&self) {
        let mut work = self.work();
        let command = self.register(COMMAND);
        if work.stopped || command == 0 {
            return; // another thread has done it
        }
        let done = self.run(&mut work, command & !BACKGROUND);
        self.set(COMMAND, 0);
        self.done(command, done);
    }

    fn done(&self, command: u32, done: Result<(), String>) {
        if let Err(error) = &done {
            (self.say)(format_args!("command {command} failed: {error}"));
        }
        self.set(STATUS, if done.is_ok() { 1 } else { 2 });
    }

    fn run(&self, work: &mut Work, command: u32) -> Result<(), String> {
        let iova = u64::from(self.register(IOVA_LOW)) | u64::from(self.register(IOVA_HIGH)) << 32;
        let length = self.register(LENGTH);
        if length == 0 || length > MAX_LENGTH || length % 4 != 0 {
            return Err(format!("LENGTH is {length}"));
        }
        let (count, stride) = (self.register(COUNT), u64::from(self.register(STRIDE)));
        match command {
            8 => {
                return self.stream.begin(Window {
                    iova,
                    count,
                    stride,
                })
            }
            9 => {
                self.stream.end();
                return Ok(());
            }
            _ => {}
        }
        let mut sum = 0u32;
        for k in 0..count {
            let at = stride
                .checked_mul(k.into())
                .and_then(|by| iova.checked_add(by));
            let access = Access {
                iova: at.ok_or("the IOVAs wrap")?,
                size: length.into(),
                value: self.register(VALUE).wrapping_add(k),
            };
            sum = sum.wrapping_add(self.access(work, command, access)?);
        }
        self.set(RESULT, sum);
        Ok(())
    }

    /// Does one access of a command, and returns the sum of the words that it has read.
    fn access(&self, work: &mut Work, command: u32, access: Access) -> Result<u32, String> {
        let Access { iova, size, .. } = access;
        let text = |error: adapter_user::Error| error.to_string();
        match command {
            1 => self.dma.write(iova, &access.data()).map_err(text)?,
            2 => {
                let mut data = access.data();
                self.dma.read(iova, &mut data).map_err(text)?;
                let words = data
                    .chunks_exact(4)
                    .map(|word| word.try_into().unwrap_or_default());
                return Ok(words.map(u32::from_le_bytes).fold(0, u32::wrapping_add));
            }
            3 => {
                let pin = self.dma.pin(iova, size, Prot::READ_WRITE).map_err(text)?;
                work.pins.insert((iova, size), Some(pin));
            }
            4 => {
                let pin = holder(&work.pins, iova, size).ok_or("no pin has these bytes")?;
                pin.write(iova - pin.iova(), &access.data()).map_err(text)?;
            }
            5 => {
                let pin = work.pins.remove(&(iova, size));
                drop(pin.ok_or("there is no such pin")?);
            }
            6 => {
                let pin = self.dma.pin(iova, size, Prot::READ_WRITE).map_err(text)?;
                pin.write(0, &access.data()).map_err(text)?;
            }
            7 => {
                (self.write_unmarked)(iova, &access.data())?;
            }
            _ => return Err("there is no such command".into()),
        }
        Ok(0)
    }

    /// Pins again what was pinned where the state comes from.
    pub(super) fn pin_loaded(&self, work: &mut Work) {
        for ((iova, size), pin) in &mut work.pins {
            if pin.is_none() {
                let again = self.dma.pin(*iova, *size, Prot::READ_WRITE);
                let error = again.as_ref().err();
                (self.say)(format_args!("pin again {iova:#x}+{size:#x} {error:?}"));
                *pin = again.ok();
            }
        }
        work.pins.retain(|_, pin| pin.is_some());
    }
}

/// One access of a command.
#[derive(Clone, Copy)]
struct Access {
    iova: u64,
    size: u64,
    /// What is written to each word.
    value: u32,
}

impl Access {
    fn data(self) -> Vec<u8> {
        self.value.to_le_bytes().repeat(self.size as usize / 4)
    }
}

/// The pin that has the `size` bytes at `iova`.
fn holder(
    pins: &BTreeMap<(u64, u64), Option<PinGuard>>,
    iova: u64,
    size: u64,
) -> Option<&PinGuard> {
    let before = pins.range(..=(iova, u64::MAX)).next_back();
    let (_, pin) = before?;
    let pin = pin.as_ref()?;
    (iova + size <= pin.iova() + pin.size()).then_some(pin)
}
