// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bitmaps taken from one page size to another.

use std::hint::black_box;

use bitvec::slice::BitSlice;
use dirty_core::{normalise, Extent, PageSize};

use crate::data::{bit, check, random_words, zeroed, Size, GIB_64, TIB_1};
use crate::harness::{Bench, Row, Who};
use crate::host::PAGE;

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

fn coarsen(bench: &mut Bench, size: Size, ratio: usize) {
    let (from, to) = (extent(size, 1), extent(size, ratio));
    // One page in 8, but none in half of the big pages or so.
    let source = || {
        let keep = random_words(size.words() / ratio, 1);
        let mut words = random_words(size.words(), 3);
        for (k, word) in words.iter_mut().enumerate() {
            let page = k * 64 / ratio;
            if ratio > 64 && !bit(&keep, page as u64) {
                *word = 0;
            }
        }
        (words, zeroed(size.words() / ratio))
    };
    let naive = |words: &[u64]| {
        let mut coarse = vec![0; size.words() / ratio];
        for page in (0..size.pages).filter(|page| bit(words, *page)) {
            let page = page / ratio as u64;
            coarse[page as usize / 64] |= 1 << (page % 64);
        }
        coarse
    };

    let mut row = Row::new("rescale", format!("coarsen {ratio} to 1"), size.name).of_limit(2.0);
    if size.pages == GIB_64.pages {
        row = row.of("bitvec", 0.1);
    }
    let setup = || {
        let (words, mut out) = source();
        normalise(&words, from, &mut out, to).expect("whole bitmaps");
        check("coarsened", &out, &naive(&words));
        (words, zeroed(out.len()))
    };
    bench.time_on(&mut row, Who::Ours, "ours", setup, |(words, out), b| {
        b.iter(|| normalise(black_box(words), from, black_box(out), to));
    });
    bench.time_on(&mut row, Who::Limit, "read", source, |(words, _), b| {
        b.iter(|| black_box(&*words).iter().fold(0, |all, word| all | word));
    });
    if size.pages == GIB_64.pages {
        let chunks = |words: &[u64], out: &mut [u64]| {
            let out = BitSlice::<u64>::from_slice_mut(out);
            let chunks = BitSlice::<u64>::from_slice(words).chunks(ratio);
            for (k, chunk) in chunks.enumerate() {
                if chunk.any() {
                    out.set(k, true);
                }
            }
        };
        let setup = || {
            let (words, mut out) = source();
            chunks(&words, &mut out);
            check("bitvec coarsened", &out, &naive(&words));
            (words, zeroed(out.len()))
        };
        bench.time_on(&mut row, Who::Peer, "bitvec", setup, |(words, out), b| {
            b.iter(|| chunks(black_box(words), black_box(out)));
        });
    }
    bench.add(row);
}

fn refine(bench: &mut Bench, size: Size, ratio: usize) {
    let (from, to) = (extent(size, ratio), extent(size, 1));
    let source = || {
        let words = random_words(size.words() / ratio, 2);
        (words, zeroed(size.words()))
    };
    let naive = |words: &[u64]| {
        let mut fine = vec![0; size.words()];
        for page in (0..size.pages).filter(|page| bit(words, page / ratio as u64)) {
            fine[page as usize / 64] |= 1 << (page % 64);
        }
        fine
    };

    let most = if ratio == 16 { 4.0 } else { 2.0 };
    let mut row = Row::new("rescale", format!("refine 1 to {ratio}"), size.name).of_limit(most);
    if size.pages == GIB_64.pages {
        row = row.of("bitvec", 0.1);
    }
    let setup = || {
        let (words, mut out) = source();
        normalise(&words, from, &mut out, to).expect("whole bitmaps");
        check("refined", &out, &naive(&words));
        (words, zeroed(out.len()))
    };
    bench.time_on(&mut row, Who::Ours, "ours", setup, |(words, out), b| {
        b.iter(|| normalise(black_box(words), from, black_box(out), to));
    });
    bench.time_on(&mut row, Who::Limit, "memset", source, |(_, out), b| {
        b.iter(|| black_box(&mut *out).fill(!0));
    });
    if size.pages == GIB_64.pages {
        let chunks = |words: &[u64], out: &mut [u64]| {
            let chunks = BitSlice::<u64>::from_slice_mut(out).chunks_mut(ratio);
            let pages = BitSlice::<u64>::from_slice(words).iter();
            for (chunk, page) in chunks.zip(pages.by_vals()) {
                if page {
                    chunk.fill(true);
                }
            }
        };
        let setup = || {
            let (words, mut out) = source();
            chunks(&words, &mut out);
            check("bitvec refined", &out, &naive(&words));
            (words, zeroed(out.len()))
        };
        bench.time_on(&mut row, Who::Peer, "bitvec", setup, |(words, out), b| {
            b.iter(|| chunks(black_box(words), black_box(out)));
        });
    }
    bench.add(row);
}
