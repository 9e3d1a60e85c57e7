// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bits in plain words: bit k is bit k % 64 of word k / 64, from the lowest on.

/// The bits of word `at` that are between bit `first` and bit `last` of all words.
fn mask(at: u64, first: u64, last: u64) -> u64 {
    let start = at * 64;
    if first > start + 63 || last < start {
        return 0;
    }
    let from = !0 << first.saturating_sub(start);
    let to = !0 >> (63 - (last - start).min(63));
    from & to
}

/// Clears every bit but those from `first` to `last`.
pub(super) fn keep(words: &mut [u64], first: u64, last: u64) {
    for (at, word) in (0..).zip(words) {
        *word &= mask(at, first, last);
    }
}

/// Sets the bits from `first` to `last`.
pub(super) fn set(words: &mut [u64], first: u64, last: u64) {
    let end = (last / 64).saturating_add(1);
    let words = words.iter_mut().enumerate().take(end as usize);
    for (at, word) in words.skip((first / 64) as usize) {
        *word |= mask(at as u64, first, last);
    }
}
