// SPDX-License-Identifier: MIT OR Apache-2.0
//! Words cut into lanes of `R` bits (a power of two): one bit for each lane that
//! is not 0, and back. `R` words on one side are one word on the other: lane l
//! of word k is bit `k * 64/R + l`.
//!
//! In both directions, all lanes of a word are handled at once. Shifts leave the
//! answer of lane l of word k at bit `l * R + k`, and [`turn`] brings the bits
//! into order. That takes 5 operations for each word; bit by bit it would take
//! 200.
//!
//! At 16 to 1 (64K pages from 4K pages) this takes 3.5 x the time of reading the
//! words, and back 6.5 x the time of filling them. There SSE2 takes 1.3 x, and a
//! table 2 x.
#![allow(clippy::arithmetic_side_effects)] // R and k are at most 64, lanes have room

/// Entry i has the bits whose number has bit i.
const NUMBERED: [u64; 6] = [
    0xaaaa_aaaa_aaaa_aaaa,
    0xcccc_cccc_cccc_cccc,
    0xf0f0_f0f0_f0f0_f0f0,
    0xff00_ff00_ff00_ff00,
    0xffff_0000_ffff_0000,
    0xffff_ffff_0000_0000,
];

/// The lowest bit of each lane.
const fn lowest<const R: usize>() -> u64 {
    !0 / (!0 >> (64 - R % 65))
}

/// One bit for each lane that is not 0.
pub(crate) fn collapse<const R: usize>(words: &[u64; R]) -> u64 {
    if R > 64 {
        let lanes = words.chunks_exact(R / 64).rev();
        let some = lanes.map(|lane| lane.iter().fold(0, |all, w| all | w) != 0);
        return some.fold(0, |flags, some| flags << 1 | u64::from(some));
    }
    #[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
    if R == 16 {
        return crate::rescale::sse2::collapse_16(words);
    }
    collapse_any(words)
}

/// [`collapse`] for lanes that fit a word.
pub(crate) fn collapse_any<const R: usize>(words: &[u64; R]) -> u64 {
    let highest = lowest::<R>() << (R - 1);
    let mut flags = 0;
    for (k, w) in words.iter().enumerate() {
        // A lane that has a bit below its highest bit carries into the highest.
        let carried = (w & !highest) + !highest;
        flags |= ((carried | w) & highest) >> (R - 1 - k);
    }
    turn(flags, R.trailing_zeros())
}

/// Sets all bits of each lane whose bit is set.
pub(crate) fn spread<const R: usize>(bits: u64, words: &mut [u64; R]) {
    match R {
        16 => spread_16(bits, words),
        0..=64 => spread_any(bits, words),
        _ => spread_big(bits, words),
    }
}

/// [`spread`] for lanes of whole words.
fn spread_big<const R: usize>(mut bits: u64, words: &mut [u64; R]) {
    while bits != 0 {
        let first = bits.trailing_zeros() as usize * R / 64;
        let lane = words.get_mut(first..first + R / 64);
        lane.unwrap_or_default().fill(!0);
        bits &= bits - 1;
    }
}

/// [`spread`] for lanes that fit a word.
pub(crate) fn spread_any<const R: usize>(bits: u64, words: &mut [u64; R]) {
    let flags = turn(bits, 6 - R.trailing_zeros());
    for (k, w) in words.iter_mut().enumerate() {
        let low = flags >> k & lowest::<R>();
        *w |= (low << (R - 1) << 1).wrapping_sub(low);
    }
}

/// [`spread`] for lanes of 16 bits, by a table.
fn spread_16(bits: u64, words: &mut [u64]) {
    for (byte, pair) in bits.to_le_bytes().iter().zip(words.chunks_exact_mut(2)) {
        let lanes = SPREAD_16.get(usize::from(*byte)).unwrap_or(&[0; 2]);
        pair.iter_mut().zip(lanes).for_each(|(w, l)| *w |= l);
    }
}

/// The two words that each byte is spread to.
static SPREAD_16: [[u64; 2]; 256] = spread_16_of_all_bytes();

#[allow(clippy::indexing_slicing)] // evaluated by the compiler, which checks every index
const fn spread_16_of_all_bytes() -> [[u64; 2]; 256] {
    let mut all = [[0; 2]; 256];
    let mut k = 0;
    while k < 256 * 8 {
        let (byte, bit) = (k / 8, k % 8);
        if byte >> bit & 1 != 0 {
            all[byte][bit / 4] |= 0xffff << (bit % 4 * 16);
        }
        k += 1;
    }
    all
}

/// Moves each bit: the 6 bits of its number are rotated right by `by`.
fn turn(word: u64, by: u32) -> u64 {
    if by <= 3 {
        (0..6 - by).fold(word, |word, i| swap(word, i, i + by))
    } else {
        let back = 6 - by;
        (0..by).rev().fold(word, |word, i| swap(word, i, i + back))
    }
}

/// Moves each bit: bits i and j of its number are swapped.
fn swap(word: u64, i: u32, j: u32) -> u64 {
    let numbered = |i: u32| NUMBERED.get(i as usize).copied().unwrap_or(0);
    let distance = (1 << j) - (1 << i);
    let differ = (word >> distance ^ word) & numbered(i) & !numbered(j);
    word ^ differ ^ differ << distance
}
