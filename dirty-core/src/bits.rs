// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs of bits in plain words: bit k is bit k % 64 of word k / 64.
//!
//! Positions are checked by the callers, which know their bitmap; here a
//! position beyond the words is no bit, and nothing panics.
#![allow(clippy::arithmetic_side_effects)] // bit numbers stay far below 2^63

use core::ops::Range;

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

/// Sets `n` bits from `first` on.
pub(crate) fn set(words: &mut [u64], first: u64, n: u64) {
    if n == 0 {
        return;
    }
    let last = first + n - 1;
    debug_assert!(word(last) < words.len(), "a dirty bit has no place");
    match words.get_mut(word(first)..=word(last)) {
        Some([only]) => *only |= from_bit(first) & up_to_bit(last),
        Some([head, middle @ .., tail]) => {
            *head |= from_bit(first);
            middle.fill(!0);
            *tail |= up_to_bit(last);
        }
        _ => {}
    }
}

/// Whether bit `bit` is set.
pub(crate) fn get(words: &[u64], bit: u64) -> bool {
    words
        .get(word(bit))
        .is_some_and(|w| w >> (bit & 63) & 1 != 0)
}

/// The first bit in `range` that is `value`, or the range's end.
fn find(words: &[u64], range: Range<u64>, value: bool) -> u64 {
    let mut bit = range.start;
    while bit < range.end {
        let Some(&w) = words.get(word(bit)) else {
            return range.end;
        };
        let w = if value { w } else { !w };
        let rest = w & from_bit(bit);
        if rest != 0 {
            let found = (bit & !63) + u64::from(rest.trailing_zeros());
            return found.min(range.end);
        }
        bit = (bit | 63) + 1;
    }
    range.end
}

/// The maximal runs of set bits among `n` bits from `first` on.
pub(crate) fn runs(words: &[u64], first: u64, n: u64) -> impl Iterator<Item = Range<u64>> + '_ {
    let end = first.saturating_add(n);
    let mut at = first;
    core::iter::from_fn(move || {
        let start = find(words, at..end, true);
        if start >= end {
            return None;
        }
        at = find(words, start..end, false);
        Some(start..at)
    })
}
