// SPDX-License-Identifier: MIT OR Apache-2.0
//! The image of a bitmap: every page that is dirty or pinned, from some bit of
//! the first word on.
//!
//! It goes by blocks, which are what one word of a summary stands for. Blocks
//! with every line dirty and none pinned are copied as they are. Where few
//! lines have something to tell, only they are visited. Otherwise all are, and
//! the words of each come with a mask; the border is where both cost the same.
#![allow(clippy::arithmetic_side_effects)] // words of one bitmap: fewer than 2^26

use core::ops::Range;

use crate::bitmap::layout::{View, LINE_WORDS};
use crate::bitmap::Bitmap;
use crate::bits;
use crate::bits::stream;
use crate::error::Error;
use crate::host::Memory;

/// Words in a block.
pub(crate) const BLOCK_WORDS: usize = 64 * LINE_WORDS;

/// More lines than these have a block copied whole.
pub(crate) const FEW_LINES: u32 = 44;

/// Words shifted before they are stored past the caches: 0.7 x the time of
/// steps of 8 to 32 or of 512.
const STEP_WORDS: usize = 64;
/// Steps that are fetched ahead: 0.9 x the time, and 0.8 x where there are pins.
const AHEAD_STEPS: usize = 4;

/// Images of so many words (16 MiB) go past the caches, which they would only
/// empty: 0.7 x the time from there on, 1.5 x below.
const STREAM_WORDS: usize = 1 << 21;

/// What to do with an image.
#[derive(Clone, Copy)]
struct Mode {
    /// Bit of page 0 in word 0 of the whole image; below 64.
    shift: u32,
    /// The destination is zero.
    zeroed: bool,
    /// Store past the caches.
    stream: bool,
}

impl<M: Memory> Bitmap<M> {
    /// Writes words `first..` of the image at `shift` to `out`: every page that
    /// is dirty or pinned, with page 0 at bit `shift` (below 64) of word 0.
    /// Every page stays dirty that is.
    pub fn copy(&mut self, shift: u32, first: usize, out: &mut [u64]) {
        let mode = Mode {
            shift,
            zeroed: false,
            stream: false,
        };
        self.copy_with(mode, first, out, |_, _| {});
    }

    /// Likewise into words that are zero already. `touched` learns which may be
    /// zero no more: the first and the last of some in a row, counted in `out`.
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

    /// Likewise the whole image of a bitmap of few words, of which there may be
    /// tens of thousands: 0.4 x the instructions at 16 words. Says whether there
    /// is a page to tell of.
    #[inline]
    pub(crate) fn copy_small(&mut self, shift: u32, out: &mut [u64]) -> bool {
        let view = self.view();
        let lines = Lines::of(view, 0);
        if lines.nonempty() == 0 {
            return false;
        }
        let mode = Mode {
            shift,
            zeroed: true,
            stream: false,
        };
        let carry = match lines.is_whole() {
            true => put_words(mode, view.dirty, out, 0),
            false => {
                let out = out.get_mut(..view.dirty.len()).unwrap_or_default();
                copy_block(mode, lines, 0, view.dirty, view.pinned, out, 0)
            }
        };
        if let Some(out) = out.get_mut(view.dirty.len()) {
            *out = carry;
        }
        true
    }

    /// Writes the whole image at `shift` to `out` and clears the dirty pages.
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

    /// Copies words `first..` of the image to `out`, and tells `touched` about
    /// each that is not skipped.
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
            let lines = Lines::of(view, at);
            if lines.nonempty() == 0 && mode.zeroed && carry == 0 {
                at = end.min(next_nonempty_block(view, at..end) * BLOCK_WORDS);
                continue;
            }
            let mut next = end.min((at / BLOCK_WORDS + 1) * BLOCK_WORDS);
            let whole = lines.is_whole();
            while whole && next < end && Lines::of(view, next).is_whole() {
                next = end.min(next + BLOCK_WORDS); // all of them at once
            }
            let (Some(dirty), Some(pinned), Some(out)) = (
                view.dirty.get(at..),
                view.pinned.get(at..),
                out.get_mut(at - first..next - first),
            ) else {
                return; // all have these words: never
            };
            let from = at - first;
            if lines.nonempty() == 0 {
                touched(from, from);
                carry = copy_clean(mode, out, carry);
            } else if whole {
                touched(from, next - first - 1);
                let dirty = dirty.get(..out.len()).unwrap_or_default();
                carry = put_words(mode, dirty, out, carry);
            } else if let (true, Some(dirty), Some(pinned), Some(out)) = (
                lines.nonempty().count_ones() <= FEW_LINES,
                dirty.first_chunk(),
                pinned.first_chunk(),
                out.first_chunk_mut(),
            ) {
                if carry != 0 {
                    touched(from, from);
                }
                let touched = |first, last| touched(from + first, from + last);
                carry = copy_lines(mode, lines, dirty, pinned, out, carry, touched);
            } else {
                touched(from, next - first - 1);
                carry = copy_block(mode, lines, at % BLOCK_WORDS, dirty, pinned, out, carry);
            }
            at = next;
        }
        if mode.stream {
            stream::fence();
        }
        // The last word has what the last page's word pushes out.
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

/// The lines of a block that are dirty, and those that are pinned.
#[derive(Clone, Copy)]
struct Lines {
    dirty: u64,
    pinned: u64,
    /// Those that are in the bitmap.
    all: u64,
}

impl Lines {
    /// Those of the block with word `at`.
    #[inline]
    fn of(view: View<'_>, at: usize) -> Lines {
        let block = at / BLOCK_WORDS;
        let last = block + 1 == view.lines.len();
        Lines {
            dirty: view.lines.get(block).copied().unwrap_or(0),
            pinned: view.pinned_lines.get(block).copied().unwrap_or(0),
            all: match last {
                true => bits::up_to_bit((view.dirty.len() as u64 - 1) / LINE_WORDS as u64),
                false => !0,
            },
        }
    }

    /// Those that have something to tell.
    fn nonempty(self) -> u64 {
        self.dirty | self.pinned
    }

    /// One of them.
    fn only(self, number: usize) -> Lines {
        let Lines { dirty, pinned, all } = self;
        let bit = 1 << (number & 63);
        Lines {
            dirty: dirty & bit,
            pinned: pinned & bit,
            all: all & bit,
        }
    }

    /// Whether all are dirty and none is pinned.
    fn is_whole(self) -> bool {
        self.dirty == self.all && self.pinned == 0
    }
}

/// The first block of those with these words that has something to tell, or the
/// one after them.
fn next_nonempty_block(view: View<'_>, words: Range<usize>) -> usize {
    let blocks = words.start / BLOCK_WORDS..words.end.div_ceil(BLOCK_WORDS);
    let lines = view.lines.get(blocks.clone()).unwrap_or_default();
    let pinned_lines = view.pinned_lines.get(blocks.clone()).unwrap_or_default();
    let mut lines = blocks.clone().zip(lines.iter().zip(pinned_lines));
    let nonempty = lines.find(|(_, (dirty, pinned))| *dirty | *pinned != 0);
    nonempty.map_or(blocks.end, |(block, _)| block)
}

/// Words of the image of `npages` pages.
fn words_at(npages: u64, shift: u32) -> u64 {
    (npages + u64::from(shift)).div_ceil(64)
}

/// What `word << shift` pushes into the next word.
fn spill(word: u64, shift: u32) -> u64 {
    word.checked_shr(64 - shift).unwrap_or(0)
}

/// Copies a block that has nothing to tell. `carry` is what the word before it
/// pushes into it; returns what its last word pushes out.
fn copy_clean(mode: Mode, out: &mut [u64], carry: u64) -> u64 {
    if !mode.zeroed {
        out.fill(0);
    }
    if let (Some(out), 1..) = (out.first_mut(), carry) {
        *out |= carry;
    }
    0
}

/// Puts words of a block to `out`, from its word `at` on, in whole lines or in
/// one: what is dirty in lines that are, or pinned.
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
    // Not line by line: reads with gaps are fetched late, 2 x the time.
    if lines.pinned != 0 {
        out.iter_mut().zip(pinned).for_each(|(w, p)| *w |= p);
    }
}

/// Copies the lines of a block that have something to tell, and tells `touched`
/// which words they are.
#[inline]
fn copy_lines(
    mode: Mode,
    lines: Lines,
    dirty: &[u64; BLOCK_WORDS],
    pinned: &[u64; BLOCK_WORDS],
    out: &mut [u64; BLOCK_WORDS],
    carry: u64,
    mut touched: impl FnMut(usize, usize),
) -> u64 {
    let mut carry = copy_clean(mode, out, carry);
    for number in bits::ones(lines.nonempty()) {
        let first = number % 64 * LINE_WORDS; // below 64: so is every check left out
        let (Some(dirty), Some(pinned), Some((out, after))) = (
            dirty.get(first..).and_then(|d| d.first_chunk()),
            pinned.get(first..).and_then(|p| p.first_chunk()),
            out.get_mut(first..)
                .and_then(|o| o.split_first_chunk_mut::<LINE_WORDS>()),
        ) else {
            return 0; // a block has 64 lines: never
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

/// Copies words of a block, from its word `at` on; `dirty` and `pinned` go on
/// behind it.
fn copy_block(
    mode: Mode,
    lines: Lines,
    mut at: usize,
    mut dirty: &[u64],
    mut pinned: &[u64],
    mut out: &mut [u64],
    mut carry: u64,
) -> u64 {
    while !out.is_empty() {
        let n = match (at % LINE_WORDS, out.len()) {
            (0, STEP_WORDS..) => {
                copy_step::<STEP_WORDS>(mode, lines, at, dirty, pinned, out, &mut carry)
            }
            (0, LINE_WORDS..) => {
                copy_step::<LINE_WORDS>(mode, lines, at, dirty, pinned, out, &mut carry)
            }
            _ => copy_step::<1>(mode, lines, at, dirty, pinned, out, &mut carry),
        };
        dirty = dirty.get(n..).unwrap_or_default();
        pinned = pinned.get(n..).unwrap_or_default();
        out = out.get_mut(n..).unwrap_or_default();
        at += n;
    }
    carry
}

/// Copies the first `N` words, and returns how many they are.
#[inline]
fn copy_step<const N: usize>(
    mode: Mode,
    lines: Lines,
    at: usize,
    dirty: &[u64],
    pinned: &[u64],
    out: &mut [u64],
    carry: &mut u64,
) -> usize {
    if mode.stream {
        for words in [dirty, pinned] {
            let then = words.get(AHEAD_STEPS * N..(AHEAD_STEPS + 1) * N);
            stream::prefetch(then.unwrap_or_default());
        }
    }
    if let (Some(dirty), Some(pinned), Some(out)) = (
        dirty.first_chunk(),
        pinned.first_chunk(),
        out.first_chunk_mut::<N>(),
    ) {
        let mut words = [0; N];
        merge_lines(lines, at, dirty, pinned, &mut words);
        *carry = put_words(mode, &words, out, *carry);
    }
    N
}

/// Copies words as they are.
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

/// [`shift_words`], past the caches.
fn stream_shifted(words: &[u64], shift: u32, mut carry: u64, out: &mut [u64]) {
    // Steps begin where lines of the cache do: 0.3 x the time.
    let head = stream::misaligned(out).min(words.len());
    let (Some((first, words)), Some((first_out, out))) =
        (words.split_at_checked(head), out.split_at_mut_checked(head))
    else {
        return; // both have as many words: never
    };
    shift_words(first, shift, carry, first_out);
    carry = first.last().map_or(carry, |last| spill(*last, shift));
    let steps = words.chunks(STEP_WORDS).zip(out.chunks_mut(STEP_WORDS));
    let ahead = words.chunks(STEP_WORDS).skip(AHEAD_STEPS);
    let mut ahead = ahead.chain(core::iter::repeat(&[][..]));
    for (words, out) in steps {
        stream::prefetch(ahead.next().unwrap_or_default());
        let mut shifted = [0; STEP_WORDS];
        // A size that is known, but at the end: 0.9 x the time.
        match words.first_chunk::<STEP_WORDS>() {
            Some(words) => shift_words(words, shift, carry, &mut shifted),
            None => shift_words(words, shift, carry, &mut shifted),
        }
        stream::copy(&shifted, out);
        carry = words.last().map_or(0, |last| spill(*last, shift));
    }
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
pub(crate) fn copy_full(npages: u64, shift: u32, first: u64, out: &mut [u64]) {
    out.fill(0);
    let window = first * 64..(first + out.len() as u64) * 64;
    let start = u64::from(shift).max(window.start);
    let end = (u64::from(shift) + npages).min(window.end);
    if start < end {
        bits::set(out, start - window.start, end - window.start - 1);
    }
}
