// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tracker by guest address: its rules one by one, and against a naive
//! model that keeps a set of dirty bytes' pages.

use std::collections::BTreeSet;

use adapter_user::guest::{IovaView, Mapping, Range, Report, Slot, Tracker};
use adapter_user::{DirtyBits, Errno, Error, Extent, PageSize, TrackError};
use proptest::collection::vec;
use proptest::prelude::*;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

fn pgsize(bytes: u64) -> PageSize {
    PageSize::new(bytes).unwrap()
}

/// 100 pages at 1 MiB, with a host address, and 70 at 16 MiB.
fn tracker() -> Tracker {
    let tracker = Tracker::new(None);
    tracker
        .add_slot(5, MIB, Some(0x7000_0000), 100 * PAGE)
        .unwrap();
    tracker.add_slot(2, 16 * MIB, None, 70 * PAGE).unwrap();
    tracker
}

fn take(tracker: &Tracker) -> Vec<u64> {
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    pages(&report)
}

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
    // Nor where this process has it.
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
fn every_kind_of_source_ends_in_one_report() {
    let tracker = tracker();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    report.or_slot(5, &[1, 1 << 35 | 1 << 36]).unwrap(); // the last is padding
    report.or_ring([(2, 69), (5, 3)]).unwrap();
    report.or_host(0x7000_0000 + 5 * PAGE, 2 * PAGE).unwrap();
    report.or_range(16 * MIB + 4095, 2).unwrap();
    report.or_bitmap(&[0b10], extent(0, 2, MIB)).unwrap(); // all of slot 5
    let mut expected: Vec<u64> = (0..100).map(|page| MIB + page * PAGE).collect();
    expected.extend([0, 1, 69].map(|page| 16 * MIB + page * PAGE));
    assert_eq!(pages(&report), expected);
    report.clear();
    assert!(pages(&report).is_empty());
    // At another bit, a page of 1 KiB, then one of 512.
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
    assert_eq!(report.or_slot(5, &[1, 1]), Err(unknown), "it has none yet");
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
    // Starts in the middle of a page of 64 KiB, ends in the middle of one.
    let bits = tracker.add_slot(0, 0x18000, None, 20 * PAGE).unwrap();
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
    // Another slot with the same number has nothing of the old one.
    tracker.remove_slot(5).unwrap();
    tracker.add_slot(5, MIB, None, 100 * PAGE).unwrap();
    tracker.take(&mut report).unwrap();
    assert_eq!(pages(&report), [0]);
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
    assert_eq!(
        failed.to_string(),
        "flaky cannot tell what is dirty: no log"
    );
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
    // The device was late: the page is reported all the same.
    mapping.mark(0x8000, 1).unwrap();
    assert_eq!(take(&tracker), [MIB + 3 * PAGE]);
    // Outside of the mapping nothing is marked, and the caller told.
    assert_eq!(
        mapping.mark(0x9fff, 2),
        Err(TrackError::Unmapped { addr: 0x9fff })
    );
    assert_eq!(
        mapping.mark(0, u64::MAX),
        Err(TrackError::Unmapped { addr: 0 })
    );
    assert_eq!(take(&tracker), [MIB + 3 * PAGE, MIB + 4 * PAGE]);
    // Without the memory there is nothing to report, and a log is told so.
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
    view.unmap(0, PAGE).unwrap(); // while logs are read
    view.map(0, page(2), PAGE).unwrap();
    early.or(&[1], extent(0, 1, PAGE)).unwrap();
    early.finish();
    assert_eq!(take(&tracker), [page(0), page(1), page(2)]);
    assert_eq!(view.remembered(), 1, "the one that went meanwhile");

    let harvest = view.harvest();
    harvest.or(&[0b1], extent(0, 2, PAGE)).unwrap();
    let error = harvest.or(&[0b11], extent(0, 2, PAGE));
    assert_eq!(error, Err(TrackError::Unmapped { addr: PAGE }));
    harvest.or(&[0b1], extent(0, 2, 2 * MIB)).unwrap(); // coarse: a byte is enough
    let _ = harvest; // not finished: all is remembered
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

    // The device's log tells of a page that is not remembered: no error, until
    // a harvest that began after its unmap is finished.
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

/// What a random run does; numbers are pages of 16.
#[derive(Clone, Debug)]
enum Op {
    Map {
        iova: u64,
        gpa: u64,
        n: u64,
    },
    Unmap {
        iova: u64,
        n: u64,
    },
    /// Through a handle taken once, perhaps of a mapping that is gone.
    Late {
        handle: usize,
        at: u64,
        n: u64,
    },
    Mark {
        iova: u64,
        n: u64,
    },
    /// A device that logs by itself writes, and is harvested later.
    Log {
        iova: u64,
    },
    Harvest {
        shift: u32,
        finish: bool,
    },
    Vmm {
        gpa: u64,
        n: u64,
    },
    Foreign {
        words: u64,
        shift: u32,
    },
    Take,
}

fn ops() -> impl Strategy<Value = Op> {
    let page = 0..16u64;
    prop_oneof![
        (page.clone(), page.clone(), 1..6u64).prop_map(|(iova, gpa, n)| Op::Map { iova, gpa, n }),
        (page.clone(), 1..8u64).prop_map(|(iova, n)| Op::Unmap { iova, n }),
        (0..4usize, page.clone(), 1..4u64).prop_map(|(handle, at, n)| Op::Late { handle, at, n }),
        (page.clone(), 1..4u64).prop_map(|(iova, n)| Op::Mark { iova, n }),
        page.clone().prop_map(|iova| Op::Log { iova }),
        (0..3u32, any::<bool>()).prop_map(|(shift, finish)| Op::Harvest { shift, finish }),
        (page, 1..4u64).prop_map(|(gpa, n)| Op::Vmm { gpa, n }),
        (any::<u64>(), 0..3u32).prop_map(|(words, shift)| Op::Foreign { words, shift }),
        Just(Op::Take),
    ]
}

/// Two slots of 6 and 9 pages, with a hole at page 6.
const SLOTS: [(u64, u64); 2] = [(0, 6), (7, 9)];

fn in_slot(page: u64) -> bool {
    SLOTS
        .iter()
        .any(|(first, n)| (*first..first + n).contains(&page))
}

/// Pages that were written and not reported, and which mapping leads where.
#[derive(Default)]
struct Model {
    dirty: BTreeSet<u64>,
    live: Vec<Option<u64>>,
    log: BTreeSet<u64>,
    /// Written through a log: the true pages.
    logged: BTreeSet<u64>,
}

fn run(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let tracker = Tracker::new(None);
    for (id, (first, n)) in (0..).zip(SLOTS) {
        tracker.add_slot(id, first * PAGE, None, n * PAGE).unwrap();
    }
    let bits: Vec<Slot> = tracker.slots();
    let view: IovaView = tracker.iova_view();
    let mut handles: Vec<(Mapping, u64, u64)> = Vec::new();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    let mut m = Model {
        live: vec![None; 32],
        ..Model::default()
    };
    // Exact without logs; with them no page may be missing.
    let mut exact = true;
    for op in ops.into_iter().chain([
        Op::Harvest {
            shift: 0,
            finish: true,
        },
        Op::Take,
    ]) {
        match op {
            Op::Map { iova, gpa, n } => {
                let free = (iova..iova + n).all(|page| m.live[page as usize].is_none());
                let there = (gpa..gpa + n).all(in_slot);
                let done = view.map(iova * PAGE, gpa * PAGE, n * PAGE);
                prop_assert_eq!(done.is_ok(), free && there);
                if let Ok(mapping) = done {
                    handles.push((mapping, iova, n));
                    (0..n).for_each(|k| m.live[(iova + k) as usize] = Some(gpa + k));
                }
            }
            Op::Unmap { iova, n } => {
                let unmapped = view.unmap(iova * PAGE, n * PAGE).unwrap();
                let hit = (iova..iova + n).filter_map(|k| m.live[k as usize].take());
                prop_assert_eq!(unmapped, hit.count() as u64 * PAGE);
            }
            Op::Late { handle, at, n } => {
                let Some((mapping, iova, pages)) = handles.iter().rev().nth(handle) else {
                    continue;
                };
                let at = iova + at % pages;
                let result = mapping.mark(at * PAGE + 7, n * PAGE - 7);
                prop_assert_eq!(result.is_ok(), at + n <= iova + pages);
                let first = mapping.gpa() / PAGE + at - iova;
                m.dirty.extend(first..first + n.min(iova + pages - at));
            }
            Op::Mark { iova, n } => {
                let hit: Vec<_> = (iova..iova + n).map(|k| m.live[k as usize]).collect();
                let result = view.mark(iova * PAGE + 1, n * PAGE - 1);
                prop_assert_eq!(result.is_ok(), hit.iter().all(Option::is_some));
                m.dirty.extend(hit.into_iter().flatten());
            }
            Op::Log { iova } => {
                if let Some(page) = m.live[iova as usize] {
                    m.log.insert(iova);
                    m.logged.insert(page);
                }
            }
            Op::Harvest { shift, finish } => {
                exact &= m.log.is_empty();
                let harvest = view.harvest();
                let words = m
                    .log
                    .iter()
                    .fold(0, |word, page| word | 1 << (page >> shift));
                harvest.or(&[words], extent(0, 16, PAGE << shift)).unwrap();
                if finish {
                    harvest.finish();
                }
                m.log.clear();
                m.dirty.append(&mut m.logged);
            }
            Op::Vmm { gpa, n } => {
                for slot in &bits {
                    let (first, end) = (slot.gpa / PAGE, (slot.gpa + slot.bits.len()) / PAGE);
                    for page in (gpa..gpa + n).filter(|page| (first..end).contains(page)) {
                        slot.bits.mark((page - first) * PAGE + 4095, 1).unwrap();
                        m.dirty.insert(page);
                    }
                }
            }
            Op::Foreign { words, shift } => {
                let words = words & 0xffff >> (16 - (16 >> shift));
                let hit = |page: &u64| words >> (page >> shift) & 1 != 0;
                let coarse = |bit: u64| (bit << shift..(bit + 1) << shift).any(in_slot);
                let result = report.or_bitmap(&[words], extent(0, 16, PAGE << shift));
                let all = (0..16).filter(|bit| words >> bit & 1 != 0).all(coarse);
                prop_assert_eq!(result.is_ok(), all);
                m.dirty
                    .extend((0..16).filter(hit).filter(|page| in_slot(*page)));
            }
            Op::Take => {
                tracker.take(&mut report).unwrap();
                let found: BTreeSet<u64> = pages(&report).iter().map(|at| at / PAGE).collect();
                match exact {
                    true => prop_assert_eq!(&found, &m.dirty),
                    false => prop_assert!(found.is_superset(&m.dirty)),
                }
                exact = true;
                report.clear();
                m.dirty.clear();
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_run_agrees_with_a_set_of_pages(ops in vec(ops(), 1..40)) {
        run(ops)?;
    }
}
