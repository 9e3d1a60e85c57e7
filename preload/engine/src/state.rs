// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the engine's state is saved and loaded: numbers of 64 bits, little-endian.
//!
//! | what | numbers |
//! |---|---|
//! | the registers | one each |
//! | the stream | whether it is on; IOVA, count and stride of its places; the next word |
//! | the pins | how many; IOVA and size of each |
//! | the configuration space | its 256 bytes |
//!
//! In the pre-copy phase the engine sends 64 KiB of a pattern, which stands for the tables
//! of a larger device. The destination checks it.

use std::io::{self, Read, Write};

use super::stream::Window;
use super::{Inner, REGISTERS};

/// More pins than this are no state of ours.
const MAX_PINS: u64 = 1 << 20;
/// Numbers of the early data.
const EARLY: u64 = 8192;

impl Inner {
    pub(super) fn saved_size(&self) -> u64 {
        let numbers = REGISTERS + 5 + 1 + 2 * self.work().pins.len();
        8 * numbers as u64 + 256
    }

    pub(super) fn save_to(&self, to: &mut dyn Write) -> io::Result<()> {
        for index in 0..REGISTERS {
            put(to, self.register(index).into())?;
        }
        let (on, window, sequence) = self.stream.saved();
        put(to, on.into())?;
        put(to, window.iova)?;
        put(to, window.count.into())?;
        put(to, window.stride)?;
        put(to, sequence.into())?;
        let work = self.work();
        put(to, work.pins.len() as u64)?;
        for (iova, size) in work.pins.keys() {
            put(to, *iova)?;
            put(to, *size)?;
        }
        to.write_all(self.config().bytes())
    }

    pub(super) fn load_from(&self, from: &mut dyn Read) -> io::Result<()> {
        for index in 0..REGISTERS {
            self.set(index, get32(from)?);
        }
        let on = get(from)? != 0;
        let window = Window {
            iova: get(from)?,
            count: get32(from)?,
            stride: get(from)?,
        };
        self.stream.load(on, window, get32(from)?);
        let count = get(from)?;
        if count > MAX_PINS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut work = self.work();
        work.pins.clear();
        for _ in 0..count {
            let (iova, size) = (get(from)?, get(from)?);
            if size == 0 || iova.checked_add(size).is_none() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            work.pins.insert((iova, size), None);
        }
        let mut config = [0; 256];
        from.read_exact(&mut config)?;
        self.config().restore(&config);
        Ok(())
    }

    pub(super) fn save_early_to(&self, to: &mut dyn Write) -> io::Result<()> {
        (0..EARLY).try_for_each(|k| put(to, pattern(k)))
    }

    pub(super) fn load_early_from(&self, from: &mut dyn Read) -> io::Result<()> {
        for k in 0..EARLY {
            if get(from)? != pattern(k) {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(())
    }
}

fn pattern(k: u64) -> u64 {
    k.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn put(to: &mut dyn Write, number: u64) -> io::Result<()> {
    to.write_all(&number.to_le_bytes())
}

fn get(from: &mut dyn Read) -> io::Result<u64> {
    let mut number = [0; 8];
    from.read_exact(&mut number)?;
    Ok(u64::from_le_bytes(number))
}

fn get32(from: &mut dyn Read) -> io::Result<u32> {
    u32::try_from(get(from)?).map_err(|_| io::ErrorKind::InvalidData.into())
}
