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

/// The runs of set bits among `n` bits from `first` on.
pub(crate) fn runs(words: &[u64], first: u64, n: u64) -> impl Iterator<Item = Range<u64>> + '_ {
    let end = first.saturating_add(n);
    let start = words.len().min((first / 64) as usize);
    let stop = words.len().min(end.div_ceil(64) as usize);
    let skipped = start as u64 * 64;
    dirty_core::runs(words.get(start..stop).unwrap_or_default())
        .map(move |run| first.max(run.start + skipped)..end.min(run.end + skipped))
        .filter(|run| !run.is_empty())
}
