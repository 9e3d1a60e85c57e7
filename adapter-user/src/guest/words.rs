// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bits in plain words: bit k is bit k % 64 of word k / 64, from the lowest on.

/// Sets the `n` bits from bit `first` on; `words` must have all of them.
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

/// Clears the `n` bits from bit `first` on; `words` must have all of them.
pub(crate) fn clear(words: &mut [u64], first: u64, n: u64) {
    if n == 0 {
        return;
    }
    let last = first + n - 1;
    let (from, to) = (!0 << (first % 64), !0 >> (63 - last % 64));
    match &mut words[(first / 64) as usize..=(last / 64) as usize] {
        [only] => *only &= !(from & to),
        [head, middle @ .., tail] => {
            *head &= !from;
            middle.fill(0);
            *tail &= !to;
        }
        [] => {}
    }
}
