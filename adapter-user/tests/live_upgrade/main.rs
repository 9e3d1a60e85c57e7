// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tracker that is saved and restored: what it has afterwards, and bytes that are
//! damaged or hostile.

#[path = "../support/altered.rs"]
mod altered;
mod damaged;
mod restored;

use adapter_user::guest::{DirtyIovas, IovaRange, Report, SourceError, Tracker};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

/// A tracker that is off, with slot 5 of 100 pages at 1 MiB, and slot 2 of 70 pages at
/// 16 MiB.
fn fresh() -> Tracker {
    let tracker = Tracker::new(None);
    tracker.add_slot(5, MIB, None, 100 * PAGE).unwrap();
    tracker.add_slot(2, 16 * MIB, None, 70 * PAGE).unwrap();
    tracker
}

/// How many pages `fresh` has.
const ALL: usize = 170;

/// The addresses of the dirty pages of a report.
fn pages(report: &Report) -> Vec<u64> {
    let ranges = report.ranges(PAGE).unwrap();
    let pages = ranges.flat_map(|range| (0..range.size / PAGE).map(move |n| range.gpa + n * PAGE));
    pages.collect()
}

/// Takes a report, and returns the addresses of its dirty pages.
fn take(tracker: &Tracker) -> Vec<u64> {
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    pages(&report)
}

/// A log that tells a page of IOVAs each time.
fn tells(iova: u64) -> impl FnMut(&[IovaRange], &mut DirtyIovas) -> Result<(), SourceError> {
    move |_, dirty| Ok(dirty.or_range(iova, 1)?)
}

/// A log that is clean.
fn clean(_: &[IovaRange], _: &mut DirtyIovas) -> Result<(), SourceError> {
    Ok(())
}
