// SPDX-License-Identifier: MIT OR Apache-2.0
//! One range among few and among as many as a vfio-user server allows: in a device's
//! log that is on, and in the view of a tracker that is on. The peer is the standard
//! library's map with plain words.

use std::collections::BTreeMap;
use std::sync::RwLock;

use adapter_user::device_log::{DeviceLog, Holes, LogOptions};
use adapter_user::guest::{IovaView, Report, Tracker};

use crate::data::{check, naive, zeroed};
use crate::harness::Bench;
use crate::host::PAGE;
use crate::report::row::{Row, Who};
use crate::rows::mappings::{gap, place, Batches, BATCH, FEW, MANY, PAGES};
use crate::sets::{Atomic, PageSet};

const WORDS: usize = PAGES as usize / 64;

pub(crate) fn run(bench: &mut Bench) {
    rows::<DeviceLog, Bitmaps, Bitmaps>(bench, "log");
    rows::<View, Translations, Locked>(bench, "view");
    fill(bench);
}

/// Ranges of IOVAs that are added, removed and marked. All numbers are pages.
trait Ranges {
    const NAME: &'static str;

    fn new() -> Self;

    /// Adds a range of `PAGES` pages.
    fn add(&mut self, first: u64);

    fn remove(&mut self, first: u64);

    /// Marks one page.
    fn mark(&mut self, page: u64);

    /// Takes the dirty pages of the range at page `first`.
    fn take(&mut self, first: u64) -> [u64; WORDS];
}

/// Rows of ours, of a peer, and of a peer whose marks threads may share.
fn rows<Ours: Ranges, Peer: Ranges, SharedPeer: Ranges>(bench: &mut Bench, what: &str) {
    let row = |case| Row::new("mappings", format!("{what}: {case}"), "65535").per(BATCH);
    let mut add = row("add + remove");
    add_and_remove::<Ours>(bench, &mut add, Who::Limit, "among 64", FEW);
    add_and_remove::<Ours>(bench, &mut add, Who::Ours, Ours::NAME, MANY);
    add_and_remove::<Peer>(bench, &mut add, Who::Peer, Peer::NAME, MANY);
    bench.add(add);
    let mut by_iova = row("mark by IOVA");
    mark::<Ours>(bench, &mut by_iova, Who::Limit, "among 64", FEW);
    mark::<Ours>(bench, &mut by_iova, Who::Ours, Ours::NAME, MANY);
    mark::<Peer>(bench, &mut by_iova, Who::Peer, Peer::NAME, MANY);
    if SharedPeer::NAME != Peer::NAME {
        mark::<SharedPeer>(bench, &mut by_iova, Who::Peer, SharedPeer::NAME, MANY);
    }
    bench.add(by_iova);
}

/// `n` ranges, of which one has a dirty page that is reported before anything is timed.
fn ranges<R: Ranges>(n: usize) -> (R, Batches) {
    let mut ranges = filled::<R>(n);
    ranges.mark(place(n / 2) + 65);
    check(R::NAME, &ranges.take(place(n / 2)), &naive(PAGES, [65]));
    (ranges, Batches::new(n))
}

fn add_and_remove<R: Ranges>(
    bench: &mut Bench,
    row: &mut Row,
    who: Who,
    name: &'static str,
    n: usize,
) {
    bench.time_on(
        row,
        who,
        name,
        || ranges::<R>(n),
        |(ranges, batches), b| {
            b.iter(|| {
                for k in batches.next() {
                    ranges.add(gap(*k));
                    ranges.remove(gap(*k));
                }
            });
        },
    );
}

fn mark<R: Ranges>(bench: &mut Bench, row: &mut Row, who: Who, name: &'static str, n: usize) {
    bench.time_on(
        row,
        who,
        name,
        || ranges::<R>(n),
        |(ranges, batches), b| {
            b.iter(|| {
                for k in batches.next() {
                    ranges.mark(place(*k) + *k as u64 % PAGES);
                }
            });
        },
    );
}

/// As many ranges as a vfio-user server allows, added one by one to a log that is on.
fn fill(bench: &mut Bench) {
    let mut row = Row::new("mappings", "log: add of all", "65535").per(MANY);
    bench.time(&mut row, Who::Ours, DeviceLog::NAME, |b| {
        b.iter_with_large_drop(|| filled::<DeviceLog>(MANY));
    });
    bench.time(&mut row, Who::Peer, Bitmaps::NAME, |b| {
        b.iter_with_large_drop(|| filled::<Bitmaps>(MANY));
    });
    bench.add(row);
}

fn filled<R: Ranges>(n: usize) -> R {
    let mut ranges = R::new();
    (0..n).for_each(|k| ranges.add(place(k)));
    ranges
}

impl Ranges for DeviceLog {
    const NAME: &'static str = "ours";

    fn new() -> Self {
        let log = DeviceLog::with_options(LogOptions {
            holes: Holes::Clean,
            ..LogOptions::default()
        });
        log.set_tracking(true).expect("no ranges so far");
        log
    }

    fn add(&mut self, first: u64) {
        let added = self.add_range(first * PAGE, PAGES * PAGE);
        added.expect("a free range");
    }

    fn remove(&mut self, first: u64) {
        let removed = self.remove_range(first * PAGE, PAGES * PAGE);
        removed.expect("a range");
    }

    fn mark(&mut self, page: u64) {
        DeviceLog::mark(self, page * PAGE, PAGE).expect("a page of a range");
    }

    fn take(&mut self, first: u64) -> [u64; WORDS] {
        let mut out = [0; WORDS];
        let told = self.report(first * PAGE, PAGES * PAGE, PAGE, &mut out);
        told.expect("a range");
        out
    }
}

/// Live ranges with dirty words, and the words of those that are gone.
struct Bitmaps {
    live: BTreeMap<u64, Vec<u64>>,
    gone: BTreeMap<u64, Vec<u64>>,
}

impl Ranges for Bitmaps {
    const NAME: &'static str = "BTreeMap";

    fn new() -> Self {
        Bitmaps {
            live: BTreeMap::new(),
            gone: BTreeMap::new(),
        }
    }

    fn add(&mut self, first: u64) {
        let before = self.live.range(..first + PAGES).next_back();
        assert!(before.is_none_or(|(at, _)| at + PAGES <= first));
        self.live.insert(first, vec![0; WORDS]);
    }

    fn remove(&mut self, first: u64) {
        let words = self.live.remove(&first).expect("a range");
        if words.iter().all(|word| *word == 0) {
            return;
        }
        let gone = self.gone.entry(first).or_insert_with(|| vec![0; WORDS]);
        gone.iter_mut()
            .zip(words)
            .for_each(|(all, word)| *all |= word);
    }

    fn mark(&mut self, page: u64) {
        let (first, words) = self.live.range_mut(..=page).next_back().expect("a range");
        let page = page - first;
        words[page as usize / 64] |= 1 << (page % 64);
    }

    fn take(&mut self, first: u64) -> [u64; WORDS] {
        let gone = self.gone.remove(&first).unwrap_or(vec![0; WORDS]);
        let live = self.live.get_mut(&first).expect("a range");
        std::array::from_fn(|k| gone[k] | std::mem::take(&mut live[k]))
    }
}

/// A view of 64 GiB of guest memory. Nobody reads a log of it, so a mapping that goes
/// is not remembered.
struct View {
    tracker: Tracker,
    view: IovaView,
}

/// The guest's page behind the first page of a range.
pub(crate) fn guest_page(first: u64) -> u64 {
    first % GUEST
}

const GUEST: u64 = 1 << 24;

impl Ranges for View {
    const NAME: &'static str = "ours";

    fn new() -> Self {
        let tracker = Tracker::new(None);
        let bits = tracker.add_slot(0, 0, None, GUEST * PAGE);
        bits.expect("memory for a bitmap");
        tracker.start().expect("the kernel has membarrier(2)");
        let view = tracker.iova_view();
        View { tracker, view }
    }

    fn add(&mut self, first: u64) {
        let gpa = guest_page(first) * PAGE;
        let mapped = self.view.map(first * PAGE, gpa, PAGES * PAGE);
        mapped.expect("a free range");
    }

    fn remove(&mut self, first: u64) {
        let unmapped = self.view.unmap(first * PAGE, PAGES * PAGE);
        assert_eq!(unmapped, Ok(PAGES * PAGE));
    }

    fn mark(&mut self, page: u64) {
        let marked = self.view.mark(page * PAGE, PAGE);
        marked.expect("a page of a mapping");
    }

    fn take(&mut self, first: u64) -> [u64; WORDS] {
        let mut report = Report::new();
        self.tracker.take(&mut report).expect("no source fails");
        let words = report.slot(0).expect("the slot");
        std::array::from_fn(|k| words[guest_page(first) as usize / 64 + k])
    }
}

/// Mappings, and the dirty words of a guest.
struct Translations {
    mappings: BTreeMap<u64, u64>,
    dirty: Vec<u64>,
}

impl Ranges for Translations {
    const NAME: &'static str = "BTreeMap";

    fn new() -> Self {
        Translations {
            mappings: BTreeMap::new(),
            dirty: vec![0; GUEST as usize / 64],
        }
    }

    fn add(&mut self, first: u64) {
        let before = self.mappings.range(..first + PAGES).next_back();
        assert!(before.is_none_or(|(at, _)| at + PAGES <= first));
        self.mappings.insert(first, guest_page(first));
    }

    fn remove(&mut self, first: u64) {
        self.mappings.remove(&first).expect("a mapping");
    }

    fn mark(&mut self, page: u64) {
        let mapping = self.mappings.range(..=page).next_back();
        let (first, guest) = mapping.expect("a mapping");
        let page = guest + (page - first);
        self.dirty[page as usize / 64] |= 1 << (page % 64);
    }

    fn take(&mut self, first: u64) -> [u64; WORDS] {
        let at = guest_page(first) as usize / 64;
        std::array::from_fn(|k| std::mem::take(&mut self.dirty[at + k]))
    }
}

/// The same as a VMM with a virtual IOMMU holds it: threads share the mappings' lock,
/// and a bitmap of vm-memory.
struct Locked {
    mappings: RwLock<BTreeMap<u64, u64>>,
    dirty: Atomic,
}

impl Ranges for Locked {
    const NAME: &'static str = "RwLock<BTreeMap> + AtomicBitmap";

    fn new() -> Self {
        Locked {
            mappings: RwLock::default(),
            dirty: Atomic::new(GUEST),
        }
    }

    fn add(&mut self, first: u64) {
        let mut mappings = self.mappings.write().expect("no panic");
        let before = mappings.range(..first + PAGES).next_back();
        assert!(before.is_none_or(|(at, _)| at + PAGES <= first));
        mappings.insert(first, guest_page(first));
    }

    fn remove(&mut self, first: u64) {
        let mut mappings = self.mappings.write().expect("no panic");
        mappings.remove(&first).expect("a mapping");
    }

    fn mark(&mut self, page: u64) {
        let mappings = self.mappings.read().expect("no panic");
        let mapping = mappings.range(..=page).next_back();
        let (first, guest) = mapping.expect("a mapping");
        self.dirty.mark_one(guest + (page - first));
    }

    fn take(&mut self, first: u64) -> [u64; WORDS] {
        let mut words = zeroed(GUEST as usize / 64);
        self.dirty.take(&mut words);
        let at = guest_page(first) as usize / 64;
        std::array::from_fn(|k| words[at + k])
    }
}
