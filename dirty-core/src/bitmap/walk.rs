// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walks over the pages of a bitmap. Its summaries lead past clean lines.
#![allow(clippy::arithmetic_side_effects)] // bits of one bitmap: fewer than 2^31

use core::ops::Range;

use crate::bitmap::layout::LINE_WORDS;
use crate::bitmap::Bitmap;
use crate::bits;
use crate::bits::runs::{Pages, Runs};
use crate::host::Memory;

impl<M: Memory> Bitmap<M> {
    /// The pages that are dirty or pinned, ascending. Leaves dirty pages dirty.
    pub fn pages(&mut self) -> impl Iterator<Item = u64> + '_ {
        Pages::new(self.nonempty_words())
    }

    /// The runs of pages that are dirty or pinned, ascending. No run ends where
    /// the next one starts. Leaves dirty pages dirty.
    pub fn runs(&mut self) -> impl Iterator<Item = Range<u64>> + '_ {
        Runs::new(self.nonempty_words())
    }

    /// The words that are not 0, each with the number of its first page.
    fn nonempty_words(&mut self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let view = self.view();
        let blocks = (0..).zip(view.lines.iter().zip(view.pinned_lines));
        blocks.flat_map(move |(block, (dirty, pinned))| {
            view.prefetch(block + 1);
            bits::ones(dirty | pinned).flat_map(move |k| {
                let line = block * 64 + k;
                let words = view.words(line, dirty >> (k & 63) & 1, pinned >> (k & 63) & 1);
                // A test of each word would be mispredicted half the time.
                let set = |flags, w: &u64| flags << 1 | u64::from(*w != 0);
                let flags = words.iter().rev().fold(0, set);
                bits::ones(flags).map(move |k| {
                    let word = words.get(k % LINE_WORDS).copied().unwrap_or(0);
                    ((line * LINE_WORDS + k) as u64 * 64, word)
                })
            })
        })
    }
}
