// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walking over dirty pages and over runs of them.

use std::cell::{LazyCell, RefCell};
use std::hint::black_box;
use std::iter;
use std::ops::Range;

use dirty_core::Bitmap;
use fixedbitset::FixedBitSet;
use rand::Rng;
use roaring::RoaringBitmap;

use crate::data::{bit, huge_pages, naive, random, scattered, Size, GIB_64, TIB_1};
use crate::harness::Bench;
use crate::host::Heap;
use crate::report::row::{Row, Who};

pub(crate) fn run(bench: &mut Bench) {
    let share = |share| move |size: Size| scattered(size.pages, share);
    both(bench, "0.01 %", GIB_64, Ours::Bitmap, share(0.0001));
    both(bench, "0.01 %", TIB_1, Ours::Bitmap, share(0.0001));
    both(bench, "1 %", GIB_64, Ours::Bitmap, share(0.01));
    both(bench, "10 %", GIB_64, Ours::Words, share(0.1));
    both(bench, "50 %", GIB_64, Ours::Words, share(0.5));
    let half = |size: Size| huge_pages(size.pages, 0.5);
    runs(bench, &case("huge pages", GIB_64, Ours::Bitmap, half));
    let whole = |size: Size| iter::once(0..size.pages).collect();
    runs(bench, &case("a whole range", GIB_64, Ours::Bitmap, whole));
    let dense = case("dense by words", GIB_64, Ours::Words, dense_runs);
    runs(bench, &dense);
}

fn both(
    bench: &mut Bench,
    name: &'static str,
    size: Size,
    ours: Ours,
    dirty: impl Fn(Size) -> Vec<Range<u64>>,
) {
    let case = case(name, size, ours, dirty);
    pages(bench, &case);
    runs(bench, &case);
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

/// Which of ours walks: the faster one of the two that there are.
#[derive(Clone, Copy)]
enum Ours {
    /// A bitmap with its summaries.
    Bitmap,
    /// The words of a report.
    Words,
}

/// A row's name and size, and its pages, which are made once and only if needed.
struct Case<F> {
    name: &'static str,
    size: Size,
    ours: Ours,
    pages: LazyCell<Pages, F>,
}

fn case(
    name: &'static str,
    size: Size,
    ours: Ours,
    dirty: impl Fn(Size) -> Vec<Range<u64>>,
) -> Case<impl FnOnce() -> Pages> {
    Case {
        name,
        size,
        ours,
        pages: LazyCell::new(move || Pages::new(size, &dirty(size))),
    }
}

/// The same pages as each candidate holds them.
struct Pages {
    words: Vec<u64>,
    bitmap: RefCell<Bitmap<Heap>>,
    fixed: FixedBitSet,
    roaring: RoaringBitmap,
}

impl Pages {
    fn new(size: Size, dirty: &[Range<u64>]) -> Self {
        let words = naive(size.pages, dirty.iter().cloned().flatten());
        let mut bitmap = Bitmap::new(&Heap, size.pages).expect("memory for a bitmap");
        let mut roaring = RoaringBitmap::new();
        for run in dirty {
            bitmap.set(run.start, run.end - run.start);
            roaring.insert_range(run.start as u32..run.end as u32);
        }
        roaring.optimize();
        let blocks = words.iter().map(|word| *word as usize);
        Pages {
            fixed: FixedBitSet::with_capacity_and_blocks(words.len() * 64, blocks),
            words,
            bitmap: RefCell::new(bitmap),
            roaring,
        }
    }
}

/// A way to walk: whose, its name, and a sum over what it meets.
type Walk<'a> = (Who, &'static str, &'a dyn Fn(&Pages) -> u64);

/// Times walks. `naive` gives the sum that each must have, and the number of pages or
/// runs that it meets.
fn time<F: FnOnce() -> Pages>(
    bench: &mut Bench,
    what: &str,
    case: &Case<F>,
    walks: &[Walk<'_>],
    naive: fn(&[u64]) -> (u64, usize),
) {
    let name = format!("{what}, {}", case.name);
    let mut row = Row::new("walk", name, case.size.name);
    let want = LazyCell::new(|| naive(&case.pages.words));
    for (who, name, walk) in walks {
        let setup = || {
            let pages: &Pages = &case.pages;
            assert_eq!(walk(pages), want.0, "{name}: {what}");
            pages
        };
        bench.time_on(&mut row, *who, name, setup, |pages, b| {
            b.iter(|| walk(black_box(pages)));
        });
    }
    if row.ours().is_some() {
        row = row.per(want.1);
    }
    bench.add(row);
}

fn pages<F: FnOnce() -> Pages>(bench: &mut Bench, case: &Case<F>) {
    let ours: Walk<'_> = match case.ours {
        Ours::Bitmap => (Who::Ours, "ours", &|pages| {
            pages.bitmap.borrow_mut().pages().sum()
        }),
        Ours::Words => (Who::Ours, "ours, of words", &|pages| {
            dirty_core::pages(&pages.words).sum()
        }),
    };
    let fixed: Walk<'_> = (Who::Peer, "fixedbitset", &|pages| {
        let ones = pages.fixed.ones();
        ones.fold(0, |sum, page| sum + page as u64)
    });
    let roaring: Walk<'_> = (Who::Peer, "roaring", &|pages| {
        let pages = pages.roaring.iter();
        pages.fold(0, |sum, page| sum + u64::from(page))
    });
    time(bench, "pages", case, &[ours, fixed, roaring], |words| {
        let pages = 0..words.len() as u64 * 64;
        let dirty = pages.filter(|page| bit(words, *page));
        dirty.fold((0, 0), |(sum, n), page| (sum + page, n + 1))
    });
}

/// A sum that changes if a start and an end are exchanged.
fn add(sum: u64, run: Range<u64>) -> u64 {
    sum.wrapping_add(run.start ^ run.end << 32)
}

fn runs<F: FnOnce() -> Pages>(bench: &mut Bench, case: &Case<F>) {
    let ours: Walk<'_> = match case.ours {
        Ours::Bitmap => (Who::Ours, "ours", &|pages| {
            pages.bitmap.borrow_mut().runs().fold(0, add)
        }),
        Ours::Words => (Who::Ours, "ours, of words", &|pages| {
            dirty_core::runs(&pages.words).fold(0, add)
        }),
    };
    let roaring: Walk<'_> = (Who::Peer, "roaring", &|pages| {
        let mut sum = 0;
        let mut runs = pages.roaring.iter();
        while let Some(run) = runs.next_range() {
            let (first, last) = run.into_inner();
            sum = add(sum, u64::from(first)..u64::from(last) + 1);
        }
        sum
    });
    time(bench, "runs", case, &[ours, roaring], |words| {
        let (mut sum, mut n, mut start) = (0, 0, None);
        let end = words.len() as u64 * 64;
        for page in 0..=end {
            let dirty = page < end && bit(words, page);
            match (start, dirty) {
                (None, true) => start = Some(page),
                (Some(first), false) => {
                    sum = add(sum, first..page);
                    n += 1;
                    start = None;
                }
                _ => {}
            }
        }
        (sum, n)
    });
}
