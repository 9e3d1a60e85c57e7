// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image of a bitmap: every page that is dirty or pinned, from some bit of
//! the first word on. One pass, and the dirty bits are cleared in it if they
//! are to be.
//!
//! It goes by blocks, which are what one word of a summary stands for. Where
//! few lines have something to tell, only they are visited; where many have,
//! all words are copied. The border is where both cost the same.
#![allow(clippy::arithmetic_side_effects)] // words of one bitmap: fewer than 2^26

use crate::bitmap::{Bitmap, LINE_WORDS};
use crate::bits;
use crate::error::Error;
use crate::host::Memory;
use crate::stream;

/// Words in a block.
pub(crate) const BLOCK_WORDS: usize = 64 * LINE_WORDS;

/// More lines than these have a block copied whole.
const FEW_LINES: u32 = 25;

/// Words copied before they are cleared: eight cache lines. (Measured against
/// 64 to 4096 words: 0.7 x the time at most sizes.)
const STEP_WORDS: usize = 64;

/// Images of so many words (16 MiB) go past the caches, which they would only
/// empty: 0.7 x the time from there on, 1.5 x below.
const STREAM_WORDS: usize = 1 << 21;

/// What to do with an image.
#[derive(Clone, Copy)]
struct Copy {
    /// Bit of page 0 in word 0 of the whole image; below 64.
    shift: u32,
    /// The destination is zero.
    zeroed: bool,
    /// Clear the dirty pages.
    clear: bool,
    /// Store past the caches.
    stream: bool,
}

impl<M: Memory> Bitmap<M> {
    /// Writes words `first..` of the image at `shift` to `out`: every page that
    /// is dirty or pinned, with page 0 at bit `shift` (below 64) of word 0.
    /// Every page stays dirty that is.
    pub fn image(&mut self, shift: u32, first: usize, out: &mut [u64]) {
        let copy = Copy {
            shift,
            zeroed: false,
            clear: false,
            stream: false,
        };
        self.copy(copy, first, out, |_, _| {});
    }

    /// Likewise into words that are zero already. `touched` learns which may be
    /// zero no more: the first and the last of some in a row, counted in `out`.
    pub(crate) fn image_sparse(
        &mut self,
        shift: u32,
        first: usize,
        out: &mut [u64],
        touched: impl FnMut(usize, usize),
    ) {
        let copy = Copy {
            shift,
            zeroed: true,
            clear: false,
            stream: false,
        };
        self.copy(copy, first, out, touched);
    }

    /// Likewise the whole image of a bitmap of few words, of which there may be
    /// tens of thousands: 0.4 x the instructions at 16 words. Says whether there
    /// is a page to tell of.
    #[inline]
    pub(crate) fn image_small(&mut self, shift: u32, out: &mut [u64]) -> bool {
        let parts = self.parts();
        if parts.lines.iter().all(|lines| *lines == 0) {
            return false;
        }
        if parts.pinned_lines.iter().any(|lines| *lines != 0) {
            or(parts.dirty, parts.pinned);
        }
        shift_words(parts.dirty, shift, 0, out);
        if let (Some(last), Some(out)) = (parts.dirty.last(), out.get_mut(parts.dirty.len())) {
            *out = spill(*last, shift);
        }
        true
    }

    /// Writes the whole image at `shift` to `out` and clears the dirty pages,
    /// in the same pass.
    ///
    /// # Errors
    ///
    /// `BitmapSize` if `out` is too short; nothing is taken then.
    pub fn take(&mut self, shift: u32, out: &mut [u64]) -> Result<(), Error> {
        self.take_all(shift, out, false)
    }

    /// Likewise into words that are zero already: visits only lines that have
    /// something to tell, if they are few.
    ///
    /// # Errors
    ///
    /// `BitmapSize` if `out` is too short; nothing is taken then.
    pub fn take_sparse(&mut self, shift: u32, out: &mut [u64]) -> Result<(), Error> {
        self.take_all(shift, out, true)
    }

    fn take_all(&mut self, shift: u32, out: &mut [u64], zeroed: bool) -> Result<(), Error> {
        let words = image_words(self.npages(), shift);
        if shift >= 64 || words > out.len() as u64 {
            return Err(Error::BitmapSize);
        }
        let copy = Copy {
            shift,
            zeroed,
            clear: true,
            stream: words >= STREAM_WORDS as u64,
        };
        self.copy(copy, 0, out, |_, _| {});
        Ok(())
    }

    /// Copies words `first..` of the image to `out`, and tells `touched` about
    /// each that is not skipped.
    #[inline]
    fn copy(
        &mut self,
        copy: Copy,
        first: usize,
        out: &mut [u64],
        mut touched: impl FnMut(usize, usize),
    ) {
        let npages = self.npages();
        let parts = self.parts();
        let end = first.saturating_add(out.len()).min(parts.dirty.len());
        let before = first.checked_sub(1);
        let mut carry = before.map_or(0, |at| {
            let words = [parts.dirty.get(at), parts.pinned.get(at)];
            let page_bits = words.iter().flatten().fold(0, |all, word| all | **word);
            spill(page_bits, copy.shift)
        });
        let blocks = first / BLOCK_WORDS..end.div_ceil(BLOCK_WORDS);
        let lines = parts.lines.get_mut(blocks.clone()).unwrap_or_default();
        let pinned_lines = parts.pinned_lines.get(blocks.clone()).unwrap_or_default();
        for ((block, lines), pinned_lines) in blocks.zip(lines).zip(pinned_lines) {
            if copy.zeroed && *lines == 0 && carry == 0 {
                continue;
            }
            let at = (block * BLOCK_WORDS).max(first);
            let next = ((block + 1) * BLOCK_WORDS).min(end);
            if at >= next {
                break; // the words begin behind the last page
            }
            let (Some(dirty), Some(pinned), Some(out)) = (
                parts.dirty.get_mut(at..next),
                parts.pinned.get(at..next),
                out.get_mut(at - first..next - first),
            ) else {
                return; // all have these words: never
            };
            let from = at - first;
            carry = if *lines == 0 {
                touched(from, from);
                copy_clean(copy, out, carry)
            } else if let (true, Some(dirty), Some(pinned), Some(out)) = (
                lines.count_ones() <= FEW_LINES,
                dirty.first_chunk_mut(),
                pinned.first_chunk(),
                out.first_chunk_mut(),
            ) {
                or_lines(dirty, pinned, *pinned_lines);
                touched(from, from);
                for line in ones(*lines) {
                    let line = from + line * LINE_WORDS;
                    touched(line, line + LINE_WORDS);
                }
                copy_lines(copy, *lines, dirty, out, carry)
            } else {
                touched(from, next - first - 1);
                let pinned = if *pinned_lines == 0 { &[] } else { pinned };
                copy_block(copy, dirty, pinned, out, carry)
            };
            if copy.clear {
                *lines = *pinned_lines;
            }
        }
        if copy.stream {
            stream::fence();
        }
        let words = image_words(npages, copy.shift);
        if end == parts.dirty.len() && words > end as u64 {
            // None if the words begin behind the image.
            let at = end.checked_sub(first);
            if let Some((at, out)) = at.and_then(|at| Some((at, out.get_mut(at)?))) {
                if carry != 0 || !copy.zeroed {
                    touched(at, at);
                    *out = carry;
                }
            }
        }
    }

    /// Clears the dirty pages.
    pub fn clear(&mut self) {
        let parts = self.parts();
        let blocks = parts.dirty.chunks_mut(BLOCK_WORDS);
        let lines = parts.lines.iter_mut().zip(parts.pinned_lines);
        for ((lines, pinned_lines), dirty) in lines.zip(blocks) {
            if *lines != 0 {
                clear_lines(*lines, dirty);
                *lines = *pinned_lines;
            }
        }
    }
}

/// Clears those lines of a block that are set in `lines`, at least.
pub(crate) fn clear_lines(lines: u64, block: &mut [u64]) {
    match block.first_chunk_mut() {
        Some(block) if lines.count_ones() <= FEW_LINES => {
            for at in ones(lines) {
                if let Some(line) = line_mut(block, at * LINE_WORDS) {
                    *line = [0; LINE_WORDS];
                }
            }
        }
        _ => block.fill(0),
    }
}

/// Words of the image of `npages` pages.
fn image_words(npages: u64, shift: u32) -> u64 {
    (npages + u64::from(shift)).div_ceil(64)
}

/// The bits that are set in a word.
fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.checked_sub(1)?;
        Some(bit as usize)
    })
}

/// What `word << shift` pushes into the next word.
fn spill(word: u64, shift: u32) -> u64 {
    word.checked_shr(64 - shift).unwrap_or(0)
}

/// Copies a block that has nothing to tell. `carry` is what the word before it
/// pushes into it; returns what its last word pushes out.
fn copy_clean(copy: Copy, out: &mut [u64], carry: u64) -> u64 {
    if !copy.zeroed {
        out.fill(0);
    }
    if let Some(out) = out.first_mut() {
        *out |= carry;
    }
    0
}

/// Makes pinned pages dirty, as they are when their pins go; until then nobody
/// can tell.
#[inline]
fn or(dirty: &mut [u64], pinned: &[u64]) {
    dirty.iter_mut().zip(pinned).for_each(|(d, p)| *d |= p);
}

/// Likewise in some lines of a block.
fn or_lines(dirty: &mut [u64; BLOCK_WORDS], pinned: &[u64; BLOCK_WORDS], lines: u64) {
    for line in ones(lines) {
        let first = line * LINE_WORDS;
        let pinned = pinned.get(first..).and_then(|p| p.first_chunk());
        if let (Some(dirty), Some(pinned)) = (line_mut(dirty, first), pinned) {
            let pinned: &[u64; LINE_WORDS] = pinned;
            or(dirty, pinned);
        }
    }
}

/// Copies the lines of a block that have something to tell.
fn copy_lines(
    copy: Copy,
    lines: u64,
    dirty: &mut [u64; BLOCK_WORDS],
    out: &mut [u64; BLOCK_WORDS],
    carry: u64,
) -> u64 {
    let mut carry = copy_clean(copy, out, carry);
    for at in ones(lines) {
        let first = at * LINE_WORDS;
        let (Some(dirty), Some((out, after))) = (
            line_mut(dirty, first),
            out.get_mut(first..).and_then(|o| o.split_first_chunk_mut()),
        ) else {
            return 0; // a block has 64 lines: never
        };
        let line: [u64; LINE_WORDS] = *dirty;
        if copy.clear {
            *dirty = [0; LINE_WORDS];
        }
        let out: &mut [u64; LINE_WORDS] = out;
        if copy.shift == 0 {
            *out = line;
            continue;
        }
        let [before, ..] = *out;
        shift_words(&line, copy.shift, before, out);
        let [.., last] = line;
        match after.first_mut() {
            Some(out) => *out |= spill(last, copy.shift),
            None => carry = spill(last, copy.shift),
        }
    }
    carry
}

/// The line of a block that begins with word `first`.
fn line_mut(words: &mut [u64; BLOCK_WORDS], first: usize) -> Option<&mut [u64; LINE_WORDS]> {
    words.get_mut(first..)?.first_chunk_mut()
}

/// Copies every word of a block, with its pinned words if there are any.
fn copy_block(
    copy: Copy,
    dirty: &mut [u64],
    mut pinned: &[u64],
    out: &mut [u64],
    mut carry: u64,
) -> u64 {
    let mut steps = dirty.chunks_exact_mut(STEP_WORDS);
    let mut outs = out.chunks_exact_mut(STEP_WORDS);
    for (dirty, out) in (&mut steps).zip(&mut outs) {
        if let Some((here, after)) = pinned.split_first_chunk::<STEP_WORDS>() {
            or(dirty, here);
            pinned = after;
        }
        carry = copy_step(copy, dirty, out, carry);
    }
    let dirty = steps.into_remainder();
    or(dirty, pinned);
    copy_step(copy, dirty, outs.into_remainder(), carry)
}

#[inline]
fn copy_step(copy: Copy, dirty: &mut [u64], out: &mut [u64], carry: u64) -> u64 {
    let Some(last) = dirty.last().copied() else {
        return carry;
    };
    if !copy.stream {
        shift_words(dirty, copy.shift, carry, out);
    } else if copy.shift == 0 {
        stream::copy(dirty, out);
    } else {
        let mut words = [0; STEP_WORDS];
        shift_words(dirty, copy.shift, carry, &mut words);
        stream::copy(&words, out);
    }
    if copy.clear {
        dirty.fill(0);
    }
    spill(last, copy.shift)
}

/// Puts `words`, shifted up by `shift` bits with `carry` below, to `out`. (A
/// loop over slices: the compiler makes vectors of it.)
#[inline]
fn shift_words(words: &[u64], shift: u32, carry: u64, out: &mut [u64]) {
    if shift == 0 {
        if let Some(out) = out.get_mut(..words.len()) {
            out.copy_from_slice(words);
        }
        return;
    }
    let (Some((o, out)), Some((w, above))) = (out.split_first_mut(), words.split_first()) else {
        return;
    };
    *o = w << shift | carry;
    for ((o, w), below) in out.iter_mut().zip(above).zip(words) {
        *o = w << shift | below >> (64 - shift);
    }
}

/// Writes words `first..` of the image of `npages` pages that are all dirty.
pub(crate) fn full_image(npages: u64, shift: u32, first: u64, out: &mut [u64]) {
    out.fill(0);
    let window = first * 64..(first + out.len() as u64) * 64;
    let start = u64::from(shift).max(window.start);
    let end = (u64::from(shift) + npages).min(window.end);
    if start < end {
        bits::set(out, start - window.start, end - window.start - 1);
    }
}
