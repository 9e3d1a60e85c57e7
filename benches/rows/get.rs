// SPDX-License-Identifier: MIT OR Apache-2.0
//! GET_BITMAP of a container: dense, at any bit offset, and sparse.

use std::ops::Range;
use std::slice;

use bitvec::slice::BitSlice;
use dirty_core::Dest;

use crate::data::{check, huge_pages, naive, scattered, sizes, zeroed};
use crate::data::{Size, GIB_64, TIB_1, TIB_8};
use crate::guest::Guest;
use crate::harness::{after, Bench};
use crate::machine;
use crate::report::row::{Row, Who};
use crate::sets::*;

/// Pages of the mapping before the one that is measured, whose pages then start
/// at this bit.
const OFFSET: u64 = 13;

pub(crate) fn run(bench: &mut Bench) {
    for size in sizes() {
        aligned(bench, size);
    }
    for size in sizes() {
        shifted(bench, size);
    }
    let pages = GIB_64.pages;
    sparse(bench, "clean", &[], 0.01);
    sparse(bench, "0.01 % scattered", &scattered(pages, 0.0001), 0.1);
    sparse(bench, "1 % in 2 MiB runs", &huge_pages(pages, 0.01), 0.05);
}

fn aligned(bench: &mut Bench, size: Size) {
    let mut row = Row::new("get", "dense, aligned", size.name).of_limit(1.15);
    ours(bench, &mut row, Typed, size, 0);
    machine::snapshot(bench, &mut row, size.words());
    if size.pages < TIB_8.pages {
        peer::<Bits>(bench, &mut row, size); // seconds beyond
        peer::<Atomic>(bench, &mut row, size);
    }
    peer::<Fixed>(bench, &mut row, size);
    bench.add(row);

    let mut row = Row::new("get", "dense, aligned, ioctl", size.name);
    ours(bench, &mut row, Ioctl, size, 0);
    machine::snapshot(bench, &mut row, size.words());
    bench.add(row);
}

fn shifted(bench: &mut Bench, size: Size) {
    // The mapping is smaller by the offset, because a report has at most 256 MiB.
    let pages = size.pages - 64;
    let shifted = Size { pages, ..size };
    let most = if size.pages >= TIB_1.pages { 1.3 } else { 2.5 };
    let mut row = Row::new("get", "dense, bit offset 13", size.name).of_limit(most);
    ours(bench, &mut row, Typed, shifted, OFFSET);
    machine::snapshot(bench, &mut row, size.words());
    if size.pages < TIB_8.pages {
        let setup = || {
            let mut bits = Bits::new(pages);
            let mut out = zeroed(size.words());
            bits.mark_all();
            take_shifted(&mut bits, &mut out);
            let want = naive(size.pages, OFFSET..OFFSET + pages);
            check("bitvec", &out, &want);
            (bits, out)
        };
        bench.time_on(&mut row, Who::Peer, Bits::NAME, setup, |state, b| {
            after(
                b,
                state,
                |(bits, _)| bits.mark_all(),
                |(bits, out)| take_shifted(bits, out),
            );
        });
    }
    bench.add(row);

    let mut row = Row::new("get", "dense, bit offset 13, ioctl", size.name);
    ours(bench, &mut row, Ioctl, shifted, OFFSET);
    machine::snapshot(bench, &mut row, size.words());
    bench.add(row);
}

fn take_shifted(bits: &mut Bits, out: &mut [u64]) {
    let out = BitSlice::<u64>::from_slice_mut(out);
    out[OFFSET as usize..][..bits.0.len()].copy_from_bitslice(&bits.0);
    bits.0.fill(false);
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

/// A guest with a mapping of `size` after one of `offset` pages, words for a report
/// of both, and their pages. The report with `runs` dirty is checked.
fn guest(get: impl Get, size: Size, offset: u64, runs: &[Range<u64>]) -> (Guest, Vec<u64>, u64) {
    let mappings = [offset, size.pages];
    let mut guest = Guest::tracking(if offset == 0 {
        &mappings[1..]
    } else {
        &mappings
    });
    let pages = offset + size.pages;
    let mut out = zeroed(pages.div_ceil(64) as usize);
    mark(&mut guest, offset, runs);
    get_over_old(get, &mut guest, pages, &mut out);
    let dirty = runs.iter().cloned().flatten().map(|page| offset + page);
    check("a report", &out, &naive(pages, dirty));
    get_over_old(get, &mut guest, pages, &mut out);
    check("a report after it", &out, &naive(pages, []));
    (guest, out, pages)
}

/// GET into words that are all ones, unless they must be zero.
fn get_over_old<G: Get>(get: G, guest: &mut Guest, pages: u64, out: &mut [u64]) {
    out.fill(if G::ZEROED { 0 } else { !0 });
    get.get(guest, pages, out);
}

fn mark(guest: &mut Guest, offset: u64, runs: &[Range<u64>]) {
    for run in runs {
        guest.mark(offset + run.start, run.end - run.start);
    }
}

fn ours(bench: &mut Bench, row: &mut Row, get: impl Get, size: Size, offset: u64) {
    let setup = || {
        // A scattered report is easier to get wrong, so it is checked too.
        drop(guest(get, size, offset, &scattered(size.pages, 0.001)));
        guest(get, size, offset, slice::from_ref(&(0..size.pages)))
    };
    bench.time_on(row, Who::Ours, "ours", setup, |state, b| {
        after(
            b,
            state,
            |(guest, _, _)| guest.mark(offset, size.pages),
            |(guest, out, pages)| get.get(guest, *pages, out),
        );
    });
}

fn peer<S: PageSet>(bench: &mut Bench, row: &mut Row, size: Size) {
    let setup = || {
        let mut set = S::new(size.pages);
        let mut out = zeroed(size.words());
        let runs = scattered(size.pages, 0.001);
        runs.iter().for_each(|run| set.mark_one(run.start));
        set.take(&mut out);
        check(
            S::NAME,
            &out,
            &naive(size.pages, runs.into_iter().flatten()),
        );
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

fn sparse(bench: &mut Bench, case: &str, runs: &[Range<u64>], most: f64) {
    let zeroed = format!("sparse, {case}, zeroed words");
    let mut row = Row::new("get", zeroed, GIB_64.name).of_limit(most);
    ours_sparse(bench, &mut row, TypedZeroed, runs);
    machine::copy_and_clear(bench, &mut row, GIB_64.words());
    peer_sparse::<Bits>(bench, &mut row, runs);
    peer_sparse::<Atomic>(bench, &mut row, runs);
    peer_sparse::<Fixed>(bench, &mut row, runs);
    peer_sparse::<Roaring>(bench, &mut row, runs);
    bench.add(row);

    let ioctl = format!("sparse, {case}, ioctl");
    let mut row = Row::new("get", ioctl, GIB_64.name).of_limit(0.4);
    ours_sparse(bench, &mut row, Ioctl, runs);
    machine::copy_and_clear(bench, &mut row, GIB_64.words());
    bench.add(row);
}

fn ours_sparse<G: Get>(bench: &mut Bench, row: &mut Row, get: G, runs: &[Range<u64>]) {
    let setup = || guest(get, GIB_64, 0, runs);
    bench.time_on(row, Who::Ours, "ours", setup, |state, b| {
        after(
            b,
            state,
            |(guest, out, _)| {
                mark(guest, 0, runs);
                out.fill(0);
            },
            |(guest, out, pages)| get.get(guest, *pages, out),
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
        check(
            S::NAME,
            &out,
            &naive(GIB_64.pages, runs.iter().cloned().flatten()),
        );
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
