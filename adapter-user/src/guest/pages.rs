// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty pages of one slot in a report.

use dirty_core::{normalise, Error, Extent, PageSize};

use super::slots::Slot;
use super::words::{clear, count, or, set};
use crate::error::TrackError;

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
}

/// Where a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotInfo {
    /// The slot's number.
    pub id: u32,
    /// The first guest-physical address.
    pub gpa: u64,
    /// The length in bytes.
    pub size: u64,
}

#[derive(Clone, Debug)]
pub(super) struct SlotPages {
    /// The slot as the report has it; its bits may have grown since.
    pub(super) slot: Slot,
    /// Bit k % 64 of word k / 64 stands for page k of the slot.
    ///
    /// INVARIANT: as many words as `slot.size` needs, and no bit beyond its pages.
    pub(super) words: Vec<u64>,
    /// The bytes that sources have told of the slot in this take.
    pub(super) told: u64,
    /// The bytes that this take found marked.
    pub(super) marked: u64,
}

impl SlotPages {
    /// The pages of `slot`, of which `words` has the first.
    pub(super) fn new(slot: Slot, mut words: Vec<u64>) -> Self {
        // A slot does not shrink, so this cuts nothing off.
        words.resize(slot.bits.words(), 0);
        SlotPages {
            slot,
            words,
            told: 0,
            marked: 0,
        }
    }

    pub(super) fn info(&self) -> SlotInfo {
        let Slot { id, gpa, size, .. } = self.slot;
        SlotInfo { id, gpa, size }
    }

    pub(super) fn extent(&self) -> Extent {
        let pgsize = self.slot.bits.pgsize();
        Extent {
            bit: 0,
            iova: self.slot.gpa,
            npages: self.slot.size.div_ceil(pgsize.bytes()),
            pgsize,
        }
    }

    /// The number of dirty pages.
    pub(super) fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Sets the pages that hold bytes `first` to `last` of the slot, which a source
    /// told.
    pub(super) fn set(&mut self, first: u64, last: u64) {
        let pgsize = self.slot.bits.pgsize();
        let first = pgsize.pages(first);
        let npages = pgsize.pages(last) - first + 1;
        set(&mut self.words, first, npages);
        self.add_told(npages, pgsize);
    }

    /// Sets all pages, which nobody told one by one.
    pub(super) fn set_all(&mut self) {
        let npages = self.extent().npages;
        set(&mut self.words, 0, npages);
    }

    fn add_told(&mut self, npages: u64, pgsize: PageSize) {
        let bytes = npages.saturating_mul(pgsize.bytes());
        self.told = self.told.saturating_add(bytes);
    }

    /// Takes the marks of the slot.
    pub(super) fn take_marks(&mut self) {
        // This cannot fail: the words have the length of the bits.
        let npages = self.slot.bits.take_counting(&mut self.words).unwrap_or(0);
        self.marked = npages.saturating_mul(self.slot.bits.pgsize().bytes());
    }

    /// Clears the pages that lie wholly between two guest addresses of the slot.
    pub(super) fn discard(&mut self, first: u64, last: u64) {
        let pages = self.slot.bits.pgsize();
        let (from, end) = (first - self.slot.gpa, last - self.slot.gpa + 1);
        let from = from.div_ceil(pages.bytes());
        let end = match end >= self.slot.size {
            true => self.slot.size.div_ceil(pages.bytes()),
            false => pages.pages(end),
        };
        clear(&mut self.words, from, end.saturating_sub(from));
    }

    pub(super) fn ranges(
        &self,
        pgsize: PageSize,
    ) -> Result<impl Iterator<Item = Range> + '_, Error> {
        let (start, end) = (self.slot.gpa, self.slot.last());
        let inside = pgsize.bytes() - 1;
        let ranges = self.extent().ranges(&self.words)?;
        let mut runs = ranges
            .map(move |(first, last)| ((first & !inside).max(start), (last | inside).min(end)))
            .peekable();
        Ok(std::iter::from_fn(move || {
            let (first, mut last) = runs.next()?;
            while let Some((_, next)) = runs.next_if(|(next, _)| *next <= last.saturating_add(1)) {
                last = last.max(next);
            }
            Some(Range {
                gpa: first,
                size: last - first + 1,
            })
        }))
    }

    /// Returns how many pages of `extent` lie wholly in the slot.
    pub(super) fn overlap(&self, extent: Extent) -> u64 {
        let pgsize = extent.pgsize;
        let first = self.slot.gpa.max(extent.iova);
        let end = extent.iova.saturating_add(extent.npages << pgsize.shift());
        let end = end.min(self.slot.last().saturating_add(1));
        match first.checked_add(pgsize.bytes() - 1) {
            Some(up) if up < end => pgsize.pages(end).saturating_sub(pgsize.pages(up)),
            _ => 0,
        }
    }

    /// ORs the bits of `words` that are in the slot. `log` says which pages `words`
    /// stands for.
    pub(super) fn or(&mut self, words: &[u64], log: Extent) -> Result<(), TrackError> {
        let own = self.extent();
        if log == own {
            // The bits stand for the same pages, so whole words can be ORed.
            let len = self.words.len();
            let words = words.get(..len).ok_or(Error::BitmapSize)?;
            let mut npages = or(&mut self.words, words);
            if let (Some(tail), rest @ 1..) = (self.words.last_mut(), own.npages % 64) {
                *tail &= (1 << rest) - 1;
                let beyond = words.last().map_or(0, |last| last >> rest);
                npages -= u64::from(beyond.count_ones());
            }
            self.add_told(npages, own.pgsize);
            return Ok(());
        }
        normalise(words, log, &mut self.words, own)?;
        let (skip, npages) = self.inside(log);
        self.add_told(count(words, log.bit + skip, npages), log.pgsize);
        Ok(())
    }

    /// The pages of `extent`, which describes a bitmap, that share a byte with the slot:
    /// how many come before them, and how many they are.
    fn inside(&self, extent: Extent) -> (u64, u64) {
        let pgsize = extent.pgsize;
        let start = pgsize.pages(extent.iova);
        let (first, last) = (pgsize.pages(self.slot.gpa), pgsize.pages(self.slot.last()));
        let from = first.max(start);
        let end = last
            .saturating_add(1)
            .min(start.saturating_add(extent.npages));
        match end.checked_sub(from) {
            Some(npages) => (from - start, npages),
            None => (0, 0),
        }
    }
}
