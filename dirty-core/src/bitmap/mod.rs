// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty bitmap of one mapping.
//!
//! A bit is a page of the container's granularity. A report has the pages that
//! are dirty or pinned. It is a pass over words and never a walk over pins: each
//! page has a pinned bit beside its dirty bit. The memory for the pinned bits
//! comes with the first pin. So a bitmap without pins takes 1 bit for each page
//! (and 0.8 % for the summaries), and one with pins takes 2.
//!
//! There are three summaries with one bit for each line of 512 pages: the lines
//! with a dirty page, the lines whose pages are all dirty, and the lines with a
//! pinned page. A clean line costs a report nothing, and neither does cleaning
//! one. A line that is not in the dirty summary is clean, whatever its words
//! hold: it is *stale* until its words are wiped, which happens before the next
//! page in it is marked. Lines are wiped in batches of eight, and a fourth summary
//! has the batches that are wiped. So to clean all pages is to clear three
//! summaries, 1/170 of the words.
//!
//! A line in the second summary is *full*. Its words are stale too, and nobody
//! reads them: a report has ones for it. So a mark of whole lines, or of a whole
//! range, changes the summaries only. A mark of a single page in a full line sets
//! a bit that nobody reads, which takes less time than to look first.
//!
//! There are two ways to mark. [`Bitmap::set`] is for the owner and uses plain
//! words. [`Bitmap::mark`] needs only `&self`: threads mark at the same time,
//! with atomic operations. Of the threads that need a batch wiped, one claims
//! and wipes it, and the others wait for its 64 stores. Each then puts its own
//! line into the dirty summary. Reports and [`Bitmap::clear`] take `&mut self`.
//!
//! A thread may make a line full while another wipes it, and neither waits.
//! Whoever makes a line full sets its bit in the full summary first, then in the
//! dirty summary; whoever wipes a batch leaves the full summary alone. So once a
//! line is full it stays full until the owner cleans it. If the wipe takes away
//! the bit of a page that a third thread has marked meanwhile, that thread found
//! the line in the dirty summary before its batch was wiped, so the line is
//! full, and the page is dirty with it.
//!
//! No write is lost as long as four steps keep their order: write, mark, report,
//! copy. Whoever writes a page marks it afterwards. Whatever hands out `&self`
//! and `&mut self` (a reader-writer lock, say) orders the mark with every
//! report, which is why relaxed operations are enough. Whoever reports copies
//! the page afterwards. So a copy made after the report that has the mark has
//! the write too, and a mark that comes too late for one report is in the next.
#![allow(clippy::arithmetic_side_effects)] // bits of one bitmap: fewer than 2^31

pub(crate) mod copy;
pub(crate) mod layout;
pub(crate) mod lines;
mod walk;

use core::ops::Range;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use crate::bitmap::layout::{first_page, line, whole_lines, Layout, View};
use crate::bits;
use crate::error::Error;
use crate::host::Memory;
use crate::mem::{spin_loop, AtomicU64};

/// The dirty and pinned pages of one mapping.
pub struct Bitmap<M: Memory> {
    /// INVARIANT: no bit beyond the last page is pinned, or dirty in a line that
    /// is in the dirty summary. Each line in a summary has a dirty or a pinned
    /// page, and no other line has one. Each full line is in the dirty summary,
    /// and has 512 pages. Every other line in the dirty summary is in a wiped
    /// batch. The words of the other lines in a wiped batch are zero. While nobody
    /// marks, each batch that is claimed is wiped.
    layout: Layout<M>,
}

impl<M: Memory> Bitmap<M> {
    /// Bytes that a bitmap of `npages` pages takes from the host as long as no
    /// page was pinned.
    #[must_use]
    pub fn bytes(npages: u64) -> u64 {
        Layout::<M>::bytes(npages)
    }

    /// Bytes that it takes besides with the first pin.
    #[must_use]
    pub fn pinned_bytes(npages: u64) -> u64 {
        Layout::<M>::pinned_bytes(npages)
    }

    /// A clean bitmap of `npages` pages, without pins.
    ///
    /// # Errors
    ///
    /// `TooManyPages` for more than 2^31-1 pages; `NoMemory`.
    pub fn new(mem: &M, npages: u64) -> Result<Self, Error> {
        let layout = Layout::new(mem, npages)?;
        Ok(Bitmap { layout })
    }

    /// The number of pages.
    #[must_use]
    pub fn npages(&self) -> u64 {
        self.layout.npages()
    }

    #[inline]
    pub(crate) fn view(&mut self) -> View<'_> {
        self.layout.view()
    }

    /// The first and the last of `n` pages from `first` on, as far as they are
    /// in the bitmap.
    #[inline]
    fn clip(&self, first: u64, n: u64) -> Option<(u64, u64)> {
        let n = n.min(self.npages().checked_sub(first)?);
        (n != 0).then(|| (first, first + n - 1))
    }

    /// Marks `n` pages from `first` on as dirty. Pages beyond the end are left
    /// out.
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

    /// As `set`, for pages in more than one word.
    #[inline(never)]
    fn set_run(&mut self, first: u64, last: u64) {
        match self.layout.valid_run(first, last) {
            Some(words) => bits::set_run(words, first, last),
            None => self.set_far(first, last),
        }
    }

    /// As `set`, where lines may be stale, or lie in the run as a whole.
    #[inline(never)]
    fn set_far(&mut self, first: u64, last: u64) {
        let whole = whole_lines(first, last);
        if whole.is_empty() {
            return self.set_stale(first, last);
        }
        for summary in self.summaries(&whole) {
            bits::set(self.layout.exclusive(), summary.start, summary.end - 1);
        }
        for part in ends(first, last, whole).into_iter().flatten() {
            self.set_stale(part.start, part.end - 1);
        }
    }

    /// As `set`, where lines may be stale. No whole line lies in the run.
    #[cold]
    #[inline(never)]
    fn set_stale(&mut self, first: u64, last: u64) {
        for line in line(first)..=line(last) {
            self.wipe(line);
        }
        let lines = [first, last].map(|page| self.layout.line_bit(line(page)));
        let words = self.layout.exclusive();
        bits::set(words, first, last);
        bits::set(words, lines[0], lines[1]);
    }

    /// The bits that make lines full, in the order in which they are set.
    #[inline]
    fn summaries(&self, lines: &Range<u64>) -> [Range<u64>; 2] {
        let n = lines.end - lines.start;
        let Range { start, .. } = *lines;
        [self.layout.full_bit(start), self.layout.line_bit(start)].map(|bit| bit..bit + n)
    }

    /// Wipes the batch of a line unless it is wiped.
    #[inline]
    fn wipe(&mut self, line: u64) {
        let (batch, wiped) = (self.layout.batch(line), self.layout.wiped_bit(line));
        let words = self.layout.exclusive();
        if bits::get(words, wiped) {
            return;
        }
        words.get_mut(batch).unwrap_or_default().fill(0);
        bits::set(words, wiped, wiped);
    }

    /// Marks `n` pages from `first` on as dirty, beside other threads that mark.
    /// Pages beyond the end are left out.
    ///
    /// Call it *after* the write: a report between a mark and its write clears
    /// the mark, and the copy made then may lack the write. The operations on
    /// bits are relaxed. Whatever hands out `&self` and `&mut self` orders the
    /// mark and the report.
    ///
    /// A mark may wait for another thread that wipes the same lines, so do not call
    /// it in a signal handler that may have interrupted a mark.
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

    /// As `mark`, for pages in more than one word.
    #[inline(never)]
    fn mark_run(&self, first: u64, last: u64) {
        match self.layout.valid_run_shared(first, last) {
            Some(words) => or_run(words, first, last),
            None => self.mark_far(first, last),
        }
    }

    /// As `mark`, where lines may be stale, or lie in the run as a whole.
    #[inline(never)]
    fn mark_far(&self, first: u64, last: u64) {
        let whole = whole_lines(first, last);
        if whole.is_empty() {
            return self.mark_stale(first, last);
        }
        for summary in self.summaries(&whole) {
            self.or_run(summary.start, summary.end - 1);
        }
        for part in ends(first, last, whole).into_iter().flatten() {
            self.mark_stale(part.start, part.end - 1);
        }
    }

    /// As `mark`, where lines may be stale. No whole line lies in the run.
    #[cold]
    #[inline(never)]
    fn mark_stale(&self, first: u64, last: u64) {
        for line in line(first)..=line(last) {
            self.validate(line);
        }
        self.or_run(first, last);
    }

    /// Sets bits `first..=last` of the layout, beside other threads that set bits.
    fn or_run(&self, first: u64, last: u64) {
        let words = self.layout.shared();
        let words = words.get(bits::word(first)..bits::word(last) + 1);
        or_run(words.unwrap_or_default(), first, last);
    }

    /// Makes a line valid: wipes its batch, or waits until another thread has, and
    /// puts it into the dirty summary.
    #[inline]
    fn validate(&self, line: u64) {
        let layout = &self.layout;
        let (line_bit, claimed_bit) = (layout.line_bit(line), layout.claimed_bit(line));
        let [bit, claimed, wiped] =
            [line_bit, claimed_bit, layout.wiped_bit(line)].map(|bit| 1 << (bit & 63));
        let words = layout.shared();
        let [Some(lines), Some(batches)] =
            [line_bit, claimed_bit].map(|bit| words.get(bits::word(bit)))
        else {
            return; // unreachable: summaries have a bit for every line
        };
        if lines.load(Acquire) & bit != 0 {
            return;
        }
        if batches.load(Acquire) & wiped == 0 {
            if batches.fetch_or(claimed, Relaxed) & claimed == 0 {
                let stale = words.get(layout.batch(line)).unwrap_or_default();
                stale.iter().for_each(|w| w.store(0, Relaxed));
                batches.fetch_or(wiped, Release);
            }
            while batches.load(Acquire) & wiped == 0 {
                spin_loop();
            }
        }
        lines.fetch_or(bit, Release);
    }

    /// Marks every page.
    pub fn set_all(&mut self) {
        self.set(0, self.npages());
    }

    /// Cleans every page: all lines are stale now, and none is full. Pins stay.
    pub fn clear(&mut self) {
        let summaries = self.layout.dirty_summaries();
        let summaries = self.layout.exclusive().get_mut(summaries);
        summaries.unwrap_or_default().fill(0);
    }

    /// Has the bits of a page fetched that will be unpinned soon.
    #[inline]
    pub(crate) fn prefetch(&mut self, page: u64) {
        self.layout.prefetch(page);
    }

    /// Notes that a page is pinned: it is in every report until
    /// [`unpin`](Bitmap::unpin). No effect beyond the end.
    ///
    /// The first pin takes [`pinned_bytes`](Bitmap::pinned_bytes) from the host.
    /// The bitmap keeps them when the last pin goes.
    ///
    /// # Errors
    ///
    /// `NoMemory`; nothing changes then.
    pub fn pin(&mut self, mem: &M, page: u64) -> Result<(), Error> {
        if page < self.npages() {
            self.reserve_pins(mem)?;
        }
        self.set_pinned(page);
        Ok(())
    }

    /// Whether there is memory for pinned bits.
    #[inline]
    pub(crate) fn has_pins_reserved(&self) -> bool {
        self.layout.has_pinned()
    }

    /// Takes memory for pinned bits, if there is none yet.
    pub(crate) fn reserve_pins(&mut self, mem: &M) -> Result<(), Error> {
        match self.layout.has_pinned() {
            true => Ok(()),
            false => self.layout.add_pinned(mem),
        }
    }

    /// Frees the memory for pinned bits. No page may be pinned.
    pub(crate) fn free_pins(&mut self) {
        self.layout.drop_pinned();
    }

    /// As `pin`, after [`reserve_pins`](Bitmap::reserve_pins).
    #[inline]
    pub(crate) fn set_pinned(&mut self, page: u64) {
        if page >= self.npages() {
            return;
        }
        debug_assert!(self.layout.has_pinned());
        bits::set(self.layout.pinned(), page, page);
        let line_bit = self.layout.pinned_line_bit(line(page));
        bits::set(self.layout.exclusive(), line_bit, line_bit);
    }

    /// Notes that the last pin of a page is gone: the page is dirty once more.
    /// No effect on a page that is not pinned.
    pub fn unpin(&mut self, page: u64) {
        if page >= self.npages() {
            return;
        }
        let line_bit = self.layout.pinned_line_bit(line(page));
        let beside = self.layout.words_of(line(page));
        let pinned = self.layout.pinned();
        if !bits::get(pinned, page) {
            return;
        }
        bits::clear(pinned, page);
        let beside = pinned.get(beside).unwrap_or_default();
        if beside.iter().fold(0, |all, w| all | w) == 0 {
            bits::clear(self.layout.exclusive(), line_bit);
        }
        self.set(page, 1);
    }
}

#[cfg(test)]
impl<M: Memory> Bitmap<M> {
    /// Whether each line in the dirty summary has a dirty page (a line without
    /// one costs a report time), each line in the pinned summary a pinned page,
    /// no other line has a pinned page, no thread is at wiping a batch, and no line
    /// counts by words that were not wiped.
    #[allow(dead_code)] // this file is in another test crate too
    pub(crate) fn is_summarised(&mut self) -> bool {
        use crate::bitmap::layout::LINE_WORDS;

        for line in 0..line(self.npages() + first_page(1) - 1) {
            let layout = &self.layout;
            let [claimed, wiped, dirty, full] = [
                layout.claimed_bit(line),
                layout.wiped_bit(line),
                layout.line_bit(line),
                layout.full_bit(line),
            ]
            .map(|bit| bits::get(self.layout.exclusive(), bit));
            let words = self.layout.words_of(line);
            let words = self.layout.dirty().get(words).unwrap_or_default();
            let zero = words.iter().all(|w| *w == 0);
            let valid = match (wiped, dirty) {
                (true, true) => true,
                (true, false) => zero,
                (false, true) => full,
                (false, false) => true,
            };
            if !valid || claimed && !wiped {
                return false;
            }
        }
        let has_pins = self.layout.has_pinned();
        let view = self.view();
        let pinned = view.pinned.chunks(LINE_WORDS);
        let mut lines = (0..).zip(view.dirty.chunks(LINE_WORDS).zip(pinned));
        lines.all(|(line, (dirty, pinned))| {
            let some = dirty.iter().any(|w| *w != 0);
            let pins = has_pins && pinned.iter().any(|w| *w != 0);
            let (in_lines, full) = (bits::get(view.lines, line), bits::get(view.full, line));
            let summarised = if full {
                in_lines && dirty.len() == LINE_WORDS
            } else {
                some || !in_lines
            };
            summarised && pins == bits::get(view.pinned_lines, line)
        })
    }
}

/// The pages `first..=last` before and after the lines that lie in them as a whole.
#[inline]
fn ends(first: u64, last: u64, whole: Range<u64>) -> [Option<Range<u64>>; 2] {
    let before = first..first_page(whole.start);
    let after = first_page(whole.end)..last + 1;
    [before, after].map(|part| (!part.is_empty()).then_some(part))
}

/// Sets bits `first..=last`, beside other threads that set bits. `words` begin
/// and end with the words of these bits.
#[inline]
fn or_run(words: &[AtomicU64], first: u64, last: u64) {
    match words {
        [head, middle @ .., tail] => {
            or(head, bits::from_bit(first));
            // A store of all ones loses no bit: nobody clears bits meanwhile.
            middle.iter().for_each(|w| w.store(!0, Relaxed));
            or(tail, bits::up_to_bit(last));
        }
        [only] => or(only, bits::between(first, last)),
        [] => {}
    }
}

/// Sets bits of a word. A word that has them already is left alone, since nobody
/// clears them meanwhile: its cache line stays with the other threads.
#[inline]
fn or(word: &AtomicU64, bits: u64) {
    if word.load(Relaxed) & bits != bits {
        word.fetch_or(bits, Relaxed);
    }
}
