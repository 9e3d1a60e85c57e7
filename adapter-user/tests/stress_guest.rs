// SPDX-License-Identifier: MIT OR Apache-2.0
//! Some threads write, mark, map and unmap while another takes reports, adds and
//! removes slots, and starts and stops logs. In the end the copy made by the reports
//! has every write.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use adapter_user::device_log::DeviceLog;
use adapter_user::guest::{Mapping, Report, Tracker};
use adapter_user::{DirtyBits, Error, TrackError};
use rand::{rngs::SmallRng, Rng, SeedableRng};

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;
const THREADS: u64 = 4;
const TIME: Duration = Duration::from_millis(1500);

/// A guest whose pages are one number each.
fn guest() -> Vec<AtomicU64> {
    (0..PAGES).map(|_| AtomicU64::new(0)).collect()
}

fn write(guest: &[AtomicU64], page: u64, value: u64) {
    guest[page as usize].store(value, Ordering::Relaxed);
}

fn copy(guest: &[AtomicU64], report: &Report, to: &mut [u64]) {
    for range in report.ranges(PAGE).unwrap() {
        for page in range.gpa / PAGE..(range.gpa + range.size) / PAGE {
            to[page as usize] = guest[page as usize].load(Ordering::Relaxed);
        }
    }
}

fn assert_same(guest: &[AtomicU64], copy: &[u64]) {
    for (page, (now, copy)) in guest.iter().zip(copy).enumerate() {
        assert_eq!(now.load(Ordering::Relaxed), *copy, "page {page} is stale");
    }
}

#[test]
fn four_devices_and_a_vmm_lose_nothing() {
    let tracker = Tracker::new(None);
    let ram = tracker.add_slot(0, 0, None, PAGES * PAGE).unwrap();
    let guest = guest();
    let stop = AtomicBool::new(false);
    let mut there = vec![0; PAGES as usize];
    thread::scope(|scope| {
        for seed in 0..THREADS {
            let view = tracker.iova_view();
            let (guest, stop, ram) = (&guest, &stop, &ram);
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(seed);
                let mut window: Option<Mapping> = None;
                while !stop.load(Ordering::Relaxed) {
                    // Each thread has pages of its own, so the last write is known.
                    let page = random.random_range(0..PAGES / THREADS) * THREADS + seed;
                    match random.random_range(0..4) {
                        0 => {
                            write(guest, page, random.random());
                            ram.mark(page * PAGE, 8).unwrap();
                        }
                        1 => {
                            view.map(0, page * PAGE, PAGE).unwrap();
                            write(guest, page, random.random());
                            view.mark(8, 8).unwrap();
                            view.unmap(0, PAGE).unwrap();
                        }
                        _ => {
                            let iova = 1 << 30;
                            if let Some(old) = window.take() {
                                view.unmap(iova, PAGE).unwrap();
                                // The device writes after the unmap.
                                write(guest, old.gpa() / PAGE, random.random());
                                old.mark(iova, PAGE).unwrap();
                            }
                            let new = view.map(iova, page * PAGE, PAGE).unwrap();
                            write(guest, page, random.random());
                            new.mark(iova, PAGE).unwrap();
                            window = Some(new);
                        }
                    }
                }
            });
        }
        let end = Instant::now() + TIME;
        let mut report = Report::new();
        tracker.start().unwrap();
        for (page, to) in there.iter_mut().enumerate() {
            *to = guest[page].load(Ordering::Relaxed);
        }
        while Instant::now() < end {
            let _ = tracker.add_slot(1, 1 << 40, None, PAGE).unwrap();
            tracker.take(&mut report).unwrap();
            // All of a slot that joins is dirty.
            assert_eq!(report.slot(1), Some(&[1][..]));
            report.discard(1 << 40, PAGE);
            copy(&guest, &report, &mut there);
            report.clear();
            tracker.remove_slot(1).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    copy(&guest, &report, &mut there);
    assert_same(&guest, &there);
}

/// The bits of a slot are closed while four threads mark. Each mark is refused, or its
/// page is in the last take.
#[test]
fn a_slot_that_goes_has_every_mark_that_was_taken() {
    let end = Instant::now() + TIME;
    while Instant::now() < end {
        let tracker = Tracker::new(None);
        let ram = tracker.add_slot(0, 0, None, PAGES * PAGE).unwrap();
        tracker.start().unwrap();
        let marked: Vec<Vec<u64>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|seed| {
                    let ram: DirtyBits = ram.clone();
                    scope.spawn(move || {
                        let pages = (0..PAGES / THREADS).map(|page| page * THREADS + seed);
                        pages
                            .take_while(|page| ram.mark(page * PAGE, 1).is_ok())
                            .collect()
                    })
                })
                .collect();
            let slot = tracker.remove_slot(0).unwrap();
            let mut words = vec![0u64; slot.bits.words()];
            slot.bits.take(&mut words).unwrap();
            let marked = threads.into_iter().map(|thread| thread.join().unwrap());
            let marked: Vec<Vec<u64>> = marked.collect();
            for page in marked.iter().flatten() {
                assert!(
                    words[(page / 64) as usize] >> (page % 64) & 1 != 0,
                    "page {page} is lost"
                );
            }
            marked
        });
        drop(marked);
    }
}

#[test]
fn a_log_whose_ranges_come_and_go_loses_nothing() {
    let log = DeviceLog::new(None);
    let guest = guest();
    let stop = AtomicBool::new(false);
    let mut there = vec![0; PAGES as usize];
    let each = PAGES / THREADS;
    thread::scope(|scope| {
        for seed in 0..THREADS {
            let (guest, stop, log) = (&guest, &stop, &log);
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(seed);
                let first = seed * each;
                log.add_range(first * PAGE, each * PAGE).unwrap();
                while !stop.load(Ordering::Relaxed) {
                    if random.random_range(0..10) == 0 {
                        log.remove_range(first * PAGE, each * PAGE).unwrap();
                        log.add_range(first * PAGE, each * PAGE).unwrap();
                    }
                    let handle = log.range(first * PAGE);
                    for _ in 0..10 {
                        let page = first + random.random_range(0..each);
                        write(guest, page, random.random());
                        let marked = handle.as_ref().map(|h| h.mark(page * PAGE, 1));
                        if marked == Some(Ok(())) {
                            continue;
                        }
                        // There is no handle, or the log was started again since. If
                        // the log is off, whoever starts it copies everything.
                        match log.mark(page * PAGE, 1) {
                            Ok(()) | Err(TrackError::Cause(Error::NotTracking)) => break,
                            other => panic!("{other:?}"),
                        }
                    }
                }
            });
        }
        let end = Instant::now() + TIME;
        let mut words = vec![0; (PAGES / 64) as usize];
        let mut starts = 0;
        while Instant::now() < end {
            log.set_tracking(true).unwrap();
            starts += 1;
            for (page, to) in there.iter_mut().enumerate() {
                *to = guest[page].load(Ordering::Relaxed);
            }
            for _ in 0..50 {
                words.fill(0);
                // A range is not logged between its removal and its addition.
                match log.report(0, PAGES * PAGE, PAGE, &mut words) {
                    Ok(()) => {}
                    Err(TrackError::Unmapped { .. }) => continue,
                    other => panic!("{other:?}"),
                }
                for page in 0..PAGES {
                    if words[(page / 64) as usize] >> (page % 64) & 1 != 0 {
                        there[page as usize] = guest[page as usize].load(Ordering::Relaxed);
                    }
                }
            }
            if starts % 2 == 0 {
                log.set_tracking(false).unwrap();
            }
        }
        log.set_tracking(true).unwrap();
        for (page, to) in there.iter_mut().enumerate() {
            *to = guest[page].load(Ordering::Relaxed);
        }
        stop.store(true, Ordering::Relaxed);
    });
    let mut words = vec![0; (PAGES / 64) as usize];
    log.report(0, PAGES * PAGE, PAGE, &mut words).unwrap();
    for page in 0..PAGES {
        if words[(page / 64) as usize] >> (page % 64) & 1 != 0 {
            there[page as usize] = guest[page as usize].load(Ordering::Relaxed);
        }
    }
    assert_same(&guest, &there);
}
