// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walks over the pages of a bitmap. Its summaries lead past clean lines, and
//! past the words of full ones.
#![allow(clippy::arithmetic_side_effects)] // bits of one bitmap: fewer than 2^31

use core::ops::Range;

use crate::bitmap::layout::{first_page, LINE_WORDS};
use crate::bitmap::Bitmap;
use crate::bits;
use crate::bits::runs::{Pages, Part, Runs};
use crate::host::Memory;

impl<M: Memory> Bitmap<M> {
    /// The pages that are dirty or pinned, ascending. Leaves dirty pages dirty.
    pub fn pages(&mut self) -> impl Iterator<Item = u64> + '_ {
        Pages::new(self.parts())
    }

    /// The runs of pages that are dirty or pinned, ascending. No run ends where
    /// the next one starts. Leaves dirty pages dirty.
    pub fn runs(&mut self) -> impl Iterator<Item = Range<u64>> + '_ {
        Runs::new(self.parts())
    }

    /// The words that are not 0, and runs of full lines.
    fn parts(&mut self) -> impl Iterator<Item = Part> + '_ {
        let view = self.view();
        let blocks = view.lines.iter().zip(view.full).zip(view.pinned_lines);
        (0..)
            .zip(blocks)
            .flat_map(move |(block, ((dirty, full), pinned))| {
                view.prefetch(block + 1);
                // Full lines are visited where a run of them starts.
                let starts = full & !(full << 1);
                bits::ones((dirty | pinned) & !full | starts).flat_map(move |k| {
                    let line = block * 64 + k;
                    let run = u64::from((full >> (k & 63)).trailing_ones());
                    let (mut words, mut flags) = ([0; LINE_WORDS], 1);
                    if run == 0 {
                        words = view.words(line, dirty >> (k & 63) & 1, pinned >> (k & 63) & 1);
                        // A test of each word would be mispredicted half the time.
                        let set = |flags, w: &u64| flags << 1 | u64::from(*w != 0);
                        flags = words.iter().rev().fold(0, set);
                    }
                    let first = first_page(line as u64);
                    bits::ones(flags).map(move |k| match run {
                        0 => {
                            let word = words.get(k % LINE_WORDS).copied().unwrap_or(0);
                            Part::Word(first + k as u64 * 64, word)
                        }
                        run => Part::Run(first..first + first_page(run)),
                    })
                })
            })
    }
}
