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

pub(crate) mod copy;
pub(crate) mod layout;

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::bitmap::layout::{line, Layout, View, LINE_WORDS};
use crate::bits;
use crate::error::Error;
use crate::host::Memory;
use crate::mem::{spin_loop, AtomicU64};

/// The dirty and pinned pages of one mapping.
pub struct Bitmap<M: Memory> {
    /// INVARIANT: no bit beyond the last page is pinned, or dirty in a line that
    /// is in the summary; lines in the summaries, and no others, have dirty or
    /// pinned pages. No line is being wiped while nobody marks.
    layout: Layout<M>,
}

impl<M: Memory> Bitmap<M> {
    /// Bytes that a bitmap of `npages` pages takes from the host.
    #[must_use]
    pub fn bytes(npages: u64) -> u64 {
        Layout::<M>::bytes(npages)
    }

    /// A clean bitmap.
    ///
    /// # Errors
    ///
    /// `TooManyPages` beyond 2^31-1, `NoMemory`.
    pub fn new(mem: &M, npages: u64) -> Result<Self, Error> {
        let layout = Layout::new(mem, npages)?;
        Ok(Bitmap { layout })
    }

    /// Number of pages.
    #[must_use]
    pub fn npages(&self) -> u64 {
        self.layout.npages()
    }

    pub(crate) fn view(&mut self) -> View<'_> {
        self.layout.view()
    }

    /// `n` pages from `first` on, as far as they are in the bitmap: first, last.
    #[inline]
    fn clip(&self, first: u64, n: u64) -> Option<(u64, u64)> {
        let n = n.min(self.npages().checked_sub(first)?);
        (n != 0).then(|| (first, first + n - 1))
    }

    /// Marks `n` pages from `first` on dirty; pages beyond the end are none.
    #[inline]
    pub fn set(&mut self, first: u64, n: u64) {
        let Some((first, last)) = self.clip(first, n) else {
            return;
        };
        if bits::word(first) != bits::word(last) {
            self.set_run(first, last);
        } else if let Some(word) = self.layout.valid(first) {
            *word |= bits::between(first, last);
        } else {
            self.set_stale(first, last);
        }
    }

    /// Likewise, in more words than one.
    #[inline(never)]
    fn set_run(&mut self, first: u64, last: u64) {
        match self.layout.valid_run(first, last) {
            Some(words) => bits::set_run(words, first, last),
            None => self.set_stale(first, last),
        }
    }

    /// Likewise where lines may be stale.
    #[cold]
    #[inline(never)]
    fn set_stale(&mut self, first: u64, last: u64) {
        let (first_line, last_line) = (line(first), line(last));
        self.wipe(first_line);
        if first_line != last_line {
            self.wipe(last_line);
        }
        let lines = [first_line, last_line].map(|line| self.layout.line_bit(line));
        let words = self.layout.exclusive();
        bits::set(words, first, last);
        bits::set(words, lines[0], lines[1]); // those in between are all dirty
    }

    /// Zeroes the dirty bits of a line if they are stale.
    #[inline]
    fn wipe(&mut self, line: u64) {
        let (stale, bit) = (self.layout.dirty(line), self.layout.line_bit(line));
        let words = self.layout.exclusive();
        if bits::get(words, bit) {
            return;
        }
        let stale = words.get_mut(stale).unwrap_or_default();
        match stale.first_chunk_mut::<LINE_WORDS>() {
            Some(line) => *line = [0; LINE_WORDS],
            None => stale.fill(0),
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
        if bits::word(first) != bits::word(last) {
            self.mark_run(first, last);
        } else if let Some(word) = self.layout.valid_shared(first) {
            or(word, bits::between(first, last));
        } else {
            self.mark_stale(first, last);
        }
    }

    /// Likewise, in more words than one.
    #[inline(never)]
    fn mark_run(&self, first: u64, last: u64) {
        match self.layout.valid_run_shared(first, last) {
            Some(words) => or_run(words, first, last),
            None => self.mark_stale(first, last),
        }
    }

    /// Likewise where lines may be stale.
    #[cold]
    #[inline(never)]
    fn mark_stale(&self, first: u64, last: u64) {
        for line in line(first)..=line(last) {
            self.wipe_shared(line);
        }
        let words = self.layout.shared();
        let words = words.get(bits::word(first)..bits::word(last) + 1);
        or_run(words.unwrap_or_default(), first, last);
    }

    /// Makes the words of a line good, or waits until another thread has.
    #[cold]
    #[inline(never)]
    fn wipe_shared(&self, line: u64) {
        let bits = [self.layout.line_bit(line), self.layout.lock_bit(line)];
        let words = self.layout.shared();
        let [Some(lines), Some(locks)] = bits.map(|bit| words.get(bits::word(bit))) else {
            return; // every line is in all summaries: never
        };
        let bit = 1 << (line & 63);
        while lines.load(Acquire) & bit == 0 {
            if locks.fetch_or(bit, Acquire) & bit != 0 {
                spin_loop();
                continue;
            }
            // Whoever wiped it last has made it good.
            if lines.load(Relaxed) & bit == 0 {
                let stale = words.get(self.layout.dirty(line)).unwrap_or_default();
                stale.iter().for_each(|w| w.store(0, Relaxed));
                lines.fetch_or(bit, Release);
            }
            locks.fetch_and(!bit, Release);
        }
    }

    /// Marks every page.
    pub fn set_all(&mut self) {
        self.set(0, self.npages());
    }

    /// Clears the dirty pages: all lines are stale now.
    pub fn clear(&mut self) {
        let lines = self.layout.lines();
        let lines = self.layout.exclusive().get_mut(lines);
        lines.unwrap_or_default().fill(0);
    }

    /// Says that a page will be unpinned soon.
    #[inline]
    pub(crate) fn prefetch(&mut self, page: u64) {
        self.layout.prefetch(page);
    }

    /// The page holds a pin now: it is in every report until
    /// [`unpin`](Bitmap::unpin).
    pub fn pin(&mut self, page: u64) {
        if page >= self.npages() {
            return;
        }
        let page_bit = self.layout.pinned_bit(page);
        let line_bit = self.layout.pinned_line_bit(line(page));
        let words = self.layout.exclusive();
        bits::set(words, page_bit, page_bit);
        bits::set(words, line_bit, line_bit);
    }

    /// The page's last pin is gone: it is dirty once more.
    pub fn unpin(&mut self, page: u64) {
        if page >= self.npages() {
            return;
        }
        let page_bit = self.layout.pinned_bit(page);
        let line_bit = self.layout.pinned_line_bit(line(page));
        let beside = self.layout.pinned(line(page));
        let words = self.layout.exclusive();
        if !bits::get(words, page_bit) {
            return;
        }
        bits::clear(words, page_bit);
        let beside = words.get(beside).unwrap_or_default();
        if beside.iter().fold(0, |all, w| all | w) == 0 {
            bits::clear(words, line_bit);
        }
        self.set(page, 1);
    }
}

#[cfg(test)]
impl<M: Memory> Bitmap<M> {
    /// Whether each line in `lines` has a dirty page, or else it costs a report
    /// for nothing; and a line is in `pinned_lines` if, and only if, a page in it
    /// is pinned. No line is being wiped.
    #[allow(dead_code)] // this file is in another test crate too
    pub(crate) fn is_summarised(&mut self) -> bool {
        let lock_word = bits::word(self.layout.lock_bit(0));
        let mut locks = self.layout.exclusive().iter().skip(lock_word);
        if locks.any(|w| *w != 0) {
            return false;
        }
        let view = self.view();
        let pinned = view.pinned.chunks(LINE_WORDS);
        let mut lines = (0..).zip(view.dirty.chunks(LINE_WORDS).zip(pinned));
        lines.all(|(line, (dirty, pinned))| {
            let some = dirty.iter().any(|w| *w != 0);
            let pins = pinned.iter().any(|w| *w != 0);
            (some || !bits::get(view.lines, line)) && pins == bits::get(view.pinned_lines, line)
        })
    }
}

/// Sets bits `first..=last` of words that are those with these bits, beside other
/// threads that do.
#[inline]
fn or_run(words: &[AtomicU64], first: u64, last: u64) {
    match words {
        [head, middle @ .., tail] => {
            or(head, bits::from_bit(first));
            // A store of all ones loses nothing: nobody clears meanwhile.
            middle.iter().for_each(|w| w.store(!0, Relaxed));
            or(tail, bits::up_to_bit(last));
        }
        [only] => or(only, bits::between(first, last)),
        [] => {}
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
