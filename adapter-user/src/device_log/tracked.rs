// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's log as a log of the tracker.

use super::log::DeviceLog;
use super::report::take;
use crate::guest::{DirtyIovas, DirtyLog, IovaRange, SourceError};

/// A clone of the log can be [added](crate::guest::Tracker::add_log) to a tracker, with
/// the view of its device's mappings. Each take then has what is dirty in the IOVAs that
/// it asks for, and all that is left of removed ranges. Nobody else should read the
/// log meanwhile: a report clears what it has.
///
/// IOVAs that are not mapped in the log are clean, whatever
/// [`LogOptions::holes`](super::LogOptions::holes) says.
///
/// Start the log before the tracker, and stop it after the tracker: a log that was
/// started again in between has forgotten what was dirty.
///
/// # Errors
///
/// In this order; all memory behind the view counts as dirty then:
///
/// - [`Error::NotTracking`](crate::Error::NotTracking) if the log is off.
/// - [`TrackError::Unmapped`](crate::TrackError::Unmapped) for an IOVA that the log was
///   not started for, so that nobody knows what was written there.
impl DirtyLog for DeviceLog {
    fn read(&mut self, ask: &[IovaRange], dirty: &mut DirtyIovas) -> Result<(), SourceError> {
        let log: &DeviceLog = self;
        // What was removed may be of mappings that the view has forgotten.
        dirty.allow_beside();
        for range in ask {
            // Marks take no other lock, and a map waits for one range at most.
            let state = log.read();
            state.check_started(range.iova, range.last())?;
            let put = |words: &[u64], pages| dirty.or_bitmap(words, pages);
            take(state.on()?, range.iova, range.last(), put)?;
        }
        // A range that was removed before it was its turn is in here.
        log.take_removed(|iova, size| dirty.or_range(iova, size))?;
        Ok(())
    }
}
