// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reports of a device's log: which pages are dirty, and what is cleared.

use dirty_core::{normalise, Error, Extent};

use super::ask::{Ask, Windows};
use super::log::DeviceLog;
use super::range::{base, Logged};
use crate::dirty_bits::DirtyBits;
use crate::error::TrackError;
use crate::ranges::check_covered;

/// The part of a report that comes from one range of the log.
struct Part<'a> {
    bits: &'a DirtyBits,
    /// The index in `bits` of the first of `words`.
    start: usize,
    /// The dirty pages that the report has of this range.
    words: Vec<u64>,
    /// The pages that the words stand for.
    pages: Extent,
    /// The bits in `words` of the pages that the report has as a whole: the first
    /// one, and the one after the last. The report has only a piece of the other
    /// pages. They stay dirty, because another report may ask for the other piece.
    whole: (u64, u64),
}

impl<'a> Part<'a> {
    fn new(ask: Ask, range: &'a Logged) -> Option<Part<'a>> {
        let bits = range.bits.as_ref()?;
        let pgsize = bits.pgsize();
        let base = base(range.first, pgsize);
        let (first, last) = (ask.iova.max(range.first), ask.last.min(range.last));
        let (from, to) = (pgsize.pages(first - base), pgsize.pages(last - base));
        let start = (from / 64) as usize;
        let mut words = vec![0; (to / 64) as usize - start + 1];
        bits.peek(start, &mut words);
        keep(&mut words, from % 64, from % 64 + (to - from));
        let inside = pgsize.bytes() - 1;
        let cut_head = first > range.first && first & inside != 0;
        let cut_tail = last < range.last && last & inside != inside;
        let bit = from % 64;
        Some(Part {
            bits,
            start,
            words,
            pages: Extent {
                bit,
                iova: base + (from << pgsize.shift()),
                npages: to - from + 1,
                pgsize,
            },
            whole: (
                bit + u64::from(cut_head),
                (bit + (to - from) + 1) - u64::from(cut_tail),
            ),
        })
    }

    /// Clears the pages that the report has as a whole, and nothing else.
    fn clear(mut self) {
        let (first, end) = self.whole;
        match end.checked_sub(1).filter(|last| *last >= first) {
            Some(last) => keep(&mut self.words, first, last),
            None => self.words.fill(0),
        }
        self.bits.clear(self.start, &self.words);
    }
}

/// Clears every bit but those from `first` to `last`.
fn keep(words: &mut [u64], first: u64, last: u64) {
    for (at, word) in (0..).zip(words) {
        let here = at * 64..at * 64 + 64;
        if first >= here.end || last < here.start {
            *word = 0;
            continue;
        }
        if first > here.start {
            *word &= !0 << (first % 64);
        }
        if last < here.end {
            *word &= !0 >> (63 - last % 64);
        }
    }
}

impl DeviceLog {
    /// ORs the dirty pages of the `size` bytes of IOVAs from `iova` on into `bitmap`,
    /// and clears them. This is DMA_LOGGING_REPORT.
    ///
    /// Bit k % 64 of word k / 64 is the page of `pgsize` bytes at
    /// `iova + k * pgsize`. The IOVAs may span ranges of the log, or be a part of
    /// one. A page of the log stays dirty if they contain only a piece of it.
    ///
    /// Copy the pages *after* this call.
    ///
    /// # Errors
    ///
    /// In this order. Nothing is cleared then, and every page of the report counts
    /// as dirty:
    ///
    /// - [`TrackError::PageSize`] unless `pgsize` is a power of two of at least
    ///   4 KiB.
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs wrap.
    /// - [`Error::Misaligned`] unless `iova` is a multiple of `pgsize`.
    /// - [`Error::BitmapSize`] if `bitmap` is too short.
    /// - [`Error::NotTracking`] if the log is off.
    /// - [`TrackError::Unmapped`] if an IOVA is in no range of the log, so that
    ///   nobody knows what was written there.
    pub fn report(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &mut [u64],
    ) -> Result<(), TrackError> {
        self.report_words(Ask::logging(iova, size, pgsize)?, true, bitmap)
    }

    /// As [`report`](DeviceLog::report), at any page size. If `clear` is false, the
    /// pages stay dirty. This is IOMMU_HWPT_GET_DIRTY_BITMAP.
    ///
    /// # Errors
    ///
    /// In this order. Nothing is cleared then, and every page of the report counts
    /// as dirty:
    ///
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs wrap.
    /// - [`TrackError::PageSize`] unless `pgsize` is a power of two.
    /// - [`Error::Misaligned`] unless `iova` and `size` are multiples of `pgsize`
    ///   and of 4 KiB.
    /// - [`Error::BitmapSize`], [`Error::NotTracking`], [`TrackError::Unmapped`] as
    ///   `report`.
    pub fn dirty_bitmap(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<(), TrackError> {
        self.report_words(Ask::iommufd(iova, size, pgsize)?, clear, bitmap)
    }

    fn report_words(&self, ask: Ask, clear: bool, bitmap: &mut [u64]) -> Result<(), TrackError> {
        ask.check_fits(bitmap)?;
        self.report_windows(ask, clear, |at, words| {
            bitmap[at..]
                .iter_mut()
                .zip(words)
                .for_each(|(a, b)| *a |= b);
            Ok(())
        })
    }

    /// Makes a report window by window, and gives each to `put`: the index of its
    /// first word in the report, and its words. If `clear` is set and no call of
    /// `put` fails, it then clears what the report has.
    pub(super) fn report_windows(
        &self,
        ask: Ask,
        clear: bool,
        mut put: impl FnMut(usize, &[u64]) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        let mut state = self.write();
        state.on.ok_or(Error::NotTracking)?;
        let (first, last) = (ask.iova, ask.last);
        let hit = state.ranges.values().chain(&state.gone);
        let hit: Vec<Logged> = hit.filter(|r| r.overlaps(first, last)).cloned().collect();
        check_covered(hit.iter().map(|r| (r.first, r.last)).collect(), first, last)?;
        if clear {
            // These ranges are forgotten below. A mark that comes after their bits
            // are read must be refused, or it would be lost.
            let gone = state.gone.iter().filter(|r| r.inside(first, last));
            gone.for_each(Logged::close);
        }
        let parts: Vec<Part<'_>> = hit.iter().filter_map(|r| Part::new(ask, r)).collect();
        let mut windows = Windows::new(ask);
        while let Some((at, to, out)) = windows.next() {
            for part in &parts {
                normalise(&part.words, part.pages, out, to)?;
            }
            put(at, out)?;
        }
        if clear {
            parts.into_iter().for_each(Part::clear);
            state.gone.retain(|r| !r.inside(first, last));
        }
        Ok(())
    }
}
