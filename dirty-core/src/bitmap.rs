// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty bitmap of one mapping.
//!
//! A bit is a page of the container's granularity. Beside the dirty bits lie
//! the pinned bits: a page reported is one that is dirty or pinned, so a
//! report is a pass over words and never a walk over pins. Two summaries have
//! one bit per line of 512 pages, so that clean lines cost nothing: one of the
//! lines with a dirty or pinned page, one of those with a pinned page, which
//! becomes the other when all dirty pages are taken.
//!
//! Two ways to mark. [`Bitmap::set`] is for the owner: plain words.
//! [`Bitmap::mark`] needs only `&`: threads mark at the same time with atomic
//! operations. Reports and clears take `&mut`.
//!
//! No write is lost as long as four steps keep their order: write, mark, report,
//! copy. Whoever writes a page marks it after that. Whatever hands out `&` and
//! `&mut` (a reader-writer lock, say) orders the mark with every report, which
//! is why relaxed operations are enough. Whoever reports copies the page after
//! that. So a copy made after the report that has the mark has the write too,
//! and a mark that comes too late for one report is in the next.
#![allow(clippy::arithmetic_side_effects)] // bits of one bitmap: fewer than 2^31

use core::sync::atomic::Ordering::Relaxed;

use crate::bits;
use crate::error::Error;
use crate::host::Memory;
use crate::mem::{AtomicU64, Words};
use crate::uapi::DIRTY_BITMAP_PAGES_MAX;

/// Words in a line, which has one bit in a summary.
pub(crate) const LINE_WORDS: usize = 8;
/// log2 of the pages in a line.
const LINE_SHIFT: u32 = 9;

/// The dirty and pinned pages of one mapping.
pub struct Bitmap<M: Memory> {
    /// The four parts, one after another.
    ///
    /// INVARIANT: no dirty or pinned bit at or beyond `npages`; a line with a
    /// dirty or pinned bit is in `lines`, one with a pinned bit, and no other,
    /// in `pinned_lines`.
    words: Words<M>,
    npages: u64,
    /// Words with a bit for each page.
    len: usize,
}

/// The parts of a bitmap: a bit for each page, and a bit for each line.
pub(crate) struct Parts<T> {
    pub(crate) dirty: T,
    pub(crate) pinned: T,
    pub(crate) lines: T,
    pub(crate) pinned_lines: T,
}

/// Words with a bit for each page, and with a bit for each line.
fn lengths(npages: u64) -> (usize, usize) {
    let pages = bits::word(npages.saturating_add(63));
    (pages, summary(pages))
}

/// Words with a bit for each line of so many words.
fn summary(words: usize) -> usize {
    words.div_ceil(64 * LINE_WORDS)
}

impl<M: Memory> Bitmap<M> {
    /// Bytes that a bitmap of `npages` pages takes from the host.
    #[must_use]
    pub fn bytes(npages: u64) -> u64 {
        let (pages, lines) = lengths(npages);
        (pages as u64)
            .saturating_add(lines as u64)
            .saturating_mul(16)
    }

    /// A clean bitmap.
    ///
    /// # Errors
    ///
    /// `TooManyPages` beyond 2^31-1, `NoMemory`.
    pub fn new(mem: &M, npages: u64) -> Result<Self, Error> {
        if npages > DIRTY_BITMAP_PAGES_MAX {
            return Err(Error::TooManyPages);
        }
        let (pages, lines) = lengths(npages);
        Ok(Bitmap {
            words: Words::new(mem, 2 * (pages + lines))?,
            npages,
            len: pages,
        })
    }

    /// Number of pages.
    #[must_use]
    pub fn npages(&self) -> u64 {
        self.npages
    }

    pub(crate) fn parts(&mut self) -> Parts<&mut [u64]> {
        let (pages, lines) = (self.len, summary(self.len));
        let words = self.words.exclusive();
        let (dirty, rest) = words.split_at_mut_checked(pages).unwrap_or_default();
        let (pinned, rest) = rest.split_at_mut_checked(pages).unwrap_or_default();
        let (lines, pinned_lines) = rest.split_at_mut_checked(lines).unwrap_or_default();
        Parts {
            dirty,
            pinned,
            lines,
            pinned_lines,
        }
    }

    /// `n` pages from `first` on, as far as they are in the bitmap.
    fn clip(&self, first: u64, n: u64) -> Option<(u64, u64)> {
        let n = n.min(self.npages.checked_sub(first)?);
        (n != 0).then(|| (first, first + n - 1))
    }

    /// Marks `n` pages from `first` on dirty; pages beyond the end are none.
    #[inline]
    pub fn set(&mut self, first: u64, n: u64) {
        let Some((first, last)) = self.clip(first, n) else {
            return;
        };
        if !bits::set_again(self.words.exclusive(), first, last) {
            self.set_run(first, last);
        }
    }

    /// Likewise where that may not be all of one word, and none may be dirty.
    fn set_run(&mut self, first: u64, last: u64) {
        let (first_line, last_line) = (self.line(first), self.line(last));
        let words = self.words.exclusive();
        if !bits::set_short(words, first, last) {
            bits::set(words, first, last);
            bits::set(words, first_line, last_line);
        }
    }

    /// The bit, of all words, of the line that a page is in.
    fn line(&self, page: u64) -> u64 {
        2 * 64 * self.len as u64 + (page >> LINE_SHIFT) // behind dirty and pinned
    }

    /// Likewise, beside other threads that mark.
    ///
    /// Call it *after* the write: a report between a mark and its write clears
    /// the mark, and the copy made then may lack the write. The operations are
    /// relaxed; the order of a mark and a report is that of the `&` and the
    /// `&mut`, and comes from whatever hands them out.
    #[inline]
    pub fn mark(&self, first: u64, n: u64) {
        let Some((first, last)) = self.clip(first, n) else {
            return;
        };
        let words = self.words.shared();
        if mark(words, first, last) {
            mark(words, self.line(first), self.line(last));
        }
    }

    /// Marks every page.
    pub fn set_all(&mut self) {
        self.set(0, self.npages);
    }

    /// The page holds a pin now: it is in every report until
    /// [`unpin`](Bitmap::unpin).
    pub fn pin(&mut self, page: u64) {
        if page >= self.npages {
            return;
        }
        let parts = self.parts();
        let line = page >> LINE_SHIFT;
        bits::set(parts.pinned, page, page);
        bits::set(parts.lines, line, line);
        bits::set(parts.pinned_lines, line, line);
    }

    /// The page's last pin is gone: it is dirty once more.
    pub fn unpin(&mut self, page: u64) {
        let parts = self.parts();
        if !bits::get(parts.pinned, page) {
            return;
        }
        bits::clear(parts.pinned, page);
        bits::set(parts.dirty, page, page); // its line is in `lines` already
        let line = page >> LINE_SHIFT;
        let first = line as usize * LINE_WORDS;
        let words = parts.pinned.iter().skip(first).take(LINE_WORDS);
        if words.fold(0, |all, w| all | w) == 0 {
            bits::clear(parts.pinned_lines, line);
        }
    }
}

#[cfg(test)]
impl<M: Memory> Bitmap<M> {
    /// Whether a line has its bit in `lines` if, and only if, a page in it is
    /// dirty or pinned, and in `pinned_lines` if one is pinned.
    #[allow(dead_code)] // this file is in another test crate too
    pub(crate) fn is_summarised(&mut self) -> bool {
        let parts = self.parts();
        let pinned = parts.pinned.chunks(LINE_WORDS);
        let mut lines = (0..).zip(parts.dirty.chunks(LINE_WORDS).zip(pinned));
        lines.all(|(line, (dirty, pinned))| {
            let pins = pinned.iter().any(|w| *w != 0);
            let some = pins || dirty.iter().any(|w| *w != 0);
            some == bits::get(parts.lines, line) && pins == bits::get(parts.pinned_lines, line)
        })
    }
}

/// Sets bits `first..=last` beside other threads that do, and says whether that
/// may have changed one.
#[inline]
fn mark(words: &[AtomicU64], first: u64, last: u64) -> bool {
    if bits::word(first) != bits::word(last) {
        mark_run(words, first, last);
        return true;
    }
    let only = words.get(bits::word(first));
    only.is_some_and(|w| or(w, bits::between(first, last)))
}

/// Likewise, if they are in more than one word.
fn mark_run(words: &[AtomicU64], first: u64, last: u64) {
    if let Some([head, middle @ .., tail]) = words.get(bits::word(first)..bits::word(last) + 1) {
        or(head, bits::from_bit(first));
        // A store of all ones loses nothing: nobody clears meanwhile.
        middle.iter().for_each(|w| w.store(!0, Relaxed));
        or(tail, bits::up_to_bit(last));
    }
}

/// Leaves a word alone that has the bits: nobody clears them meanwhile, and
/// its cache line stays with the other threads.
#[inline]
fn or(word: &AtomicU64, bits: u64) -> bool {
    let new = word.load(Relaxed) & bits != bits;
    if new {
        word.fetch_or(bits, Relaxed);
    }
    new
}
