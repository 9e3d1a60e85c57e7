// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a restored tracker has, and what it needs from its caller.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use adapter_user::guest::{RestoreError, Slot};
use adapter_user::{DirtyBits, PageSize, TrackError};

use super::*;

#[test]
fn marks_and_undelivered_pages_go_on() {
    let old = fresh();
    old.start().unwrap();
    let mut report = Report::new();
    old.slots()[0].bits.mark(3 * PAGE, 1).unwrap();
    old.take(&mut report).unwrap();
    old.slots()[1].bits.mark(69 * PAGE, 1).unwrap();
    let saved = old.save(&report).unwrap();
    let wanted = [MIB + 3 * PAGE, 16 * MIB + 69 * PAGE];

    let new = fresh();
    let restored = new.restore(&saved).unwrap();
    assert!(restored.sources.is_empty());
    assert!(new.is_on());
    assert_eq!(take(&new), wanted);
    assert!(take(&new).is_empty());

    // The old one could have gone on.
    old.take(&mut report).unwrap();
    assert_eq!(pages(&report), wanted);
}

/// A slot that was not saved is new memory, and one that is not there is an error.
#[test]
fn slots_must_be_the_same() {
    let old = fresh();
    old.start().unwrap();
    let saved = old.save(&Report::new()).unwrap();

    let new = fresh();
    new.add_slot(7, 0, None, 2 * PAGE).unwrap();
    new.restore(&saved).unwrap();
    assert_eq!(take(&new), [0, PAGE]);
    assert_eq!(new.stats().wholly_dirty.new_memory.bytes, 2 * PAGE);

    let huge = PageSize::new(MIB).unwrap();
    let other: [&dyn Fn(&Tracker); 4] = [
        &|new| drop(new.remove_slot(2).unwrap()),
        &|new| new.move_slot(2, 32 * MIB).unwrap(),
        &|new| new.grow_slot(2, 71 * PAGE).unwrap(),
        &|new| {
            new.remove_slot(2).unwrap();
            let bits = DirtyBits::new(70 * PAGE, huge).unwrap();
            new.add(Slot::new(2, 16 * MIB, 70 * PAGE, bits)).unwrap();
        },
    ];
    for change in other {
        let new = fresh();
        change(&new);
        let failed = new.restore(&saved).unwrap_err();
        assert_eq!(failed, RestoreError::Slot { id: 2 });
        assert_eq!(failed.errno().0, 22);
        // Every page of what there is.
        let all: u64 = new.slots().iter().map(|slot| slot.size).sum();
        let mut report = Report::new();
        new.take(&mut report).unwrap();
        assert!(report.bytes() >= all);
        assert_eq!(new.stats().wholly_dirty.restore_failed.bytes, all);
    }
}

/// Sources are expected by their names, and fail until they are there.
#[test]
fn sources_must_come_back() {
    let old = fresh();
    let view = old.iova_view();
    view.map(0, MIB, 4 * PAGE).unwrap();
    old.add_source("kvm", |_| Ok(()));
    old.add_log("nvme", &view, 0, clean).unwrap();
    old.start().unwrap();
    let saved = old.save(&Report::new()).unwrap();

    let new = fresh();
    let restored = new.restore(&saved).unwrap();
    let names: Vec<&str> = restored.sources.iter().map(|s| &*s.name).collect();
    assert_eq!(names, ["kvm", "nvme"]);
    let mut report = Report::new();
    let failed = new.take(&mut report).unwrap_err();
    assert_eq!(failed.source, "kvm");
    assert_eq!(pages(&report).len(), ALL);

    new.add_source("kvm", |_| Ok(()));
    // Another view is another log.
    let other = new.iova_view();
    new.add_log("nvme", &other, 0, clean).unwrap();
    let mut report = Report::new();
    let failed = new.take(&mut report).unwrap_err();
    assert_eq!(failed.source, "nvme");
    assert_eq!(
        pages(&report),
        [MIB, MIB + PAGE, MIB + 2 * PAGE, MIB + 3 * PAGE]
    );

    assert!(restored.view("kvm").is_none());
    let view = restored.view("nvme").unwrap();
    new.add_log("nvme", view, 0, clean).unwrap();
    assert!(take(&new).is_empty());
    let names: Vec<String> = new
        .stats()
        .last_take
        .sources
        .iter()
        .map(|s| s.name.clone())
        .collect();
    assert_eq!(names, ["kvm", "nvme", "nvme"]);
}

/// A source that does not come back is removed, and what it may have is dirty.
#[test]
fn a_source_may_stay_away() {
    let old = fresh();
    let view = old.iova_view();
    view.map(0, 16 * MIB, PAGE).unwrap();
    old.add_log("gone", &view, 0, clean).unwrap();
    old.start().unwrap();
    let saved = old.save(&Report::new()).unwrap();
    let new = fresh();
    let mut restored = new.restore(&saved).unwrap();
    restored.sources.remove(0).source.remove().unwrap_err();
    assert_eq!(take(&new), [16 * MIB]);
    assert!(take(&new).is_empty());
}

/// A log that the new process reads may still tell what was written through mappings of
/// the old one, wherever their memory is now.
#[test]
fn mappings_are_remembered() {
    let old = fresh();
    let view = old.iova_view();
    let fails = Arc::new(AtomicBool::new(true));
    let failing = Arc::clone(&fails);
    let log = move |_: &[IovaRange], _: &mut DirtyIovas| match failing.load(Ordering::Relaxed) {
        true => Err("no".into()),
        false => Ok(()),
    };
    old.add_log("nvme", &view, 0, log).unwrap();
    old.start().unwrap();
    view.map(0x10_0000, MIB, 8 * PAGE).unwrap(); // goes, and its log fails
    view.map(0x20_0000, 16 * MIB, 8 * PAGE).unwrap(); // stays, cut to its second half
    view.map(0x30_0000, 20 * MIB, 8 * PAGE).unwrap(); // leads to no slot, until one departs
    view.unmap(0x10_0000, 8 * PAGE).unwrap();
    view.unmap(0x20_0000, 4 * PAGE).unwrap();
    old.move_slot(5, 20 * MIB).unwrap();
    old.move_slot(5, MIB).unwrap();
    let saved = old.save(&Report::new()).unwrap();
    assert_eq!(view.remembered(), 2);

    for (iova, wanted) in [
        (0x10_3000, vec![MIB + 3 * PAGE]),
        (0x20_1000, vec![16 * MIB + PAGE]),
        (0x20_5000, vec![16 * MIB + 5 * PAGE]),
        (0x30_2000, vec![MIB + 2 * PAGE]),
        (0x40_0000, vec![]),
    ] {
        let new = fresh();
        let restored = new.restore(&saved).unwrap();
        let view = restored.view("nvme").unwrap();
        assert_eq!(view.remembered(), 4);
        assert_eq!(new.stats().remembered_slots, 2);
        new.add_log("nvme", view, 0, tells(iova)).unwrap();
        let mut report = Report::new();
        new.take(&mut report).unwrap();
        // All behind the view is dirty too, as its log failed in the save.
        let all: Vec<u64> = pages(&report);
        assert!(wanted.iter().all(|page| all.contains(page)), "{iova:#x}");
        assert_eq!(view.remembered(), 0);
        assert_eq!(new.stats().remembered_slots, 0);
    }
}

/// As before, but each page is told by the new log alone.
#[test]
fn a_log_tells_through_mappings_of_the_old_process() {
    let old = fresh();
    let view = old.iova_view();
    old.add_log("nvme", &view, 0, clean).unwrap();
    old.start().unwrap();
    view.map(0x20_0000, 16 * MIB, 8 * PAGE).unwrap();
    view.unmap(0x20_0000, 4 * PAGE).unwrap();
    view.map(0x30_0000, MIB + 98 * PAGE, 8 * PAGE).unwrap(); // two pages of it have a slot
    let saved = old.save(&Report::new()).unwrap();
    for (iova, wanted) in [
        (0x20_1000, None), // gone, and its log was read by the save
        (0x20_5000, Some(16 * MIB + 5 * PAGE)),
        (0x30_1000, Some(MIB + 99 * PAGE)),
        (0x30_2000, None),
    ] {
        let new = fresh();
        let restored = new.restore(&saved).unwrap();
        let view = restored.view("nvme").unwrap();
        new.add_log("nvme", view, 0, tells(iova)).unwrap();
        // The new process has mapped something else there.
        view.map(0x20_0000, 16 * MIB + 60 * PAGE, 8 * PAGE).unwrap();
        let told = take(&new);
        assert!(wanted.is_none_or(|page| told.contains(&page)), "{iova:#x}");
        let elsewhere = told.iter().filter(|page| Some(**page) != wanted);
        assert!(elsewhere.count() <= 1); // through the new mapping
    }
}

/// The save asks the sources, because their logs may die with the process.
#[test]
fn a_save_reads_every_log() {
    let old = fresh();
    let view = old.iova_view();
    view.map(0, 16 * MIB, 8 * PAGE).unwrap();
    old.add_log("device", &view, 0, tells(PAGE)).unwrap();
    old.add_source("kvm", |report| Ok(report.or_ring([(5, 9)])?));
    old.start().unwrap();
    let saved = old.save(&Report::new()).unwrap();
    let wanted = [MIB + 9 * PAGE, 16 * MIB + PAGE];
    let new = fresh();
    let mut restored = new.restore(&saved).unwrap();
    new.add_source("kvm", |_| Ok(()));
    let view = restored.sources.remove(0).view.unwrap();
    new.add_log("device", &view, 0, clean).unwrap();
    assert_eq!(take(&new), wanted);

    // A source that fails makes everything dirty in the bytes.
    old.add_source("fails", |_| Err("no".into()));
    let saved = old.save(&Report::new()).unwrap();
    let new = fresh();
    new.restore(&saved).unwrap();
    let mut report = Report::new();
    new.take(&mut report).unwrap_err();
    assert_eq!(pages(&report).len(), ALL);
}

#[test]
fn a_tracker_that_is_off_stays_off() {
    let saved = fresh().save(&Report::new()).unwrap();
    let new = fresh();
    assert!(new.restore(&saved).unwrap().sources.is_empty());
    assert!(!new.is_on());
}

/// A second upgrade before the sources came back loses nothing.
#[test]
fn a_restored_tracker_is_saved_again() {
    let old = fresh();
    let view = old.iova_view();
    view.map(0, MIB, PAGE).unwrap();
    old.add_log("nvme", &view, 0, clean).unwrap();
    old.start().unwrap();
    let first = fresh();
    first.restore(&old.save(&Report::new()).unwrap()).unwrap();
    let second = fresh();
    let restored = second
        .restore(&first.save(&Report::new()).unwrap())
        .unwrap();
    assert!(restored.view("nvme").is_some());
    let mut report = Report::new();
    second.take(&mut report).unwrap_err();
    assert_eq!(pages(&report), [MIB]);
}

#[test]
fn the_report_must_be_one_of_the_tracker() {
    let (one, other) = (fresh(), fresh());
    let refused = one.save(&other.report());
    assert_eq!(refused, Err(TrackError::OtherTracker));
}
