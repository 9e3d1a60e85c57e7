// SPDX-License-Identifier: MIT OR Apache-2.0
//! Marking one page, 512 pages from any page on, 512 that are a huge page, and all.

use std::hint::black_box;

use rand::Rng;

use crate::data::{check, naive, random, sizes, zeroed, Size, GIB_64, TIB_1};
use crate::harness::{after, Bench};
use crate::report::row::{Row, Who};
use crate::sets::*;

/// Pages marked in an iteration.
const BATCH: usize = 4096;

/// Bitmaps marked in an iteration where all of one takes less than reading the clock.
const SETS: u64 = 16;

pub(crate) fn run(bench: &mut Bench) {
    let cases = [
        ("one page", 1, 1),
        ("512 pages", 512, 1),
        ("512 aligned pages", 512, 512),
    ];
    for (case, n, step) in cases {
        for size in sizes().filter(|s| s.pages <= TIB_1.pages) {
            marks(bench, case, &Starts::new(size, step), n);
        }
    }
    for size in sizes() {
        ranges(bench, size);
    }
}

/// Rows of marks of `n` pages.
fn marks(bench: &mut Bench, case: &str, starts: &Starts, n: u64) {
    let row = |how| Row::new("mark", format!("{case}, {how}"), starts.size.name).per(BATCH);

    let mut owner = row("exclusive");
    mark::<Exclusive>(bench, &mut owner, Who::Ours, starts, n);
    mark::<Words>(bench, &mut owner, Who::Limit, starts, n);
    mark::<Fixed>(bench, &mut owner, Who::Peer, starts, n);
    bench.add(owner);

    let mut shared = row("shared");
    mark::<Shared>(bench, &mut shared, Who::Ours, starts, n);
    mark::<AtomicWords>(bench, &mut shared, Who::Limit, starts, n);
    mark::<Atomic>(bench, &mut shared, Who::Peer, starts, n);
    bench.add(shared);
}

/// Rows of marks of everything.
fn ranges(bench: &mut Bench, size: Size) {
    let sets = (GIB_64.pages / size.pages).clamp(1, SETS) as usize;
    let row = |how| Row::new("mark", format!("a whole range, {how}"), size.name).per(sets);

    let mut owner = row("exclusive");
    all::<Exclusive>(bench, &mut owner, Who::Ours, size, sets);
    all::<Words>(bench, &mut owner, Who::Limit, size, sets);
    all::<Fixed>(bench, &mut owner, Who::Peer, size, sets);
    all::<Roaring>(bench, &mut owner, Who::Peer, size, sets);
    bench.add(owner);

    let mut shared = row("shared");
    all::<Shared>(bench, &mut shared, Who::Ours, size, sets);
    all::<AtomicWords>(bench, &mut shared, Who::Limit, size, sets);
    // Threads cannot share it, but it is the fastest at this.
    all::<Roaring>(bench, &mut shared, Who::Peer, size, sets);
    if size.pages <= GIB_64.pages {
        all::<Atomic>(bench, &mut shared, Who::Peer, size, sets); // seconds beyond
    }
    bench.add(shared);
}

/// Random first pages for marks of up to 512 pages.
struct Starts {
    size: Size,
    pages: Vec<u32>,
}

impl Starts {
    /// Pages that are a multiple of `step`, a power of two.
    fn new(size: Size, step: u32) -> Self {
        let mut rng = random(size.pages);
        let last = (size.pages - 512) as u32;
        let mut start = || rng.random_range(0..last) & !(step - 1);
        let pages = (0..1 << 20).map(|_| start()).collect();
        Starts { size, pages }
    }
}

fn mark<S: PageSet>(bench: &mut Bench, row: &mut Row, who: Who, starts: &Starts, n: u64) {
    if n == 1 {
        time(bench, row, who, starts, n, S::mark_one);
    } else {
        time(bench, row, who, starts, n, |set: &mut S, page| {
            set.mark(page, n);
        });
    }
}

/// Times `mark`, which marks `n` pages.
fn time<S: PageSet>(
    bench: &mut Bench,
    row: &mut Row,
    who: Who,
    starts: &Starts,
    n: u64,
    mark: impl Fn(&mut S, u64),
) {
    let Starts { size, pages } = starts;
    let setup = || {
        let mut set = S::new(size.pages);
        let some = pages.iter().take(1000).map(|p| u64::from(*p));
        some.clone().for_each(|page| mark(&mut set, page));
        let mut out = zeroed(size.words());
        set.take(&mut out);
        let want = naive(size.pages, some.flat_map(|page| page..page + n));
        check(S::NAME, &out, &want);
        (set, pages.chunks_exact(BATCH).cycle())
    };
    bench.time_on(row, who, S::NAME, setup, |(set, batches), b| {
        b.iter(|| {
            let batch = batches.next().expect("a cycle has no end");
            for page in batch {
                mark(black_box(&mut *set), u64::from(*page));
            }
        });
    });
}

/// Times marks of all pages of `sets` sets that are empty.
fn all<S: PageSet>(bench: &mut Bench, row: &mut Row, who: Who, size: Size, sets: usize) {
    let setup = || {
        let new = |_| {
            let mut set = S::new(size.pages);
            set.mark_all();
            let mut out = zeroed(size.words());
            set.take(&mut out);
            check(S::NAME, &out, &vec![!0; size.words()]);
            set
        };
        (0..sets).map(new).collect::<Vec<S>>()
    };
    bench.time_on(row, who, S::NAME, setup, |sets, b| {
        after(
            b,
            sets,
            |sets| sets.iter_mut().for_each(S::clear),
            |sets| black_box(sets).iter_mut().for_each(S::mark_all),
        );
    });
}
