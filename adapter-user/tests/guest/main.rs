// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tracker by guest address: its rules one by one, and a comparison with a naive
//! model that keeps a set of pages.

mod model;
mod report;
mod slots;
mod stats;
mod views;

use adapter_user::guest::{Report, Tracker};
use adapter_user::{Extent, PageSize};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

fn pgsize(bytes: u64) -> PageSize {
    PageSize::new(bytes).unwrap()
}

/// A tracker that is on, with slot 5, of 100 pages at 1 MiB that have a host address, and slot 2,
/// of 70 pages at 16 MiB.
fn tracker() -> Tracker {
    let tracker = Tracker::new(None);
    tracker
        .add_slot(5, MIB, Some(0x7000_0000), 100 * PAGE)
        .unwrap();
    tracker.add_slot(2, 16 * MIB, None, 70 * PAGE).unwrap();
    tracker.start().unwrap();
    tracker
}

/// Takes a report, and returns the addresses of its dirty pages.
fn take(tracker: &Tracker) -> Vec<u64> {
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    pages(&report)
}

/// The addresses of the dirty pages of a report.
fn pages(report: &Report) -> Vec<u64> {
    let ranges = report.ranges(PAGE).unwrap();
    let pages: Vec<u64> = ranges
        .flat_map(|range| (0..range.size).step_by(4096).map(move |at| range.gpa + at))
        .collect();
    assert_eq!(pages.len() as u64, report.pages());
    pages
}

fn extent(iova: u64, npages: u64, bytes: u64) -> Extent {
    Extent {
        bit: 0,
        iova,
        npages,
        pgsize: pgsize(bytes),
    }
}
