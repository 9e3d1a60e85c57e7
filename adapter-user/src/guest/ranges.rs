// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty pages as ranges of addresses.

use std::borrow::Cow;

use dirty_core::PageSize;

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
}

/// The ranges of the pages whose bits are set, ascending. No two touch.
pub(super) struct Ranges<'a> {
    /// Bit k % 64 of word k / 64 stands for page k.
    words: Cow<'a, [u64]>,
    /// The number of the next word, and the bits that are left of the word before it.
    next: usize,
    left: u64,
    pgsize: PageSize,
    /// The address of page 0.
    base: u64,
    /// The first and last address that ranges may have, which may cut a page short.
    bounds: (u64, u64),
}

impl<'a> Ranges<'a> {
    /// `base` is the address of page 0. The pages share a byte with the addresses of
    /// `bounds`.
    pub(super) fn new(
        words: Cow<'a, [u64]>,
        pgsize: PageSize,
        base: u64,
        bounds: (u64, u64),
    ) -> Self {
        Ranges {
            words,
            next: 0,
            left: 0,
            pgsize,
            base,
            bounds,
        }
    }

    /// The next run of set bits: the first, and the one after the last.
    #[inline]
    fn next_run(&mut self) -> Option<(u64, u64)> {
        while self.left == 0 {
            self.left = *self.words.get(self.next)?;
            self.next += 1;
        }
        // Ones up to the end of the run, and below its start.
        let ones = self.left | (self.left - 1);
        let word = (self.next as u64 - 1) * 64;
        let start = word + u64::from(self.left.trailing_zeros());
        let mut end = word + u64::from(ones.trailing_ones());
        self.left &= ones.wrapping_add(1);
        if ones == !0 {
            while let Some(more) = self.words.get(self.next) {
                self.next += 1;
                end += u64::from(more.trailing_ones());
                self.left = more & more.wrapping_add(1);
                if *more != !0 {
                    break;
                }
            }
        }
        Some((start, end))
    }
}

impl Iterator for Ranges<'_> {
    type Item = Range;

    #[inline]
    fn next(&mut self) -> Option<Range> {
        let (start, end) = self.next_run()?;
        let shift = self.pgsize.shift();
        let gpa = (self.base + (start << shift)).max(self.bounds.0);
        // The last page may end at 2^64.
        let last = self.base.wrapping_add(end << shift).wrapping_sub(1);
        let size = last.min(self.bounds.1) - gpa + 1;
        Some(Range { gpa, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each range of the bits that are set, found bit by bit.
    fn naive(words: &[u64]) -> Vec<Range> {
        let mut ranges: Vec<Range> = Vec::new();
        for page in (0..words.len() * 64).filter(|k| words[k / 64] >> (k % 64) & 1 != 0) {
            let gpa = (page as u64) << 12;
            match ranges.last_mut() {
                Some(last) if last.gpa + last.size == gpa => last.size += 4096,
                _ => ranges.push(Range { gpa, size: 4096 }),
            }
        }
        ranges
    }

    #[test]
    fn every_order_of_telling_words() {
        let telling = [0, 1, 1 << 63, !0, !0 << 3, !0 >> 3, 0b1011, 5 << 61, !6];
        let pgsize = PageSize::new(4096).unwrap();
        for k in 0..telling.len().pow(4) {
            let words: Vec<u64> = (0..4).map(|at| telling[k / 9usize.pow(at) % 9]).collect();
            let bounds = (0, 4 * 64 * 4096 - 1);
            let ranges = Ranges::new(Cow::Borrowed(&words), pgsize, 0, bounds);
            assert_eq!(ranges.collect::<Vec<_>>(), naive(&words), "{words:x?}");
        }
    }

    #[test]
    fn bounds_cut_pages_short() {
        let pgsize = PageSize::new(1 << 63).unwrap();
        let bounds = (0x5000, u64::MAX - 0x1000);
        let ranges = Ranges::new(Cow::Borrowed(&[0b11]), pgsize, 0, bounds);
        let size = bounds.1 - bounds.0 + 1;
        assert!(ranges.eq([Range { gpa: 0x5000, size }]));
    }
}
