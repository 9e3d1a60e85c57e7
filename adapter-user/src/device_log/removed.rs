// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is left to report of ranges that were removed while the log was on.

use std::collections::BTreeMap;

use dirty_core::{normalise, runs, Error, Extent, PageSize};

use super::piece::Piece;
use super::spans::Spans;
use super::words::{keep, set};
use crate::ranges::check_covered;

/// How many words of dirty bits have one entry.
const WORDS: usize = 8;
/// How many pages have one entry.
const PAGES: u64 = WORDS as u64 * 64;
/// What an entry of [`Removed::words`] takes in a tree whose nodes are half full.
const ENTRY_BYTES: u64 = 144;
/// What a span takes in a tree whose nodes are half full.
const SPAN_BYTES: u64 = 40;

/// The dirty pages of removed ranges, until somebody has them all.
///
/// Pages are counted from IOVA 0, so what two ranges had at the same IOVA is one
/// page here.
pub(super) struct Removed {
    pgsize: PageSize,
    cap: u64,
    /// The IOVAs that were removed and not reported since. Every dirty page below
    /// has at least one of them.
    known: Spans,
    /// Dirty bits: entry k has the pages from `k * PAGES` on. No entry is zero.
    words: BTreeMap<u64, [u64; WORDS]>,
    /// Pages that are dirty, and, beyond the cap, pages between them.
    runs: Spans,
    /// How often the cap was reached.
    coarser: u64,
}

impl Removed {
    pub(super) fn new(pgsize: PageSize, cap: u64) -> Removed {
        Removed {
            pgsize,
            cap,
            known: Spans::default(),
            words: BTreeMap::new(),
            runs: Spans::default(),
            coarser: 0,
        }
    }

    /// Whether the cap allows `more` bytes.
    fn room(&mut self, more: u64) -> bool {
        let room = self.bytes().saturating_add(more) <= self.cap;
        self.coarser += u64::from(!room);
        room
    }

    /// About how many bytes all this takes.
    pub(super) fn bytes(&self) -> u64 {
        let spans = (self.known.len() + self.runs.len()) as u64 * SPAN_BYTES;
        let words = self.words.len() as u64 * ENTRY_BYTES;
        spans.saturating_add(words)
    }

    /// How many ranges are still to be reported.
    pub(super) fn ranges(&self) -> usize {
        self.known.len()
    }

    /// How often the cap was reached, so that pages may be dirty that were not marked.
    pub(super) fn coarser(&self) -> u64 {
        self.coarser
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Removed {
            coarser: self.coarser,
            ..Removed::new(self.pgsize, self.cap)
        };
    }

    /// The removed IOVAs from `first` to `last` that were not reported.
    pub(super) fn known(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.known.within(first, last)
    }

    /// Closes a piece and keeps its dirty pages.
    pub(super) fn keep(&mut self, piece: &Piece) {
        // A mark that still succeeds has set its bit before the words are read.
        piece.close();
        let room = self.room(SPAN_BYTES);
        self.known.insert(piece.first, piece.last, room);
        let (first, last) = (piece.first_word(), piece.last_word());
        for entry in first / WORDS as u64..=last / WORDS as u64 {
            let start = entry * WORDS as u64;
            let from = start.max(first);
            let mut words = [0; WORDS];
            piece.peek(from, &mut words[(from - start) as usize..]);
            self.or(entry, &words);
        }
    }

    /// Marks pages of removed ranges. Fails if some of them are in no removed range
    /// that is still to be reported; the others are marked all the same.
    pub(super) fn mark(&mut self, first: u64, last: u64) -> Result<(), Error> {
        let known: Vec<(u64, u64)> = self.known(first, last).collect();
        for (from, to) in &known {
            self.dirty(*from, *to);
        }
        check_covered(known, first, last).map_err(|_| Error::NotTracking)
    }

    /// Makes the pages of some IOVAs dirty.
    fn dirty(&mut self, first: u64, last: u64) {
        let (from, to) = (self.pgsize.pages(first), self.pgsize.pages(last));
        if to - from >= PAGES {
            let room = self.room(SPAN_BYTES);
            return self.runs.insert(from, to, room);
        }
        for entry in from / PAGES..=to / PAGES {
            let start = entry * PAGES;
            let mut words = [0; WORDS];
            let (head, tail) = (from.max(start) - start, to.min(start + PAGES - 1) - start);
            set(&mut words, head, tail);
            self.or(entry, &words);
        }
    }

    /// ORs dirty bits into an entry.
    fn or(&mut self, entry: u64, words: &[u64; WORDS]) {
        if words.iter().fold(0, |any, word| any | word) == 0 {
            return;
        }
        if let Some(there) = self.words.get_mut(&entry) {
            there.iter_mut().zip(words).for_each(|(a, b)| *a |= b);
        } else if *words != [!0; WORDS] && self.room(ENTRY_BYTES) {
            self.words.insert(entry, *words);
        } else {
            // All from the first dirty page to the last: at most one span an entry.
            let start = entry * PAGES;
            let first = runs(words).map(|run| run.start).next();
            let last = runs(words).map(|run| run.end - 1).last();
            if let (Some(first), Some(last)) = (first, last) {
                let room = self.room(SPAN_BYTES);
                self.runs.insert(start + first, start + last, room);
            }
        }
    }

    /// The pages of an entry.
    fn extent(&self, entry: u64) -> Extent {
        let first = entry * PAGES;
        let npages = (self.pgsize.pages(u64::MAX) - first + 1).min(PAGES);
        Extent {
            bit: 0,
            iova: first << self.pgsize.shift(),
            npages,
            pgsize: self.pgsize,
        }
    }

    /// The first and last IOVA of some pages.
    fn iovas(&self, first: u64, last: u64) -> (u64, u64) {
        let shift = self.pgsize.shift();
        (first << shift, last << shift | (self.pgsize.bytes() - 1))
    }

    /// ORs the dirty pages into a window of a report, which ends at IOVA `last`.
    pub(super) fn report(&self, out: &mut [u64], to: Extent, last: u64) -> Result<(), Error> {
        let (from, end) = (self.pgsize.pages(to.iova), self.pgsize.pages(last));
        for (entry, words) in self.words.range(from / PAGES..=end / PAGES) {
            let start = entry * PAGES;
            let (head, tail) = (from.max(start) - start, end.min(start + PAGES - 1) - start);
            let mut words = *words;
            keep(&mut words, head, tail);
            normalise(&words, self.extent(*entry), out, to)?;
        }
        for (a, b) in self.runs.within(from, end) {
            let (a, b) = self.iovas(a, b);
            let page = |iova: u64| to.pgsize.pages(iova - to.iova);
            set(out, page(a.max(to.iova)), page(b.min(last)));
        }
        Ok(())
    }

    /// Somebody has the dirty pages from IOVA `first` to IOVA `last`: they become
    /// clean, and their range is forgotten. A page of which the IOVAs have only a
    /// piece stays dirty, if the rest of it was removed too.
    pub(super) fn told(&mut self, first: u64, last: u64) {
        let (mut from, mut to) = (self.pgsize.pages(first), self.pgsize.pages(last));
        let (start, end) = (self.iovas(from, from).0, self.iovas(to, to).1);
        let cut_head = start < first && self.known.touches(start, first - 1);
        let cut_tail = last < end && self.known.touches(last + 1, end);
        let room = self.room(SPAN_BYTES);
        self.known.remove(first, last, room);
        if cut_head {
            from += 1;
        }
        if cut_tail {
            match to.checked_sub(1) {
                Some(before) => to = before,
                None => return,
            }
        }
        if from <= to {
            self.clean(from, to);
        }
    }

    /// Makes the pages from page `from` to page `to` clean.
    fn clean(&mut self, from: u64, to: u64) {
        let mut empty = Vec::new();
        for (entry, words) in self.words.range_mut(from / PAGES..=to / PAGES) {
            let start = entry * PAGES;
            let (head, tail) = (from.max(start) - start, to.min(start + PAGES - 1) - start);
            let mut told = *words;
            keep(&mut told, head, tail);
            words.iter_mut().zip(told).for_each(|(a, b)| *a &= !b);
            if *words == [0; WORDS] {
                empty.push(*entry);
            }
        }
        for entry in empty {
            self.words.remove(&entry);
        }
        let room = self.room(SPAN_BYTES);
        self.runs.remove(from, to, room);
    }

    /// The dirty pages, as the first and last IOVA of each run. A page may be in two
    /// of them.
    pub(super) fn dirty_runs(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let words = self.words.iter().flat_map(|(entry, words)| {
            let start = entry * PAGES;
            runs(words).map(move |run| (start + run.start, start + run.end - 1))
        });
        let all = words.chain(self.runs.within(0, u64::MAX));
        all.map(|(first, last)| self.iovas(first, last))
    }
}
