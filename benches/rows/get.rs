// SPDX-License-Identifier: MIT OR Apache-2.0
//! GET_BITMAP of a container: dense, at any bit offset, and sparse.

use std::ops::Range;

use dirty_core::Dest;

use crate::data::{check, huge_pages, naive, scattered, sizes, zeroed};
use crate::data::{Size, GIB_64, TIB_8};
use crate::guest::Guest;
use crate::harness::{after, Bench};
use crate::machine;
use crate::report::row::{Row, Who};
use crate::sets::*;

/// Pages of the mapping before the one that is measured, whose pages then start
/// at this bit.
const OFFSET: u64 = 13;

pub(crate) fn run(bench: &mut Bench) {
    for fill in [Fill::Lines, Fill::Words] {
        for size in sizes() {
            aligned(bench, fill, size);
        }
        for size in sizes() {
            shifted(bench, fill, size);
        }
        ioctl(bench, fill);
    }
    let pages = GIB_64.pages;
    sparse(bench, "clean", &[]);
    sparse(bench, "0.01 % scattered", &scattered(pages, 0.0001));
    sparse(bench, "1 % in 2 MiB runs", &huge_pages(pages, 0.01));
}

/// What is dirty in a dense report.
#[derive(Clone, Copy)]
pub(crate) enum Fill {
    /// Every page.
    Lines,
    /// All pages but the last of each word, so that words must be read and none is
    /// clean.
    Words,
}

impl Fill {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Fill::Lines => "full lines",
            Fill::Words => "dense by words",
        }
    }

    /// Calls `mark` with the first page and the number of pages of each run.
    pub(crate) fn mark(self, pages: u64, mut mark: impl FnMut(u64, u64)) {
        match self {
            Fill::Lines => mark(0, pages),
            Fill::Words => (0..pages / 64).for_each(|word| mark(word * 64, 63)),
        }
    }
}

fn aligned(bench: &mut Bench, fill: Fill, size: Size) {
    let mut row = Row::new("get", fill.name(), size.name);
    ours(bench, &mut row, Typed, fill, size, 0);
    machine::snapshot(bench, &mut row, size.words());
    peer::<Fixed>(bench, &mut row, size);
    if size.pages < TIB_8.pages {
        peer::<Atomic>(bench, &mut row, size); // seconds beyond
    }
    if matches!(fill, Fill::Lines) {
        peer::<Roaring>(bench, &mut row, size);
    }
    bench.add(row);
}

fn shifted(bench: &mut Bench, fill: Fill, size: Size) {
    // The mapping is smaller by the offset, because a report has at most 256 MiB.
    let pages = size.pages - 64;
    let shifted = Size { pages, ..size };
    let case = format!("{}, bit offset {OFFSET}", fill.name());
    let mut row = Row::new("get", case, size.name);
    ours(bench, &mut row, Typed, fill, shifted, OFFSET);
    machine::snapshot(bench, &mut row, size.words());
    bench.add(row);
}

fn ioctl(bench: &mut Bench, fill: Fill) {
    let case = format!("{}, ioctl", fill.name());
    let mut row = Row::new("get", case, GIB_64.name);
    ours(bench, &mut row, Ioctl, fill, GIB_64, 0);
    machine::snapshot(bench, &mut row, GIB_64.words());
    bench.add(row);
}

/// GET_BITMAP of everything in one way.
trait Get: Copy {
    /// Whether the words that it gets must be zero.
    const ZEROED: bool = false;

    fn get(self, guest: &mut Guest, pages: u64, out: &mut [u64]);
}

#[derive(Clone, Copy)]
struct Typed;

impl Get for Typed {
    fn get(self, guest: &mut Guest, pages: u64, out: &mut [u64]) {
        guest.get(0, pages, Dest::Words(out));
    }
}

#[derive(Clone, Copy)]
struct TypedZeroed;

impl Get for TypedZeroed {
    const ZEROED: bool = true;

    fn get(self, guest: &mut Guest, pages: u64, out: &mut [u64]) {
        guest.get(0, pages, Dest::Zeroed(out));
    }
}

#[derive(Clone, Copy)]
struct Ioctl;

impl Get for Ioctl {
    fn get(self, guest: &mut Guest, pages: u64, out: &mut [u64]) {
        guest.get_by_ioctl(pages, out);
    }
}

/// A guest with a mapping after another, and words for a report of both.
struct State {
    guest: Guest,
    out: Vec<u64>,
    /// Pages of the first mapping.
    offset: u64,
    /// Pages of both.
    pages: u64,
}

impl State {
    fn new(size: Size, offset: u64) -> State {
        let mappings = [offset, size.pages];
        let first = usize::from(offset == 0);
        let pages = offset + size.pages;
        State {
            guest: Guest::tracking(&mappings[first..]),
            out: zeroed(pages.div_ceil(64) as usize),
            offset,
            pages,
        }
    }

    /// Marks pages of the second mapping.
    fn mark(&mut self, first: u64, n: u64) {
        self.guest.mark(self.offset + first, n);
    }

    fn mark_runs(&mut self, runs: &[Range<u64>]) {
        for run in runs {
            self.mark(run.start, run.end - run.start);
        }
    }

    fn get(&mut self, get: impl Get) {
        get.get(&mut self.guest, self.pages, &mut self.out);
    }

    /// Checks a report of what `mark` marks by the function that it is called with, and
    /// one after it.
    fn check(&mut self, get: impl Get, mark: impl Fn(&mut dyn FnMut(u64, u64))) {
        let mut want = vec![0; self.out.len()];
        mark(&mut |first, n| {
            self.mark(first, n);
            set_bits(&mut want, self.offset + first, n);
        });
        self.get_over_old(get);
        check("a report", &self.out, &want);
        self.get_over_old(get);
        check("a report after it", &self.out, &vec![0; self.out.len()]);
    }

    /// GET into words that are all ones, unless they must be zero.
    fn get_over_old<G: Get>(&mut self, get: G) {
        self.out.fill(if G::ZEROED { 0 } else { !0 });
        self.get(get);
    }
}

fn mark_each(runs: &[Range<u64>], mark: &mut dyn FnMut(u64, u64)) {
    for run in runs {
        mark(run.start, run.end - run.start);
    }
}

fn ours(bench: &mut Bench, row: &mut Row, get: impl Get, fill: Fill, size: Size, offset: u64) {
    let first = bench.is_first();
    let setup = || {
        let mut state = State::new(size, offset);
        if first {
            // A scattered report is easier to get wrong, so it is checked too.
            let runs = scattered(size.pages, 0.001);
            state.check(get, |mark| mark_each(&runs, mark));
            state.check(get, |mark| fill.mark(size.pages, mark));
        }
        state
    };
    bench.time_on(row, Who::Ours, "ours", setup, |state, b| {
        after(
            b,
            state,
            |state| fill.mark(size.pages, |first, n| state.mark(first, n)),
            |state| state.get(get),
        );
    });
}

/// A peer copies every word, whatever is in it.
fn peer<S: PageSet>(bench: &mut Bench, row: &mut Row, size: Size) {
    let first = bench.is_first();
    let setup = || {
        let mut set = S::new(size.pages);
        let mut out = zeroed(size.words());
        if first {
            let runs = scattered(size.pages, 0.001);
            runs.iter().for_each(|run| set.mark_one(run.start));
            set.take(&mut out);
            let want = naive(size.pages, runs.into_iter().flatten());
            check(S::NAME, &out, &want);
        }
        (set, out)
    };
    bench.time_on(row, Who::Peer, S::NAME, setup, |state, b| {
        after(
            b,
            state,
            |(set, _)| set.make_dense(),
            |(set, out)| set.take(out),
        );
    });
}

fn sparse(bench: &mut Bench, case: &str, runs: &[Range<u64>]) {
    let mut row = Row::new("get", format!("{case}, zeroed words"), GIB_64.name);
    ours_sparse(bench, &mut row, TypedZeroed, runs);
    machine::copy_and_clear(bench, &mut row, GIB_64.words());
    peer_sparse::<Atomic>(bench, &mut row, runs);
    peer_sparse::<Fixed>(bench, &mut row, runs);
    peer_sparse::<Roaring>(bench, &mut row, runs);
    bench.add(row);

    let mut row = Row::new("get", format!("{case}, ioctl"), GIB_64.name);
    ours_sparse(bench, &mut row, Ioctl, runs);
    machine::copy_and_clear(bench, &mut row, GIB_64.words());
    bench.add(row);
}

fn ours_sparse<G: Get>(bench: &mut Bench, row: &mut Row, get: G, runs: &[Range<u64>]) {
    let setup = || {
        let mut state = State::new(GIB_64, 0);
        state.check(get, |mark| mark_each(runs, mark));
        state
    };
    bench.time_on(row, Who::Ours, "ours", setup, |state, b| {
        after(
            b,
            state,
            |state| {
                state.mark_runs(runs);
                state.out.fill(0);
            },
            |state| state.get(get),
        );
    });
}

fn peer_sparse<S: PageSet>(bench: &mut Bench, row: &mut Row, runs: &[Range<u64>]) {
    let mark = |set: &mut S| {
        for run in runs {
            set.mark(run.start, run.end - run.start);
        }
    };
    let setup = || {
        let mut set = S::new(GIB_64.pages);
        let mut out = zeroed(GIB_64.words());
        mark(&mut set);
        set.take(&mut out);
        let want = naive(GIB_64.pages, runs.iter().cloned().flatten());
        check(S::NAME, &out, &want);
        (set, out)
    };
    bench.time_on(row, Who::Peer, S::NAME, setup, |state, b| {
        after(
            b,
            state,
            |(set, out)| {
                mark(set);
                out.fill(0);
            },
            |(set, out)| set.take(out),
        );
    });
}
