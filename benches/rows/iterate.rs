// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walking over dirty pages and over runs of them, in the words of a report.

use std::cell::{LazyCell, RefCell};
use std::hint::black_box;
use std::ops::Range;

use bitvec::slice::BitSlice;
use dirty_core::Bitmap;
use fixedbitset::FixedBitSet;
use rand::Rng;
use roaring::RoaringBitmap;

use crate::data::{bit, naive, random, scattered, Size, GIB_64, TIB_1};
use crate::harness::Bench;
use crate::host::Heap;
use crate::report::row::{Row, Who};

pub(crate) fn run(bench: &mut Bench) {
    let share = |share| move |size: Size| scattered(size.pages, share);
    case(bench, "0.01 %", GIB_64, share(0.0001));
    case(bench, "0.01 %", TIB_1, share(0.0001));
    case(bench, "1 %", GIB_64, share(0.01));
    case(bench, "10 %", GIB_64, share(0.1));
    case(bench, "50 %", GIB_64, share(0.5));
    case(bench, "dense runs", GIB_64, dense_runs);
}

fn case(
    bench: &mut Bench,
    case: &'static str,
    size: Size,
    dirty: impl Fn(Size) -> Vec<Range<u64>>,
) {
    let words = LazyCell::new(|| naive(size.pages, dirty(size).into_iter().flatten()));
    let words = || words.as_slice();
    let row = |what| {
        let row = Row::new("iterate", format!("{what}, {case}"), size.name);
        if matches!(case, "0.01 %" | "1 %") {
            row.of("roaring", 2.0)
        } else {
            row.of_peers(1.0)
        }
    };
    pages(bench, row("pages"), &words);
    runs(bench, row("runs"), &words);
}

/// Runs of 64 to 1023 pages with gaps of the same lengths.
fn dense_runs(size: Size) -> Vec<Range<u64>> {
    let mut rng = random(3);
    let mut runs = Vec::new();
    let mut at = 0;
    while at + 1024 < size.pages {
        let n = rng.random_range(64..1024);
        runs.push(at..at + n);
        at += n + rng.random_range(64..1024);
    }
    runs
}

/// The same pages as each peer holds them. Ours are the words of a report, and a
/// bitmap where few are dirty, because its summary is faster there.
struct Peers<'a> {
    words: &'a [u64],
    bitmap: Option<RefCell<Bitmap<Heap>>>,
    bits: &'a BitSlice<u64>,
    fixed: FixedBitSet,
    roaring: RoaringBitmap,
}

impl<'a> Peers<'a> {
    fn new(words: &'a [u64]) -> Self {
        let blocks = words.iter().map(|word| *word as usize);
        let pages = naive_pages(words).map(|page| page as u32);
        let mut roaring = RoaringBitmap::from_sorted_iter(pages).expect("pages in order");
        roaring.optimize();
        let pages = words.len() as u64 * 64;
        let few = naive_pages(words).take(pages as usize / 50).count() < pages as usize / 50;
        let bitmap = few.then(|| {
            let mut bitmap = Bitmap::new(&Heap, pages).expect("memory for a bitmap");
            naive_pages(words).for_each(|page| bitmap.set(page, 1));
            RefCell::new(bitmap)
        });
        Peers {
            words,
            bitmap,
            bits: BitSlice::from_slice(words),
            fixed: FixedBitSet::with_capacity_and_blocks(words.len() * 64, blocks),
            roaring,
        }
    }
}

fn naive_pages(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    let pages = 0..words.len() as u64 * 64;
    pages.filter(|page| bit(words, *page))
}

fn pages<'a>(bench: &mut Bench, mut row: Row, words: &impl Fn() -> &'a [u64]) {
    let mut time = |who, name, sum: &dyn Fn(&Peers<'_>) -> u64| {
        let setup = || {
            let words = words();
            let peers = Peers::new(words);
            let want: u64 = naive_pages(words).sum();
            assert_eq!(sum(&peers), want, "{name}: pages");
            peers
        };
        bench.time_on(&mut row, who, name, setup, |peers, b| {
            b.iter(|| sum(black_box(peers)));
        });
    };
    time(Who::Ours, "ours", &|peers| match &peers.bitmap {
        Some(bitmap) => bitmap.borrow_mut().pages().sum(),
        None => dirty_core::pages(peers.words).sum(),
    });
    time(Who::Peer, "bitvec", &|peers| {
        let ones = peers.bits.iter_ones();
        ones.fold(0, |sum, page| sum + page as u64)
    });
    time(Who::Peer, "fixedbitset", &|peers| {
        let ones = peers.fixed.ones();
        ones.fold(0, |sum, page| sum + page as u64)
    });
    time(Who::Peer, "roaring", &|peers| {
        let pages = peers.roaring.iter();
        pages.fold(0, |sum, page| sum + u64::from(page))
    });
    if row.ours().is_some() {
        row = row.per(naive_pages(words()).count());
    }
    bench.add(row);
}

fn runs<'a>(bench: &mut Bench, mut row: Row, words: &impl Fn() -> &'a [u64]) {
    // A sum that changes if a start and an end are exchanged.
    let add = |sum: u64, start: u64, end: u64| sum.wrapping_add(start ^ end << 32);
    let mut time = |who, name, sum: &dyn Fn(&Peers<'_>) -> u64| {
        let setup = || {
            let words = words();
            let peers = Peers::new(words);
            let mut want = 0;
            let mut start = None;
            let end = words.len() as u64 * 64;
            for page in 0..=end {
                let dirty = page < end && bit(words, page);
                match (start, dirty) {
                    (None, true) => start = Some(page),
                    (Some(first), false) => {
                        want = add(want, first, page);
                        start = None;
                    }
                    _ => {}
                }
            }
            assert_eq!(sum(&peers), want, "{name}: runs");
            peers
        };
        bench.time_on(&mut row, who, name, setup, |peers, b| {
            b.iter(|| sum(black_box(peers)));
        });
    };
    time(Who::Ours, "ours", &|peers| {
        let add = |sum, run: Range<u64>| add(sum, run.start, run.end);
        match &peers.bitmap {
            Some(bitmap) => bitmap.borrow_mut().runs().fold(0, add),
            None => dirty_core::runs(peers.words).fold(0, add),
        }
    });
    time(Who::Peer, "bitvec", &|peers| {
        let (mut sum, mut at, mut rest) = (0, 0, peers.bits);
        while let Some(skip) = rest.first_one() {
            rest = &rest[skip..];
            let n = rest.first_zero().unwrap_or(rest.len());
            sum = add(sum, (at + skip) as u64, (at + skip + n) as u64);
            rest = &rest[n..];
            at += skip + n;
        }
        sum
    });
    time(Who::Peer, "roaring", &|peers| {
        let mut sum = 0;
        let mut runs = peers.roaring.iter();
        while let Some(run) = runs.next_range() {
            let (first, last) = run.into_inner();
            sum = add(sum, u64::from(first), u64::from(last) + 1);
        }
        sum
    });
    if row.ours().is_some() {
        row = row.per(dirty_core::runs(words()).count());
    }
    bench.add(row);
}
