// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes into a report, from marks and from sources, and what comes out of it.

use adapter_user::guest::Range;
use adapter_user::{Errno, Error, TrackError};

use super::*;

#[test]
fn every_kind_of_source_ends_in_one_report() {
    let tracker = tracker();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    report.or_slot(5, &[1, 1 << 35 | 1 << 36]).unwrap(); // the last bit is padding
    report.or_ring([(2, 69), (5, 3)]).unwrap();
    report.or_host(0x7000_0000 + 5 * PAGE, 2 * PAGE).unwrap();
    report.or_range(16 * MIB + 4095, 2).unwrap();
    report.or_bitmap(&[0b10], extent(0, 2, MIB)).unwrap(); // all of slot 5
    let mut expected: Vec<u64> = (0..100).map(|page| MIB + page * PAGE).collect();
    expected.extend([0, 1, 69].map(|page| 16 * MIB + page * PAGE));
    assert_eq!(pages(&report), expected);
    report.clear();
    assert!(pages(&report).is_empty());
    // The extent begins at bit 60, and its pages have 1 KiB.
    let part = |bit, bytes| Extent {
        bit,
        ..extent(MIB + 8 * PAGE, 64, bytes)
    };
    report.or_bitmap(&[1 << 63, 1], part(60, 1024)).unwrap();
    assert_eq!(pages(&report), [MIB + 8 * PAGE, MIB + 9 * PAGE]);
}

#[test]
fn bits_outside_the_slots_are_an_error_and_the_others_count() {
    let tracker = tracker();
    let mut report = Report::new();
    let unknown = TrackError::UnknownSlot { id: 5 };
    assert_eq!(
        report.or_slot(5, &[1, 1]),
        Err(unknown),
        "the report has no slots yet"
    );
    tracker.take(&mut report).unwrap();
    let outside = |addr| Err(TrackError::Unmapped { addr });

    assert_eq!(report.or_slot(5, &[1]), Err(Error::BitmapSize.into()));
    assert_eq!(report.pages(), 0);
    assert_eq!(
        report.or_ring([(2, 70), (3, 0), (2, 7)]),
        outside(16 * MIB + 70 * PAGE)
    );
    assert_eq!(
        report.or_ring([(2, u64::MAX)]).unwrap_err().errno(),
        Errno::EINVAL
    );
    assert_eq!(report.or_range(MIB - 1, 2), outside(MIB - 1));
    assert_eq!(report.or_range(u64::MAX, 2), Err(Error::Wraps.into()));
    assert_eq!(report.or_range(u64::MAX, 1), outside(u64::MAX));
    assert_eq!(report.or_range(u64::MAX, 0), Ok(()));
    assert_eq!(report.or_host(0x7000_0000 - 1, 1), outside(0x7000_0000 - 1));
    assert_eq!(pages(&report), [MIB, 16 * MIB + 7 * PAGE]);

    let words = [1 << 2 | 1];
    let result = report.or_bitmap(&words, extent(MIB + 98 * PAGE, 64, PAGE));
    assert_eq!(result, outside(MIB + 100 * PAGE));
    let result = report.or_bitmap(&[0], extent(MIB + 98 * PAGE, 64, PAGE));
    assert_eq!(result, Ok(()), "clean pages may be anywhere");
    assert_eq!(pages(&report)[1], MIB + 98 * PAGE);
    for (bad, cause) in [
        (extent(0, 65, PAGE), Error::BitmapSize),
        (extent(1, 1, PAGE), Error::Misaligned),
        (extent(0u64.wrapping_sub(PAGE), 2, PAGE), Error::Wraps),
    ] {
        assert_eq!(report.or_bitmap(&[1], bad), Err(cause.into()));
        assert_eq!(Report::new().or_bitmap(&[1], bad), Err(cause.into()));
    }
}

#[test]
fn a_report_comes_at_any_page_size() {
    let tracker = Tracker::new(None);
    // The slot starts and ends inside a page of 64 KiB.
    let bits = tracker.add_slot(0, 0x18000, None, 20 * PAGE).unwrap();
    tracker.start().unwrap();
    bits.mark(0, 1).unwrap();
    bits.mark(19 * PAGE, 1).unwrap();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    let ranges = |pgsize| report.ranges(pgsize).unwrap().collect::<Vec<_>>();
    let range = |gpa, size| Range { gpa, size };
    assert_eq!(ranges(PAGE), [range(0x18000, PAGE), range(0x2b000, PAGE)]);
    assert_eq!(ranges(1024), ranges(PAGE));
    assert_eq!(
        ranges(0x8000),
        [range(0x18000, 0x8000), range(0x28000, 0x4000)]
    );
    assert_eq!(ranges(0x10000), [range(0x18000, 0x14000)], "they touch");
    assert_eq!(report.ranges(0).err(), Some(TrackError::PageSize));
    assert_eq!(report.ranges(12288).err(), Some(TrackError::PageSize));

    let bitmap = |pgsize| {
        let mut words = [0; 2];
        report.bitmap(0, pgsize, &mut words).unwrap();
        words
    };
    assert_eq!(bitmap(PAGE), [1 | 1 << 19, 0]);
    assert_eq!(bitmap(1024), [0xf, 0xf << 12]);
    assert_eq!(bitmap(0x10000), [0b11, 0]);
    assert_eq!(bitmap(1 << 40), [1, 0]);
    let short = report.bitmap(0, 1024, &mut [0]);
    assert_eq!(short, Err(Error::BitmapSize.into()));
    assert_eq!(
        report.bitmap(1, 1024, &mut []),
        Err(TrackError::UnknownSlot { id: 1 })
    );
}

#[test]
fn a_source_that_fails_makes_everything_dirty() {
    let tracker = tracker();
    let mut rounds = 0;
    tracker.add_source("flaky", move |report| {
        rounds += 1;
        match rounds {
            2 => Err("no log".into()),
            _ => Ok(report.or_range(MIB, 1)?),
        }
    });
    tracker.add_source("other", |report| Ok(report.or_range(16 * MIB, 1)?));
    assert_eq!(take(&tracker), [MIB, 16 * MIB]);
    let mut report = Report::new();
    let failed = tracker.take(&mut report).unwrap_err();
    assert_eq!(failed.source, "flaky");
    assert_eq!(failed.to_string(), "flaky cannot tell what is dirty");
    assert_eq!(failed.cause.to_string(), "no log");
    assert_eq!(report.pages(), 170);
    assert_eq!(take(&tracker), [MIB, 16 * MIB]);
}

#[test]
fn a_round_that_failed_is_part_of_the_next() {
    let tracker = tracker();
    let mut report = Report::new();
    tracker.slots()[0].bits.mark(0, 1).unwrap();
    tracker.take(&mut report).unwrap();
    tracker.slots()[0].bits.mark(PAGE, 1).unwrap();
    tracker.take(&mut report).unwrap();
    assert_eq!(pages(&report), [MIB, MIB + PAGE]);
}
