// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty pages of one slot in a report.

use std::borrow::Cow;

use dirty_core::{normalise, Error, Extent, PageSize};

use super::ranges::Ranges;
use super::slots::Slot;
use super::words::{clear, count, or, set};
use crate::error::TrackError;

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
    /// told. Returns how many bytes it has told with that.
    pub(super) fn set(&mut self, first: u64, last: u64) -> u64 {
        let pgsize = self.slot.bits.pgsize();
        let first = pgsize.pages(first);
        let npages = pgsize.pages(last) - first + 1;
        set(&mut self.words, first, npages);
        self.add_told(npages, pgsize)
    }

    /// Sets all pages, which nobody told one by one.
    pub(super) fn set_all(&mut self) {
        let npages = self.extent().npages;
        set(&mut self.words, 0, npages);
    }

    fn add_told(&mut self, npages: u64, pgsize: PageSize) -> u64 {
        let bytes = npages.saturating_mul(pgsize.bytes());
        self.told = self.told.saturating_add(bytes);
        bytes
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

    /// The dirty ranges, in whole pages of `pgsize` that the ends of the slot may cut.
    pub(super) fn ranges(&self, pgsize: PageSize) -> Result<Ranges<'_>, Error> {
        let bounds = (self.slot.gpa, self.slot.last());
        let own = self.extent();
        if pgsize <= own.pgsize {
            let words = Cow::Borrowed(&self.words[..]);
            return Ok(Ranges::new(words, own.pgsize, own.iova, bounds));
        }
        let coarse = self.extent_in(pgsize);
        let mut words = vec![0; coarse.npages.div_ceil(64) as usize];
        normalise(&self.words, own, &mut words, coarse)?;
        Ok(Ranges::new(words.into(), pgsize, coarse.iova, bounds))
    }

    /// The pages of `pgsize` that share a byte with the slot. The first has bit 0.
    pub(super) fn extent_in(&self, pgsize: PageSize) -> Extent {
        let first = pgsize.pages(self.slot.gpa);
        Extent {
            bit: 0,
            iova: first << pgsize.shift(),
            npages: pgsize.pages(self.slot.last()) - first + 1,
            pgsize,
        }
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
    /// stands for. Returns how many bytes they are.
    pub(super) fn or(&mut self, words: &[u64], log: Extent) -> Result<u64, TrackError> {
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
            return Ok(self.add_told(npages, own.pgsize));
        }
        normalise(words, log, &mut self.words, own)?;
        let (skip, npages) = self.inside(log);
        Ok(self.add_told(count(words, log.bit + skip, npages), log.pgsize))
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
