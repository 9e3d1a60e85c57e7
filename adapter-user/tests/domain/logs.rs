// SPDX-License-Identifier: MIT OR Apache-2.0
//! A `DeviceLog` and a `Container` that are added to a tracker as they are.

use super::*;
use adapter_user::device_log::{Holes, LogOptions};
use adapter_user::{Extent, PageSize};

fn both_holes(mut test: impl FnMut(LogOptions)) {
    for holes in [Holes::Refused, Holes::Clean] {
        test(LogOptions {
            holes,
            ..LogOptions::default()
        });
    }
}

#[test]
fn a_log_answers_for_holes_whatever_its_options() {
    both_holes(|options| {
        let tracker = tracker(64);
        let view = tracker.iova_view();
        let log = DeviceLog::with_options(options);
        // With this gap the two mappings and the hole between them are asked for in one.
        tracker.add_log("dev", &view, 1 << 20, log.clone()).unwrap();
        log.start_all(PAGE).unwrap();
        tracker.start().unwrap();
        for (iova, gpa) in [(0x10_0000, 0), (0x12_0000, 0x1_0000)] {
            log.add_range(iova, 4 * PAGE).unwrap();
            view.map(iova, gpa, 4 * PAGE).unwrap();
        }
        // The view maps more than the log does.
        view.map(0x20_0000, 0x2_0000, PAGE).unwrap();
        log.mark(0x10_1000, 1).unwrap();
        log.mark(0x12_3000, 1).unwrap();
        assert_eq!(take(&tracker), set([1, 0x13]));
        assert_eq!(take(&tracker), set([]));
    });
}

#[test]
fn a_log_tells_what_is_left_of_removed_ranges() {
    both_holes(|options| {
        let tracker = tracker(64);
        let view = tracker.iova_view();
        let log = DeviceLog::with_options(options);
        tracker.add_log("dev", &view, 0, log.clone()).unwrap();
        log.start_all(PAGE).unwrap();
        tracker.start().unwrap();
        log.add_range(0, 2 * PAGE).unwrap();
        view.map(0, 5 * PAGE, 2 * PAGE).unwrap();
        log.mark(PAGE, 1).unwrap();
        log.remove_range(0, 2 * PAGE).unwrap();
        view.unmap(0, 2 * PAGE).unwrap();
        assert_eq!(take(&tracker), set([6]));

        // A range that was removed before the tracker was told of any mapping.
        log.add_range(0x10_0000, PAGE).unwrap();
        log.mark(0x10_0000, 1).unwrap();
        log.remove_range(0x10_0000, PAGE).unwrap();
        assert_eq!(take(&tracker), set([]));
        view.map(0x10_0000, 0, PAGE).unwrap();
        assert_eq!(take(&tracker), set([]));
    });
}

#[test]
fn what_the_cap_of_removed_ranges_joins_is_no_error() {
    let tracker = tracker(64);
    let view = tracker.iova_view();
    let log = DeviceLog::with_options(LogOptions {
        removed: 0,
        ..LogOptions::default()
    });
    tracker.add_log("dev", &view, 0, log.clone()).unwrap();
    log.start_all(PAGE).unwrap();
    tracker.start().unwrap();
    for iova in [0, 100 * PAGE] {
        log.add_range(iova, PAGE).unwrap();
        view.map(iova, iova / 10, PAGE).unwrap();
        log.mark(iova, 1).unwrap();
        log.remove_range(iova, PAGE).unwrap();
        view.unmap(iova, PAGE).unwrap();
    }
    assert_eq!(take(&tracker), set([0, 10]));
}

#[test]
fn a_log_that_is_off_or_knows_too_little_makes_all_behind_its_view_dirty() {
    let tracker = tracker(8);
    let view = tracker.iova_view();
    let log = DeviceLog::new(None);
    tracker.add_log("dev", &view, 0, log.clone()).unwrap();
    tracker.start().unwrap();
    view.map(0, PAGE, 2 * PAGE).unwrap();
    log.add_range(0, 2 * PAGE).unwrap();
    let mut report = Report::new();
    let failed = tracker.take(&mut report).unwrap_err();
    assert_eq!(failed.cause.to_string(), "dirty-page tracking is off");
    assert_eq!(dirty(&report), set([1, 2]));

    log.start(&[(0, PAGE)], PAGE).unwrap();
    report.clear();
    let failed = tracker.take(&mut report).unwrap_err();
    assert_eq!(failed.source, "dev");
    assert_eq!(dirty(&report), set([1, 2]));
}

#[test]
fn a_log_with_large_pages_loses_no_part_of_them() {
    let tracker = tracker(64);
    let view = tracker.iova_view();
    let log = DeviceLog::new(None);
    log.add_range(0, 1 << 30).unwrap();
    log.start_all(16 * PAGE).unwrap();
    tracker.add_log("dev", &view, 0, log.clone()).unwrap();
    tracker.start().unwrap();
    // Two mappings in one page of the log.
    view.map(PAGE, 0, PAGE).unwrap();
    view.map(5 * PAGE, 9 * PAGE, 2 * PAGE).unwrap();
    log.mark(6 * PAGE, 1).unwrap();
    assert_eq!(take(&tracker), set([0, 9, 10]));
    assert_eq!(take(&tracker), set([]));
}

/// 1 TiB is read in pieces, and costs what is dirty in it.
#[test]
fn a_log_of_a_large_range_is_read() {
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, 1 << 40).unwrap();
    let view = tracker.iova_view();
    let log = DeviceLog::new(None);
    log.add_range(0, 1 << 40).unwrap();
    log.start_all(PAGE).unwrap();
    tracker.add_log("dev", &view, 0, log.clone()).unwrap();
    tracker.start().unwrap();
    view.map(0, 0, 1 << 40).unwrap();
    let pages = [0, 1 << 20, (1 << 28) - 1];
    for page in pages {
        log.mark(page * PAGE, 1).unwrap();
    }
    assert_eq!(take(&tracker), set(pages));
}

#[test]
fn a_container_answers_for_mappings_that_are_larger_than_the_views() {
    let tracker = tracker(64);
    let host = tracker.slots()[0].host.unwrap();
    let view = tracker.iova_view();
    let container = container();
    // SAFETY: the memory is leaked, and nobody has a reference to it.
    unsafe { container.map_process(0, host, 64 * PAGE, RW) }.unwrap();
    let log = container.clone();
    tracker.add_log("container", &view, 0, log).unwrap();
    container.start().unwrap();
    tracker.start().unwrap();
    view.map(8 * PAGE, 8 * PAGE, 4 * PAGE).unwrap();
    view.map(20 * PAGE, 20 * PAGE, PAGE).unwrap();
    for page in [7, 9, 20, 21] {
        container.mark(page * PAGE, 1).unwrap();
    }
    assert_eq!(take(&tracker), set([9, 20]));
    assert_eq!(take(&tracker), set([]));

    // A pinned page stays dirty.
    let unpin = Box::new(adapter_user::Device::unpin_range);
    let device = container.open_device(GROUP, Some(unpin)).unwrap();
    let pin = device.pin(10 * PAGE, 1, RW).unwrap();
    assert_eq!(take(&tracker), set([10]));
    assert_eq!(take(&tracker), set([10]));
    drop(pin);
    assert_eq!(take(&tracker), set([10]));
    assert_eq!(take(&tracker), set([]));
}

#[test]
fn a_container_that_does_not_track_makes_all_behind_its_view_dirty() {
    let tracker = tracker(8);
    let view = tracker.iova_view();
    let container = container();
    let log = container.clone();
    tracker.add_log("container", &view, 0, log).unwrap();
    tracker.start().unwrap();
    view.map(0, 3 * PAGE, PAGE).unwrap();
    let mut report = Report::new();
    let failed = tracker.take(&mut report).unwrap_err();
    assert_eq!(failed.cause.to_string(), "dirty-page tracking is off");
    assert_eq!(dirty(&report), set([3]));
}

#[test]
fn a_range_that_a_container_unmapped_is_told_by_its_bitmap() {
    let tracker = tracker(8);
    let host = tracker.slots()[0].host.unwrap();
    let view = tracker.iova_view();
    let container = container();
    let log = container.clone();
    tracker.add_log("container", &view, 0, log).unwrap();
    container.start().unwrap();
    tracker.start().unwrap();
    view.map(0, 0, 4 * PAGE).unwrap();
    // SAFETY: the memory is leaked, and nobody has a reference to it.
    unsafe { container.map_process(0, host, 4 * PAGE, RW) }.unwrap();
    container.mark(PAGE, 1).unwrap();
    let mut words = [0];
    container
        .unmap_dirty(0, 4 * PAGE, PAGE, &mut words)
        .unwrap();
    let pages = Extent {
        bit: 0,
        iova: 0,
        npages: 4,
        pgsize: PageSize::new(PAGE).unwrap(),
    };
    view.unmap_dirty(0, 4 * PAGE, &words, pages).unwrap();
    assert_eq!(take(&tracker), set([1]));
}
