// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ranges of a device's log, and what threads mark through.

use dirty_core::{Error, PageSize};

#[cfg(doc)]
use super::DeviceLog;
use crate::dirty_bits::DirtyBits;
use crate::error::TrackError;

/// A range of a device's log: what a thread of the device marks through, without
/// a lock.
///
/// A mark that says `Ok` is in a report that is made later; one that comes when
/// no report will come any more (after STOP, or after the report that took the
/// rest of a removed range) is refused. Mark by [`DeviceLog::mark`] then: the log
/// may have been started again meanwhile.
#[derive(Clone, Debug)]
pub struct LogRange {
    first: u64,
    last: u64,
    bits: DirtyBits,
}

#[derive(Clone)]
pub(super) struct Logged {
    pub(super) first: u64,
    pub(super) last: u64,
    /// None while the log is off. Page 0 is the one that holds `first`.
    pub(super) bits: Option<DirtyBits>,
}

impl LogRange {
    /// First IOVA.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Last IOVA.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Marks `len` bytes from `iova` on: *after* the write, and before telling
    /// anybody that it is done.
    ///
    /// # Errors
    ///
    /// `NotTracking` when no report will tell of it; [`TrackError::Unmapped`] if
    /// a part is outside the range, the rest being marked.
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

/// Start of the page that holds `iova`.
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

    /// Bytes from its first page's start to its end.
    fn span(&self, pgsize: PageSize) -> Result<u64, TrackError> {
        let more = self.last - base(self.first, pgsize);
        Ok(more.checked_add(1).ok_or(Error::Wraps)?)
    }

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

    pub(super) fn inside(&self, first: u64, last: u64) -> bool {
        first <= self.first && self.last <= last
    }

    pub(super) fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first <= last && first <= self.last
    }
}
