// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an operator sees of a tracker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use adapter_user::guest::{DirtyIovas, IovaRange, SourceError, TrackerStats, Whole};

use super::*;

/// The bytes that a source told in the last take, and whether it failed.
fn source(stats: &TrackerStats, name: &str) -> (u64, bool) {
    let mut sources = stats.last_take.sources.iter();
    let found = sources.find(|source| source.name == name).unwrap();
    (found.bytes, found.failed)
}

/// The bytes that were marked and told in a slot.
fn slot(stats: &TrackerStats, id: u32) -> (u64, u64) {
    let mut slots = stats.last_take.slots.iter();
    let found = slots.find(|slot| slot.id == id).unwrap();
    (found.marked, found.told)
}

fn whole(whole: Whole) -> (u64, u64) {
    (whole.times, whole.bytes)
}

/// Bytes by source and by slot, each in the way in which the source told them.
#[test]
fn a_take_counts_by_source_and_slot() {
    let tracker = tracker();
    tracker.add_source("log", |report| {
        report.or_slot(5, &[0b111, 1 << 35 | 1 << 40])?; // bit 40 is beyond the slot's end
        Ok(report.or_slot(2, &[0; 2])?)
    });
    tracker.add_source("ring", |report| {
        Ok(report.or_ring([(2, 0), (2, 1), (2, 1)])?)
    });
    tracker.add_source("host", |report| Ok(report.or_host(0x7000_0fff, 2)?));
    tracker.add_source("huge", |report| {
        // The second huge page of the guest has slot 5's second half in it.
        Ok(report.or_bitmap(&[0b1], extent(MIB, 1, MIB))?)
    });
    let view = tracker.iova_view();
    view.map(0, 16 * MIB, 8 * PAGE).unwrap();
    let log = |_: &[IovaRange], dirty: &mut DirtyIovas| Ok(dirty.or_range(PAGE, 3 * PAGE)?);
    tracker.add_log("device", &view, 0, log).unwrap();
    tracker.slots()[1].bits.mark(20 * PAGE, 2 * PAGE).unwrap();

    assert_eq!(tracker.stats().takes, 0);
    take(&tracker);
    let stats = tracker.stats();
    assert_eq!(stats.takes, 1);
    assert_eq!(source(&stats, "log"), (4 * PAGE, false));
    assert_eq!(source(&stats, "ring"), (3 * PAGE, false));
    assert_eq!(source(&stats, "host"), (2 * PAGE, false));
    assert_eq!(source(&stats, "huge"), (MIB, false));
    assert_eq!(source(&stats, "device"), (3 * PAGE, false));
    assert_eq!(slot(&stats, 5), (0, (4 + 2) * PAGE + MIB));
    assert_eq!(slot(&stats, 2), (5 * PAGE, 3 * PAGE));
    let sum = stats.last_take.sources.iter().map(|source| source.time);
    assert!(sum.sum::<std::time::Duration>() <= stats.last_take.time);

    // The next take counts anew.
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    let stats = tracker.stats();
    assert_eq!(stats.takes, 2);
    assert_eq!(source(&stats, "log"), (4 * PAGE, false));
    assert_eq!(slot(&stats, 2), (3 * PAGE, 3 * PAGE));
    assert_eq!(report.bytes(), report.pages() * PAGE);
}

/// What the tracker has: bitmaps, budget, views and mappings.
#[test]
fn stats_have_what_there_is() {
    let tracker = Tracker::new(Some(1 << 20));
    tracker.add_slot(0, 0, None, 100 * PAGE).unwrap();
    tracker.add_slot(1, MIB, None, 64 * PAGE).unwrap();
    let stats = tracker.stats();
    assert_eq!((stats.on, stats.slots, stats.views), (false, 2, 0));
    assert_eq!((stats.bitmap_bytes, stats.budget), (24, Some(1 << 20)));

    let views = [tracker.iova_view(), tracker.iova_view()];
    let log = |_: &[IovaRange], _: &mut DirtyIovas| Ok(());
    tracker.add_log("log", &views[0], 0, log).unwrap();
    tracker.start().unwrap();
    for view in &views {
        view.map(0, 0, 3 * PAGE).unwrap();
        view.unmap(PAGE, PAGE).unwrap();
    }
    tracker.move_slot(1, 2 * MIB).unwrap();
    let stats = tracker.stats();
    assert!(stats.on);
    assert_eq!((stats.views, stats.mappings), (2, 4));
    assert_eq!((stats.remembered_mappings, stats.remembered_slots), (1, 1));
    take(&tracker);
    let stats = tracker.stats();
    assert_eq!((stats.remembered_mappings, stats.remembered_slots), (0, 0));
    drop(views);
    assert_eq!(tracker.stats().views, 1); // the log keeps one
}

/// Why something was told as dirty as a whole.
#[test]
fn whole_memories_have_a_cause() {
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, 100 * PAGE).unwrap();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap_err();
    let off = tracker.stats();
    assert_eq!(whole(off.wholly_dirty.off), (1, 100 * PAGE));
    assert_eq!(off.last_take.sources, []);

    tracker.start().unwrap();
    assert_eq!(tracker.stats().wholly_dirty.new_memory, Whole::default());
    tracker.add_slot(1, MIB, None, 7 * PAGE).unwrap();
    tracker.grow_slot(1, 10 * PAGE).unwrap();
    assert_eq!(
        whole(tracker.stats().wholly_dirty.new_memory),
        (2, 10 * PAGE)
    );

    let fail = Arc::new(AtomicBool::new(true));
    let failing = Arc::clone(&fail);
    let kvm = tracker.add_source("kvm", move |report| {
        report.or_ring([(0, 1)])?;
        match failing.load(Ordering::Relaxed) {
            true => Err("no".into()),
            false => Ok(()),
        }
    });
    let view = tracker.iova_view();
    view.map(0, 0, 3 * PAGE).unwrap();
    let log = |_: &[IovaRange], _: &mut DirtyIovas| Err(SourceError::from("no"));
    let log = tracker.add_log("log", &view, 0, log).unwrap();
    tracker.take(&mut report).unwrap_err();
    let stats = tracker.stats();
    assert_eq!(source(&stats, "kvm"), (PAGE, true));
    assert_eq!(source(&stats, "log"), (0, true));
    assert_eq!(whole(stats.wholly_dirty.source_failed), (1, 110 * PAGE));
    assert_eq!(whole(stats.wholly_dirty.log_failed), (1, 3 * PAGE));

    // A removal asks once more, and counts too.
    log.remove().unwrap_err();
    fail.store(false, Ordering::Relaxed);
    kvm.remove().unwrap();
    assert_eq!(
        whole(tracker.stats().wholly_dirty.log_failed),
        (2, 6 * PAGE)
    );
}

/// More mappings and slots go than are remembered.
#[test]
fn what_is_not_remembered_has_a_cause() {
    let tracker = tracker();
    let view = tracker.iova_view();
    let log = |_: &[IovaRange], _: &mut DirtyIovas| Ok(());
    tracker.add_log("log", &view, 0, log).unwrap();
    for n in 0..(1 << 16) + 2 {
        view.map(n * PAGE, MIB, PAGE).unwrap();
    }
    view.unmap(0, PAGE << 17).unwrap();
    let wholly = tracker.stats().wholly_dirty;
    assert_eq!(whole(wholly.forgotten_mappings), (1, 2 * PAGE));
    for n in 0..(1 << 12) + 1 {
        tracker.move_slot(5, (n % 2) * MIB).unwrap();
    }
    let wholly = tracker.stats().wholly_dirty;
    assert_eq!(whole(wholly.forgotten_slots), (1, 100 * PAGE));
}

/// A source that panics while it is asked, by a take or by its removal, takes with it
/// what it had told.
#[test]
fn after_a_panic_everything_is_dirty() {
    for removed in [false, true] {
        let tracker = tracker();
        let source = tracker.add_source("panics", |report| {
            report.or_ring([(2, 1)])?;
            panic!("on purpose");
        });
        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| match removed {
            true => source.clone().remove(),
            false => tracker.take(&mut Report::new()),
        }));
        assert!(asked.is_err());
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| source.remove()));
        assert_eq!(take(&tracker).len(), 170);
        let wholly = tracker.stats().wholly_dirty;
        assert_eq!(whole(wholly.source_panicked), (1, 170 * PAGE));
        assert!(take(&tracker).is_empty());
    }
}
