// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that maps and unmaps page after page while the log of its device runs, and
//! a report after each 1,000.

use std::collections::BTreeMap;

use adapter_user::device_log::{DeviceLog, Holes, LogOptions};

use crate::data::{check, naive};
use crate::harness::Bench;
use crate::host::PAGE;
use crate::report::row::{Row, Who};

const CYCLES: usize = 200_000;
/// Cycles before each report, and the pages that are mapped in turn.
const ROUND: usize = 1000;
const WORDS: usize = ROUND.div_ceil(64);

pub(crate) fn run(bench: &mut Bench) {
    let half = "twice half as many";
    let mut row = Row::new("mappings", "log: map, mark, unmap", "200000").per(CYCLES);
    bench.time(&mut row, Who::Ours, "ours", |b| {
        b.iter(|| cycles(&mut log(), CYCLES));
    });
    bench.time(&mut row, Who::Limit, half, |b| {
        b.iter(|| (0..2).for_each(|_| cycles(&mut log(), CYCLES / 2)));
    });
    bench.time(&mut row, Who::Peer, "BTreeMap", |b| {
        b.iter(|| cycles(&mut Map::default(), CYCLES));
    });
    bench.add(row);
}

/// A device's log that is on. All numbers are pages.
trait Log {
    fn add(&mut self, page: u64);

    fn mark(&mut self, page: u64);

    fn remove(&mut self, page: u64);

    /// Takes the dirty pages from page 0 on, also of what is gone.
    fn report(&mut self, out: &mut [u64; WORDS]);
}

fn cycles(log: &mut impl Log, n: usize) {
    let all = naive(ROUND as u64, 0..ROUND as u64);
    for _ in 0..n / ROUND {
        for k in 0..ROUND {
            let page = (k * 7 % ROUND) as u64; // 7 and ROUND have no common divisor
            log.add(page);
            log.mark(page);
            log.remove(page);
        }
        let mut out = [0; WORDS];
        log.report(&mut out);
        check("what is gone", &out, &all);
    }
}

fn log() -> DeviceLog {
    let log = DeviceLog::with_options(LogOptions {
        holes: Holes::Clean,
        ..LogOptions::default()
    });
    log.set_tracking(true).expect("no ranges so far");
    log
}

impl Log for DeviceLog {
    fn add(&mut self, page: u64) {
        self.add_range(page * PAGE, PAGE).expect("a free range");
    }

    fn mark(&mut self, page: u64) {
        DeviceLog::mark(self, page * PAGE, PAGE).expect("a range");
    }

    fn remove(&mut self, page: u64) {
        self.remove_range(page * PAGE, PAGE).expect("a range");
    }

    fn report(&mut self, out: &mut [u64; WORDS]) {
        let told = DeviceLog::report(self, 0, ROUND as u64 * PAGE, PAGE, out);
        told.expect("holes are clean");
    }
}

/// The pages and the words of each range, by its first page.
type Bitmaps = BTreeMap<u64, (u64, Vec<u64>)>;

/// Ranges in the standard library's map, with words each.
#[derive(Default)]
struct Map {
    live: Bitmaps,
    gone: Bitmaps,
}

impl Log for Map {
    fn add(&mut self, page: u64) {
        let before = self.live.range(..=page).next_back();
        assert!(before.is_none_or(|(first, (n, _))| first + n <= page));
        self.live.insert(page, (1, vec![0]));
    }

    fn mark(&mut self, page: u64) {
        let range = self.live.range_mut(..=page).next_back();
        let (first, (_, words)) = range.expect("a range");
        let page = page - first;
        words[page as usize / 64] |= 1 << (page % 64);
    }

    fn remove(&mut self, page: u64) {
        let (n, words) = self.live.remove(&page).expect("a range");
        if let Some((_, gone)) = self.gone.get_mut(&page) {
            gone.iter_mut()
                .zip(words)
                .for_each(|(all, word)| *all |= word);
        } else {
            self.gone.insert(page, (n, words));
        }
    }

    fn report(&mut self, out: &mut [u64; WORDS]) {
        let gone = std::mem::take(&mut self.gone);
        let live = self.live.iter().map(|(first, range)| (*first, range));
        for (first, (n, words)) in live.chain(gone.iter().map(|(f, range)| (*f, range))) {
            for page in (0..*n).filter(|page| words[*page as usize / 64] >> (page % 64) & 1 != 0) {
                let at = first + page;
                out[at as usize / 64] |= 1 << (at % 64);
            }
        }
        self.live.values_mut().for_each(|(_, words)| words.fill(0));
    }
}
