// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VMM's work: four threads mark, and one report joins KVM's log, the VMM's writes
//! and a device's. The peer does as cloud-hypervisor: it gets and resets a bitmap of
//! vm-memory for each source, and ORs them into a new one.

use std::hint::black_box;
use std::ops::Range;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Instant;

use adapter_user::guest::{Mapping, Report, Tracker};
use adapter_user::DirtyBits;
use rand::Rng;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

use crate::data::{check, huge_pages, naive, random, scattered, GIB_64};
use crate::harness::{after, Bench};
use crate::host::PAGE;
use crate::report::row::{Row, Who};
use crate::sets::{Atomic, PageSet};

const ATOMIC: &str = <Atomic as PageSet>::NAME;
const THREADS: usize = 4;

pub(crate) fn run(bench: &mut Bench) {
    for (case, n) in [("mark", 1), ("mark of 512 pages", 512)] {
        let row = |how| Row::new("vmm", format!("4 threads, {case}{how}"), GIB_64.name);
        let mut direct = row("").of(ATOMIC, 1.1);
        mark(bench, &mut direct, Who::Ours, "ours", n, bits());
        mark(bench, &mut direct, Who::Peer, ATOMIC, n, atomic());
        bench.add(direct);
        // No peer translates.
        let mut by_iova = row(" by IOVA");
        mark(bench, &mut by_iova, Who::Ours, "ours", n, mapping());
        bench.add(by_iova);
    }
    let pages = GIB_64.pages;
    report(bench, "clean", Vec::new());
    report(bench, "0.1 % scattered", scattered(pages, 0.001));
    report(bench, "1 % scattered", scattered(pages, 0.01));
    report(bench, "50 % in 2M", huge_pages(pages, 0.5));
}

/// Something in which threads mark bytes from an offset on.
trait Marks: Sync {
    fn mark(&self, offset: u64, len: u64);
}

impl Marks for DirtyBits {
    fn mark(&self, offset: u64, len: u64) {
        DirtyBits::mark(self, offset, len).expect("inside");
    }
}

impl Marks for Mapping {
    fn mark(&self, offset: u64, len: u64) {
        Mapping::mark(self, self.iova() + offset, len).expect("inside");
    }
}

impl Marks for AtomicBitmap {
    fn mark(&self, offset: u64, len: u64) {
        self.mark_dirty(offset as usize, len as usize);
    }
}

fn tracker() -> (Tracker, DirtyBits) {
    let tracker = Tracker::new(None);
    let bits = tracker.add_slot(0, 0, None, GIB_64.pages * PAGE);
    tracker.start().expect("the kernel has membarrier(2)");
    (tracker, bits.expect("memory for a bitmap"))
}

/// Bits, with the tracker that keeps them on.
struct Tracked<T> {
    marks: T,
    _tracker: Tracker,
}

impl<T: Marks> Marks for Tracked<T> {
    fn mark(&self, offset: u64, len: u64) {
        self.marks.mark(offset, len);
    }
}

fn bits() -> impl Marks {
    let (tracker, marks) = tracker();
    Tracked {
        marks,
        _tracker: tracker,
    }
}

fn mapping() -> impl Marks {
    let (tracker, _) = tracker();
    let mapping = tracker.iova_view().map(1 << 40, 0, GIB_64.pages * PAGE);
    Tracked {
        marks: mapping.expect("in step"),
        _tracker: tracker,
    }
}

fn atomic() -> AtomicBitmap {
    Atomic::new(GIB_64.pages).0
}

/// Times marks of `n` pages from four threads at a time.
fn mark(bench: &mut Bench, row: &mut Row, who: Who, name: &'static str, n: u64, set: impl Marks) {
    let setup = || {
        let mut rng = random(n);
        let last = GIB_64.pages - n;
        let mut pages = || (0..1 << 18).map(|_| rng.random_range(0..=last)).collect();
        let pages: [Vec<u64>; THREADS] = std::array::from_fn(|_| pages());
        pages
    };
    bench.time_on(row, who, name, setup, |pages, b| {
        b.iter_custom(|iters| {
            let each = (iters as usize).div_ceil(THREADS);
            let start = Barrier::new(THREADS + 1);
            thread::scope(|scope| {
                let threads = pages.each_ref().map(|pages| {
                    scope.spawn(|| {
                        start.wait();
                        for page in pages.iter().cycle().take(each) {
                            set.mark(page * PAGE, n * PAGE);
                        }
                    })
                });
                start.wait();
                let started = Instant::now();
                for thread in threads {
                    thread.join().expect("no mark fails");
                }
                started.elapsed()
            })
        });
    });
}

/// A third of the pages each: KVM's, the VMM's and the device's.
fn thirds(dirty: &[Range<u64>]) -> [Vec<Range<u64>>; 3] {
    std::array::from_fn(|k| dirty.iter().skip(k).step_by(3).cloned().collect())
}

fn bitmap(dirty: &[Range<u64>]) -> Vec<u64> {
    naive(GIB_64.pages, dirty.iter().cloned().flatten())
}

fn mark_all(set: &impl Marks, dirty: &[Range<u64>]) {
    for run in dirty {
        set.mark(run.start * PAGE, (run.end - run.start) * PAGE);
    }
}

fn report(bench: &mut Bench, case: &'static str, dirty: Vec<Range<u64>>) {
    let case = format!("report of three sources, {case}");
    let mut row = Row::new("vmm", case, GIB_64.name).of(ATOMIC, 0.7);
    let parts = thirds(&dirty);
    let setup = || {
        let mut ours = Ours::new(&parts);
        check("ours", ours.report(), &bitmap(&dirty));
        ours
    };
    bench.time_on(&mut row, Who::Ours, "ours", setup, |ours, b| {
        let mark = |ours: &mut Ours| ours.mark(&parts);
        after(b, ours, mark, |ours| {
            black_box(ours.report());
        });
    });
    let setup = || {
        let theirs = Theirs::new(&parts);
        check(ATOMIC, &theirs.report(), &bitmap(&dirty));
        theirs
    };
    bench.time_on(&mut row, Who::Peer, ATOMIC, setup, |theirs, b| {
        let mark = |theirs: &mut Theirs| theirs.mark(&parts);
        after(b, theirs, mark, |theirs| {
            black_box(theirs.report());
        });
    });
    bench.add(row);
}

struct Ours {
    tracker: Tracker,
    vmm: DirtyBits,
    device: Mapping,
    report: Report,
}

impl Ours {
    fn new(parts: &[Vec<Range<u64>>; 3]) -> Ours {
        let (tracker, vmm) = tracker();
        let device = tracker.iova_view().map(0, 0, GIB_64.pages * PAGE);
        let log: Arc<[u64]> = bitmap(&parts[0]).into();
        tracker.add_source("kvm", move |report| Ok(report.or_slot(0, &log)?));
        let mut ours = Ours {
            tracker,
            vmm,
            device: device.expect("all of it is there"),
            report: Report::new(),
        };
        ours.report(); // gets its words
        ours.mark(parts);
        ours
    }

    fn mark(&mut self, parts: &[Vec<Range<u64>>; 3]) {
        mark_all(&self.vmm, &parts[1]);
        mark_all(&self.device, &parts[2]);
    }

    fn report(&mut self) -> &[u64] {
        self.report.clear();
        self.tracker
            .take(&mut self.report)
            .expect("no source fails");
        self.report.slot(0).expect("the slot")
    }
}

struct Theirs {
    /// What KVM_GET_DIRTY_LOG gives.
    log: Vec<u64>,
    vmm: AtomicBitmap,
    device: AtomicBitmap,
}

impl Theirs {
    fn new(parts: &[Vec<Range<u64>>; 3]) -> Theirs {
        let mut theirs = Theirs {
            log: bitmap(&parts[0]),
            vmm: atomic(),
            device: atomic(),
        };
        theirs.mark(parts);
        theirs
    }

    fn mark(&mut self, parts: &[Vec<Range<u64>>; 3]) {
        mark_all(&self.vmm, &parts[1]);
        mark_all(&self.device, &parts[2]);
    }

    fn report(&self) -> Vec<u64> {
        let vmm = self.vmm.get_and_reset();
        let device = self.device.get_and_reset();
        let all = self.log.iter().zip(&vmm).zip(&device);
        all.map(|((a, b), c)| a | b | c).collect()
    }
}
