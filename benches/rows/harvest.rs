// SPDX-License-Identifier: MIT OR Apache-2.0
//! A log with 20,000 dirty runs is read through a view that remembers 60,000 mappings
//! which are gone. One of 4 GiB, as of a guest that boots with a passthrough domain,
//! must not make it slower.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, Report, SourceError, Tracker};
use adapter_user::{Extent, PageSize};

use crate::data::check;
use crate::harness::{after, Bench};
use crate::host::PAGE;
use crate::report::row::{Row, Who};

const GONE: u64 = 60_000;
const RUNS: u64 = 20_000;
/// The IOVA of the page that the log begins with. Below are the pages that are gone.
const BASE: u64 = 0xf_0000;
/// Every second page is dirty.
const PAGES: u64 = 2 * RUNS;
const LARGE: u64 = 4 << 30;

pub(crate) fn run(bench: &mut Bench) {
    let without = "without it";
    let cases = [
        ("forgotten", Large::Forgotten),
        ("remembered", Large::Remembered),
    ];
    for (how, large) in cases {
        let case = format!("harvest, a {how} 4 GiB mapping");
        let row = Row::new("view", case, "60000").of(without, 2.0);
        let mut row = row.at_most(100e6);
        harvest(bench, &mut row, Who::Ours, "ours", large);
        harvest(bench, &mut row, Who::Limit, without, Large::None);
        bench.add(row);
    }
}

/// What became of the mapping of 4 GiB.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Large {
    None,
    Forgotten,
    Remembered,
}

fn harvest(bench: &mut Bench, row: &mut Row, who: Who, name: &'static str, large: Large) {
    let setup = || {
        let mut guest = Guest::new(large);
        guest.come_and_go();
        guest.take();
        guest.check();
        guest
    };
    bench.time_on(row, who, name, setup, |guest, b| {
        after(b, guest, Guest::come_and_go, Guest::take);
    });
}

struct Guest {
    tracker: Tracker,
    view: IovaView,
    report: Report,
    /// Whether the log has something.
    dirty: Arc<AtomicBool>,
    large: Large,
}

impl Guest {
    fn new(large: Large) -> Guest {
        let tracker = Tracker::new(None);
        let bits = tracker.add_slot(0, 0, None, LARGE);
        bits.expect("memory for a bitmap");
        let view = tracker.iova_view();
        let dirty = Arc::new(AtomicBool::new(false));
        let words = vec![0x5555_5555_5555_5555; PAGES.div_ceil(64) as usize];
        let extent = Extent {
            bit: 0,
            iova: BASE * PAGE,
            npages: PAGES,
            pgsize: PageSize::new(PAGE).expect("a power of two"),
        };
        let set = Arc::clone(&dirty);
        let log = move |_: &[IovaRange], dirty: &mut DirtyIovas| -> Result<(), SourceError> {
            if set.swap(false, Ordering::Relaxed) {
                dirty.or_bitmap(&words, extent)?;
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
        if large == Large::Forgotten {
            guest.passthrough();
            assert_eq!(guest.view.remembered(), 1);
        }
        guest.take();
        assert_eq!(guest.view.remembered(), 0);
        guest.map(BASE, LARGE / 2, PAGES);
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

    /// Maps and unmaps 4 GiB, where the log's pages are too.
    fn passthrough(&self) {
        self.map(0, 0, LARGE / PAGE);
        self.unmap(0, LARGE / PAGE);
    }

    /// Maps and unmaps pages, and lets the log have dirty pages.
    fn come_and_go(&mut self) {
        if self.large == Large::Remembered {
            self.unmap(BASE, PAGES);
            self.passthrough();
            self.map(BASE, LARGE / 2, PAGES);
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
            want[at..at + PAGES as usize / 64].fill(0x5555_5555_5555_5555);
        };
        mark(LARGE / 2 / PAGE);
        if self.large == Large::Remembered {
            mark(BASE);
        }
        check("a harvest", self.report.slot(0).expect("the slot"), &want);
    }
}
