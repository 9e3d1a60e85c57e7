// SPDX-License-Identifier: MIT OR Apache-2.0
//! The log of a device behind a virtual IOMMU is read through a view, as guest pages:
//! with as many mappings as a container may hold, and after a guest that booted with
//! all of its memory mapped.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, Report, SourceError, Tracker};
use adapter_user::{Extent, PageSize};

use crate::data::{check, naive, scattered, GIB_64};
use crate::harness::{after, Bench};
use crate::host::PAGE;
use crate::report::row::{Row, Who};
use crate::rows::mappings::{place, MANY, PAGES};
use crate::rows::ranges::guest_page;

/// Words of the log of a mapping.
const WORDS: usize = PAGES as usize / 64;

pub(crate) fn run(bench: &mut Bench) {
    many(bench);
    large(bench);
}

/// What the device wrote: the words of each mapping, 1 % of the pages dirty.
fn log() -> Vec<u64> {
    let pages = MANY as u64 * PAGES;
    naive(pages, scattered(pages, 0.01).into_iter().flatten())
}

fn words(log: &[u64], mapping: usize) -> &[u64] {
    &log[mapping * WORDS..][..WORDS]
}

/// 65,534 mappings of 2 MiB.
fn many(bench: &mut Bench) {
    let mut row = Row::new("mappings", "view: harvest of a log, 1 %", "65535");
    let setup = || {
        let (mut ours, mut theirs) = (Ours::new(), Theirs::new());
        check("a harvest", ours.take(), &theirs.take());
        ours
    };
    bench.time_on(&mut row, Who::Ours, "ours", setup, |ours, b| {
        b.iter(|| {
            black_box(ours.take());
        });
    });
    bench.time_on(&mut row, Who::Peer, "BTreeMap", Theirs::new, |theirs, b| {
        b.iter(|| theirs.take());
    });
    bench.add(row);
}

struct Ours {
    tracker: Tracker,
    report: Report,
}

impl Ours {
    fn new() -> Ours {
        let tracker = Tracker::new(None);
        let bits = tracker.add_slot(0, 0, None, GIB_64.pages * PAGE);
        bits.expect("memory for a bitmap");
        let view = tracker.iova_view();
        for k in 0..MANY {
            let gpa = guest_page(place(k)) * PAGE;
            let mapped = view.map(place(k) * PAGE, gpa, PAGES * PAGE);
            mapped.expect("free IOVAs");
        }
        let device = log();
        let log = move |ask: &[IovaRange], dirty: &mut DirtyIovas| -> Result<(), SourceError> {
            for range in ask {
                let mapping = range.iova / PAGE / place(1);
                let log = extent(range.iova, range.size / PAGE);
                dirty.or_bitmap(words(&device, mapping as usize), log)?;
            }
            Ok(())
        };
        let added = tracker.add_log("device", &view, 0, log);
        added.expect("a view of the tracker");
        tracker.start().expect("the kernel has membarrier(2)");
        Ours {
            tracker,
            report: Report::new(),
        }
    }

    fn take(&mut self) -> &[u64] {
        self.report.clear();
        let taken = self.tracker.take(&mut self.report);
        taken.expect("the log can be read");
        self.report.slot(0).expect("the slot")
    }
}

/// Mappings in the standard library's map, and a walk over the bits of the log.
struct Theirs {
    mappings: BTreeMap<u64, u64>,
    log: Vec<u64>,
}

impl Theirs {
    fn new() -> Theirs {
        let mappings = (0..MANY).map(|k| (place(k), guest_page(place(k))));
        Theirs {
            mappings: mappings.collect(),
            log: log(),
        }
    }

    fn take(&mut self) -> Vec<u64> {
        let mut out = vec![0; GIB_64.words()];
        for (first, guest) in &self.mappings {
            let words = words(&self.log, (first / place(1)) as usize);
            for (at, word) in (0..).zip(words) {
                let mut word = *word;
                while word != 0 {
                    let page = guest + at * 64 + u64::from(word.trailing_zeros());
                    out[page as usize / 64] |= 1 << (page % 64);
                    word &= word - 1;
                }
            }
        }
        out
    }
}

fn extent(iova: u64, npages: u64) -> Extent {
    Extent {
        bit: 0,
        iova,
        npages,
        pgsize: PageSize::new(PAGE).expect("a power of two"),
    }
}

/// Pages that are mapped and gone again between two reports.
const GONE: u64 = 60_000;
const RUNS: u64 = 20_000;
/// The IOVA of the page that the log begins with. Below are the pages that are gone.
const BASE: u64 = 0xf_0000;
/// Every second page is dirty.
const DIRTY: u64 = 2 * RUNS;
const LARGE: u64 = 4 << 30;

/// A log with 20,000 dirty runs is read while the view remembers 60,000 mappings that
/// are gone. One of 4 GiB among them must not make it slower.
fn large(bench: &mut Bench) {
    let case = "view: harvest, a 4 GiB mapping gone";
    let mut row = Row::new("mappings", case, "20000 runs");
    let mut time = |who, name, large| {
        let setup = || {
            let mut guest = Guest::new(large);
            guest.come_and_go();
            guest.take();
            guest.check();
            guest
        };
        bench.time_on(&mut row, who, name, setup, |guest, b| {
            after(b, guest, Guest::come_and_go, Guest::take);
        });
    };
    time(Who::Ours, "ours", true);
    time(Who::Limit, "without it", false);
    bench.add(row);
}

struct Guest {
    tracker: Tracker,
    view: IovaView,
    report: Report,
    /// Whether the log has something.
    dirty: Arc<AtomicBool>,
    /// Whether a mapping of 4 GiB is among those that are gone.
    large: bool,
}

impl Guest {
    fn new(large: bool) -> Guest {
        let tracker = Tracker::new(None);
        let bits = tracker.add_slot(0, 0, None, LARGE);
        bits.expect("memory for a bitmap");
        let view = tracker.iova_view();
        let dirty = Arc::new(AtomicBool::new(false));
        let words = vec![0x5555_5555_5555_5555; DIRTY.div_ceil(64) as usize];
        let set = Arc::clone(&dirty);
        let log = move |_: &[IovaRange], dirty: &mut DirtyIovas| -> Result<(), SourceError> {
            if set.swap(false, Ordering::Relaxed) {
                dirty.or_bitmap(&words, extent(BASE * PAGE, DIRTY))?;
            }
            Ok(())
        };
        let added = tracker.add_log("device", &view, 0, log);
        added.expect("a view of the tracker");
        tracker.start().expect("the kernel has membarrier(2)");
        let mut guest = Guest {
            tracker,
            view,
            report: Report::new(),
            dirty,
            large,
        };
        guest.take();
        guest.map(BASE, LARGE / 2, DIRTY);
        guest
    }

    fn map(&self, page: u64, gpa: u64, pages: u64) {
        let mapped = self.view.map(page * PAGE, gpa, pages * PAGE);
        mapped.expect("free IOVAs");
    }

    fn unmap(&self, page: u64, pages: u64) {
        let unmapped = self.view.unmap(page * PAGE, pages * PAGE);
        assert_eq!(unmapped, Ok(pages * PAGE));
    }

    /// Maps and unmaps pages, and lets the log have dirty pages.
    fn come_and_go(&mut self) {
        if self.large {
            self.unmap(BASE, DIRTY);
            // Of a guest that boots with a passthrough domain. The log's pages are there.
            self.map(0, 0, LARGE / PAGE);
            self.unmap(0, LARGE / PAGE);
            self.map(BASE, LARGE / 2, DIRTY);
        }
        for page in 0..GONE {
            self.map(BASE - 1 - page, page * PAGE, 1);
            self.unmap(BASE - 1 - page, 1);
        }
        self.dirty.store(true, Ordering::Relaxed);
        self.report.clear();
    }

    fn take(&mut self) {
        let taken = self.tracker.take(&mut self.report);
        taken.expect("the log can be read");
    }

    fn check(&self) {
        let mut want = vec![0u64; (LARGE / PAGE / 64) as usize];
        let mut mark = |first: u64| {
            let at = first as usize / 64;
            want[at..at + DIRTY as usize / 64].fill(0x5555_5555_5555_5555);
        };
        mark(LARGE / 2 / PAGE);
        if self.large {
            mark(BASE);
        }
        check("a harvest", self.report.slot(0).expect("the slot"), &want);
    }
}
