// SPDX-License-Identifier: MIT OR Apache-2.0
//! Slots are checked, come and go.

use adapter_user::guest::{DirtyIovas, IovaRange, Range, Report, Slot};
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
    tracker.start().unwrap();
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
    tracker.add_known(new_slot(5, MIB, 100)).unwrap();
    tracker.take(&mut report).unwrap();
    assert_eq!(pages(&report), [0]);
}

#[test]
fn bits_of_another_page_size_fit_in() {
    let tracker = tracker();
    let bits = DirtyBits::new(4 * MIB, pgsize(2 * MIB)).unwrap();
    let slot = |gpa| Slot::new(0, gpa, 4 * MIB, bits.clone());
    assert_eq!(tracker.add(slot(33 * MIB)), Err(Error::Misaligned.into()));
    tracker.add_known(slot(32 * MIB)).unwrap();
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

/// A slot of `n` pages at `gpa` with bits of its own.
fn new_slot(id: u32, gpa: u64, n: u64) -> Slot {
    let bits = DirtyBits::new(n * PAGE, pgsize(PAGE)).unwrap();
    Slot::new(id, gpa, n * PAGE, bits)
}

#[test]
fn a_slot_that_moves_is_told_at_its_new_address() {
    let tracker = tracker();
    let view = tracker.iova_view();
    let mapping = view.map(0, MIB, 4 * PAGE).unwrap();
    let bits = tracker.slots()[0].bits.clone();
    let mut report = tracker.report();
    bits.mark(PAGE, 1).unwrap();
    tracker.take(&mut report).unwrap(); // taken, and not delivered
    bits.mark(2 * PAGE, 1).unwrap(); // not taken
    tracker.move_slot(5, 64 * MIB).unwrap();
    mapping.mark(3 * PAGE, 1).unwrap(); // through a mapping made before
    tracker.take(&mut report).unwrap();
    let at = |page| 64 * MIB + page * PAGE;
    assert_eq!(pages(&report), [at(1), at(2), at(3)]);
    assert_eq!(report.slots()[1].gpa, 64 * MIB);
    report.or_host(0x7000_0000, 1).unwrap();
    report.or_ring([(5, 4)]).unwrap();
    assert_eq!(pages(&report), [at(0), at(1), at(2), at(3), at(4)]);

    let moved = |gpa| tracker.move_slot(5, gpa);
    assert_eq!(moved(1), Err(Error::Misaligned.into()));
    assert_eq!(moved(16 * MIB), Err(Error::Overlap.into()));
    assert_eq!(moved(0u64.wrapping_sub(PAGE)), Err(Error::Wraps.into()));
    assert_eq!(moved(64 * MIB + PAGE), Ok(()), "onto itself");
    let unknown = TrackError::UnknownSlot { id: 1 };
    assert_eq!(tracker.move_slot(1, 0), Err(unknown));
}

#[test]
fn a_slot_that_comes_back_takes_marks_again() {
    let tracker = tracker();
    let mut report = tracker.report();
    tracker.slots()[1].bits.mark(0, 1).unwrap();
    tracker.take(&mut report).unwrap();
    let slot = tracker.remove_slot(2).unwrap();
    let bits = slot.bits.clone();
    assert_eq!(bits.mark(PAGE, 1), Err(Error::NotTracking));
    tracker.take(&mut report).unwrap();
    assert!(pages(&report).is_empty());
    // What was taken and not delivered is handed out.
    let removed: Vec<_> = report.removed().collect();
    assert_eq!((removed[0].0.id, removed[0].0.gpa), (2, 16 * MIB));
    assert_eq!(removed[0].1, [1, 0]);
    // Nothing was lost meanwhile.
    tracker.add_known(slot).unwrap();
    assert_eq!(bits.mark(2 * PAGE, 1), Ok(()));
    tracker.take(&mut report).unwrap();
    let at = |page| 16 * MIB + page * PAGE;
    assert_eq!(pages(&report), [at(0), at(1), at(2)]);
    assert_eq!(report.removed().count(), 0);
    report.clear();
    // If nobody says that its content is known, all of it is dirty.
    let slot = tracker.remove_slot(2).unwrap();
    tracker.add(slot).unwrap();
    tracker.take(&mut report).unwrap();
    assert_eq!(report.pages(), 70);
}

#[test]
fn a_slot_that_joins_while_tracking_is_dirty_unless_it_is_known() {
    let tracker = tracker();
    tracker.add_slot(0, 0, None, 3 * PAGE).unwrap();
    assert_eq!(take(&tracker), [0, PAGE, 2 * PAGE]);
    tracker.add_known(new_slot(1, 8 * PAGE, 3)).unwrap();
    assert!(take(&tracker).is_empty());
    tracker.grow_slot(0, 5 * PAGE).unwrap();
    assert_eq!(take(&tracker), [3 * PAGE, 4 * PAGE]);
    tracker.stop();
    tracker.add_slot(3, 20 * PAGE, None, PAGE).unwrap();
    tracker.start().unwrap();
    assert!(
        take(&tracker).is_empty(),
        "all memory is copied after start"
    );
}

#[test]
fn a_slot_that_grows_keeps_its_handles() {
    let tracker = tracker();
    let bits = tracker.slots()[0].bits.clone();
    let view = tracker.iova_view();
    let mapping = view.map(0, MIB, 1000 * PAGE).unwrap(); // more than there is yet
    let mut report = tracker.report();
    bits.mark(99 * PAGE, 1).unwrap();
    tracker.take(&mut report).unwrap();
    tracker.grow_slot(5, 1000 * PAGE).unwrap();
    tracker.take(&mut report).unwrap();
    assert_eq!(report.pages(), 901);
    report.clear();
    bits.mark(98 * PAGE, 2 * PAGE + 1).unwrap(); // over the old end
    bits.mark(127 * PAGE, 2 * PAGE).unwrap(); // over the end of the old words
    mapping.mark(500 * PAGE, 1).unwrap();
    tracker.take(&mut report).unwrap();
    let at = |page| MIB + page * PAGE;
    assert_eq!(pages(&report), [98, 99, 100, 127, 128, 500].map(at));
    let grow = |size| tracker.grow_slot(5, size);
    assert_eq!(grow(999 * PAGE), Err(TrackError::Shrinks));
    assert_eq!(grow(16 * MIB), Err(Error::Overlap.into()));
    assert_eq!(grow(u64::MAX), Err(Error::Wraps.into()));
    assert_eq!(bits.grow(2000 * PAGE), Err(TrackError::BitsInUse));
}

#[test]
fn a_page_count_that_is_no_multiple_of_64_grows() {
    let bits = DirtyBits::new(3 * PAGE, pgsize(PAGE)).unwrap();
    for n in 4..=300 {
        bits.grow(n * PAGE).unwrap();
        assert_eq!(bits.mark((n - 1) * PAGE, PAGE + 1), Err(Error::Unmapped));
        assert!(bits.is_dirty((n - 1) * PAGE) && !bits.is_dirty(n * PAGE));
    }
    let mut words = vec![0; bits.words()];
    bits.take(&mut words).unwrap();
    assert_eq!(words, [!0 << 3, !0, !0, !0, (1 << 44) - 1]);
}

#[test]
fn bits_in_two_places_are_refused() {
    let tracker = tracker();
    let slot = tracker.slots()[0].clone();
    let again = |id, gpa| Slot::new(id, gpa, slot.size, slot.bits.clone());
    assert_eq!(tracker.add(again(0, 0)), Err(TrackError::BitsInUse));
    let other = Tracker::new(None);
    assert_eq!(other.add(again(0, 0)), Err(TrackError::BitsInUse));
    tracker.remove_slot(5).unwrap();
    assert_eq!(other.add(again(0, 0)), Ok(()));
    assert_eq!(tracker.add(again(5, MIB)), Err(TrackError::BitsInUse));
    // A tracker that is gone has no slots.
    drop(other);
    assert_eq!(tracker.add(again(5, MIB)), Ok(()));
    slot.bits.mark(0, 1).unwrap();
    assert_eq!(take(&tracker).len(), 100);
}

#[test]
fn bits_of_another_length_than_the_region_are_refused() {
    let tracker = tracker();
    let mut short = new_slot(0, 0, 4);
    short.size = 5 * PAGE;
    let (bits, memory) = (4 * PAGE, 5 * PAGE);
    let cause = TrackError::BitsLength { bits, memory };
    assert_eq!(tracker.add(short), Err(cause));
}

#[test]
fn hosts_that_overlap_are_refused() {
    let tracker = tracker();
    let at = |host| {
        let mut slot = new_slot(0, 0, 4);
        slot.host = Some(host);
        slot
    };
    let overlap = Err(TrackError::HostOverlap { id: 5 });
    assert_eq!(tracker.add(at(0x7000_0000 + 99 * PAGE)), overlap);
    assert_eq!(tracker.add(at(0x7000_0000 - 3 * PAGE)), overlap);
    assert_eq!(tracker.add_known(at(0x7000_0000 - 4 * PAGE)), Ok(()));
    let mut report = tracker.report();
    report.or_host(0x7000_0000 - PAGE, 2 * PAGE).unwrap();
    assert_eq!(pages(&report), [3 * PAGE, MIB]);
    assert!(report.or_host(0x7000_0000 - 5 * PAGE, 2 * PAGE).is_err());
}

#[test]
fn many_slots_are_found_by_number_and_host() {
    let tracker = Tracker::new(None);
    for id in 0..4096u32 {
        let place = u64::from(id.reverse_bits() >> 20) * 3 * PAGE;
        let host = Some((1 << 40) - place);
        tracker.add_slot(id, place, host, 2 * PAGE).unwrap();
    }
    tracker.start().unwrap();
    let mut report = tracker.report();
    for id in [0, 77, 4095u32] {
        let place = u64::from(id.reverse_bits() >> 20) * 3 * PAGE;
        report.or_ring([(id, 0)]).unwrap();
        report.or_host((1 << 40) - place + PAGE, 1).unwrap();
        assert_eq!(report.slot(id), Some(&[0b11][..]));
    }
    assert_eq!(report.pages(), 6);
}

#[test]
fn while_a_tracker_is_off_nothing_is_marked_and_every_take_fails() {
    let tracker = tracker();
    tracker.stop();
    assert!(!tracker.is_on());
    let bits = tracker.slots()[1].bits.clone();
    let view = tracker.iova_view();
    let mapping = view.map(0, 16 * MIB, PAGE).unwrap();
    assert_eq!((bits.mark(0, 1), mapping.mark(0, 1)), (Ok(()), Ok(())));
    assert_eq!(view.mark(0, 1), Ok(()));
    let mut report = Report::new();
    let off = tracker.take(&mut report).unwrap_err();
    assert_eq!(
        off.to_string(),
        "a tracker that is off cannot tell what is dirty"
    );
    assert_eq!(report.pages(), 170, "nobody knows");
    tracker.start().unwrap();
    assert!(take(&tracker).is_empty());
    mapping.mark(0, 1).unwrap();
    assert_eq!(take(&tracker), [16 * MIB]);
}

#[test]
fn pages_that_are_taken_out_need_no_copy() {
    let tracker = tracker();
    let bits = tracker.slots()[1].bits.clone();
    bits.mark(0, 10 * PAGE).unwrap();
    // A balloon: whole pages only.
    bits.discard(PAGE + 1, 2 * PAGE);
    bits.discard_bitmap(&[0b10_0001]);
    let mut words = vec![0; bits.words()];
    bits.read(&mut words).unwrap();
    assert_eq!(words[0], 0b11_1101_1010, "read and not cleared");
    let mut report = tracker.report();
    tracker.take(&mut report).unwrap();
    assert_eq!(report.slot(2).unwrap()[0], 0b11_1101_1010);
    // Already sent: from the report, over the gap between the slots.
    tracker.slots()[0].bits.mark(99 * PAGE, 1).unwrap();
    tracker.take(&mut report).unwrap();
    report.discard(2 * MIB, 14 * MIB + 4 * PAGE + 1);
    report
        .discard_bitmap(&[0b10], extent(16 * MIB + 8 * PAGE, 2, PAGE))
        .unwrap();
    let at = |page| 16 * MIB + page * PAGE;
    assert_eq!(
        pages(&report),
        [MIB + 99 * PAGE, at(4), at(6), at(7), at(8)]
    );
    report.discard(0, u64::MAX);
    assert_eq!(report.pages(), 0);
    // What was marked since the take is in the next report all the same.
    bits.mark(0, 1).unwrap();
    report.set_all();
    report.discard(0, u64::MAX);
    tracker.take(&mut report).unwrap();
    assert_eq!(pages(&report), [16 * MIB]);
    // The end of the memory ends its last page.
    let odd = DirtyBits::new(PAGE + 1, pgsize(PAGE)).unwrap();
    odd.mark(PAGE, 1).unwrap();
    odd.discard(PAGE, 1);
    assert!(!odd.is_dirty(PAGE));
}

#[test]
fn bits_take_in_a_bitmap() {
    let tracker = tracker();
    let bits = tracker.slots()[1].bits.clone();
    for other in [&[1][..], &[1, !0, 0]] {
        assert_eq!(bits.mark_bitmap(other), Err(Error::BitmapSize));
    }
    bits.mark_bitmap(&[1, !0]).unwrap(); // with KVM's padding
    let at = |page| 16 * MIB + page * PAGE;
    assert_eq!(take(&tracker), [0, 64, 65, 66, 67, 68, 69].map(at));
}

/// Two gone mappings have the same IOVAs and guest addresses, but the slot moved
/// before the second was made. Found by the fuzz target `tracker_ops`.
#[test]
fn gone_mappings_that_look_alike_lead_to_different_memory() {
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, PAGE).expect("slot");
    let view = tracker.iova_view();
    view.map(0, 0, PAGE).expect("map");
    tracker.move_slot(0, MIB).expect("move");
    let log = |_: &[IovaRange], dirty: &mut DirtyIovas| Ok(dirty.or_range(0, PAGE)?);
    let _source = tracker.add_log("log", &view, 0, log);
    tracker.start().expect("start");
    // The device writes through the first mapping.
    view.unmap(0, PAGE).expect("unmap");
    view.map(0, 0, PAGE).expect("map again");
    view.unmap(0, PAGE).expect("unmap again");
    assert_eq!(take(&tracker), [MIB]);
}
