// SPDX-License-Identifier: MIT OR Apache-2.0
//! The handles that threads mark through.

use std::fmt;
use std::sync::{PoisonError, RwLock, Weak};

use dirty_core::Error;

use super::piece::Piece;
use super::state::State;
use crate::error::TrackError;

/// A range of a [`DeviceLog`](super::DeviceLog): a device's threads mark through it,
/// without a lock.
///
/// A mark that returns `Ok` is in a report that is made later. A mark that comes
/// after the range was removed takes the log's lock, and is in the report of the
/// removed range.
///
/// A mark is refused when no report will have it: after the log was switched off, or
/// after a report has had these pages of the removed range. Call
/// [`DeviceLog::mark`](super::DeviceLog::mark) then, because the log may have been
/// started again.
#[derive(Clone)]
pub struct LogRange {
    piece: Piece,
    /// The start of the log that the piece is of.
    start: u64,
    log: Weak<RwLock<State>>,
}

impl LogRange {
    pub(super) fn new(piece: Piece, start: u64, log: Weak<RwLock<State>>) -> LogRange {
        LogRange { piece, start, log }
    }

    /// Returns the first IOVA.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.piece.first
    }

    /// Returns the last IOVA.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.piece.last
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
    /// - [`Error::NotTracking`] if no report will have the mark, or not all of it.
    /// - [`TrackError::Unmapped`] if some of the bytes are outside the range; the
    ///   others are marked all the same.
    pub fn mark(&self, iova: u64, len: u64) -> Result<(), TrackError> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let last = iova.saturating_add(more);
        let (from, to) = (iova.max(self.first()), last.min(self.last()));
        if from <= to && self.piece.mark(from, to).is_err() {
            self.mark_removed(from, to)?;
        }
        match from > iova || to < last || last - iova != more {
            true => Err(TrackError::Unmapped { addr: iova }),
            false => Ok(()),
        }
    }

    /// Marks pages of a range that was removed meanwhile.
    fn mark_removed(&self, first: u64, last: u64) -> Result<(), Error> {
        let log = self.log.upgrade().ok_or(Error::NotTracking)?;
        let mut state = log.write().unwrap_or_else(PoisonError::into_inner);
        let on = state.on_mut()?;
        match on.start == self.start {
            true => on.removed.mark(first, last),
            false => Err(Error::NotTracking),
        }
    }
}

impl fmt::Debug for LogRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogRange")
            .field("first", &self.first())
            .field("last", &self.last())
            .finish_non_exhaustive()
    }
}
