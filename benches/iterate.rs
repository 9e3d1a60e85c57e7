// SPDX-License-Identifier: MIT OR Apache-2.0
//! Walking over dirty pages and over runs of them, in the words of a report.

use std::hint::black_box;
use std::ops::Range;

use bitvec::slice::BitSlice;
use fixedbitset::FixedBitSet;
use rand::Rng;
use roaring::RoaringBitmap;

use crate::data::{naive, random, scattered, Size, GIB_64, TIB_1};
use crate::harness::{Bench, Row, Who};

// To be those of dirty_core, as soon as it has them.
fn ours_pages(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    (0..).step_by(64).zip(words).flat_map(|(first, word)| {
        let mut rest = *word;
        std::iter::from_fn(move || {
            let bit = (rest != 0).then(|| u64::from(rest.trailing_zeros()))?;
            rest &= rest - 1;
            Some(first + bit)
        })
    })
}

fn ours_runs(words: &[u64]) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut pages = ours_pages(words).peekable();
    std::iter::from_fn(move || {
        let start = pages.next()?;
        let mut end = start + 1;
        while pages.next_if_eq(&end).is_some() {
            end += 1;
        }
        Some(start..end)
    })
}

pub(crate) fn run(bench: &mut Bench) {
    let cases = [
        ("0.01 %", GIB_64, scattered(GIB_64.pages, 0.0001)),
        ("0.01 %", TIB_1, scattered(TIB_1.pages, 0.0001)),
        ("1 %", GIB_64, scattered(GIB_64.pages, 0.01)),
        ("10 %", GIB_64, scattered(GIB_64.pages, 0.1)),
        ("50 %", GIB_64, scattered(GIB_64.pages, 0.5)),
        ("dense runs", GIB_64, dense_runs(GIB_64.pages)),
    ];
    for (case, size, dirty) in cases {
        let words = naive(size.pages, dirty.into_iter().flatten());
        let few = matches!(case, "0.01 %" | "1 %");
        let goal = |row: Row| {
            if few {
                row.of("roaring", 2.0)
            } else {
                row.of_peers(1.0)
            }
        };
        pages(bench, case, size, &words, goal);
        runs(bench, case, size, &words, goal);
    }
}

/// Runs of 64 to 1023 pages with gaps of the same lengths.
fn dense_runs(pages: u64) -> Vec<Range<u64>> {
    let mut rng = random(3);
    let mut runs = Vec::new();
    let mut at = 0;
    while at + 1024 < pages {
        let n = rng.random_range(64..1024);
        runs.push(at..at + n);
        at += n + rng.random_range(64..1024);
    }
    runs
}

/// The same pages, for each of the peers.
struct Peers<'a> {
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
        Peers {
            bits: BitSlice::from_slice(words),
            fixed: FixedBitSet::with_capacity_and_blocks(words.len() * 64, blocks),
            roaring,
        }
    }
}

fn naive_pages(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    let pages = 0..words.len() as u64 * 64;
    pages.filter(|page| crate::data::bit(words, *page))
}

fn pages(
    bench: &mut Bench,
    case: &'static str,
    size: Size,
    words: &[u64],
    goal: impl Fn(Row) -> Row,
) {
    let n: u32 = words.iter().map(|word| word.count_ones()).sum();
    let row = Row::new("iterate", format!("pages, {case}"), size.name);
    let mut row = goal(row.per(n as usize));
    let mut time = |who, name, sum: &dyn Fn(&Peers<'_>) -> u64| {
        let setup = || {
            let peers = Peers::new(words);
            assert_eq!(
                sum(&peers),
                naive_pages(words).sum::<u64>(),
                "{name}: pages"
            );
            peers
        };
        bench.time_on(&mut row, who, name, setup, |peers, b| {
            b.iter(|| sum(black_box(peers)));
        });
    };
    time(Who::Ours, "ours", &|_| ours_pages(black_box(words)).sum());
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
    bench.add(row);
}

fn runs(
    bench: &mut Bench,
    case: &'static str,
    size: Size,
    words: &[u64],
    goal: impl Fn(Row) -> Row,
) {
    let n = ours_runs(words).count();
    let row = Row::new("iterate", format!("runs, {case}"), size.name);
    let mut row = goal(row.per(n));
    // Of starts and ends, in a way that tells one from the other.
    let add = |sum: u64, start: u64, end: u64| sum.wrapping_add(start ^ end << 32);
    let mut time = |who, name, sum: &dyn Fn(&Peers<'_>) -> u64| {
        let setup = || {
            let peers = Peers::new(words);
            let mut want = 0;
            let mut start = None;
            for page in 0..=size.pages {
                let dirty = page < size.pages && crate::data::bit(words, page);
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
    time(Who::Ours, "ours", &|_| {
        let runs = ours_runs(black_box(words));
        runs.fold(0, |sum, run| add(sum, run.start, run.end))
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
    bench.add(row);
}
