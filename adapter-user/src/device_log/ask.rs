// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a report of a device's log is asked for, and its words window by window.

use dirty_core::{Error, Extent, PageSize};

use crate::dirty_bits::BASE_PAGE;
use crate::error::TrackError;

/// How many words of a report are made at a time.
const WINDOW: usize = 4096;

/// Returns the last IOVA of a range that starts at `iova` and has `size` bytes. It
/// must not be above `limit`.
pub(super) fn last_iova(iova: u64, size: u64, limit: u64) -> Result<u64, Error> {
    let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
    let last = iova.checked_add(more).filter(|last| *last <= limit);
    last.ok_or(Error::Wraps)
}

/// A report that somebody asks for: a range of IOVAs and a page size.
#[derive(Clone, Copy)]
pub(super) struct Ask {
    pub(super) iova: u64,
    pub(super) last: u64,
    pgsize: PageSize,
}

impl Ask {
    /// Checks the arguments of DMA_LOGGING_REPORT. No IOVA may be above `limit`.
    pub(super) fn logging(
        limit: u64,
        iova: u64,
        size: u64,
        pgsize: u64,
    ) -> Result<Ask, TrackError> {
        let pgsize = PageSize::new(pgsize).filter(|size| *size >= BASE_PAGE);
        let pgsize = pgsize.ok_or(TrackError::PageSize)?;
        let last = last_iova(iova, size, limit)?;
        if !pgsize.aligns(iova) {
            return Err(Error::Misaligned.into());
        }
        Ok(Ask { iova, last, pgsize })
    }

    /// Checks the arguments of IOMMU_HWPT_GET_DIRTY_BITMAP.
    pub(super) fn iommufd(iova: u64, size: u64, pgsize: u64) -> Result<Ask, TrackError> {
        let last = last_iova(iova, size, u64::MAX)?;
        let pgsize = PageSize::new(pgsize).ok_or(TrackError::PageSize)?;
        if !pgsize.aligns(iova | size) || !BASE_PAGE.aligns(iova | size) {
            return Err(Error::Misaligned.into());
        }
        Ok(Ask { iova, last, pgsize })
    }

    /// The number of pages, of which the end of the range may cut the last short.
    pub(super) fn npages(self) -> u64 {
        self.pgsize.pages(self.last - self.iova).saturating_add(1)
    }

    /// The pages and their bits. The first page has bit 0.
    pub(super) fn extent(self) -> Extent {
        Extent {
            bit: 0,
            iova: self.iova,
            npages: self.npages(),
            pgsize: self.pgsize,
        }
    }

    /// The last IOVA of a window of the report.
    pub(super) fn end_of(self, window: Extent) -> u64 {
        let end = window.iova + ((window.npages - 1) << self.pgsize.shift());
        (end | (self.pgsize.bytes() - 1)).min(self.last)
    }

    /// Checks that `bitmap` has a bit for every page.
    pub(super) fn check_fits(self, bitmap: &[u64]) -> Result<(), TrackError> {
        match self.npages().div_ceil(64) <= bitmap.len() as u64 {
            true => Ok(()),
            false => Err(Error::BitmapSize.into()),
        }
    }
}

/// The words of a report, one window after another.
pub(super) struct Windows {
    ask: Ask,
    words: Vec<u64>,
    /// How many pages had their window.
    done: u64,
}

impl Windows {
    pub(super) fn new(ask: Ask) -> Windows {
        let words = ask.npages().div_ceil(64).min(WINDOW as u64);
        Windows {
            ask,
            words: vec![0; words as usize],
            done: 0,
        }
    }

    /// Returns the next window: the index of its first word in the report, the
    /// pages that it stands for, and its words, which are zero.
    pub(super) fn next(&mut self) -> Option<(usize, Extent, &mut [u64])> {
        let left = self.ask.npages() - self.done;
        if left == 0 {
            return None;
        }
        let npages = left.min(WINDOW as u64 * 64);
        let at = self.done / 64;
        let iova = self.ask.iova + (self.done << self.ask.pgsize.shift());
        self.done += npages;
        let words = &mut self.words[..npages.div_ceil(64) as usize];
        words.fill(0);
        let extent = Extent {
            bit: 0,
            iova,
            npages,
            pgsize: self.ask.pgsize,
        };
        Some((at as usize, extent, words))
    }
}
