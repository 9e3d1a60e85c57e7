// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mappings of IOVAs, and logs by IOVA.

use std::sync::{Arc, Mutex};

use adapter_user::guest::{DirtyIovas, DirtyLog, IovaRange, IovaView, Slot, SourceError};
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
    // After the slot is removed, a mark is refused.
    tracker.remove_slot(5).unwrap();
    assert_eq!(mapping.mark(0x8000, 1), Err(Error::NotTracking.into()));
    // What comes to its address is reached through the mapping that stayed.
    tracker.add_slot(6, MIB, None, 4 * PAGE).unwrap();
    take(&tracker);
    assert_eq!(mapping.mark(0x8000, 1), Ok(()));
    assert_eq!(take(&tracker), [MIB + 3 * PAGE]);
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
    assert_eq!(
        map(0, 0u64.wrapping_sub(PAGE), 2 * PAGE),
        Err(Error::Wraps.into())
    );
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
    tracker.start().unwrap();
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

/// A device's log: the numbers of dirty pages of IOVAs. `read` runs before each read.
#[derive(Clone, Default)]
struct Log {
    dirty: Arc<Mutex<Vec<u64>>>,
    asked: Arc<Mutex<Vec<(u64, u64)>>>,
    fails: Arc<Mutex<bool>>,
    read: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Log {
    fn set(&self, page: u64) {
        self.dirty.lock().unwrap().push(page);
    }

    fn asked(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

impl DirtyLog for Log {
    fn read(&mut self, ask: &[IovaRange], dirty: &mut DirtyIovas) -> Result<(), SourceError> {
        if let Some(read) = &self.read {
            read();
        }
        if *self.fails.lock().unwrap() {
            return Err("the device is gone".into());
        }
        let ask = ask
            .iter()
            .map(|range| (range.iova / PAGE, range.size / PAGE));
        self.asked.lock().unwrap().extend(ask);
        for page in self.dirty.lock().unwrap().drain(..) {
            dirty.or_bitmap(&[1], extent(page * PAGE, 1, PAGE))?;
        }
        Ok(())
    }
}

/// The tracker of [`tracker`], with a log for a view. It has been read once.
fn logged() -> (Tracker, IovaView, Log) {
    let (tracker, log) = (tracker(), Log::default());
    let view = tracker.iova_view();
    tracker.add_log("log", &view, 0, log.clone()).unwrap();
    assert!(take(&tracker).is_empty());
    (tracker, view, log)
}

fn page(n: u64) -> u64 {
    MIB + n * PAGE
}

#[test]
fn a_log_counts_for_every_mapping_since_it_was_read() {
    let (tracker, view, log) = logged();
    view.map(0, page(0), PAGE).unwrap();
    view.unmap(0, PAGE).unwrap();
    view.map(0, page(1), PAGE).unwrap();
    log.set(0);
    assert_eq!(view.remembered(), 1);
    assert_eq!(take(&tracker), [page(0), page(1)]);
    assert_eq!(view.remembered(), 0);
    log.set(0);
    assert_eq!(take(&tracker), [page(1)]);
}

#[test]
fn a_mapping_that_goes_while_the_log_is_read_is_not_forgotten() {
    let tracker = tracker();
    let view = tracker.iova_view();
    let rounds = Arc::new(Mutex::new(0));
    let changed = view.clone();
    let log = Log {
        read: Some(Arc::new(move || {
            let mut rounds = rounds.lock().unwrap();
            changed.unmap(0, PAGE).unwrap();
            changed.map(0, page(*rounds), PAGE).unwrap();
            *rounds += 1;
        })),
        ..Log::default()
    };
    tracker.add_log("log", &view, 0, log.clone()).unwrap();
    take(&tracker);
    log.set(0);
    assert_eq!(take(&tracker), [page(0), page(1)]);
    assert_eq!(view.remembered(), 1, "it went during the take");
    log.set(0);
    assert_eq!(take(&tracker), [page(0), page(1), page(2)]);
}

/// Two takes of one tracker wait for each other, and each log is read before what it
/// needs is forgotten.
#[test]
fn two_harvests_at_once_lose_nothing() {
    let (tracker, view, log) = logged();
    let mut told = Vec::new();
    for n in 0..200 {
        let at = n % 100;
        view.map(0, page(at), PAGE).unwrap();
        log.set(0);
        view.unmap(0, PAGE).unwrap();
        std::thread::scope(|scope| {
            let takes = [0, 1].map(|_| scope.spawn(|| take(&tracker)));
            let takes = takes.map(|taken| taken.join().unwrap());
            told.push(takes.concat());
            assert!(told[n as usize].contains(&page(at)), "{n}");
        });
    }
}

#[test]
fn a_log_is_asked_for_what_is_mapped_or_remembered() {
    let tracker = tracker();
    let view = tracker.iova_view();
    let [near, far] = [Log::default(), Log::default()];
    tracker.add_log("near", &view, 0, near.clone()).unwrap();
    tracker
        .add_log("far", &view, 4 * PAGE, far.clone())
        .unwrap();
    for (iova, n) in [(2, 3), (5, 1), (8, 1), (100, 2), (107, 1)] {
        view.map(iova * PAGE, MIB, n * PAGE).unwrap();
    }
    view.unmap(3 * PAGE, PAGE).unwrap();
    view.unmap(8 * PAGE, PAGE).unwrap();
    take(&tracker);
    assert_eq!(near.asked(), [(2, 4), (8, 1), (100, 2), (107, 1)]);
    assert_eq!(far.asked(), [(2, 7), (100, 2), (107, 1)]);
    take(&tracker);
    assert_eq!(near.asked(), [(2, 1), (4, 2), (100, 2), (107, 1)]);
    // All IOVAs there are.
    view.unmap(0, 0u64.wrapping_sub(PAGE)).unwrap();
    view.map(0, 0, 0u64.wrapping_sub(PAGE)).unwrap();
    view.map(0u64.wrapping_sub(PAGE), MIB, PAGE).unwrap();
    take(&tracker);
    let last = u64::MAX / PAGE;
    assert_eq!(near.asked().last(), Some(&(last, 1)));
}

#[test]
fn a_log_that_fails_makes_dirty_what_is_behind_its_view() {
    let (tracker, view, log) = logged();
    let other = tracker.iova_view();
    other.map(0, 16 * MIB, 8 * PAGE).unwrap();
    view.map(0, page(3), 2 * PAGE).unwrap();
    view.unmap(PAGE, PAGE).unwrap();
    log.set(1);
    *log.fails.lock().unwrap() = true;
    let mut report = Report::new();
    let failed = tracker.take(&mut report).unwrap_err();
    assert_eq!(
        (&*failed.source, failed.cause.to_string()),
        ("log", "the device is gone".to_owned())
    );
    assert_eq!(pages(&report), [page(3), page(4)]);
    // It is read later, and has a page whose mapping is gone.
    *log.fails.lock().unwrap() = false;
    assert_eq!(take(&tracker), [page(4)]);
}

#[test]
fn a_page_that_the_view_does_not_know_is_an_error() {
    let (tracker, view, log) = logged();
    view.map(PAGE, page(7), PAGE).unwrap();
    log.set(0);
    log.set(1);
    let mut report = Report::new();
    let failed = tracker.take(&mut report).unwrap_err();
    assert_eq!(
        failed.cause.to_string(),
        TrackError::Unmapped { addr: 0 }.to_string()
    );
    assert_eq!(pages(&report), [page(7)]);
    // One byte of a large page is enough.
    let large = |_: &[IovaRange], dirty: &mut DirtyIovas| -> Result<(), SourceError> {
        Ok(dirty.or_bitmap(&[1], extent(0, 1, 2 * MIB))?)
    };
    tracker.add_log("large", &view, 0, large).unwrap();
    for _ in 0..2 {
        assert_eq!(take(&tracker), [page(7)]);
    }
    let wrong = |_: &[IovaRange], dirty: &mut DirtyIovas| -> Result<(), SourceError> {
        assert_eq!(
            dirty.or_bitmap(&[1], extent(1, 1, PAGE)),
            Err(Error::Misaligned.into())
        );
        assert_eq!(
            dirty.or_bitmap(&[1], extent(0, 65, PAGE)),
            Err(Error::BitmapSize.into())
        );
        assert_eq!(dirty.or_range(u64::MAX, 2), Err(Error::Wraps.into()));
        assert_eq!(dirty.or_range(PAGE, 0), Ok(()));
        Ok(())
    };
    tracker.add_log("wrong", &view, 0, wrong).unwrap();
    assert_eq!(take(&tracker), [page(7)]);
}

#[test]
fn mappings_of_peer_to_peer_bars_lead_nowhere() {
    let (tracker, view, log) = logged();
    let bar = view.map(0, 0xe000_0000, 4 * PAGE).unwrap();
    assert_eq!(bar.mark(0, 4 * PAGE), Ok(()));
    assert_eq!(view.mark(0, PAGE), Ok(()));
    log.set(1);
    assert!(take(&tracker).is_empty());
    // Memory is plugged there while the mapping stays.
    tracker.add_slot(9, 0xe000_0000, None, 3 * PAGE).unwrap();
    take(&tracker);
    log.set(1);
    bar.mark(2 * PAGE, 2 * PAGE).unwrap();
    assert_eq!(take(&tracker), [0xe000_0000 + PAGE, 0xe000_0000 + 2 * PAGE]);
}

#[test]
fn what_an_unmap_returns_is_marked_before_the_mapping_goes() {
    let tracker = tracker();
    let view = tracker.iova_view();
    view.map(0, page(0), 4 * PAGE).unwrap();
    let dirty = extent(PAGE, 2, PAGE);
    let unmap = |words: &[u64]| view.unmap_dirty(PAGE, 2 * PAGE, words, dirty);
    assert_eq!(unmap(&[]), Err(Error::BitmapSize.into()));
    assert_eq!(unmap(&[0b10]), Ok(2 * PAGE));
    assert_eq!(unmap(&[0b11]), Ok(0));
    assert_eq!(take(&tracker), [page(2)]);
}

#[test]
fn a_source_that_is_removed_is_asked_once_more() {
    let (tracker, view, log) = logged();
    let kvm = tracker.add_source("kvm", |report| Ok(report.or_range(16 * MIB, 1)?));
    let gone = Log::default();
    let unplugged = tracker.add_log("gone", &view, 0, gone.clone()).unwrap();
    view.map(0, page(5), PAGE).unwrap();
    view.map(PAGE, page(6), PAGE).unwrap();
    view.unmap(0, PAGE).unwrap();
    gone.set(0);
    unplugged.clone().remove().unwrap();
    unplugged.remove().unwrap();
    kvm.remove().unwrap();
    assert_eq!(take(&tracker), [page(5), 16 * MIB]);
    gone.set(0);
    assert!(take(&tracker).is_empty(), "nobody asks it any more");
    // One that fails leaves what `take` would.
    *gone.fails.lock().unwrap() = true;
    let again = tracker.add_log("gone", &view, 0, gone).unwrap();
    assert_eq!(again.remove().unwrap_err().source, "gone");
    assert_eq!(take(&tracker), [page(6)]);
    let bad = tracker.add_source("bad", |_| Err("no".into()));
    bad.remove().unwrap_err();
    assert_eq!(take(&tracker).len(), 170);
    // A source of a tracker that is off or gone is not asked.
    tracker.stop();
    tracker
        .add_source("bad", |_| Err("no".into()))
        .remove()
        .unwrap();
    let last = tracker.add_source("bad", |_| Err("no".into()));
    log.set(0);
    drop((tracker, view));
    last.remove().unwrap();
}

#[test]
fn a_view_remembers_nothing_while_nobody_migrates() {
    let (tracker, view, log) = logged();
    tracker.stop();
    for n in 0..1024 {
        view.map(n * PAGE, page(n % 100), PAGE).unwrap();
        view.unmap(n * PAGE, PAGE).unwrap();
    }
    assert_eq!(view.remembered(), 0);
    // What the log has from before is in no mapping, and that is no error.
    log.set(77);
    tracker.start().unwrap();
    assert!(take(&tracker).is_empty());
    view.map(0, page(0), PAGE).unwrap();
    view.unmap(0, PAGE).unwrap();
    assert_eq!(view.remembered(), 1);
    tracker.start().unwrap();
    assert_eq!(view.remembered(), 0, "start begins with nothing remembered");
    // A view without a log has nobody to remember for.
    let marks = tracker.iova_view();
    marks.map(0, page(0), PAGE).unwrap();
    marks.unmap(0, PAGE).unwrap();
    assert_eq!(marks.remembered(), 0);
}

#[test]
fn dropping_the_tracker_drops_all() {
    let (tracker, view, _) = logged();
    let token = Arc::new(());
    let (held, inner) = (Arc::clone(&token), view.clone());
    tracker.add_source("holds its view", move |_| {
        let _ = (&held, inner.remembered());
        Ok(())
    });
    let (held, inner) = (Arc::clone(&token), view.clone());
    let log = move |_: &[IovaRange], _: &mut DirtyIovas| -> Result<(), SourceError> {
        let _ = (&held, inner.remembered());
        Ok(())
    };
    tracker.add_log("holds its view", &view, 0, log).unwrap();
    let (held, weak) = (Arc::clone(&token), tracker.downgrade());
    tracker.add_source("knows its tracker", move |_| {
        let _ = &held;
        assert!(weak.upgrade().is_some());
        Ok(())
    });
    let bits = tracker.slots()[0].bits.clone();
    take(&tracker);
    let there = Arc::downgrade(&token);
    drop(token);
    let weak = tracker.downgrade();
    drop(tracker);
    assert!(weak.upgrade().is_none() && there.upgrade().is_none());
    // The view is still usable, and the bits are free.
    view.map(0, page(0), PAGE).unwrap();
    let other = Tracker::new(None);
    other.add(Slot::new(0, 0, bits.len(), bits)).unwrap();
    let cause = other.add_log("log", &view, 0, Log::default()).unwrap_err();
    assert_eq!(cause, TrackError::OtherTracker);
}

#[test]
fn a_source_that_panics_makes_everything_dirty() {
    let (tracker, _, _) = logged();
    let mut panics = true;
    tracker.add_source("bug", move |_| match std::mem::take(&mut panics) {
        true => panic!("a bug"),
        false => Ok(()),
    });
    let taken = std::panic::catch_unwind(|| take(&tracker));
    assert!(taken.is_err());
    assert_eq!(take(&tracker).len(), 170);
    assert!(take(&tracker).is_empty());
}

#[test]
fn what_cannot_be_remembered_is_dirty_at_once() {
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, MIB).unwrap();
    tracker.start().unwrap();
    let (view, log) = (tracker.iova_view(), Log::default());
    tracker.add_log("log", &view, 0, log.clone()).unwrap();
    assert!(take(&tracker).is_empty());
    for n in 0..1 << 16 {
        view.map(n * PAGE, 0, PAGE).unwrap();
        view.unmap(n * PAGE, PAGE).unwrap();
    }
    let bits = tracker.slots()[0].bits.clone();
    assert!(!bits.is_dirty(0));
    view.map(0, 5 * PAGE, PAGE).unwrap();
    view.unmap(0, PAGE).unwrap();
    assert!(bits.is_dirty(5 * PAGE));
    assert_eq!(view.remembered(), 1 << 16);
    // A device's log has a page whose mapping is not remembered. That is no error
    // until the log was read once more.
    log.set(1 << 28);
    assert_eq!(take(&tracker), [5 * PAGE]);
    assert_eq!(view.remembered(), 0);
    log.set(1 << 28);
    tracker.take(&mut Report::new()).unwrap_err();
}

/// A guest stacks mappings so that every dirty run hits all of them.
#[test]
fn mappings_in_a_stack_count_as_dirty_when_they_are_too_many() {
    let tracker = Tracker::new(None);
    tracker.add_slot(0, 0, None, 1 << 30).unwrap();
    tracker.start().unwrap();
    let view = tracker.iova_view();
    let log = |_: &[IovaRange], dirty: &mut DirtyIovas| -> Result<(), SourceError> {
        Ok(dirty.or_bitmap(&[0x5555_5555_5555_5555; 32], extent(0, 2048, PAGE))?)
    };
    tracker.add_log("log", &view, 0, log).unwrap();
    take(&tracker);
    for n in 0..8192 {
        view.map(0, n * PAGE, 2048 * PAGE).unwrap();
        view.unmap(0, 2048 * PAGE).unwrap();
    }
    assert_eq!(take(&tracker).len(), 8191 + 2048);
}
