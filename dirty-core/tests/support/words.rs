// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads and writes single bits of bitmaps.

/// The numbers of the bits that are set.
pub(crate) fn bits(words: &[u64]) -> Vec<u64> {
    let all = 0..words.len() as u64 * 64;
    all.filter(|bit| get(words, *bit)).collect()
}

/// Whether a bit is set.
pub(crate) fn get(words: &[u64], bit: u64) -> bool {
    words[(bit / 64) as usize] >> (bit % 64) & 1 != 0
}

/// Sets a bit.
pub(crate) fn set(words: &mut [u64], bit: u64) {
    words[(bit / 64) as usize] |= 1 << (bit % 64);
}

/// `n` words that differ from each other and from every bitmap in the tests.
pub(crate) fn garbage(n: usize) -> Vec<u64> {
    (0..n as u64)
        .map(|k| 0xa5c3_96f1_7e2d_4b81 ^ k << 40)
        .collect()
}
