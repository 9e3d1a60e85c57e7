// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty bitmap of one mapping.
//!
//! A bit is a page of the container's granularity. Beside the dirty bits lie
//! the pinned bits: a page reported is one that is dirty or pinned, so a
//! report is a pass over words and never a walk over pins.
//!
//! Summaries have one bit per line of 512 pages: of the lines with a dirty page,
//! and of those with a pinned page. So a clean line costs nothing, and neither
//! does it to clean one: a line that is not in the summary is clean, whatever
//! its words are. They are *stale*, and wiped before its next page is marked.
//! To clear all that is dirty is to clear the summary, 1/512 of the words: a
//! dense report takes 0.5 to 0.8 x the time that it takes if the words are
//! cleared.
//!
//! Two ways to mark. [`Bitmap::set`] is for the owner: plain words.
//! [`Bitmap::mark`] needs only `&`: threads mark at the same time with atomic
//! operations. Reports and clears take `&mut`. Of threads that find a line stale
//! one wipes it, and the others wait for its eight stores.
//!
//! No write is lost as long as four steps keep their order: write, mark, report,
//! copy. Whoever writes a page marks it after that. Whatever hands out `&` and
//! `&mut` (a reader-writer lock, say) orders the mark with every report, which
//! is why relaxed operations are enough. Whoever reports copies the page after
//! that. So a copy made after the report that has the mark has the write too,
//! and a mark that comes too late for one report is in the next.
#![allow(clippy::arithmetic_side_effects)] // bits of one bitmap: fewer than 2^31

use core::ops::Range;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::bits;
use crate::error::Error;
use crate::host::Memory;
use crate::mem::{spin_loop, AtomicU64, Words};
use crate::uapi::DIRTY_BITMAP_PAGES_MAX;

/// Words in a line, which has one bit in a summary.
pub(crate) const LINE_WORDS: usize = 8;
/// log2 of the pages in a line.
const LINE_SHIFT: u32 = 9;

/// The dirty and pinned pages of one mapping.
pub struct Bitmap<M: Memory> {
    /// A bit for each page: dirty, then pinned. Behind them, a bit for each line:
    /// summaries of lines that are dirty, that are pinned, and that a thread
    /// wipes just now.
    ///
    /// INVARIANT: no bit at or beyond `npages` is pinned, or dirty in a line
    /// that is in the summary; lines in the summaries, and no others, have dirty
    /// or pinned pages. No line is being wiped while nobody marks.
    words: Words<M>,
    npages: u64,
    /// Words with a bit for each page.
    len: usize,
}

/// The parts of a bitmap: a bit for each page, and a bit for each line.
#[derive(Clone, Copy)]
pub(crate) struct Parts<'a> {
    /// Of lines that are in `lines`; the rest is stale.
    pub(crate) dirty: &'a [u64],
    pub(crate) pinned: &'a [u64],
    pub(crate) lines: &'a [u64],
    pub(crate) pinned_lines: &'a [u64],
}

impl Parts<'_> {
    /// The words of a line: what is dirty or pinned. 0 where there are none.
    #[inline]
    pub(crate) fn line(self, number: u64) -> [u64; LINE_WORDS] {
        let first = number as usize * LINE_WORDS;
        let mut told = words_from(self.dirty, first);
        if !bits::get(self.lines, number) {
            told = [0; LINE_WORDS]; // stale
        }
        // Most lines have no pins: do not fetch what is zero.
        if bits::get(self.pinned_lines, number) {
            let pinned = words_from(self.pinned, first);
            told.iter_mut().zip(pinned).for_each(|(w, p)| *w |= p);
        }
        told
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

/// Words with a bit for each page, and all words of a bitmap.
fn lengths(npages: u64) -> (usize, usize) {
    let len = bits::word(npages.saturating_add(63));
    (len, 2 * len + 3 * summary(len))
}

/// Words of a summary of so many words.
fn summary(words: usize) -> usize {
    words.div_ceil(64 * LINE_WORDS)
}

impl<M: Memory> Bitmap<M> {
    /// Bytes that a bitmap of `npages` pages takes from the host.
    #[must_use]
    pub fn bytes(npages: u64) -> u64 {
        let (_, words) = lengths(npages);
        (words as u64).saturating_mul(8)
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
        let (len, words) = lengths(npages);
        Ok(Bitmap {
            words: Words::new(mem, words)?,
            npages,
            len,
        })
    }

    /// Number of pages.
    #[must_use]
    pub fn npages(&self) -> u64 {
        self.npages
    }

    pub(crate) fn parts(&mut self) -> Parts<'_> {
        let (len, summary) = (self.len, summary(self.len));
        let words = &*self.words.exclusive();
        let (dirty, rest) = words.split_at_checked(len).unwrap_or_default();
        let (pinned, rest) = rest.split_at_checked(len).unwrap_or_default();
        let (lines, rest) = rest.split_at_checked(summary).unwrap_or_default();
        let (pinned_lines, _) = rest.split_at_checked(summary).unwrap_or_default();
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

    /// The bit of the page's line, among all words.
    #[inline]
    fn line(&self, page: u64) -> u64 {
        2 * 64 * self.len as u64 + line(page)
    }

    /// The words with the dirty bits of the page's line.
    fn words_of(&self, page: u64) -> Range<usize> {
        let first = line(page) as usize * LINE_WORDS;
        first..self.len.min(first + LINE_WORDS)
    }

    /// Marks `n` pages from `first` on dirty; pages beyond the end are none.
    #[inline]
    pub fn set(&mut self, first: u64, n: u64) {
        let Some((first, last)) = self.clip(first, n) else {
            return;
        };
        if bits::word(first) != bits::word(last) {
            return self.set_run(first, last);
        }
        let line = self.line(first);
        let words = self.words.exclusive();
        if bits::get(words, line) {
            bits::set(words, first, last);
        } else {
            self.set_stale(first, last);
        }
    }

    /// Likewise, in more words than one.
    #[inline(never)]
    fn set_run(&mut self, first: u64, last: u64) {
        let (first_line, last_line) = (self.line(first), self.line(last));
        let words = self.words.exclusive();
        let near = bits::word(last) - bits::word(first) <= LINE_WORDS;
        if near && bits::get(words, first_line) && bits::get(words, last_line) {
            bits::set_run(words, first, last);
        } else {
            self.set_stale(first, last);
        }
    }

    /// Likewise where lines may be stale.
    #[cold]
    #[inline(never)]
    fn set_stale(&mut self, first: u64, last: u64) {
        self.wipe(first);
        if line(first) != line(last) {
            self.wipe(last);
        }
        let (first_line, last_line) = (self.line(first), self.line(last));
        let words = self.words.exclusive();
        bits::set(words, first, last);
        bits::set(words, first_line, last_line); // those in between are all dirty
    }

    /// Zeroes the dirty bits of the page's line if they are stale.
    #[inline]
    fn wipe(&mut self, page: u64) {
        let (line, stale) = (self.line(page), self.words_of(page));
        let words = self.words.exclusive();
        if !bits::get(words, line) {
            words.get_mut(stale).unwrap_or_default().fill(0);
        }
    }

    /// Marks likewise, beside other threads that mark.
    ///
    /// Call it *after* the write: a report between a mark and its write clears
    /// the mark, and the copy made then may lack the write. The operations on
    /// bits are relaxed; the order of a mark and a report is that of the `&` and
    /// the `&mut`, and comes from whatever hands them out.
    ///
    /// A mark may wait for another thread's wipe of the same line, so it is not
    /// for a signal handler that may have interrupted a mark.
    #[inline]
    pub fn mark(&self, first: u64, n: u64) {
        let Some((first, last)) = self.clip(first, n) else {
            return;
        };
        let words = self.words.shared();
        if bits::word(first) == bits::word(last) && is_good(words, self.line(first)) {
            mark_word(words, first, last);
        } else {
            self.mark_run(first, last);
        }
    }

    /// Likewise, in more words than one.
    #[inline(never)]
    fn mark_run(&self, first: u64, last: u64) {
        let words = self.words.shared();
        let lines = line(first)..=line(last);
        for page in lines.map(|line| line << LINE_SHIFT) {
            if !is_good(words, self.line(page)) {
                self.wipe_shared(page);
            }
        }
        mark(words, first, last);
    }

    /// Makes the words of the page's line good, or waits until another thread
    /// has.
    #[cold]
    #[inline(never)]
    fn wipe_shared(&self, page: u64) {
        let words = self.words.shared();
        let line = self.line(page);
        let at = bits::word(line);
        let (Some(lines), Some(wiping)) = (words.get(at), words.get(at + 2 * summary(self.len)))
        else {
            return; // every line is in all summaries: never
        };
        let bit = 1 << (line & 63);
        while !is_good(words, line) {
            if wiping.fetch_or(bit, Acquire) & bit != 0 {
                spin_loop();
                continue;
            }
            // Whoever wiped it last has made it good.
            if lines.load(Relaxed) & bit == 0 {
                let stale = words.get(self.words_of(page)).unwrap_or_default();
                stale.iter().for_each(|w| w.store(0, Relaxed));
                lines.fetch_or(bit, Release);
            }
            wiping.fetch_and(!bit, Release);
        }
    }

    /// Marks every page.
    pub fn set_all(&mut self) {
        self.set(0, self.npages);
    }

    /// Clears the dirty pages: all lines are stale now.
    pub fn clear(&mut self) {
        let lines = 2 * self.len..2 * self.len + summary(self.len);
        let lines = self.words.exclusive().get_mut(lines);
        lines.unwrap_or_default().fill(0);
    }

    /// The pinned bit of a page, and that of its line, among all words.
    fn pinned(&self, page: u64) -> (u64, u64) {
        let line = self.line(page) + 64 * summary(self.len) as u64;
        (64 * self.len as u64 + page, line)
    }

    /// The page holds a pin now: it is in every report until
    /// [`unpin`](Bitmap::unpin).
    pub fn pin(&mut self, page: u64) {
        if page >= self.npages {
            return;
        }
        let (bit, line) = self.pinned(page);
        let words = self.words.exclusive();
        bits::set(words, bit, bit);
        bits::set(words, line, line);
    }

    /// The page's last pin is gone: it is dirty once more.
    pub fn unpin(&mut self, page: u64) {
        if page >= self.npages {
            return;
        }
        let (bit, line) = self.pinned(page);
        let beside = self.words_of(page);
        let beside = self.len + beside.start..self.len + beside.end;
        let words = self.words.exclusive();
        if !bits::get(words, bit) {
            return;
        }
        bits::clear(words, bit);
        let beside = words.get(beside).unwrap_or_default();
        if beside.iter().fold(0, |all, w| all | w) == 0 {
            bits::clear(words, line);
        }
        self.set(page, 1);
    }
}

/// The line of a page: its bit in a summary.
#[inline]
const fn line(page: u64) -> u64 {
    page >> LINE_SHIFT
}

#[cfg(test)]
impl<M: Memory> Bitmap<M> {
    /// Whether each line in `lines` has a dirty page, or else it costs a report
    /// for nothing; and a line is in `pinned_lines` if, and only if, a page in it
    /// is pinned. No line is being wiped.
    #[allow(dead_code)] // this file is in another test crate too
    pub(crate) fn is_summarised(&mut self) -> bool {
        let wiping = 2 * (self.len + summary(self.len));
        let mut wiping = self.words.exclusive().iter().skip(wiping);
        if wiping.any(|w| *w != 0) {
            return false;
        }
        let parts = self.parts();
        let pinned = parts.pinned.chunks(LINE_WORDS);
        let mut lines = (0..).zip(parts.dirty.chunks(LINE_WORDS).zip(pinned));
        lines.all(|(line, (dirty, pinned))| {
            let some = dirty.iter().any(|w| *w != 0);
            let pins = pinned.iter().any(|w| *w != 0);
            (some || !bits::get(parts.lines, line)) && pins == bits::get(parts.pinned_lines, line)
        })
    }
}

/// Whether the words of a line are good, and the stores seen that made them so.
#[inline]
fn is_good(words: &[AtomicU64], line: u64) -> bool {
    let word = words.get(bits::word(line));
    word.is_some_and(|w| w.load(Acquire) >> (line & 63) & 1 != 0)
}

/// Sets bits `first..=last`, which are in one word, beside other threads that do.
#[inline]
fn mark_word(words: &[AtomicU64], first: u64, last: u64) {
    if let Some(only) = words.get(bits::word(first)) {
        or(only, bits::between(first, last));
    }
}

/// Likewise, in any words.
fn mark(words: &[AtomicU64], first: u64, last: u64) {
    if bits::word(first) == bits::word(last) {
        mark_word(words, first, last);
    } else if let Some([head, middle @ .., tail]) =
        words.get(bits::word(first)..bits::word(last) + 1)
    {
        or(head, bits::from_bit(first));
        // A store of all ones loses nothing: nobody clears meanwhile.
        middle.iter().for_each(|w| w.store(!0, Relaxed));
        or(tail, bits::up_to_bit(last));
    }
}

/// Leaves a word alone that has the bits: nobody clears them meanwhile, and
/// its cache line stays with the other threads.
#[inline]
fn or(word: &AtomicU64, bits: u64) {
    if word.load(Relaxed) & bits != bits {
        word.fetch_or(bits, Relaxed);
    }
}
