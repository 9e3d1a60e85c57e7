// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies of a bitmap: every page that is dirty or pinned, with page 0 at any bit
//! of the first word.
//!
//! A copy goes block by block; a block is what one word of a summary stands for.
//! Ones are written for a block whose lines are all full. A block whose lines are
//! all dirty by their words and have no pins is copied as it is. Where few lines
//! are nonempty (have a dirty or a pinned page) by their words, only these lines
//! and the full ones are visited. Otherwise every line is visited, and its words
//! are masked. The border between the two is where both cost the same.
#![allow(clippy::arithmetic_side_effects)] // words of one bitmap: fewer than 2^26

use core::ops::Range;

use crate::bitmap::layout::{View, LINE_WORDS};
use crate::bitmap::lines::Lines;
use crate::bitmap::Bitmap;
use crate::bits;
use crate::bits::shift::{shift_words, spill, stream_shifted, AHEAD_STEPS, STEP_WORDS};
use crate::bits::stream;
use crate::error::Error;
use crate::host::Memory;

/// Words in a block.
pub(crate) const BLOCK_WORDS: usize = 64 * LINE_WORDS;

/// Copies of so many words (16 MiB) or more go past the caches, which they would
/// only flush: 0.7 x the time from here on, 1.5 x below.
const STREAM_WORDS: usize = 1 << 21;

/// How to copy.
#[derive(Clone, Copy)]
struct Mode {
    /// The bit of page 0 in word 0 of the whole copy; below 64.
    shift: u32,
    /// The destination is zero.
    zeroed: bool,
    /// Store past the caches.
    stream: bool,
}

impl<M: Memory> Bitmap<M> {
    /// Copies the pages that are dirty or pinned to `out`, from word `first` of
    /// the whole copy on. Page 0 is bit `shift` (below 64) of word 0. Leaves
    /// dirty pages dirty.
    pub fn copy(&mut self, shift: u32, first: usize, out: &mut [u64]) {
        let mode = Mode {
            shift,
            zeroed: false,
            stream: false,
        };
        self.copy_with(mode, first, out, |_, _| {});
    }

    /// As [`copy`](Bitmap::copy), into words that are zero. Calls
    /// `touched(first, last)` for each run of words in `out` that may now be
    /// nonzero.
    pub(crate) fn copy_sparse(
        &mut self,
        shift: u32,
        first: usize,
        out: &mut [u64],
        touched: impl FnMut(usize, usize),
    ) {
        let mode = Mode {
            shift,
            zeroed: true,
            stream: false,
        };
        self.copy_with(mode, first, out, touched);
    }

    /// As [`copy_sparse`](Bitmap::copy_sparse), all of a bitmap that has few
    /// words, as tens of thousands of mappings may have: 0.4 x the instructions
    /// at 16 words. Returns whether a page is dirty or pinned.
    #[inline]
    pub(crate) fn copy_small(&mut self, shift: u32, out: &mut [u64]) -> bool {
        if self.layout.is_first_block_empty() {
            return false;
        }
        let lines = self.layout.only_block();
        let len = self.layout.dirty().len();
        let (out, after) = out.split_at_mut_checked(len).unwrap_or_default();
        let mode = Mode {
            shift,
            zeroed: true,
            stream: false,
        };
        let carry = if lines.is_plain() {
            put_words(mode, self.layout.dirty(), out, 0)
        } else if lines.is_full() {
            put_ones(mode, out, 0)
        } else {
            let view = self.view();
            let source = Source {
                lines,
                at: 0,
                dirty: view.dirty,
                pinned: view.pinned,
            };
            copy_block(mode, source, out, 0)
        };
        if let Some(out) = after.first_mut() {
            *out = carry;
        }
        true
    }

    /// Copies the pages that are dirty or pinned to `out`, with page 0 at bit
    /// `shift` of word 0, and cleans them. Overwrites the words; words beyond
    /// the last page's are left alone.
    ///
    /// # Errors
    ///
    /// `BitmapSize` if `out` is too short, or `shift` is not below 64; nothing
    /// is cleaned then.
    pub fn take(&mut self, shift: u32, out: &mut [u64]) -> Result<(), Error> {
        self.take_all(shift, out, false)
    }

    /// As [`take`](Bitmap::take), into words that are zero: visits only lines
    /// with dirty or pinned pages if they are few.
    ///
    /// # Errors
    ///
    /// Those of `take`.
    pub fn take_sparse(&mut self, shift: u32, out: &mut [u64]) -> Result<(), Error> {
        self.take_all(shift, out, true)
    }

    fn take_all(&mut self, shift: u32, out: &mut [u64], zeroed: bool) -> Result<(), Error> {
        let words = words_at(self.npages(), shift);
        if shift >= 64 || words > out.len() as u64 {
            return Err(Error::BitmapSize);
        }
        let mode = Mode {
            shift,
            zeroed,
            stream: words >= STREAM_WORDS as u64,
        };
        self.copy_with(mode, 0, out, |_, _| {});
        self.clear();
        Ok(())
    }

    /// Copies words `first..` of the whole copy to `out`, and calls `touched` for
    /// each run of words that is not skipped.
    #[inline]
    fn copy_with(
        &mut self,
        mode: Mode,
        first: usize,
        out: &mut [u64],
        mut touched: impl FnMut(usize, usize),
    ) {
        let words = words_at(self.npages(), mode.shift);
        let view = self.view();
        let end = first.saturating_add(out.len()).min(view.dirty.len());
        let mut carry = match first.checked_sub(1) {
            Some(before) => {
                let line = view.line(before / LINE_WORDS);
                let word = line.get(before % LINE_WORDS).copied();
                spill(word.unwrap_or(0), mode.shift)
            }
            None => 0,
        };
        let mut at = first;
        while at < end {
            let lines = view.block(at / BLOCK_WORDS);
            if lines.nonempty() == 0 && mode.zeroed && carry == 0 {
                at = end.min(next_nonempty_block(view, at..end) * BLOCK_WORDS);
                continue;
            }
            let mut next = end.min((at / BLOCK_WORDS + 1) * BLOCK_WORDS);
            let (full, plain) = (lines.is_full(), lines.is_plain());
            while (full || plain) && next < end {
                let lines = view.block(next / BLOCK_WORDS);
                if (lines.is_full(), lines.is_plain()) != (full, plain) {
                    break;
                }
                next = end.min(next + BLOCK_WORDS); // all of them at once
            }
            let (Some(dirty), Some(pinned), Some(out)) = (
                view.dirty.get(at..),
                view.pinned.get(at..),
                out.get_mut(at - first..next - first),
            ) else {
                return; // unreachable: all three have these words
            };
            let from = at - first;
            if lines.nonempty() == 0 {
                touched(from, from);
                carry = copy_clean(mode, out, carry);
            } else if full {
                touched(from, next - first - 1);
                carry = put_ones(mode, out, carry);
            } else if plain {
                touched(from, next - first - 1);
                let dirty = dirty.get(..out.len()).unwrap_or_default();
                carry = put_words(mode, dirty, out, carry);
            } else if let (true, Some(dirty), Some(pinned), Some(out)) = (
                lines.is_few(),
                dirty.first_chunk(),
                pinned.first_chunk(),
                out.first_chunk_mut(),
            ) {
                let block = Block {
                    lines,
                    dirty,
                    pinned,
                };
                if carry != 0 {
                    touched(from, from);
                }
                let touched = |first, last| touched(from + first, from + last);
                carry = copy_lines(mode, block, out, carry, touched);
            } else {
                touched(from, next - first - 1);
                let source = Source {
                    lines,
                    at: at % BLOCK_WORDS,
                    dirty,
                    pinned,
                };
                carry = copy_block(mode, source, out, carry);
            }
            at = next;
        }
        if mode.stream {
            stream::fence();
        }
        // The last word holds the bits that the shift pushes out of the last
        // page's word.
        if at == view.dirty.len() && words > at as u64 {
            if let Some(out) = out.get_mut(at - first) {
                if carry != 0 || !mode.zeroed {
                    touched(at - first, at - first);
                    *out = carry;
                }
            }
        }
    }
}

/// The first nonempty block of those with these words, or the block after them.
fn next_nonempty_block(view: View<'_>, words: Range<usize>) -> usize {
    let blocks = words.start / BLOCK_WORDS..words.end.div_ceil(BLOCK_WORDS);
    let lines = view.lines.get(blocks.clone()).unwrap_or_default();
    let pinned_lines = view.pinned_lines.get(blocks.clone()).unwrap_or_default();
    let mut lines = blocks.clone().zip(lines.iter().zip(pinned_lines));
    let nonempty = lines.find(|(_, (dirty, pinned))| *dirty | *pinned != 0);
    nonempty.map_or(blocks.end, |(block, _)| block)
}

/// The words of the whole copy of `npages` pages.
fn words_at(npages: u64, shift: u32) -> u64 {
    (npages + u64::from(shift)).div_ceil(64)
}

/// Copies an empty block. `carry` is what the word before it pushes into it;
/// returns what its last word pushes out, which is nothing.
#[inline]
fn copy_clean(mode: Mode, out: &mut [u64], carry: u64) -> u64 {
    if !mode.zeroed {
        out.fill(0);
    }
    if let (Some(out), 1..) = (out.first_mut(), carry) {
        *out |= carry;
    }
    0
}

/// Writes words of a block to `out`, from its word `at` on: the dirty bits of
/// lines in the summary, ones for full lines, and the pinned bits. The words are
/// whole lines, or in one line.
#[inline]
fn merge_lines<const N: usize>(
    lines: Lines,
    at: usize,
    dirty: &[u64; N],
    pinned: &[u64; N],
    out: &mut [u64; N],
) {
    *out = *dirty;
    if lines.dirty != lines.all {
        for (number, words) in (at / LINE_WORDS..).zip(out.chunks_mut(LINE_WORDS)) {
            let valid = 0u64.wrapping_sub(lines.dirty >> number & 1);
            words.iter_mut().for_each(|w| *w &= valid);
        }
    }
    if lines.full != 0 {
        for (number, words) in (at / LINE_WORDS..).zip(out.chunks_mut(LINE_WORDS)) {
            let full = 0u64.wrapping_sub(lines.full >> number & 1);
            words.iter_mut().for_each(|w| *w |= full);
        }
    }
    // Not line by line: the processor fetches reads with gaps late, 2 x the time.
    if lines.pinned != 0 {
        out.iter_mut().zip(pinned).for_each(|(w, p)| *w |= p);
    }
}

/// A whole block: its lines, and its dirty and pinned words.
#[derive(Clone, Copy)]
struct Block<'a> {
    lines: Lines,
    dirty: &'a [u64; BLOCK_WORDS],
    pinned: &'a [u64; BLOCK_WORDS],
}

/// Copies the nonempty lines of a block to words that are zero if the mode says
/// so, and calls `touched` for the words of each.
#[inline]
fn copy_lines(
    mode: Mode,
    block: Block<'_>,
    out: &mut [u64; BLOCK_WORDS],
    carry: u64,
    mut touched: impl FnMut(usize, usize),
) -> u64 {
    let mut carry = copy_clean(mode, out, carry);
    let mut lines = block.lines;
    if lines.full != 0 {
        carry = fill_lines(mode, lines.full, out, &mut touched);
        lines = lines.by_words();
    }
    for number in bits::ones(lines.nonempty()) {
        let first = number % 64 * LINE_WORDS; // `% 64` lets the compiler drop checks
        let (Some(dirty), Some(pinned), Some((out, after))) = (
            block.dirty.get(first..).and_then(|d| d.first_chunk()),
            block.pinned.get(first..).and_then(|p| p.first_chunk()),
            out.get_mut(first..)
                .and_then(|o| o.split_first_chunk_mut::<LINE_WORDS>()),
        ) else {
            return 0; // unreachable: a block has 64 lines
        };
        touched(first, first + LINE_WORDS);
        let mut words = [0; LINE_WORDS];
        merge_lines(lines.only(number), first, dirty, pinned, &mut words);
        if mode.shift == 0 {
            *out = words;
            continue;
        }
        let [before, ..] = *out;
        shift_words(&words, mode.shift, before, out);
        let [.., last] = words;
        match after.first_mut() {
            Some(out) => *out |= spill(last, mode.shift),
            None => carry = spill(last, mode.shift),
        }
    }
    carry
}

/// Writes ones for the lines of a block in `full`, where zeros are but for what
/// other lines push in, and calls `touched` for the words of each.
#[inline(never)]
fn fill_lines(
    mode: Mode,
    full: u64,
    out: &mut [u64; BLOCK_WORDS],
    touched: &mut impl FnMut(usize, usize),
) -> u64 {
    let stream = false; // a line alone is not worth it
    let mode = Mode { stream, ..mode };
    let mut carry = 0;
    for number in bits::ones(full) {
        let first = number * LINE_WORDS;
        touched(first, first + LINE_WORDS);
        let (_, out) = out.split_at_mut_checked(first).unwrap_or_default();
        let (out, after) = out.split_at_mut_checked(LINE_WORDS).unwrap_or_default();
        let before = out.first().copied().unwrap_or(0);
        let spilt = put_ones(mode, out, before);
        match after.first_mut() {
            Some(out) => *out |= spilt,
            None => carry = spilt,
        }
    }
    carry
}

/// Words of a block, from its word `at` on. `dirty` and `pinned` may go on
/// behind the block.
#[derive(Clone, Copy)]
struct Source<'a> {
    lines: Lines,
    at: usize,
    dirty: &'a [u64],
    pinned: &'a [u64],
}

/// Copies words of a block, as many as `out` has.
fn copy_block(mode: Mode, mut source: Source<'_>, mut out: &mut [u64], mut carry: u64) -> u64 {
    while !out.is_empty() {
        let n = match (source.at % LINE_WORDS, out.len()) {
            (0, STEP_WORDS..) => copy_step::<STEP_WORDS>(mode, source, out, &mut carry),
            (0, LINE_WORDS..) => copy_step::<LINE_WORDS>(mode, source, out, &mut carry),
            _ => copy_step::<1>(mode, source, out, &mut carry),
        };
        source.dirty = source.dirty.get(n..).unwrap_or_default();
        source.pinned = source.pinned.get(n..).unwrap_or_default();
        source.at += n;
        out = out.get_mut(n..).unwrap_or_default();
    }
    carry
}

/// Copies the first `N` words. Returns `N`.
#[inline]
fn copy_step<const N: usize>(
    mode: Mode,
    source: Source<'_>,
    out: &mut [u64],
    carry: &mut u64,
) -> usize {
    if mode.stream {
        for words in [source.dirty, source.pinned] {
            let ahead = words.get(AHEAD_STEPS * N..(AHEAD_STEPS + 1) * N);
            stream::prefetch(ahead.unwrap_or_default());
        }
    }
    if let (Some(dirty), Some(pinned), Some(out)) = (
        source.dirty.first_chunk(),
        source.pinned.first_chunk(),
        out.first_chunk_mut::<N>(),
    ) {
        let mut words = [0; N];
        merge_lines(source.lines, source.at, dirty, pinned, &mut words);
        *carry = put_words(mode, &words, out, *carry);
    }
    N
}

/// Writes words to `out`, shifted as the mode says. `carry` is what the word
/// before pushes into them; returns what the last word pushes out.
#[inline]
fn put_words(mode: Mode, words: &[u64], out: &mut [u64], carry: u64) -> u64 {
    if !mode.stream {
        shift_words(words, mode.shift, carry, out);
    } else if mode.shift == 0 {
        stream::copy(words, out);
    } else {
        stream_shifted(words, mode.shift, carry, out);
    }
    words.last().map_or(carry, |last| spill(*last, mode.shift))
}

/// As [`put_words`], for words that are all ones.
#[inline]
fn put_ones(mode: Mode, out: &mut [u64], carry: u64) -> u64 {
    fill(mode.stream, out);
    if let Some(first) = out.first_mut() {
        *first = !0 << mode.shift | carry;
    }
    spill(!0, mode.shift)
}

/// Sets all bits of the words.
#[inline]
fn fill(stream: bool, out: &mut [u64]) {
    if stream {
        return stream::fill(out);
    }
    out.fill(!0);
}

/// Writes words `first..` of the whole copy of `npages` pages that are all dirty.
pub(crate) fn copy_full(npages: u64, shift: u32, first: u64, out: &mut [u64]) {
    let words = words_at(npages, shift).saturating_sub(first);
    let words = usize::try_from(words).unwrap_or(usize::MAX);
    let behind = out.get_mut(words..).unwrap_or_default();
    behind.fill(0);
    let len = out.len().min(words);
    let out = out.get_mut(..len).unwrap_or_default();
    let stream = len >= STREAM_WORDS;
    fill(stream, out);
    if stream {
        stream::fence();
    }
    if let (Some(out), 0) = (out.first_mut(), first) {
        *out &= bits::from_bit(shift.into());
    }
    if let (Some(out), true) = (out.last_mut(), len == words) {
        *out &= bits::up_to_bit(u64::from(shift) + npages - 1);
    }
}
