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

/// ORs `more` into `words`, which are as many, and returns how many bits `more` has.
pub(crate) fn or(words: &mut [u64], more: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("popcnt") {
        // SAFETY: the processor has the instruction.
        return unsafe { or_popcnt(words, more) };
    }
    or_counting(words, more)
}

/// As `or`, with the instruction POPCNT, which baseline x86-64 does not have. Counting
/// without it takes longer than all the rest.
///
/// # Safety
///
/// The processor has the instruction.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "popcnt")]
unsafe fn or_popcnt(words: &mut [u64], more: &[u64]) -> u64 {
    or_counting(words, more)
}

/// Most words are clean: some at a time are passed over.
#[inline(always)]
fn or_counting(words: &mut [u64], more: &[u64]) -> u64 {
    const BLOCK: usize = 16;
    let mut ones = 0;
    let mut or = |words: &mut [u64], more: &[u64]| {
        if more.iter().fold(0, |any, more| any | more) == 0 {
            return;
        }
        for (word, more) in words.iter_mut().zip(more) {
            ones += u64::from(more.count_ones());
            *word |= more;
        }
    };
    let (mut blocks, mut with) = (words.chunks_exact_mut(BLOCK), more.chunks_exact(BLOCK));
    for (words, more) in blocks.by_ref().zip(with.by_ref()) {
        or(words, more);
    }
    or(blocks.into_remainder(), with.remainder());
    ones
}

/// How many of the `n` bits from bit `first` on are set; `words` must have all of them.
pub(crate) fn count(words: &[u64], first: u64, n: u64) -> u64 {
    if n == 0 {
        return 0;
    }
    let ones = |word: &u64| u64::from(word.count_ones());
    let last = first + n - 1;
    let (from, to) = (!0 << (first % 64), !0 >> (63 - last % 64));
    match &words[(first / 64) as usize..=(last / 64) as usize] {
        [only] => ones(&(only & from & to)),
        [head, middle @ .., tail] => {
            ones(&(head & from)) + ones(&(tail & to)) + middle.iter().map(ones).sum::<u64>()
        }
        [] => 0,
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
