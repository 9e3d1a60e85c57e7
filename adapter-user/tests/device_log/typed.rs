// SPDX-License-Identifier: MIT OR Apache-2.0
//! The typed calls.

use adapter_user::{Errno, PageSize};

use adapter_user::device_log::LogOptions;

use super::*;

#[test]
fn start_checks_its_ranges_in_order() {
    let log = unlimited(Some(16));
    let start = |ranges: &[(u64, u64)], pgsize| log.start(ranges, pgsize).map(drop);
    assert_eq!(start(&[], 0), Err(TrackError::NoRanges));
    let many: Vec<_> = (0..257).map(|n| (n * PAGE, PAGE)).collect();
    assert_eq!(start(&many, 0), Err(TrackError::TooManyRanges));
    assert_eq!(TrackError::TooManyRanges.errno(), Errno::E2BIG);
    for pgsize in [0, 3, 12288] {
        assert_eq!(start(&[(0, PAGE)], pgsize), Err(TrackError::PageSize));
    }
    assert_eq!(start(&[(1, PAGE)], PAGE), cause(Error::Misaligned));
    assert_eq!(start(&[(0, 1)], PAGE), cause(Error::Misaligned));
    assert_eq!(start(&[(PAGE, PAGE)], 2 * PAGE), cause(Error::Misaligned));
    assert_eq!(start(&[(0, 0)], PAGE), cause(Error::ZeroSize));
    assert_eq!(start(&[(END, 2 * PAGE)], PAGE), cause(Error::Wraps));
    assert_eq!(Error::Wraps.errno(), Errno::EOVERFLOW);
    for overlap in [(PAGE, PAGE), (2 * PAGE, PAGE), (0, 9 * PAGE), (0, 2 * PAGE)] {
        let ranges = [(PAGE, 2 * PAGE), overlap];
        assert_eq!(start(&ranges, PAGE), Err(TrackError::RangesOverlap));
    }
    assert_eq!(TrackError::RangesOverlap.errno(), Errno::EINVAL);
    let over = TrackError::Budget {
        wanted: 24,
        left: 16,
    };
    assert_eq!(
        start(&[(0, PAGE), (PAGE, PAGE), (2 * PAGE, PAGE)], PAGE),
        Err(over)
    );
    assert_eq!(over.errno(), Errno::ENOMEM);
    assert!(!log.is_on());
    assert_eq!(start(&[(0, PAGE), (END, PAGE)], PAGE), Ok(()));
    assert_eq!(start(&[(0, PAGE)], PAGE), Err(TrackError::Started));
    assert_eq!(TrackError::Started.errno(), Errno::EINVAL);
    log.stop();
    log.stop();
    assert_eq!(
        start(&many[..256], PAGE).unwrap_err().errno(),
        Errno::ENOMEM
    );
    assert_eq!(
        start(&[(0, 2 << 40)], 1 << 40),
        Ok(()),
        "a larger page needs fewer bits"
    );
}

#[test]
fn the_page_size_is_a_hint() {
    let log = DeviceLog::new(None);
    let chosen = |hint| {
        let pgsize = log.start(&[(1 << 20, 1 << 20)], hint).map(PageSize::bytes);
        log.stop();
        pgsize
    };
    assert_eq!(chosen(512), Ok(4096));
    assert_eq!(chosen(4096), Ok(4096));
    assert_eq!(chosen(65536), Ok(65536));
}

#[test]
fn report_checks_its_arguments() {
    let log = started();
    let mut words = [0; 4];
    let mut ask = |iova, size, pgsize| log.report(iova, size, pgsize, &mut words);
    for pgsize in [0, 1, 2048, 12288] {
        assert_eq!(ask(0, PAGE, pgsize), Err(TrackError::PageSize));
    }
    assert_eq!(ask(END, 2 * PAGE, PAGE), cause(Error::Wraps));
    assert_eq!(ask(0, 0, PAGE), cause(Error::ZeroSize));
    assert_eq!(ask(1, PAGE, PAGE), cause(Error::Misaligned));
    assert_eq!(ask(0, 257 * PAGE, PAGE), cause(Error::BitmapSize));
    assert_eq!(ask(0, 101 * PAGE, PAGE), unmapped(100 * PAGE));
    assert_eq!(ask(150 * PAGE, PAGE, PAGE), unmapped(150 * PAGE));
    assert_eq!(ask(0, 100 * PAGE, PAGE), Ok(()));
    log.stop();
    assert_eq!(
        log.report(0, PAGE, PAGE, &mut words),
        cause(Error::NotTracking)
    );
    assert_eq!(log.mark(0, 1), cause(Error::NotTracking));
    assert!(log.range(0).is_none());
}

#[test]
fn an_error_clears_nothing() {
    let log = started();
    log.mark(99 * PAGE, 1).unwrap();
    assert_eq!(
        report(&log, 90, 20),
        Err(TrackError::Unmapped { addr: 100 * PAGE })
    );
    assert_eq!(report(&log, 90, 10), Ok(vec![99]));
    assert_eq!(report(&log, 90, 10), Ok(vec![]));
}

#[test]
fn reports_or_into_the_buffer_at_any_page_size() {
    let log = started();
    let ask = |pgsize: u64, clear| {
        let mut words = [1 << 40, 0];
        log.dirty_bitmap(64 * PAGE, 32 * PAGE, pgsize, clear, &mut words)
            .unwrap();
        assert_eq!(words[0] >> 40 & 1, 1, "the buffer keeps its bits");
        words[0] ^= 1 << 40;
        words
    };
    log.mark(63 * PAGE, 1).unwrap(); // outside
    log.mark(65 * PAGE, 1).unwrap();
    log.mark(80 * PAGE, 1).unwrap();
    assert_eq!(ask(PAGE, false), [1 << 1 | 1 << 16, 0]);
    assert_eq!(ask(2 * PAGE, false), [1 << 0 | 1 << 8, 0]);
    assert_eq!(ask(8 * PAGE, false), [1 << 0 | 1 << 2, 0]);
    assert_eq!(ask(2048, false), [0b11 << 2 | 0b11 << 32, 0]);
    assert_eq!(ask(PAGE, true), [1 << 1 | 1 << 16, 0]);
    assert_eq!(ask(PAGE, true), [0, 0]);
    assert_eq!(report(&log, 0, 100), Ok(vec![63]));
}

#[test]
fn iommufd_checks_its_arguments() {
    let log = started();
    let ask = |iova, size, pgsize| log.dirty_bitmap(iova, size, pgsize, true, &mut [0; 64]);
    assert_eq!(ask(0, 0, 0), cause(Error::ZeroSize));
    assert_eq!(ask(END, 2 * PAGE, 0), cause(Error::Wraps));
    assert_eq!(ask(0, PAGE, 0), Err(TrackError::PageSize));
    assert_eq!(ask(0, PAGE, 3), Err(TrackError::PageSize));
    assert_eq!(ask(0, PAGE, 2 * PAGE), cause(Error::Misaligned));
    assert_eq!(ask(PAGE, 2 * PAGE, 2 * PAGE), cause(Error::Misaligned));
    assert_eq!(ask(2048, 2048, 1024), cause(Error::Misaligned));
    assert_eq!(ask(0, PAGE, 1024), Ok(()));
    assert_eq!(ask(100 * PAGE, PAGE, PAGE), unmapped(100 * PAGE));
}

/// A report of a part of a large page must not lose the rest of the page.
#[test]
fn a_page_reported_in_part_stays_dirty() {
    let log = unlimited(None);
    log.start(&[(0, 1 << 20)], 64 << 10).unwrap();
    log.mark(17 * PAGE, 1).unwrap();
    assert_eq!(report(&log, 16, 8), Ok((16..24).collect()));
    assert_eq!(report(&log, 24, 8), Ok((24..32).collect()));
    assert_eq!(report(&log, 0, 64), Ok((16..32).collect()));
    assert_eq!(report(&log, 0, 64), Ok(vec![]));
}

#[test]
fn tracking_starts_clean_and_keeps_its_ranges() {
    let log = DeviceLog::new(Some(16));
    log.add_range(0, 64 * PAGE).unwrap();
    log.add_range(END, PAGE).unwrap();
    assert_eq!(log.add_range(63 * PAGE, PAGE), cause(Error::Overlap));
    assert_eq!(log.add_range(1, PAGE), cause(Error::Misaligned));
    assert_eq!(log.add_range(END, 2 * PAGE), cause(Error::Wraps));
    assert_eq!(log.remove_range(0, PAGE), cause(Error::NoMapping));
    log.set_tracking(true).unwrap();
    let over = TrackError::Budget { wanted: 8, left: 0 };
    assert_eq!(log.add_range(100 * PAGE, PAGE), Err(over));
    let old = log.range(0).unwrap();
    old.mark(0, 1).unwrap();
    log.set_tracking(true).unwrap();
    assert_eq!(report(&log, 0, 64), Ok(vec![]), "it starts clean again");
    old.mark(0, 1).unwrap();
    assert_eq!(report(&log, 0, 64), Ok(vec![0]));
    log.set_tracking(false).unwrap();
    assert_eq!(old.mark(0, 1), cause(Error::NotTracking));
    log.set_tracking(true).unwrap();
    assert_eq!(
        old.mark(0, 1),
        cause(Error::NotTracking),
        "the handle is from before the log was off"
    );
    assert_eq!(report(&log, 0, 64), Ok(vec![]));
}

#[test]
fn ranges_come_and_go_while_the_log_is_on() {
    let log = started();
    let going = log.range(50 * PAGE).unwrap();
    assert_eq!((going.first(), going.last()), (0, 100 * PAGE - 1));
    going.mark(2 * PAGE, PAGE).unwrap();
    log.remove_range(0, 100 * PAGE).unwrap();
    assert!(log.range(0).is_none());
    assert_eq!(log.mark(0, 1), unmapped(0));
    going.mark(3 * PAGE, 1).unwrap(); // after the removal, and still in a report
    log.add_range(0, 10 * PAGE).unwrap();
    log.mark(9 * PAGE, 1).unwrap();
    assert_eq!(report(&log, 0, 10), Ok(vec![2, 3, 9]));
    going.mark(60 * PAGE, 1).unwrap(); // a report has only taken a part of the range
    assert_eq!(
        going.mark(4 * PAGE, 1),
        cause(Error::NotTracking),
        "a report has taken this part of the range"
    );
    log.mark(4 * PAGE, 1).unwrap();
    assert_eq!(report(&log, 0, 100), Ok(vec![4, 60]));
    assert_eq!(
        going.mark(5 * PAGE, 1),
        cause(Error::NotTracking),
        "a report has taken all of the range"
    );
    assert_eq!(
        report(&log, 0, 100),
        Err(TrackError::Unmapped { addr: 10 * PAGE })
    );
    assert_eq!(report(&log, 0, 10), Ok(vec![]));
    // A mark that reaches outside fails and marks the part inside.
    let range = log.range(0).unwrap();
    assert_eq!(range.mark(9 * PAGE, 2 * PAGE), unmapped(9 * PAGE));
    assert_eq!(log.mark(9 * PAGE, 192 * PAGE), unmapped(10 * PAGE));
    assert_eq!(report(&log, 0, 10), Ok(vec![9]));
    assert_eq!(report(&log, 200, 100), Ok(vec![200]));
    log.remove_range(200 * PAGE, 100 * PAGE).unwrap();
    log.stop();
    assert_eq!(range.mark(0, 1), cause(Error::NotTracking));
}

/// What an operator sees of a log: it grows coarser beyond its limit, and says so.
#[test]
fn stats_have_ranges_bitmaps_and_what_was_removed() {
    let limit = 400;
    let options = LogOptions {
        budget: Some(1 << 20),
        removed: limit,
        ..LogOptions::default()
    };
    let log = DeviceLog::with_options(options);
    for n in 0..40 {
        log.add_range(n << 30, 100 * PAGE).unwrap();
    }
    let stats = log.stats();
    assert_eq!((stats.pgsize, stats.ranges, stats.logged), (None, 40, 0));
    assert_eq!((stats.budget, stats.removed_limit), (Some(1 << 20), limit));

    log.start(
        &[(0, 50 * PAGE), (60 * PAGE, 40 * PAGE), (1 << 30, 1 << 40)],
        PAGE,
    )
    .unwrap();
    let stats = log.stats();
    assert_eq!(
        (stats.pgsize, stats.ranges, stats.logged),
        (Some(PAGE), 40, 41)
    );
    assert_eq!(stats.bitmap_bytes, 8 + 16 + 39 * 16);

    log.mark(1 << 30, 1).unwrap();
    log.remove_range(1 << 30, 100 * PAGE).unwrap();
    let stats = log.stats();
    assert_eq!((stats.ranges, stats.logged), (39, 40));
    assert_eq!((stats.removed_ranges, stats.coarser), (1, 0));
    assert!(stats.removed_bytes > 0 && stats.removed_bytes <= limit);
    for n in 2..40 {
        log.mark(n << 30, 1).unwrap();
        log.remove_range(n << 30, 100 * PAGE).unwrap();
    }
    let stats = log.stats();
    assert!(stats.coarser > 0 && stats.removed_ranges < 5, "{stats:?}");
    log.take_removed(|_, _| Ok(())).unwrap();
    let stats = log.stats();
    assert_eq!((stats.removed_ranges, stats.removed_bytes), (0, 0));
    log.stop();
    assert_eq!(log.stats().bitmap_bytes, 0);
}
