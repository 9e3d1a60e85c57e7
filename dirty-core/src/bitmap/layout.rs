// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the bits of a bitmap lie: in one array, a bit for each page (dirty, then
//! pinned), behind them a bit for each line (summaries).
//!
//! A page that is in the bitmap has its words in the array; to check that once
//! more for each word would take a mark 1.2 x the time. So this module is
//! `unsafe` too.
#![allow(unsafe_code)]
#![allow(clippy::arithmetic_side_effects)] // bits of one bitmap: fewer than 2^31

use core::ops::Range;
use core::sync::atomic::Ordering::Acquire;

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

/// The line of a page: its bit in a summary.
#[inline]
pub(crate) const fn line(page: u64) -> u64 {
    page >> LINE_SHIFT
}

/// The words of a bitmap.
pub(crate) struct Layout<M: Memory> {
    /// INVARIANT: `2 * len` words, and behind them three summaries of
    /// `summary(len)`.
    words: Words<M>,
    /// INVARIANT: at most `64 * len`.
    npages: u64,
    /// Words with a bit for each page.
    len: usize,
    /// Words before the first summary. INVARIANT: `2 * len`.
    lines: usize,
}

/// The parts of a bitmap: a bit for each page, and a bit for each line.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    /// Of lines that are in `lines`; the rest is stale.
    pub(crate) dirty: &'a [u64],
    pub(crate) pinned: &'a [u64],
    pub(crate) lines: &'a [u64],
    pub(crate) pinned_lines: &'a [u64],
}

impl View<'_> {
    /// The words of a line: what is dirty or pinned. 0 where there are none.
    pub(crate) fn line(self, line: usize) -> [u64; LINE_WORDS] {
        let bit = |summary| u64::from(bits::get(summary, line as u64));
        self.words(line, bit(self.lines), bit(self.pinned_lines))
    }

    /// Likewise, for whoever knows its bits in the summaries.
    #[inline]
    pub(crate) fn words(self, line: usize, dirty: u64, pinned: u64) -> [u64; LINE_WORDS] {
        let first = line * LINE_WORDS;
        let mut all = words_from(self.dirty, first);
        if dirty == 0 {
            all = [0; LINE_WORDS]; // stale
        }
        // Most lines have no pins: do not fetch what is zero.
        if pinned != 0 {
            let pinned = words_from(self.pinned, first);
            all.iter_mut().zip(pinned).for_each(|(w, p)| *w |= p);
        }
        all
    }

    /// Says that the dirty lines of a block will be wanted soon: 0.7 x the time
    /// of a walk where few are.
    #[inline]
    pub(crate) fn prefetch(self, block: usize) {
        for line in bits::ones(self.lines.get(block).copied().unwrap_or(0)) {
            let first = (block * 64 + line) * LINE_WORDS;
            stream::prefetch(self.dirty.get(first..first + 1).unwrap_or_default());
        }
    }
}

/// A line of words, from `first` on; 0 where there are no more.
#[inline]
fn words_from(words: &[u64], first: usize) -> [u64; LINE_WORDS] {
    let words = words.get(first..).unwrap_or_default();
    words.first_chunk().copied().unwrap_or_else(|| {
        let mut all = [0; LINE_WORDS];
        all.iter_mut().zip(words).for_each(|(to, from)| *to = *from);
        all
    })
}

/// The words of pages `first..=last`, if no line is between theirs.
#[inline]
fn near(first: u64, last: u64) -> Option<Range<usize>> {
    let (from, to) = (bits::word(first), bits::word(last));
    // Below 0 is far beyond.
    (to.wrapping_sub(from) <= LINE_WORDS).then(|| from..to + 1)
}

/// Words with a bit for each page, and all words of a bitmap.
fn lengths(npages: u64) -> (usize, usize) {
    let len = bits::word(npages.saturating_add(63));
    (len, 2 * len + 3 * summary(len))
}

/// Words of a summary of so many words.
fn summary(words: usize) -> usize {
    words.div_ceil(64 * LINE_WORDS)
}

impl<M: Memory> Layout<M> {
    /// Bytes that so many pages take from the host.
    pub(crate) fn bytes(npages: u64) -> u64 {
        let (_, words) = lengths(npages);
        (words as u64).saturating_mul(8)
    }

    pub(crate) fn new(mem: &M, npages: u64) -> Result<Self, Error> {
        if npages > DIRTY_BITMAP_PAGES_MAX {
            return Err(Error::TooManyPages);
        }
        let (len, words) = lengths(npages);
        Ok(Layout {
            words: Words::new(mem, words)?,
            npages,
            len,
            lines: 2 * len,
        })
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

    pub(crate) fn view(&mut self) -> View<'_> {
        let (len, summary) = (self.len, summary(self.len));
        let words = &*self.words.exclusive();
        let (dirty, rest) = words.split_at_checked(len).unwrap_or_default();
        let (pinned, rest) = rest.split_at_checked(len).unwrap_or_default();
        let (lines, rest) = rest.split_at_checked(summary).unwrap_or_default();
        let (pinned_lines, _) = rest.split_at_checked(summary).unwrap_or_default();
        View {
            dirty,
            pinned,
            lines,
            pinned_lines,
        }
    }

    /// The dirty word of a page, if its line is good.
    #[inline]
    pub(crate) fn valid(&mut self, page: u64) -> Option<&mut u64> {
        if page >= self.npages {
            return None;
        }
        let at = self.lines + bits::word(line(page));
        let words = self.words.exclusive();
        debug_assert!(at < words.len());
        // SAFETY: `page` is below 64 * `len`, so its word is below `len` and the
        // word of its line below `summary(len)`; INVARIANT of `words`.
        let lines = unsafe { *words.get_unchecked(at) };
        if lines >> (line(page) & 63) & 1 == 0 {
            return None;
        }
        // SAFETY: likewise.
        Some(unsafe { words.get_unchecked_mut(bits::word(page)) })
    }

    /// Likewise; the stores are seen that made the line good.
    #[inline]
    pub(crate) fn valid_shared(&self, page: u64) -> Option<&AtomicU64> {
        if page >= self.npages {
            return None;
        }
        let at = self.lines + bits::word(line(page));
        let words = self.words.shared();
        debug_assert!(at < words.len());
        // SAFETY: `page` is below 64 * `len`, so its word is below `len` and the
        // word of its line below `summary(len)`; INVARIANT of `words`.
        let lines = unsafe { words.get_unchecked(at) }.load(Acquire);
        if lines >> (line(page) & 63) & 1 == 0 {
            return None;
        }
        // SAFETY: likewise.
        Some(unsafe { words.get_unchecked(bits::word(page)) })
    }

    /// The dirty words of pages `first..=last`, if no line is between theirs and
    /// both are good.
    #[inline]
    pub(crate) fn valid_run(&mut self, first: u64, last: u64) -> Option<&mut [u64]> {
        let near = near(first, last)?;
        self.valid(first)?;
        self.valid(last)?;
        debug_assert!(near.end <= self.len);
        // SAFETY: `near` is in order; its ends are words of pages that are in the
        // bitmap, else they were not good; INVARIANT of `words`.
        Some(unsafe { self.words.exclusive().get_unchecked_mut(near) })
    }

    /// Likewise; the stores are seen that made the lines good.
    #[inline]
    pub(crate) fn valid_run_shared(&self, first: u64, last: u64) -> Option<&[AtomicU64]> {
        let near = near(first, last)?;
        self.valid_shared(first)?;
        self.valid_shared(last)?;
        debug_assert!(near.end <= self.len);
        // SAFETY: as `valid_run`.
        Some(unsafe { self.words.shared().get_unchecked(near) })
    }

    /// Says that the words of a page will be wanted soon.
    #[inline]
    pub(crate) fn prefetch(&mut self, page: u64) {
        let word = bits::word(page);
        let len = self.len;
        let words = &*self.words.exclusive();
        for at in [word, len + word] {
            stream::prefetch(words.get(at..at + 1).unwrap_or_default());
        }
    }

    /// The words with the dirty bits of a line.
    pub(crate) fn dirty(&self, line: u64) -> Range<usize> {
        let first = line as usize * LINE_WORDS;
        first..self.len.min(first + LINE_WORDS)
    }

    /// The words with its pinned bits.
    pub(crate) fn pinned(&self, line: u64) -> Range<usize> {
        let dirty = self.dirty(line);
        self.len + dirty.start..self.len + dirty.end
    }

    /// The summary of lines that are dirty.
    pub(crate) fn lines(&self) -> Range<usize> {
        self.lines..self.lines + summary(self.len)
    }

    /// The pinned bit of a page.
    pub(crate) fn pinned_bit(&self, page: u64) -> u64 {
        64 * self.len as u64 + page
    }

    /// The bit of a line in the summary of those that are dirty.
    #[inline]
    pub(crate) fn line_bit(&self, line: u64) -> u64 {
        64 * self.lines as u64 + line
    }

    /// Likewise of those that are pinned.
    pub(crate) fn pinned_line_bit(&self, line: u64) -> u64 {
        self.line_bit(line) + 64 * summary(self.len) as u64
    }

    /// Likewise of those that a thread wipes just now.
    pub(crate) fn lock_bit(&self, line: u64) -> u64 {
        self.pinned_line_bit(line) + 64 * summary(self.len) as u64
    }
}
