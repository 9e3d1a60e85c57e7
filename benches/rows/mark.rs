// SPDX-License-Identifier: MIT OR Apache-2.0
//! Marking one page, 512 pages from any page on, and all.

use std::hint::black_box;

use rand::Rng;

use crate::data::{check, naive, random, sizes, zeroed, Size, GIB_64, TIB_1};
use crate::harness::Bench;
use crate::report::row::{Row, Who};
use crate::sets::*;

/// Pages marked in an iteration.
const BATCH: usize = 4096;

pub(crate) fn run(bench: &mut Bench) {
    for size in sizes().filter(|s| s.pages <= TIB_1.pages) {
        let starts = Starts::new(size);

        let row = Row::new("mark", "one page, exclusive", size.name);
        let mut row = row.per(BATCH).of("plain words", 1.5);
        one::<Exclusive>(bench, &mut row, Who::Ours, &starts);
        one::<Words>(bench, &mut row, Who::Limit, &starts);
        one::<Bits>(bench, &mut row, Who::Peer, &starts);
        one::<Fixed>(bench, &mut row, Who::Peer, &starts);
        one::<Roaring>(bench, &mut row, Who::Peer, &starts);
        bench.add(row);

        let row = Row::new("mark", "one page, shared", size.name);
        let mut row = row.per(BATCH).of("AtomicBitmap", 1.0);
        one::<Shared>(bench, &mut row, Who::Ours, &starts);
        one::<AtomicWords>(bench, &mut row, Who::Limit, &starts);
        one::<Atomic>(bench, &mut row, Who::Peer, &starts);
        bench.add(row);

        let row = Row::new("mark", "512 pages, exclusive", size.name);
        let mut row = row.per(BATCH).of_best(1.2);
        many::<Exclusive>(bench, &mut row, Who::Ours, &starts);
        many::<Words>(bench, &mut row, Who::Limit, &starts);
        many::<Bits>(bench, &mut row, Who::Peer, &starts);
        many::<Fixed>(bench, &mut row, Who::Peer, &starts);
        many::<Roaring>(bench, &mut row, Who::Peer, &starts);
        bench.add(row);

        let row = Row::new("mark", "512 pages, shared", size.name);
        let mut row = row.per(BATCH).of("AtomicBitmap", 1.0 / 30.0);
        many::<Shared>(bench, &mut row, Who::Ours, &starts);
        many::<AtomicWords>(bench, &mut row, Who::Limit, &starts);
        many::<Atomic>(bench, &mut row, Who::Peer, &starts);
        bench.add(row);
    }
    for size in sizes() {
        let mut row = Row::new("mark", "a whole range", size.name).of_limit(1.1);
        all::<Exclusive>(bench, &mut row, Who::Ours, size);
        bench.time_on(
            &mut row,
            Who::Limit,
            "memset",
            || zeroed(size.words()),
            |words, b| b.iter(|| black_box(&mut **words).fill(!0)),
        );
        all::<Bits>(bench, &mut row, Who::Peer, size);
        all::<Fixed>(bench, &mut row, Who::Peer, size);
        all::<Roaring>(bench, &mut row, Who::Peer, size);
        if size.pages <= GIB_64.pages {
            all::<Atomic>(bench, &mut row, Who::Peer, size); // seconds beyond
        }
        bench.add(row);
    }
}

/// Random first pages for marks of up to 512 pages.
struct Starts {
    size: Size,
    pages: Vec<u32>,
}

impl Starts {
    fn new(size: Size) -> Self {
        let mut rng = random(size.pages);
        let last = (size.pages - 512) as u32;
        let pages = (0..1 << 20).map(|_| rng.random_range(0..last)).collect();
        Starts { size, pages }
    }
}

fn one<S: PageSet>(bench: &mut Bench, row: &mut Row, who: Who, starts: &Starts) {
    marks(bench, row, who, starts, 1, |set: &mut S, page| {
        set.mark_one(page);
    });
}

fn many<S: PageSet>(bench: &mut Bench, row: &mut Row, who: Who, starts: &Starts) {
    marks(bench, row, who, starts, 512, |set: &mut S, page| {
        set.mark(page, 512);
    });
}

/// `mark` marks `n` pages.
fn marks<S: PageSet>(
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

fn all<S: PageSet>(bench: &mut Bench, row: &mut Row, who: Who, size: Size) {
    let setup = || {
        let mut set = S::new(size.pages);
        set.mark_all();
        let mut out = zeroed(size.words());
        set.take(&mut out);
        check(S::NAME, &out, &vec![!0; size.words()]);
        set
    };
    bench.time_on(row, who, S::NAME, setup, |set, b| {
        b.iter(|| black_box(&mut *set).mark_all());
    });
}
