// SPDX-License-Identifier: MIT OR Apache-2.0
//! A report of 32 GiB of memory in one slot and in many. The peer gets and resets a
//! bitmap of vm-memory for each slot.

use std::hint::black_box;
use std::ops::Range;

use adapter_user::guest::{Report, Tracker};
use adapter_user::DirtyBits;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

use crate::data::{check, naive, scattered};
use crate::harness::{after, Bench};
use crate::host::PAGE;
use crate::report::row::{Row, Who};
use crate::sets::{Atomic, PageSet};

/// Pages of all slots: 32 GiB.
const PAGES: u64 = 1 << 23;

pub(crate) fn run(bench: &mut Bench) {
    let dirty = scattered(PAGES, 0.001);
    for (name, n) in [("1 slot", 1), ("64 slots", 64), ("4096 slots", 4096)] {
        let mut row = Row::new("vmm", "take of 32 GiB, 0.1 % scattered", name);
        let setup = || {
            let mut ours = Ours::new(n);
            ours.mark(&dirty);
            ours.take();
            check("ours", &ours.words(), &bitmap(&dirty));
            ours
        };
        bench.time_on(&mut row, Who::Ours, "ours", setup, |ours, b| {
            after(b, ours, |ours| ours.mark(&dirty), Ours::take);
        });
        let setup = || {
            let mut theirs = Theirs::new(n);
            theirs.mark(&dirty);
            check(Atomic::NAME, &theirs.take().concat(), &bitmap(&dirty));
            theirs
        };
        bench.time_on(&mut row, Who::Peer, Atomic::NAME, setup, |theirs, b| {
            let take = |theirs: &mut Theirs| {
                black_box(theirs.take());
            };
            after(b, theirs, |theirs| theirs.mark(&dirty), take);
        });
        bench.add(row);
    }
}

fn bitmap(dirty: &[Range<u64>]) -> Vec<u64> {
    naive(PAGES, dirty.iter().cloned().flatten())
}

struct Ours {
    tracker: Tracker,
    slots: Vec<DirtyBits>,
    report: Report,
}

impl Ours {
    fn new(n: u64) -> Ours {
        let tracker = Tracker::new(None);
        let size = PAGES / n * PAGE;
        let slot = |id| tracker.add_slot(id as u32, id * size, None, size);
        let slots = (0..n).map(|id| slot(id).expect("memory for a bitmap"));
        let slots = slots.collect();
        tracker.start().expect("the kernel has membarrier(2)");
        let report = Report::new();
        let mut ours = Ours {
            tracker,
            slots,
            report,
        };
        ours.take(); // gets the report's words
        ours
    }

    fn mark(&mut self, dirty: &[Range<u64>]) {
        let pages = PAGES / self.slots.len() as u64;
        for page in dirty.iter().cloned().flatten() {
            let bits = &self.slots[(page / pages) as usize];
            bits.mark(page % pages * PAGE, PAGE).expect("inside");
        }
    }

    fn take(&mut self) {
        self.report.clear();
        let taken = self.tracker.take(&mut self.report);
        taken.expect("no source fails");
    }

    fn words(&self) -> Vec<u64> {
        let slots = 0..self.slots.len() as u32;
        let words = slots.map(|id| self.report.slot(id).expect("a slot"));
        words.collect::<Vec<_>>().concat()
    }
}

struct Theirs {
    slots: Vec<AtomicBitmap>,
}

impl Theirs {
    fn new(n: u64) -> Theirs {
        let slots = (0..n).map(|_| Atomic::new(PAGES / n).0).collect();
        Theirs { slots }
    }

    fn mark(&mut self, dirty: &[Range<u64>]) {
        let pages = PAGES / self.slots.len() as u64;
        for page in dirty.iter().cloned().flatten() {
            let bits = &self.slots[(page / pages) as usize];
            bits.mark_dirty((page % pages * PAGE) as usize, PAGE as usize);
        }
    }

    fn take(&self) -> Vec<Vec<u64>> {
        let slots = self.slots.iter();
        slots.map(AtomicBitmap::get_and_reset).collect()
    }
}
