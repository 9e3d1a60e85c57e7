// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the bits of a bitmap lie: in two arrays. The first has a dirty bit for
//! each page, and then four summaries: a bit for each line that is dirty, and for
//! each that is full; which batches of lines are wiped; a bit for each line with a
//! pinned page. The second has a pinned bit for each page. It is empty until the
//! first pin.
//!
//! A page that is in the bitmap has its words in the array. Checking that once
//! more for each word would make a mark take 1.2 x the time, so this module uses
//! `unsafe`.
#![allow(unsafe_code)]
#![allow(clippy::arithmetic_side_effects)] // bits of one bitmap: fewer than 2^31

use core::ops::Range;
use core::sync::atomic::Ordering::Acquire;

use crate::bitmap::lines::Lines;
use crate::bits;
use crate::bits::stream;
use crate::error::Error;
use crate::host::Memory;
use crate::mem::{AtomicU64, Words};
use crate::uapi::DIRTY_BITMAP_PAGES_MAX;

/// Words in a line, which has one bit in a summary.
pub(crate) const LINE_WORDS: usize = 8;
/// log2 of the pages in a line.
const LINE_SHIFT: u32 = 9;
/// Pages in a line.
pub(crate) const LINE_PAGES: u64 = 1 << LINE_SHIFT;

/// Lines in a batch, which are wiped together. Their cache misses happen at the same
/// time: wiping all lines one by one takes 2 x the time. More lines gain nothing, and
/// cost more where few pages are dirty.
const BATCH_LINES: u64 = 8;
/// How far apart the two bits of a batch are in their word.
const WIPED_SHIFT: u64 = 32;

/// The line of a page: its bit in a summary.
#[inline]
pub(crate) const fn line(page: u64) -> u64 {
    page >> LINE_SHIFT
}

/// The first page of a line.
#[inline]
pub(crate) const fn first_page(line: u64) -> u64 {
    line << LINE_SHIFT
}

/// The lines that lie in pages `first..=last` as a whole. May be empty.
#[inline]
pub(crate) const fn whole_lines(first: u64, last: u64) -> Range<u64> {
    line(first + LINE_PAGES - 1)..line(last + 1)
}

/// The summaries, in the order in which they lie.
const DIRTY: usize = 0;
const FULL: usize = 1;
const WIPED: usize = 2;
const PINNED: usize = 3;

/// The words of a bitmap.
pub(crate) struct Layout<M: Memory> {
    /// INVARIANT: `len` words, and behind them four summaries of `summary(len)`.
    words: Words<M>,
    /// INVARIANT: `len` words. If there are none, no line is in the pinned
    /// summary.
    pinned: Option<Words<M>>,
    /// INVARIANT: at most `64 * len`.
    npages: u64,
    /// Words with a bit for each page, and so the index of the first summary.
    len: usize,
}

/// The bits of a bitmap, as slices.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    /// A bit for each page. Lines that are not in `lines`, or that are in
    /// `full`, are stale.
    pub(crate) dirty: &'a [u64],
    /// A bit for each page. What is not in `pinned_lines` has any value: without
    /// pinned bits, these are the dirty bits.
    pub(crate) pinned: &'a [u64],
    /// A bit for each line with a dirty page.
    pub(crate) lines: &'a [u64],
    /// A bit for each line whose pages are all dirty, whatever its words hold.
    /// All of them are in `lines`.
    pub(crate) full: &'a [u64],
    /// A bit for each line with a pinned page.
    pub(crate) pinned_lines: &'a [u64],
}

impl View<'_> {
    /// The lines of a block.
    #[inline]
    pub(crate) fn block(self, block: usize) -> Lines {
        let bits = |summary: &[u64]| summary.get(block).copied().unwrap_or(0);
        Lines {
            dirty: bits(self.lines),
            full: bits(self.full),
            pinned: bits(self.pinned_lines),
            all: match block + 1 == self.lines.len() {
                true => last_lines(self.dirty.len()),
                false => !0,
            },
        }
    }

    /// The words of a line: the pages that are dirty or pinned. 0 beyond the end.
    pub(crate) fn line(self, line: usize) -> [u64; LINE_WORDS] {
        let bit = |summary| bits::get(summary, line as u64);
        match bit(self.full) {
            true => [!0; LINE_WORDS],
            false => self.words(line, bit(self.lines).into(), bit(self.pinned_lines).into()),
        }
    }

    /// As `line`, for a caller who knows the line's bits in the summaries, and
    /// that it is not full.
    #[inline]
    pub(crate) fn words(self, line: usize, dirty: u64, pinned: u64) -> [u64; LINE_WORDS] {
        let first = line * LINE_WORDS;
        let mut all = words_from(self.dirty, first);
        if dirty == 0 {
            all = [0; LINE_WORDS]; // stale
        }
        // Most lines have no pins: do not load words that are zero.
        if pinned != 0 {
            let pinned = words_from(self.pinned, first);
            all.iter_mut().zip(pinned).for_each(|(w, p)| *w |= p);
        }
        all
    }

    /// Has the words of a block's dirty lines fetched: 0.7 x the time of a walk over few
    /// dirty pages.
    #[inline]
    pub(crate) fn prefetch(self, block: usize) {
        let lines = |summary: &[u64]| summary.get(block).copied().unwrap_or(0);
        for line in bits::ones(lines(self.lines) & !lines(self.full)) {
            let first = (block * 64 + line) * LINE_WORDS;
            stream::prefetch(self.dirty.get(first..first + 1).unwrap_or_default());
        }
    }
}

/// The words of a line, from `first` on; 0 beyond the end.
#[inline]
fn words_from(words: &[u64], first: usize) -> [u64; LINE_WORDS] {
    let words = words.get(first..).unwrap_or_default();
    words.first_chunk().copied().unwrap_or_else(|| {
        let mut all = [0; LINE_WORDS];
        all.iter_mut().zip(words).for_each(|(to, from)| *to = *from);
        all
    })
}

/// The words of pages `first..=last`, if no whole line lies between the two.
#[inline]
fn near(first: u64, last: u64) -> Option<Range<usize>> {
    let (from, to) = (bits::word(first), bits::word(last));
    // A negative difference wraps to a large one.
    (to.wrapping_sub(from) <= LINE_WORDS).then(|| from..to + 1)
}

/// The words that hold a bit for each page, and all words but the pinned ones.
fn lengths(npages: u64) -> (usize, usize) {
    let len = bits::word(npages.saturating_add(63));
    (len, len + 4 * summary(len))
}

/// The lines of the last block of a bitmap of so many words, at least one.
#[inline]
fn last_lines(words: usize) -> u64 {
    bits::up_to_bit((words as u64 - 1) / LINE_WORDS as u64)
}

/// The words of a summary of so many words.
fn summary(words: usize) -> usize {
    words.div_ceil(64 * LINE_WORDS)
}

impl<M: Memory> Layout<M> {
    /// The bytes that so many pages take from the host without pinned bits.
    pub(crate) fn bytes(npages: u64) -> u64 {
        let (_, words) = lengths(npages);
        (words as u64).saturating_mul(8)
    }

    /// The bytes that the pinned bits of so many pages take.
    pub(crate) fn pinned_bytes(npages: u64) -> u64 {
        let (len, _) = lengths(npages);
        (len as u64).saturating_mul(8)
    }

    pub(crate) fn new(mem: &M, npages: u64) -> Result<Self, Error> {
        if npages > DIRTY_BITMAP_PAGES_MAX {
            return Err(Error::TooManyPages);
        }
        let (len, words) = lengths(npages);
        Ok(Layout {
            words: Words::new(mem, words)?,
            pinned: None,
            npages,
            len,
        })
    }

    /// Whether there are pinned bits.
    #[inline]
    pub(crate) fn has_pinned(&self) -> bool {
        self.pinned.is_some()
    }

    /// Takes memory for the pinned bits.
    pub(crate) fn add_pinned(&mut self, mem: &M) -> Result<(), Error> {
        self.pinned = Some(Words::new(mem, self.len)?);
        Ok(())
    }

    /// Frees the pinned bits. No page may be pinned.
    pub(crate) fn drop_pinned(&mut self) {
        self.pinned = None;
    }

    pub(crate) fn npages(&self) -> u64 {
        self.npages
    }

    pub(crate) fn exclusive(&mut self) -> &mut [u64] {
        self.words.exclusive()
    }

    pub(crate) fn shared(&self) -> &[AtomicU64] {
        self.words.shared()
    }

    #[inline]
    pub(crate) fn view(&mut self) -> View<'_> {
        let (len, summary) = (self.len, summary(self.len));
        let words = &*self.words.exclusive();
        let (dirty, rest) = words.split_at_checked(len).unwrap_or_default();
        let (lines, rest) = rest.split_at_checked(summary).unwrap_or_default();
        let (full, rest) = rest.split_at_checked(summary).unwrap_or_default();
        let (_, rest) = rest.split_at_checked(summary).unwrap_or_default();
        let (pinned_lines, _) = rest.split_at_checked(summary).unwrap_or_default();
        let pinned = match &mut self.pinned {
            Some(pinned) => pinned.exclusive(),
            None => dirty, // of the right length, and nobody looks at them
        };
        View {
            dirty,
            pinned,
            lines,
            full,
            pinned_lines,
        }
    }

    /// Whether none of the first 64 lines has a dirty or a pinned page.
    #[inline]
    pub(crate) fn is_first_block_empty(&mut self) -> bool {
        self.summary_word(DIRTY) | self.summary_word(PINNED) == 0
    }

    /// The only block of a bitmap of at most 512 words, at least one.
    #[inline]
    pub(crate) fn only_block(&mut self) -> Lines {
        Lines {
            dirty: self.summary_word(DIRTY),
            full: self.summary_word(FULL),
            pinned: self.summary_word(PINNED),
            all: last_lines(self.len),
        }
    }

    /// The first word of a summary.
    #[inline]
    fn summary_word(&mut self, number: usize) -> u64 {
        let at = self.len + number * summary(self.len);
        self.words.exclusive().get(at).copied().unwrap_or(0)
    }

    /// A dirty bit for each page. Lines that are not in the summary are stale.
    #[inline]
    pub(crate) fn dirty(&mut self) -> &[u64] {
        self.words.exclusive().get(..self.len).unwrap_or_default()
    }

    /// The dirty word of a page, if the page's line is valid.
    #[inline]
    pub(crate) fn valid(&mut self, page: u64) -> Option<&mut u64> {
        if page >= self.npages {
            return None;
        }
        let at = self.len + bits::word(line(page));
        let words = self.words.exclusive();
        debug_assert!(at < words.len());
        // SAFETY: `page` is below 64 * `len`, so its word is below `len` and the
        // word of its line below `summary(len)`. INVARIANT of `words`.
        let lines = unsafe { *words.get_unchecked(at) };
        if lines >> (line(page) & 63) & 1 == 0 {
            return None;
        }
        // SAFETY: the word of `page` is below `len`, as above.
        Some(unsafe { words.get_unchecked_mut(bits::word(page)) })
    }

    /// As `valid`, through a shared handle. The caller sees the stores that made
    /// the line valid.
    #[inline]
    pub(crate) fn valid_shared(&self, page: u64) -> Option<&AtomicU64> {
        if page >= self.npages {
            return None;
        }
        let at = self.len + bits::word(line(page));
        let words = self.words.shared();
        debug_assert!(at < words.len());
        // SAFETY: as `valid`.
        let lines = unsafe { words.get_unchecked(at) }.load(Acquire);
        if lines >> (line(page) & 63) & 1 == 0 {
            return None;
        }
        // SAFETY: as `valid`.
        Some(unsafe { words.get_unchecked(bits::word(page)) })
    }

    /// The dirty words of pages `first..=last`, if no whole line lies between the
    /// two and the lines of both are valid.
    #[inline]
    pub(crate) fn valid_run(&mut self, first: u64, last: u64) -> Option<&mut [u64]> {
        let near = near(first, last)?;
        self.valid(first)?;
        self.valid(last)?;
        debug_assert!(near.end <= self.len);
        // SAFETY: `near` is in order, and its ends are words of pages that are in
        // the bitmap, since `valid` found them. INVARIANT of `words`.
        Some(unsafe { self.words.exclusive().get_unchecked_mut(near) })
    }

    /// As `valid_run`, through a shared handle. The caller sees the stores that
    /// made the lines valid.
    #[inline]
    pub(crate) fn valid_run_shared(&self, first: u64, last: u64) -> Option<&[AtomicU64]> {
        let near = near(first, last)?;
        self.valid_shared(first)?;
        self.valid_shared(last)?;
        debug_assert!(near.end <= self.len);
        // SAFETY: as `valid_run`.
        Some(unsafe { self.words.shared().get_unchecked(near) })
    }

    /// Has the words of a page fetched.
    #[inline]
    pub(crate) fn prefetch(&mut self, page: u64) {
        let at = bits::word(page);
        let dirty = self.words.exclusive().get(at..at + 1);
        stream::prefetch(dirty.unwrap_or_default());
        let pinned = self.pinned().get(at..at + 1);
        stream::prefetch(pinned.unwrap_or_default());
    }

    /// The words of the pinned bits, if there are any.
    #[inline]
    pub(crate) fn pinned(&mut self) -> &mut [u64] {
        self.pinned.as_mut().map_or(&mut [], Words::exclusive)
    }

    /// The words of a line's batch among those of the dirty bits.
    pub(crate) fn batch(&self, line: u64) -> Range<usize> {
        let first = (line & !(BATCH_LINES - 1)) as usize * LINE_WORDS;
        first..self.len.min(first + BATCH_LINES as usize * LINE_WORDS)
    }

    /// The place of a line's words among those of the pinned bits.
    pub(crate) fn words_of(&self, line: u64) -> Range<usize> {
        let first = line as usize * LINE_WORDS;
        first..self.len.min(first + LINE_WORDS)
    }

    /// The words of the three summaries that tell what is dirty.
    pub(crate) fn dirty_summaries(&self) -> Range<usize> {
        self.len..self.len + PINNED * summary(self.len)
    }

    /// The number of a line's bit in the dirty summary.
    #[inline]
    pub(crate) fn line_bit(&self, line: u64) -> u64 {
        self.summary_bit(DIRTY, line)
    }

    /// The number of a line's bit in the full summary.
    #[inline]
    pub(crate) fn full_bit(&self, line: u64) -> u64 {
        self.summary_bit(FULL, line)
    }

    /// The number of a line's bit in the pinned summary.
    pub(crate) fn pinned_line_bit(&self, line: u64) -> u64 {
        self.summary_bit(PINNED, line)
    }

    /// The bit that says that a thread wipes a line's batch, or has wiped it.
    #[inline]
    pub(crate) fn claimed_bit(&self, line: u64) -> u64 {
        self.summary_bit(WIPED, line & !63) + (line & 63) / BATCH_LINES
    }

    /// The bit that says that a line's batch is wiped, in the word of `claimed_bit`.
    #[inline]
    pub(crate) fn wiped_bit(&self, line: u64) -> u64 {
        self.claimed_bit(line) + WIPED_SHIFT
    }

    #[inline]
    fn summary_bit(&self, number: usize, line: u64) -> u64 {
        64 * (self.len + number * summary(self.len)) as u64 + line
    }
}
