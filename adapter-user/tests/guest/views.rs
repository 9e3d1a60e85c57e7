// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mappings of IOVAs, and harvests of logs by IOVA.

use adapter_user::{Error, TrackError};

use super::*;

#[test]
fn a_mapping_marks_the_guest_s_pages_also_when_it_is_gone() {
    let tracker = tracker();
    let view = tracker.iova_view();
    let mapping = view.map(0x8000, MIB + 3 * PAGE, 2 * PAGE).unwrap();
    assert_eq!(view.translate(0x9123), Some(MIB + 4 * PAGE + 0x123));
    assert_eq!(view.translate(0xa000), None);
    mapping.mark(0x8fff, 2).unwrap();
    assert_eq!(view.unmap(0x8000, 2 * PAGE), Ok(2 * PAGE));
    assert_eq!(view.translate(0x9123), None);
    assert_eq!(take(&tracker), [MIB + 3 * PAGE, MIB + 4 * PAGE]);
    // A device that marks after the unmap is reported all the same.
    mapping.mark(0x8000, 1).unwrap();
    assert_eq!(take(&tracker), [MIB + 3 * PAGE]);
    // A mark outside the mapping marks the part inside, and fails.
    assert_eq!(
        mapping.mark(0x9fff, 2),
        Err(TrackError::Unmapped { addr: 0x9fff })
    );
    assert_eq!(
        mapping.mark(0, u64::MAX),
        Err(TrackError::Unmapped { addr: 0 })
    );
    assert_eq!(take(&tracker), [MIB + 3 * PAGE, MIB + 4 * PAGE]);
    // After the slot is removed, a log and a mark are refused.
    view.map(0, MIB, PAGE).unwrap();
    tracker.remove_slot(5).unwrap();
    let log = view.harvest().or(&[1], extent(0, 1, PAGE));
    assert_eq!(log, Err(Error::NotTracking.into()));
    assert_eq!(mapping.mark(0x8000, 1), Err(Error::NotTracking.into()));
}

#[test]
fn mappings_are_checked() {
    let tracker = tracker();
    let view = tracker.iova_view();
    let map = |iova, gpa, size| view.map(iova, gpa, size).map(drop);
    assert_eq!(map(1, MIB, PAGE), Err(Error::Misaligned.into()));
    assert_eq!(map(0, MIB, 0), Err(Error::ZeroSize.into()));
    assert_eq!(
        map(0u64.wrapping_sub(PAGE), MIB, 2 * PAGE),
        Err(Error::Wraps.into())
    );
    let beyond = TrackError::Unmapped {
        addr: MIB + 100 * PAGE,
    };
    assert_eq!(map(0, MIB + 99 * PAGE, 2 * PAGE), Err(beyond));
    assert_eq!(map(0, 0, PAGE), Err(TrackError::Unmapped { addr: 0 }));
    assert_eq!(map(2 * PAGE, MIB, 4 * PAGE), Ok(()));
    for (first, n) in [(2, 4), (1, 2), (5, 1), (0, 9), (3, 1)] {
        assert_eq!(map(first * PAGE, MIB, n * PAGE), Err(Error::Overlap.into()));
    }
    assert_eq!(map(6 * PAGE, MIB, PAGE), Ok(()), "two views of one page");
    assert_eq!(view.unmap(0, 0u64.wrapping_sub(PAGE)), Ok(5 * PAGE));
    assert_eq!(view.unmap(0, 0), Err(Error::ZeroSize.into()));
    assert_eq!(view.unmap(1, PAGE), Err(Error::Misaligned.into()));
    assert_eq!(map(0u64.wrapping_sub(PAGE), MIB, PAGE), Ok(()));
    assert_eq!(view.unmap(0u64.wrapping_sub(PAGE), PAGE), Ok(PAGE));
}

#[test]
fn a_mapping_may_span_slots_and_be_cut() {
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, 4 * PAGE).unwrap();
    tracker.add_slot(1, 4 * PAGE, None, 4 * PAGE).unwrap();
    let view = tracker.iova_view();
    let whole = view.map(16 * PAGE, PAGE, 6 * PAGE).unwrap();
    assert_eq!(view.unmap(18 * PAGE, PAGE), Ok(PAGE));
    assert_eq!(view.translate(17 * PAGE), Some(2 * PAGE));
    assert_eq!(view.translate(18 * PAGE), None);
    assert_eq!(view.translate(19 * PAGE), Some(4 * PAGE));
    view.mark(19 * PAGE, 3 * PAGE).unwrap();
    assert_eq!(take(&tracker), [4, 5, 6].map(|page| page * PAGE));
    let hole = TrackError::Unmapped { addr: 18 * PAGE };
    assert_eq!(view.mark(17 * PAGE, 3 * PAGE), Err(hole));
    assert_eq!(take(&tracker), [2, 4].map(|page| page * PAGE));
    whole.mark(16 * PAGE, 6 * PAGE).unwrap();
    assert_eq!(take(&tracker), [1, 2, 3, 4, 5, 6].map(|page| page * PAGE));
    assert_eq!(
        view.mark(22 * PAGE - 1, 2),
        Err(TrackError::Unmapped { addr: 22 * PAGE })
    );
    assert_eq!(view.mark(0, 1), Err(TrackError::Unmapped { addr: 0 }));
}

#[test]
fn a_log_counts_for_every_mapping_since_the_last_harvest() {
    let tracker = tracker();
    let view = tracker.iova_view();
    let page = |n| MIB + n * PAGE;
    view.map(0, page(0), PAGE).unwrap();
    view.unmap(0, PAGE).unwrap();
    view.map(0, page(1), PAGE).unwrap();

    let early = view.harvest();
    view.unmap(0, PAGE).unwrap(); // during the harvest
    view.map(0, page(2), PAGE).unwrap();
    early.or(&[1], extent(0, 1, PAGE)).unwrap();
    early.finish();
    assert_eq!(take(&tracker), [page(0), page(1), page(2)]);
    assert_eq!(
        view.remembered(),
        1,
        "the mapping that went during the harvest"
    );

    let harvest = view.harvest();
    harvest.or(&[0b1], extent(0, 2, PAGE)).unwrap();
    let error = harvest.or(&[0b11], extent(0, 2, PAGE));
    assert_eq!(error, Err(TrackError::Unmapped { addr: PAGE }));
    harvest.or(&[0b1], extent(0, 2, 2 * MIB)).unwrap(); // one byte of a large page is enough
    let _ = harvest; // not finished, so nothing is forgotten
    assert_eq!(take(&tracker), [page(1), page(2)]);
    assert_eq!(view.remembered(), 1);
    view.harvest().finish();
    assert_eq!(view.remembered(), 0);
}

#[test]
fn what_cannot_be_remembered_is_dirty_at_once() {
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, MIB).unwrap();
    let view = tracker.iova_view();
    for n in 0..1 << 16 {
        view.map(n * PAGE, 0, PAGE).unwrap();
        view.unmap(n * PAGE, PAGE).unwrap();
    }
    assert!(take(&tracker).is_empty());
    view.map(0, 5 * PAGE, PAGE).unwrap();
    view.unmap(0, PAGE).unwrap();
    assert_eq!(take(&tracker), [5 * PAGE]);
    assert_eq!(view.remembered(), 1 << 16);

    // A device's log has a page whose mapping is not remembered. That is no error
    // until a harvest is finished that began after the unmap.
    view.map(1 << 40, 6 * PAGE, PAGE).unwrap();
    view.unmap(1 << 40, PAGE).unwrap();
    let page = Extent {
        bit: 0,
        iova: 1 << 40,
        npages: 1,
        pgsize: PageSize::new(PAGE).unwrap(),
    };
    let harvest = view.harvest();
    assert_eq!(harvest.or(&[1], page), Ok(()));
    assert_eq!(take(&tracker), [6 * PAGE]);
    harvest.finish();
    let unmapped = TrackError::Unmapped { addr: 1 << 40 };
    assert_eq!(view.harvest().or(&[1], page), Err(unmapped));
}
