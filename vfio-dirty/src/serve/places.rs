// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the device writes, and what.

use adapter_user::emulated::Dma;
use adapter_user::Error;

/// The most bytes that are written at a place.
const MOST: usize = 4096;

/// Places in guest memory that are written to.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Places {
    pub(super) iova: u64,
    pub(super) stride: u64,
    pub(super) count: u64,
    pub(super) length: u64,
    pub(super) seed: u64,
}

impl Places {
    /// Whether all of them have an IOVA, and bytes.
    pub(super) fn are_valid(&self) -> bool {
        let last = self
            .count
            .checked_sub(1)
            .and_then(|more| more.checked_mul(self.stride))
            .and_then(|by| self.iova.checked_add(by))
            .and_then(|last| last.checked_add(self.length));
        last.is_some() && (8..=MOST as u64).contains(&self.length) && self.length % 8 == 0
    }

    /// Writes each place once.
    pub(super) fn write_all(&self, dma: &Dma) -> Result<(), Error> {
        (0..self.count).try_for_each(|number| self.write(dma, number, number))
    }

    /// Writes to the place whose turn it is at write number `n`.
    pub(super) fn write_random(&self, dma: &Dma, n: u64) -> Result<(), Error> {
        let number = mix(self.seed.wrapping_add(n)) % self.count.max(1);
        self.write(dma, number, n)
    }

    /// Writes to place `number` what belongs to write number `n`.
    fn write(&self, dma: &Dma, number: u64, n: u64) -> Result<(), Error> {
        let mut bytes = [0; MOST];
        let bytes = &mut bytes[..MOST.min(self.length as usize)];
        let first = mix(self.seed ^ n);
        for (k, word) in (0..).zip(bytes.chunks_exact_mut(8)) {
            word.copy_from_slice(&first.wrapping_add(k).to_le_bytes());
        }
        let offset = number.wrapping_mul(self.stride);
        dma.write(self.iova.wrapping_add(offset), bytes)
    }
}

/// Numbers without a pattern that anybody would see (splitmix64).
fn mix(n: u64) -> u64 {
    let n = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}
