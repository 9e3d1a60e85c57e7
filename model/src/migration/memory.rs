// SPDX-License-Identifier: MIT OR Apache-2.0
//! A user's memory, of which some can be read or written and some not.

use std::fmt;
use std::str::FromStr;

use dirty_core::host::Fault;

/// Where the argument of an ioctl is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In memory that can be read and written.
    Mem,
    /// In memory that can be read only.
    ReadOnly,
    /// The first 8 bytes can be read and written; there is no memory after them.
    Half,
    /// There is no memory.
    Hole,
}

impl Place {
    /// All of them.
    pub const ALL: [Place; 4] = [Place::Mem, Place::ReadOnly, Place::Half, Place::Hole];

    /// How many bytes can be read.
    #[must_use]
    pub fn readable(self) -> usize {
        match self {
            Place::Mem | Place::ReadOnly => BYTES,
            Place::Half => 8,
            Place::Hole => 0,
        }
    }

    /// How many bytes can be written.
    #[must_use]
    pub fn writable(self) -> usize {
        match self {
            Place::ReadOnly => 0,
            place => place.readable(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Place::Mem => "mem",
            Place::ReadOnly => "ro",
            Place::Half => "half",
            Place::Hole => "hole",
        })
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Place::ALL.into_iter().find(|p| p.to_string() == text);
        found.ok_or_else(|| format!("{text} is no place"))
    }
}

/// Bytes that an argument may have.
pub(super) const BYTES: usize = 64;

/// The address of the argument in [`Memory`].
pub(super) const ADDR: u64 = 0x1000;

/// A user's memory with one argument.
pub(super) struct Memory {
    place: Place,
    pub(super) bytes: [u8; BYTES],
}

impl Memory {
    /// With the fields of the argument one after another.
    pub(super) fn new(place: Place, words: &[u32]) -> Self {
        let mut bytes = [0; BYTES];
        for (at, word) in bytes.chunks_exact_mut(4).zip(words) {
            at.copy_from_slice(&word.to_ne_bytes());
        }
        Memory { place, bytes }
    }

    fn at(addr: u64, len: usize) -> std::ops::Range<usize> {
        let start = usize::try_from(addr - ADDR).expect("an address of the argument");
        start..start + len
    }

    pub(super) fn read(&self, addr: u64, to: &mut [u8]) -> Result<(), Fault> {
        let range = Self::at(addr, to.len());
        if range.end > self.place.readable() {
            return Err(Fault { done: 0 });
        }
        to.copy_from_slice(&self.bytes[range]);
        Ok(())
    }

    pub(super) fn write(&mut self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        let range = Self::at(addr, from.len());
        if range.end > self.place.writable() {
            return Err(Fault { done: 0 });
        }
        self.bytes[range].copy_from_slice(from);
        Ok(())
    }

    /// The `n`th 32-bit word.
    pub(super) fn word(&self, n: usize) -> u32 {
        let bytes = self.bytes[4 * n..4 * n + 4].try_into().expect("4 bytes");
        u32::from_ne_bytes(bytes)
    }
}
