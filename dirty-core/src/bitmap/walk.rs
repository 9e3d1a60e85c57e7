// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walks over the pages of a bitmap. Its summaries lead past clean lines, and
//! past the words of full ones.
#![allow(clippy::arithmetic_side_effects)] // bits of one bitmap: fewer than 2^31

use core::ops::Range;

use crate::bitmap::layout::{first_page, View, LINE_WORDS};
use crate::bitmap::lines::Lines;
use crate::bitmap::Bitmap;
use crate::bits::runs::{Pages, Part, Runs};
use crate::host::Memory;

impl<M: Memory> Bitmap<M> {
    /// The pages that are dirty or pinned, ascending. Leaves dirty pages dirty.
    pub fn pages(&mut self) -> impl Iterator<Item = u64> + '_ {
        Pages::new(Walk::new(self.view()))
    }

    /// The runs of pages that are dirty or pinned, ascending. No run ends where
    /// the next one starts. Leaves dirty pages dirty.
    pub fn runs(&mut self) -> impl Iterator<Item = Range<u64>> + '_ {
        Runs::new(Walk::new(self.view()))
    }
}

/// The words of a bitmap that are not 0, and runs of full lines.
struct Walk<'a> {
    view: View<'a>,
    /// The block after this one.
    next_block: usize,
    /// The lines of this block.
    lines: Lines,
    /// Those of them that are nonempty and not visited yet.
    left: u64,
    /// The line that is visited: its first page, its words, and a bit for each
    /// word that is not 0 and not visited yet.
    first: u64,
    words: [u64; LINE_WORDS],
    nonzero: u64,
}

impl<'a> Walk<'a> {
    fn new(view: View<'a>) -> Self {
        let lines = Lines {
            dirty: 0,
            full: 0,
            pinned: 0,
            all: 0,
        };
        Walk {
            view,
            next_block: 0,
            lines,
            left: 0,
            first: 0,
            words: [0; LINE_WORDS],
            nonzero: 0,
        }
    }

    /// Goes to the next block. Returns whether there is one.
    #[inline]
    fn enter_block(&mut self) -> bool {
        let there = self.next_block < self.view.lines.len();
        self.lines = self.view.block(self.next_block);
        self.left = self.lines.nonempty();
        self.next_block += 1;
        if self.left != 0 {
            self.view.prefetch(self.next_block);
        }
        there
    }

    /// Visits line `number` of this block by its words.
    #[inline]
    fn enter_line(&mut self, number: u32) {
        self.left &= self.left - 1;
        let line = (self.next_block - 1) * 64 + number as usize;
        let Lines { dirty, pinned, .. } = self.lines;
        self.first = first_page(line as u64);
        self.words = self
            .view
            .words(line, dirty >> number & 1, pinned >> number & 1);
        // A test of each word would be mispredicted half the time.
        let set = |flags, w: &u64| flags << 1 | u64::from(*w != 0);
        self.nonzero = self.words.iter().rev().fold(0, set);
    }

    /// Visits the full lines from line `number` of this block on: at least those
    /// of this block, and those of all full blocks that follow.
    #[inline]
    fn full_lines(&mut self, number: u32) -> Range<u64> {
        let start = (self.next_block as u64 - 1) * 64 + u64::from(number);
        let n = (self.lines.full >> number).trailing_ones();
        let mut end = start + u64::from(n);
        // Full lines that end with the block may go on behind it.
        self.left &= u64::MAX.checked_shl(number + n).unwrap_or(0);
        if number + n == 64 {
            let blocks = self.view.full.get(self.next_block..).unwrap_or_default();
            let more = blocks.iter().take_while(|full| **full == !0).count();
            self.next_block += more;
            end += more as u64 * 64;
        }
        first_page(start)..first_page(end)
    }
}

impl Iterator for Walk<'_> {
    type Item = Part;

    #[inline]
    fn next(&mut self) -> Option<Part> {
        loop {
            if self.nonzero != 0 {
                let at = self.nonzero.trailing_zeros() as usize % LINE_WORDS;
                self.nonzero &= self.nonzero - 1;
                let word = self.words.get(at).copied().unwrap_or(0);
                return Some(Part::Word(self.first + at as u64 * 64, word));
            }
            while self.left == 0 {
                if !self.enter_block() {
                    return None;
                }
            }
            let number = self.left.trailing_zeros();
            if self.lines.full >> number & 1 != 0 {
                return Some(Part::Run(self.full_lines(number)));
            }
            self.enter_line(number);
        }
    }
}
