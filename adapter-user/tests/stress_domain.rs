// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices write through one domain while others map and unmap in it and the tracker
//! takes reports. In the end the copy made by the reports has every write.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use adapter_user::device_log::LogOptions;
use adapter_user::Device;
use rand::{rngs::SmallRng, Rng, SeedableRng};

#[path = "domain/support.rs"]
mod support;

use support::*;

const PAGES: u64 = 256;
const THREADS: u64 = 4;
const TIME: Duration = Duration::from_millis(1500);
/// Windows of IOVAs for each thread; a window is one page of the thread's own.
const WINDOWS: u64 = 4;

fn run(seed: u64, options: LogOptions) {
    let tracker = Tracker::new(None);
    let base = leaked(PAGES);
    tracker.add_slot(0, 0, Some(base), PAGES * PAGE).unwrap();
    let at = |page: u64| {
        let word = (base + page * PAGE) as *mut u64;
        // SAFETY: the memory is leaked. Devices write it through the kernel, as other
        // processes would, and this test by atomic accesses alone.
        unsafe { AtomicU64::from_ptr(word) }
    };
    let (log, container) = (DeviceLog::with_options(options), container());
    let domain = domain(&tracker, Some(&log), Some(&container));
    let view = domain.view();
    tracker.add_log("log", view, 1 << 20, log.clone()).unwrap();
    tracker
        .add_log("container", view, 0, container.clone())
        .unwrap();
    log.start_all(PAGE).unwrap();
    container.start().unwrap();
    tracker.start().unwrap();
    let stop = AtomicBool::new(false);
    let mut there = vec![0; PAGES as usize]; // as the memory is
    let mut copy = |report: &Report| {
        for page in dirty(report) {
            there[page as usize] = at(page).load(Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (domain, log, container, stop, at) = (&domain, &log, &container, &stop, &at);
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(seed + thread);
                let unpin = Box::new(Device::unpin_range);
                let other = container.open_device(GROUP, Some(unpin)).unwrap();
                let ours = domain.open_device(GROUP, None).unwrap();
                let mut windows = [None; WINDOWS as usize];
                while !stop.load(Ordering::Relaxed) {
                    let k = random.random_range(0..WINDOWS);
                    let iova = (thread * WINDOWS + k) * PAGE;
                    let Some(page) = windows[k as usize] else {
                        // Each thread has pages of its own, so the last write is known.
                        let page = random.random_range(0..PAGES / THREADS) * THREADS + thread;
                        domain.map(iova, page * PAGE, PAGE, RW).unwrap();
                        windows[k as usize] = Some(page);
                        continue;
                    };
                    let value = random.random::<u64>();
                    match random.random_range(0..6) {
                        0 => ours.write(iova, &value.to_ne_bytes()).unwrap(),
                        1 => other.write(iova, &value.to_ne_bytes()).unwrap(),
                        2 => {
                            at(page).store(value, Ordering::Relaxed);
                            domain.mark(iova, 8).unwrap();
                        }
                        3 => {
                            at(page).store(value, Ordering::Relaxed);
                            log.mark(iova, 8).unwrap();
                        }
                        4 => {
                            let pin = other.pin(iova, 8, RW).unwrap();
                            pin.write(0, &value.to_ne_bytes()).unwrap();
                            if random.random() {
                                std::mem::forget(pin); // the unmap's callback unpins
                            }
                        }
                        _ => {
                            domain.unmap(iova, PAGE).unwrap();
                            windows[k as usize] = None;
                        }
                    }
                }
            });
        }
        let end = Instant::now() + TIME;
        let mut report = Report::new();
        while Instant::now() < end {
            tracker.take(&mut report).unwrap();
            copy(&report);
            report.clear();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    copy(&report);
    for page in 0..PAGES {
        let now = at(page).load(Ordering::Relaxed);
        assert_eq!(now, there[page as usize], "page {page} is stale");
    }
}

#[test]
fn four_threads_that_map_and_write_lose_nothing() {
    run(1, LogOptions::default());
}

/// The log keeps next to nothing of removed ranges, so it reports more.
#[test]
fn a_log_that_keeps_little_loses_nothing() {
    let removed = 200;
    run(
        5,
        LogOptions {
            removed,
            ..LogOptions::default()
        },
    );
}
