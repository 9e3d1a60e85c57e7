// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bitmaps rescaled from one page size to another.

use std::hint::black_box;

use dirty_core::{normalise, Extent, PageSize};

use crate::data::{bit, check, naive, random_words, zeroed, Size, GIB_64, TIB_1};
use crate::harness::Bench;
use crate::host::PAGE;
use crate::report::row::{Row, Who};
use crate::sets::set_bits;

pub(crate) fn run(bench: &mut Bench) {
    for size in [GIB_64, TIB_1] {
        for ratio in [16, 512] {
            coarsen(bench, size, ratio);
        }
        for ratio in [16, 512] {
            refine(bench, size, ratio);
        }
    }
}

/// All pages of `size`, each `ratio` times 4K.
fn extent(size: Size, ratio: usize) -> Extent {
    Extent {
        bit: 0,
        iova: 0,
        npages: size.pages / ratio as u64,
        pgsize: PageSize::new(PAGE * ratio as u64).expect("a power of two"),
    }
}

/// A rescaling from one page size to another.
struct Case<'a> {
    from: Extent,
    to: Extent,
    words: &'a dyn Fn() -> Vec<u64>,
    /// The result, bit by bit.
    naive: &'a dyn Fn(&[u64]) -> Vec<u64>,
    /// The same rescaling by hand: a walk over the dirty pages.
    loops: &'a dyn Fn(&[u64], &mut [u64]),
}

impl Case<'_> {
    fn run(&self, bench: &mut Bench, row: &mut Row) {
        self.time(bench, row, Who::Ours, "ours", |words, out| {
            let done = normalise(words, self.from, out, self.to);
            done.expect("whole bitmaps");
        });
        self.time(bench, row, Who::Peer, "a loop", |words, out| {
            out.fill(0);
            (self.loops)(words, out);
        });
    }

    fn time(
        &self,
        bench: &mut Bench,
        row: &mut Row,
        who: Who,
        name: &'static str,
        rescale: impl Fn(&[u64], &mut [u64]),
    ) {
        let first = bench.is_first();
        let setup = || {
            let words = (self.words)();
            let mut out = zeroed(self.to.npages as usize / 64);
            if first {
                rescale(&words, &mut out);
                check(name, &out, &(self.naive)(&words));
                out.fill(0);
            }
            (words, out)
        };
        bench.time_on(row, who, name, setup, |(words, out), b| {
            b.iter(|| rescale(black_box(words), black_box(out)));
        });
    }
}

fn row(what: String, size: Size) -> Row {
    Row::new("rescale", what, size.name)
}

/// Calls `dirty` with each dirty page.
fn each(words: &[u64], mut dirty: impl FnMut(usize)) {
    for (at, word) in words.iter().enumerate() {
        let mut word = *word;
        while word != 0 {
            dirty(at * 64 + word.trailing_zeros() as usize);
            word &= word - 1;
        }
    }
}

fn coarsen(bench: &mut Bench, size: Size, ratio: usize) {
    let case = Case {
        from: extent(size, 1),
        to: extent(size, ratio),
        words: &|| fine_words(size, ratio),
        naive: &|words| {
            let dirty = (0..size.pages).filter(|page| bit(words, *page));
            let ratio = ratio as u64;
            naive(size.pages / ratio, dirty.map(|page| page / ratio))
        },
        loops: &|words, out| {
            each(words, |page| {
                out[page / ratio / 64] |= 1 << (page / ratio % 64)
            });
        },
    };
    let mut row = row(format!("coarsen {ratio} to 1"), size);
    case.run(bench, &mut row);
    let setup = || fine_words(size, ratio);
    bench.time_on(&mut row, Who::Limit, "read", setup, |words, b| {
        b.iter(|| black_box(&**words).iter().fold(0, |all, word| all | word));
    });
    bench.add(row);
}

/// Words with one page in 8 dirty; of pages bigger than a word, half have none.
fn fine_words(size: Size, ratio: usize) -> Vec<u64> {
    let mut words = random_words(size.words(), 3);
    if ratio > 64 {
        let keep = random_words(size.words() / ratio, 1);
        for (big, words) in (0..).zip(words.chunks_mut(ratio / 64)) {
            if !bit(&keep, big) {
                words.fill(0);
            }
        }
    }
    words
}

fn refine(bench: &mut Bench, size: Size, ratio: usize) {
    let case = Case {
        from: extent(size, ratio),
        to: extent(size, 1),
        words: &|| random_words(size.words() / ratio, 2),
        naive: &|words| {
            let dirty = |page: &u64| bit(words, page / ratio as u64);
            naive(size.pages, (0..size.pages).filter(dirty))
        },
        loops: &|words, out| {
            let n = ratio as u64;
            each(words, |page| set_bits(out, page as u64 * n, n));
        },
    };
    let mut row = row(format!("refine 1 to {ratio}"), size);
    case.run(bench, &mut row);
    let setup = || zeroed(size.words());
    bench.time_on(&mut row, Who::Limit, "memset", setup, |out, b| {
        b.iter(|| black_box(&mut **out).fill(!0));
    });
    bench.add(row);
}
