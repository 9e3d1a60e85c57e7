// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ranges of a device's log, and the handles that threads mark through.

use dirty_core::{Error, PageSize};

use crate::dirty_bits::DirtyBits;
use crate::error::TrackError;

/// A range of a [`DeviceLog`](super::DeviceLog): a device's threads mark through it,
/// without a lock.
///
/// A mark that returns `Ok` is in a report that is made later. A mark is refused
/// when no report will have it: after the log was switched off, or after the report
/// that took all of a removed range. Call [`DeviceLog::mark`](super::DeviceLog::mark)
/// then, because the log may have been started again.
#[derive(Clone, Debug)]
pub struct LogRange {
    first: u64,
    last: u64,
    bits: DirtyBits,
}

/// A range of the log.
#[derive(Clone)]
pub(super) struct Logged {
    pub(super) first: u64,
    pub(super) last: u64,
    /// `None` while the log is off. Page 0 of the bits is the one that holds `first`.
    pub(super) bits: Option<DirtyBits>,
}

impl LogRange {
    /// Returns the first IOVA.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Returns the last IOVA.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Marks as dirty every page that the `len` bytes at IOVA `iova` touch. No bytes
    /// mark nothing.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is
    /// done.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::NotTracking`] if no report will have the mark.
    /// - [`TrackError::Unmapped`] if some of the bytes are outside the range; the
    ///   others are marked all the same.
    pub fn mark(&self, iova: u64, len: u64) -> Result<(), TrackError> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let last = iova.saturating_add(more);
        let (from, to) = (iova.max(self.first), last.min(self.last));
        if from <= to {
            let base = base(self.first, self.bits.pgsize());
            self.bits.mark(from - base, to - from + 1)?;
        }
        match from > iova || to < last || last - iova != more {
            true => Err(TrackError::Unmapped { addr: iova }),
            false => Ok(()),
        }
    }
}

/// The first address of the page that holds `iova`.
pub(super) fn base(iova: u64, pgsize: PageSize) -> u64 {
    pgsize.pages(iova) << pgsize.shift()
}

impl Logged {
    pub(super) fn new(iova: u64, size: u64) -> Result<Logged, TrackError> {
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        Ok(Logged {
            first: iova,
            last,
            bits: None,
        })
    }

    /// The number of bytes from the start of the range's first page to its end.
    fn span(&self, pgsize: PageSize) -> Result<u64, TrackError> {
        let more = self.last - base(self.first, pgsize);
        Ok(more.checked_add(1).ok_or(Error::Wraps)?)
    }

    /// The number of bytes that the range's bits take.
    pub(super) fn bytes(&self, pgsize: PageSize) -> Result<u64, TrackError> {
        Ok(DirtyBits::bytes(self.span(pgsize)?, pgsize))
    }

    pub(super) fn with_bits(mut self, pgsize: PageSize) -> Result<Logged, TrackError> {
        self.bits = Some(DirtyBits::new(self.span(pgsize)?, pgsize)?);
        Ok(self)
    }

    pub(super) fn handle(&self) -> Option<LogRange> {
        Some(LogRange {
            first: self.first,
            last: self.last,
            bits: self.bits.clone()?,
        })
    }

    pub(super) fn close(&self) {
        if let Some(bits) = &self.bits {
            bits.close();
        }
    }

    /// Whether all of the range lies between two IOVAs.
    pub(super) fn inside(&self, first: u64, last: u64) -> bool {
        first <= self.first && self.last <= last
    }

    pub(super) fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}
