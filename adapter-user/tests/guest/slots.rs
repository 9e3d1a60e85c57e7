// SPDX-License-Identifier: MIT OR Apache-2.0
//! Slots are checked, come and go.

use adapter_user::guest::{Range, Report, Slot};
use adapter_user::{DirtyBits, Errno, Error, TrackError};

use super::*;

#[test]
fn slots_do_not_overlap_and_have_numbers_of_their_own() {
    let tracker = tracker();
    let add = |id, gpa, size| tracker.add_slot(id, gpa, None, size).map(drop);
    assert_eq!(add(5, 0, PAGE), Err(TrackError::DuplicateSlot { id: 5 }));
    for (gpa, size) in [
        (MIB, PAGE),
        (MIB + 99 * PAGE, PAGE),
        (0, 2 * MIB),
        (MIB - PAGE, 2 * PAGE),
    ] {
        assert_eq!(add(9, gpa, size), Err(Error::Overlap.into()));
    }
    assert_eq!(add(9, 0, 0), Err(Error::ZeroSize.into()));
    assert_eq!(add(9, 1, PAGE), Err(Error::Misaligned.into()));
    assert_eq!(
        add(9, 0u64.wrapping_sub(PAGE), 2 * PAGE),
        Err(Error::Wraps.into())
    );
    // The host addresses may not wrap either.
    let host = Some(0u64.wrapping_sub(PAGE));
    assert_eq!(
        tracker.add_slot(9, 0x40 << 40, host, 2 * PAGE).err(),
        Some(Error::Wraps.into())
    );
    assert_eq!(add(9, 0u64.wrapping_sub(PAGE), PAGE), Ok(()));
    assert_eq!(add(10, MIB - PAGE, PAGE), Ok(()));
    assert_eq!(add(11, MIB + 100 * PAGE, 1), Ok(()));
    let found: Vec<u32> = tracker.slots().iter().map(|slot| slot.id).collect();
    assert_eq!(found, [10, 5, 11, 2, 9]);
    let top = tracker.slots().pop().unwrap();
    top.bits.mark(4095, 1).unwrap();
    assert_eq!(take(&tracker), [0u64.wrapping_sub(PAGE)]);
}

#[test]
fn a_budget_says_what_was_wanted() {
    let tracker = Tracker::new(Some(24));
    tracker.add_slot(0, 0, None, 65 * PAGE).unwrap(); // two words
    let error = tracker.add_slot(1, MIB, None, 65 * PAGE).unwrap_err();
    let (wanted, left) = (16, 8);
    assert_eq!(error, TrackError::Budget { wanted, left });
    assert_eq!(error.errno(), Errno::ENOMEM);
    assert_eq!(tracker.slots().len(), 1);
    tracker.add_slot(1, MIB, None, 64 * PAGE).unwrap();
    tracker.remove_slot(0).unwrap();
    tracker.add_slot(0, 0, None, 65 * PAGE).unwrap();
}

#[test]
fn slots_come_and_go() {
    let tracker = tracker();
    let mut report = Report::new();
    tracker.slots()[0].bits.mark(0, 1).unwrap();
    tracker.take(&mut report).unwrap();
    let new = tracker.add_slot(0, 0, None, PAGE).unwrap();
    new.mark(0, 1).unwrap();
    let old = tracker.remove_slot(2).unwrap();
    assert_eq!(old.bits.mark(0, 1), Err(Error::NotTracking));
    assert_eq!(
        tracker.remove_slot(2).unwrap_err(),
        TrackError::UnknownSlot { id: 2 }
    );
    tracker.take(&mut report).unwrap();
    assert_eq!(pages(&report), [0, MIB]);
    assert_eq!(report.slot(2), None);
    // A new slot with the same number has none of the old one's dirty pages.
    tracker.remove_slot(5).unwrap();
    tracker.add_slot(5, MIB, None, 100 * PAGE).unwrap();
    tracker.take(&mut report).unwrap();
    assert_eq!(pages(&report), [0]);
}

#[test]
fn bits_of_another_page_size_fit_in() {
    let tracker = tracker();
    let bits = DirtyBits::new(4 * MIB, pgsize(2 * MIB)).unwrap();
    let slot = |gpa| Slot {
        id: 0,
        gpa,
        host: None,
        bits: bits.clone(),
    };
    assert_eq!(tracker.add(slot(33 * MIB)), Err(Error::Misaligned.into()));
    tracker.add(slot(32 * MIB)).unwrap();
    bits.mark(3 * MIB, 1).unwrap();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    assert_eq!(report.slot(0), Some(&[0b10][..]));
    let mut log = [0; 16];
    log[0] = 1;
    report.or_slot(0, &log).unwrap();
    assert_eq!(report.slot(0), Some(&[0b11][..]));
    let range = Range {
        gpa: 32 * MIB,
        size: 4 * MIB,
    };
    assert_eq!(report.ranges(PAGE).unwrap().collect::<Vec<_>>(), [range]);
}
