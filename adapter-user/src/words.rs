// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs of bits in plain words: bit k is bit k % 64 of word k / 64.

use std::ops::Range;

/// Sets `n` bits from `first` on; they have their places.
pub(crate) fn set(words: &mut [u64], first: u64, n: u64) {
    if n == 0 {
        return;
    }
    let last = first + n - 1;
    let (from, to) = (!0 << (first % 64), !0 >> (63 - last % 64));
    match &mut words[(first / 64) as usize..=(last / 64) as usize] {
        [only] => *only |= from & to,
        [head, middle @ .., tail] => {
            *head |= from;
            middle.fill(!0);
            *tail |= to;
        }
        [] => {}
    }
}

/// The first bit from `at` on, below `end`, that is `value`, or `end`.
fn find(words: &[u64], mut at: u64, end: u64, value: bool) -> u64 {
    while at < end {
        let Some(word) = words.get((at / 64) as usize) else {
            return end;
        };
        let word = if value { *word } else { !word };
        let rest = word & !0 << (at % 64);
        if rest != 0 {
            return end.min((at & !63) + u64::from(rest.trailing_zeros()));
        }
        at = (at | 63) + 1;
    }
    end
}

/// The runs of set bits among `n` bits from `first` on.
pub(crate) fn runs(words: &[u64], first: u64, n: u64) -> impl Iterator<Item = Range<u64>> + '_ {
    let end = first.saturating_add(n);
    let mut at = first;
    std::iter::from_fn(move || {
        let start = find(words, at, end, true);
        at = find(words, start, end, false);
        (start < end).then_some(start..at)
    })
}
