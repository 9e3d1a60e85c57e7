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
use super::{Engine, Work};
use super::{COUNT, IOVA_HIGH, IOVA_LOW, LENGTH, RESULT, STATUS, STRIDE, VALUE};
use crate::trace::trace;

/// No access is longer.
const MAX_LENGTH: u32 = 1 << 20;

impl Engine {
    /// Does a command, and sets STATUS.
    pub(super) fn command(&self, command: u32) {
        let done = self.run(command);
        if let Err(error) = &done {
            trace!("command {command} failed: {error}");
        }
        self.set(STATUS, if done.is_ok() { 1 } else { 2 });
    }

    fn run(&self, command: u32) -> Result<(), String> {
        let mut work = self.work();
        if work.stopped {
            return Err("the device is stopped".into());
        }
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
            let at = at.ok_or("the IOVAs wrap")?;
            let value = self.register(VALUE).wrapping_add(k);
            self.access(&mut work, command, at, length as usize, value, &mut sum)?;
        }
        self.set(RESULT, sum);
        Ok(())
    }

    fn access(
        &self,
        work: &mut Work,
        command: u32,
        iova: u64,
        length: usize,
        value: u32,
        sum: &mut u32,
    ) -> Result<(), String> {
        let data = || value.to_le_bytes().repeat(length / 4);
        let size = length as u64;
        let text = |error: adapter_user::Error| error.to_string();
        match command {
            1 => self.dma.write(iova, &data()).map_err(text),
            2 => {
                let mut data = vec![0; length];
                self.dma.read(iova, &mut data).map_err(text)?;
                for word in data.chunks_exact(4) {
                    *sum =
                        sum.wrapping_add(u32::from_le_bytes(word.try_into().unwrap_or_default()));
                }
                Ok(())
            }
            3 => {
                let pin = self.dma.pin(iova, size, Prot::READ_WRITE).map_err(text)?;
                work.pins.insert((iova, size), Some(pin));
                Ok(())
            }
            4 => {
                let pin = holder(&work.pins, iova, size).ok_or("no pin has these bytes")?;
                pin.write(iova - pin.iova(), &data()).map_err(text)
            }
            5 => {
                let pin = work.pins.remove(&(iova, size));
                pin.map(drop).ok_or_else(|| "there is no such pin".into())
            }
            6 => {
                let pin = self.dma.pin(iova, size, Prot::READ_WRITE).map_err(text)?;
                pin.write(0, &data()).map_err(text)
            }
            7 => {
                let mappings = (self.mappings)().ok_or("the device is in no container")?;
                mappings.write_unmarked(iova, &data())
            }
            _ => Err("there is no such command".into()),
        }
    }

    /// Pins again what was pinned where the state comes from.
    pub(super) fn pin_loaded(&self, work: &mut Work) {
        for ((iova, size), pin) in &mut work.pins {
            if pin.is_none() {
                let again = self.dma.pin(*iova, *size, Prot::READ_WRITE);
                trace!("pin again {iova:#x}+{size:#x} {:?}", again.as_ref().err());
                *pin = again.ok();
            }
        }
        work.pins.retain(|_, pin| pin.is_some());
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
