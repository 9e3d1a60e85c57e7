// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs of bits in plain words: bit k is bit k % 64 of word k / 64.
//!
//! Positions are checked by the callers, which know their bitmap; here a
//! position beyond the words is no bit, and nothing panics.
#![allow(clippy::arithmetic_side_effects)] // bit numbers stay far below 2^63

pub(crate) mod runs;
pub(crate) mod stream;

/// Word of a bit.
pub(crate) const fn word(bit: u64) -> usize {
    (bit >> 6) as usize
}

/// Bit `bit` and the higher ones of its word.
pub(crate) const fn from_bit(bit: u64) -> u64 {
    !0 << (bit & 63)
}

/// Bit `bit` and the lower ones of its word.
pub(crate) const fn up_to_bit(bit: u64) -> u64 {
    !0 >> (63 - (bit & 63))
}

/// The bits of one word from `first` to `last`, which are both in it.
pub(crate) const fn between(first: u64, last: u64) -> u64 {
    (!0 >> (63 - (last - first))) << (first & 63)
}

/// Sets bits `first..=last`.
#[inline]
pub(crate) fn set(words: &mut [u64], first: u64, last: u64) {
    debug_assert!(word(last) < words.len(), "a dirty bit has no place");
    match words.get_mut(word(first)..word(last) + 1) {
        Some([only]) => *only |= between(first, last),
        Some(run) => set_run(run, first, last),
        None => {}
    }
}

/// Likewise of words that are those with these bits, more than one. (Few of them
/// by two stores that may overlap: for 512 bits memset takes longer than all the
/// rest.)
#[inline]
pub(crate) fn set_run(words: &mut [u64], first: u64, last: u64) {
    if let [head, middle @ .., tail] = words {
        *head |= from_bit(first);
        match middle.len() {
            0 => {}
            1 => fill_ends::<1>(middle),
            2..=4 => fill_ends::<2>(middle),
            5..=8 => fill_ends::<4>(middle),
            _ => middle.fill(!0),
        }
        *tail |= up_to_bit(last);
    }
}

/// Sets the bits of the first and the last `N` words.
#[inline]
fn fill_ends<const N: usize>(words: &mut [u64]) {
    if let Some(first) = words.first_chunk_mut::<N>() {
        *first = [!0; N];
    }
    if let Some(last) = words.last_chunk_mut::<N>() {
        *last = [!0; N];
    }
}

/// Clears one bit.
pub(crate) fn clear(words: &mut [u64], bit: u64) {
    if let Some(w) = words.get_mut(word(bit)) {
        *w &= !(1 << (bit & 63));
    }
}

/// Whether bit `bit` is set.
pub(crate) fn get(words: &[u64], bit: u64) -> bool {
    words
        .get(word(bit))
        .is_some_and(|w| w >> (bit & 63) & 1 != 0)
}

/// The bits that are set in a word.
pub(crate) fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.checked_sub(1)?;
        Some(bit as usize)
    })
}
