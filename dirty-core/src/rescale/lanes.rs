// SPDX-License-Identifier: MIT OR Apache-2.0
//! Words cut into lanes of `R` bits (a power of two up to 64): one bit for each
//! lane that is not 0, and back. `R` words on one side are one on the other:
//! lane l of word k is bit `k * 64/R + l`.
//!
//! Both ways a word's lanes are handled at once, by shifts that leave lane l's
//! answer for word k at bit `l * R + k`; [`turn`] brings the bits in order.
//! For each word that is 5 operations, bit by bit it would be 200.
//!
//! At 16 to 1, which 64K pages are, that is still 3.5 times as slow as reading
//! the words, and 6.5 times as slow as filling them; SSE2 takes 1.3 times as
//! long, and a table 2 times.
#![allow(clippy::arithmetic_side_effects)] // R and k are at most 64, lanes have room

/// Bits whose number has bit i.
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

pub(crate) fn collapse_any<const R: usize>(words: &[u64; R]) -> u64 {
    let highest = lowest::<R>() << (R - 1);
    let mut flags = 0;
    for (k, w) in words.iter().enumerate() {
        // A lane that has a bit below the highest carries into that one.
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

fn spread_big<const R: usize>(mut bits: u64, words: &mut [u64; R]) {
    while bits != 0 {
        let first = bits.trailing_zeros() as usize * R / 64;
        let lane = words.get_mut(first..first + R / 64);
        lane.unwrap_or_default().fill(!0);
        bits &= bits - 1;
    }
}

pub(crate) fn spread_any<const R: usize>(bits: u64, words: &mut [u64; R]) {
    let flags = turn(bits, 6 - R.trailing_zeros());
    for (k, w) in words.iter_mut().enumerate() {
        let low = flags >> k & lowest::<R>();
        *w |= (low << (R - 1) << 1).wrapping_sub(low);
    }
}

fn spread_16(bits: u64, words: &mut [u64]) {
    for (byte, pair) in bits.to_le_bytes().iter().zip(words.chunks_exact_mut(2)) {
        let lanes = SPREAD_16.get(usize::from(*byte)).unwrap_or(&[0; 2]);
        pair.iter_mut().zip(lanes).for_each(|(w, l)| *w |= l);
    }
}

/// Two words for each byte.
static SPREAD_16: [[u64; 2]; 256] = spread_16_of_all_bytes();

#[allow(clippy::indexing_slicing)] // compiled only if every index is right
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

/// Moves each bit to the place whose number is its own, turned right by `by` of
/// its 6 bits.
fn turn(word: u64, by: u32) -> u64 {
    if by <= 3 {
        (0..6 - by).fold(word, |word, i| swap(word, i, i + by))
    } else {
        let back = 6 - by;
        (0..by).rev().fold(word, |word, i| swap(word, i, i + back))
    }
}

/// Swaps bits i and j of all bits' numbers.
fn swap(word: u64, i: u32, j: u32) -> u64 {
    let numbered = |i: u32| NUMBERED.get(i as usize).copied().unwrap_or(0);
    let distance = (1 << j) - (1 << i);
    let differ = (word >> distance ^ word) & numbered(i) & !numbered(j);
    word ^ differ ^ differ << distance
}
