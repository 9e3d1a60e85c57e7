// SPDX-License-Identifier: MIT OR Apache-2.0
//! Handles to a tracker and its sources, and why a source fails.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Weak;

use super::tracker::{Inner, Tracker};

/// Why a source cannot say what is dirty.
pub type SourceError = Box<dyn StdError + Send + Sync>;

/// A handle to a [`Tracker`] that does not keep it alive.
#[derive(Clone)]
pub struct WeakTracker {
    pub(super) inner: Weak<Inner>,
}

impl WeakTracker {
    /// Returns the tracker, unless it is gone.
    #[must_use]
    pub fn upgrade(&self) -> Option<Tracker> {
        let inner = self.inner.upgrade()?;
        Some(Tracker { inner })
    }
}

impl fmt::Debug for WeakTracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WeakTracker")
    }
}

/// A source of a tracker. Dropping the handle changes nothing.
#[derive(Clone)]
pub struct Source {
    pub(super) id: u64,
    pub(super) tracker: Weak<Inner>,
}

impl Source {
    /// Removes the source, as when its device is unplugged. If the tracker is on,
    /// the source is asked once more, and what it knows is in the next report.
    /// Removing it twice is no error.
    ///
    /// It waits for a take that is going on, so a source must not call it.
    ///
    /// # Errors
    ///
    /// A [`TakeError`] if the source failed. It is removed all the same, and the
    /// next report has what [`take`](Tracker::take) would have: all memory behind
    /// the view of a log, and otherwise every page.
    pub fn remove(self) -> Result<(), TakeError> {
        match self.tracker.upgrade() {
            Some(tracker) => tracker.remove_source(self.id),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// A source failed to say what is dirty. [`Tracker::take`] says what counts as
/// dirty then.
#[derive(Debug)]
pub struct TakeError {
    /// The source's name.
    pub source: String,
    /// Why it failed.
    pub cause: SourceError,
}

impl fmt::Display for TakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cannot tell what is dirty", self.source)
    }
}

impl StdError for TakeError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.cause)
    }
}
