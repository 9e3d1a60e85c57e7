// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty bitmap of one mapping.
//!
//! A bit is a page of the container's granularity. Beside the dirty bits lie
//! the pinned bits: a page reported is one that is dirty or pinned, so a
//! report is a pass over words and never a walk over pins. A summary has one
//! bit per line of 512 pages, so that clean lines cost nothing.
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

use core::iter;
use core::ops::Range;
use core::sync::atomic::Ordering::Relaxed;

use crate::bits;
use crate::error::Error;
use crate::host::Memory;
use crate::mem::{AtomicU64, Words};
use crate::uapi::DIRTY_BITMAP_PAGES_MAX;

/// Words in a line, which has one bit in the summary.
const LINE_WORDS: usize = 8;
/// log2 of the pages in a line.
const LINE_SHIFT: u32 = 9;

/// The dirty and pinned pages of one mapping.
pub struct Bitmap<M: Memory> {
    /// Dirty words, then as many pinned words, then the summary.
    ///
    /// INVARIANT: no dirty or pinned bit at or beyond `npages`; a line with a
    /// dirty or pinned bit has its summary bit.
    words: Words<M>,
    npages: u64,
    /// Number of pinned bits.
    pinned: u64,
}

/// The three parts of a bitmap.
struct Parts<T> {
    dirty: T,
    pinned: T,
    summary: T,
}

/// The words of some lines, of `len` words in all.
pub(crate) fn words_of(lines: Range<u64>, len: usize) -> Range<usize> {
    let end = lines.end as usize * LINE_WORDS;
    lines.start as usize * LINE_WORDS..end.min(len)
}

/// Words of a bitmap's dirty bits, and of its summary.
fn lengths(npages: u64) -> (usize, usize) {
    let dirty = bits::word(npages.saturating_add(63));
    (dirty, dirty.div_ceil(LINE_WORDS).div_ceil(64))
}

impl<M: Memory> Bitmap<M> {
    /// Bytes that a bitmap of `npages` pages takes from the host.
    #[must_use]
    pub fn bytes(npages: u64) -> u64 {
        let (dirty, summary) = lengths(npages);
        (dirty as u64)
            .saturating_mul(2)
            .saturating_add(summary as u64)
            .saturating_mul(8)
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
        let (dirty, summary) = lengths(npages);
        Ok(Bitmap {
            words: Words::new(mem, 2 * dirty + summary)?,
            npages,
            pinned: 0,
        })
    }

    /// Number of pages.
    #[must_use]
    pub fn npages(&self) -> u64 {
        self.npages
    }

    fn parts(&mut self) -> Parts<&mut [u64]> {
        let (len, _) = lengths(self.npages);
        let words = self.words.exclusive();
        let (dirty, rest) = words.split_at_mut_checked(len).unwrap_or_default();
        let (pinned, summary) = rest.split_at_mut_checked(len).unwrap_or_default();
        Parts {
            dirty,
            pinned,
            summary,
        }
    }

    fn shared_parts(&self) -> Parts<&[AtomicU64]> {
        let (len, _) = lengths(self.npages);
        let words = self.words.shared();
        let (dirty, rest) = words.split_at_checked(len).unwrap_or_default();
        let (pinned, summary) = rest.split_at_checked(len).unwrap_or_default();
        Parts {
            dirty,
            pinned,
            summary,
        }
    }

    /// `n` pages from `first` on, as far as they are in the bitmap.
    fn clip(&self, first: u64, n: u64) -> Option<(u64, u64)> {
        let n = n.min(self.npages.checked_sub(first)?);
        (n != 0).then(|| (first, first + n - 1))
    }

    /// Marks `n` pages from `first` on dirty; pages beyond the end are none.
    pub fn set(&mut self, first: u64, n: u64) {
        let Some((first, last)) = self.clip(first, n) else {
            return;
        };
        let parts = self.parts();
        bits::set(parts.dirty, first, last - first + 1);
        let line = first >> LINE_SHIFT;
        bits::set(parts.summary, line, (last >> LINE_SHIFT) - line + 1);
    }

    /// Likewise, beside other threads that mark.
    ///
    /// Call it *after* the write: a report between a mark and its write clears
    /// the mark, and the copy made then may lack the write. The operations are
    /// relaxed; the order of a mark and a report is that of the `&` and the
    /// `&mut`, and comes from whatever hands them out.
    pub fn mark(&self, first: u64, n: u64) {
        let Some((first, last)) = self.clip(first, n) else {
            return;
        };
        let parts = self.shared_parts();
        match parts.dirty.get(bits::word(first)..=bits::word(last)) {
            Some([only]) => {
                only.fetch_or(bits::from_bit(first) & bits::up_to_bit(last), Relaxed);
            }
            Some([head, middle @ .., tail]) => {
                head.fetch_or(bits::from_bit(first), Relaxed);
                // A store of all ones loses nothing: nobody clears meanwhile.
                middle.iter().for_each(|w| w.store(!0, Relaxed));
                tail.fetch_or(bits::up_to_bit(last), Relaxed);
            }
            _ => {}
        }
        for line in first >> LINE_SHIFT..=last >> LINE_SHIFT {
            if let Some(w) = parts.summary.get(bits::word(line)) {
                let bit = 1 << (line & 63);
                // Usually set already: do not take the cache line then.
                if w.load(Relaxed) & bit == 0 {
                    w.fetch_or(bit, Relaxed);
                }
            }
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
        let new = !bits::get(parts.pinned, page);
        bits::set(parts.pinned, page, 1);
        bits::set(parts.summary, page >> LINE_SHIFT, 1);
        self.pinned += u64::from(new);
    }

    /// The page's last pin is gone: it is dirty once more.
    pub fn unpin(&mut self, page: u64) {
        if page >= self.npages {
            return;
        }
        let parts = self.parts();
        let old = bits::get(parts.pinned, page);
        if let Some(w) = parts.pinned.get_mut(bits::word(page)) {
            *w &= !(1 << (page & 63));
        }
        self.pinned -= u64::from(old);
        if old {
            self.set(page, 1);
        }
    }

    /// Writes words `first..` of the image at `shift` to `out`: every page that
    /// is dirty or pinned, with page 0 at bit `shift` (below 64) of word 0. One
    /// pass, nothing changes.
    pub fn image(&mut self, shift: u32, first: usize, out: &mut [u64]) {
        let parts = self.parts();
        let pages = parts.dirty.iter().zip(parts.pinned.iter());
        let words = pages.map(|(d, p)| d | p);
        funnel(words, shift, first, out);
    }

    /// Whether `out` has room for the whole image at `shift`.
    fn fits(&self, shift: u32, out: &[u64]) -> Result<(), Error> {
        let words = (self.npages + u64::from(shift)).div_ceil(64);
        if shift < 64 && words <= out.len() as u64 {
            Ok(())
        } else {
            Err(Error::BitmapSize)
        }
    }

    /// Writes the whole image at `shift` to `out` and clears the dirty pages,
    /// in the same pass.
    ///
    /// # Errors
    ///
    /// `BitmapSize` if `out` is too short; nothing is taken then.
    pub fn take(&mut self, shift: u32, out: &mut [u64]) -> Result<(), Error> {
        self.fits(shift, out)?;
        let parts = self.parts();
        let pages = parts.dirty.iter_mut().zip(parts.pinned.iter());
        let words = pages.map(|(d, p)| core::mem::take(d) | p);
        funnel(words, shift, 0, out);
        self.summarise_pins();
        Ok(())
    }

    /// Likewise into words that are zero already: visits only lines that have
    /// something to tell.
    ///
    /// # Errors
    ///
    /// `BitmapSize` if `out` is too short; nothing is taken then.
    pub fn take_sparse(&mut self, shift: u32, out: &mut [u64]) -> Result<(), Error> {
        self.fits(shift, out)?;
        let parts = self.parts();
        let lines = (parts.dirty.len() as u64).div_ceil(LINE_WORDS as u64);
        for run in bits::runs(parts.summary, 0, lines) {
            let run = words_of(run, parts.dirty.len());
            let dirty = parts.dirty.get_mut(run.clone()).unwrap_or_default();
            let pinned = parts.pinned.get(run.clone()).unwrap_or_default();
            let mut out = out.get_mut(run.start..).unwrap_or_default().iter_mut();
            let mut carry = 0;
            for (d, p) in dirty.iter_mut().zip(pinned) {
                let w = core::mem::take(d) | p;
                if let Some(o) = out.next() {
                    *o |= w << shift | carry;
                }
                carry = spill(w, shift);
            }
            if let Some(o) = out.next() {
                *o |= carry;
            }
        }
        self.summarise_pins();
        Ok(())
    }

    /// Clears the dirty pages.
    pub fn clear(&mut self) {
        let parts = self.parts();
        let lines = (parts.dirty.len() as u64).div_ceil(LINE_WORDS as u64);
        for run in bits::runs(parts.summary, 0, lines) {
            let run = words_of(run, parts.dirty.len());
            parts.dirty.get_mut(run).unwrap_or_default().fill(0);
        }
        self.summarise_pins();
    }

    /// With no page dirty, only lines with pins stay in the summary.
    fn summarise_pins(&mut self) {
        let none = self.pinned == 0;
        let parts = self.parts();
        if none {
            parts.summary.fill(0);
            return;
        }
        let lines = (parts.dirty.len() as u64).div_ceil(LINE_WORDS as u64);
        for line in 0..lines {
            let Some(w) = parts.summary.get_mut(bits::word(line)) else {
                break;
            };
            let bit = 1 << (line & 63);
            if *w & bit == 0 {
                continue;
            }
            let words = words_of(line..line + 1, parts.pinned.len());
            let pinned = parts.pinned.get(words).unwrap_or_default();
            if pinned.iter().all(|w| *w == 0) {
                *w &= !bit;
            }
        }
    }
}

#[cfg(test)]
impl<M: Memory> Bitmap<M> {
    /// Whether a line has its bit in the summary if, and only if, a page in it
    /// is dirty or pinned, and as many pins are counted as there are.
    #[allow(dead_code)] // this file is in another test crate too
    pub(crate) fn is_summarised(&mut self) -> bool {
        let counted = self.pinned;
        let parts = self.parts();
        let pins: u32 = parts.pinned.iter().map(|w| w.count_ones()).sum();
        let lines = parts.dirty.chunks(LINE_WORDS);
        let mut lines = (0..).zip(lines.zip(parts.pinned.chunks(LINE_WORDS)));
        counted == u64::from(pins)
            && lines.all(|(line, (dirty, pinned))| {
                let some = dirty.iter().chain(pinned).any(|w| *w != 0);
                some == bits::get(parts.summary, line)
            })
    }
}

/// What `word << shift` pushes into the next word.
fn spill(word: u64, shift: u32) -> u64 {
    word.checked_shr(64 - shift).unwrap_or(0)
}

/// Writes words `first..` of `words`, shifted up by `shift` bits, to `out`.
fn funnel(mut words: impl Iterator<Item = u64>, shift: u32, first: usize, out: &mut [u64]) {
    if shift == 0 {
        for (o, w) in out.iter_mut().zip(words.skip(first)) {
            *o = w;
        }
        return;
    }
    let mut carry = match first.checked_sub(1) {
        Some(before) => spill(words.nth(before).unwrap_or(0), shift),
        None => 0,
    };
    for (o, w) in out.iter_mut().zip(words.chain(iter::once(0))) {
        *o = w << shift | carry;
        carry = spill(w, shift);
    }
}

/// Words `first..` of the image of `npages` pages that are all dirty.
pub(crate) fn full_image(npages: u64, shift: u32, first: u64, out: &mut [u64]) {
    out.fill(0);
    let window = first * 64..(first + out.len() as u64) * 64;
    let start = u64::from(shift).max(window.start);
    let end = (u64::from(shift) + npages).min(window.end);
    bits::set(out, start - window.start, end.saturating_sub(start));
}
