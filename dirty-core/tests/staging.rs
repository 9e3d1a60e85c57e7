// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reports by the ioctl pass through a buffer that must be zero between them:
//! nothing of one report, even of one that failed, may be in the next.

mod support;

use std::collections::BTreeSet;

use dirty_core::uapi::VFIO_IOMMU_DIRTY_PAGES;
use dirty_core::Error;
use proptest::collection::vec;
use proptest::prelude::*;
use support::rig::Via;
use support::words::bits;
use support::{Rig, BITMAP, PAGE};

/// The iova where the mappings start.
const BASE: u64 = 1 << 30;

/// The number of pages that one copy of the buffer reports.
const WINDOW: u64 = 2048 * 64;

/// Sizes of mappings in pages. The words of some end where a copy ends.
fn mappings() -> impl Strategy<Value = Vec<u64>> {
    let pages = prop_oneof![
        4 => 1..200_u64,
        2 => 1000..3000_u64,
        1 => Just(32 * 64),
        1 => WINDOW / 4 - 70..WINDOW / 4 + 70,
        2 => Just(WINDOW),
        1 => WINDOW..WINDOW + WINDOW / 3,
    ];
    vec(pages, 1..4)
}

/// A place in the report from which a page is counted.
#[derive(Clone, Copy, Debug)]
enum Near {
    Start,
    /// The end of a copy.
    Copy(u64),
    /// The end of a mapping.
    Mapping(usize),
}

#[derive(Clone, Debug)]
enum Op {
    Mark {
        near: Near,
        by: u64,
        n: u64,
    },
    Pin {
        near: Near,
        by: u64,
    },
    Get,
    /// A report in which the user's bitmap cannot be written from this word on.
    Fault {
        word: u64,
    },
    /// A typed report at another page size, which uses the same buffer.
    Rescaled,
}

/// A place and a distance from it in pages: any from the start, else below 130.
fn place() -> impl Strategy<Value = (Near, u64)> {
    prop_oneof![
        (0..WINDOW).prop_map(|by| (Near::Start, by)),
        (1..4_u64, 0..130_u64).prop_map(|(k, by)| (Near::Copy(k), by)),
        (0..3_usize, 0..130_u64).prop_map(|(k, by)| (Near::Mapping(k), by)),
    ]
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let mark = |((near, by), n)| Op::Mark { near, by, n };
    let op = prop_oneof![
        6 => (place(), 1..130_u64).prop_map(mark),
        1 => (place(), 5000..40_000_u64).prop_map(mark),
        1 => place().prop_map(|(near, by)| Op::Pin { near, by }),
        3 => Just(Op::Get),
        1 => (0..8192_u64).prop_map(|word| Op::Fault { word }),
        1 => Just(Op::Rescaled),
    ];
    vec(op, 1..24)
}

#[test]
fn a_page_is_told_once_wherever_it_is() {
    for shift in [0, 1, 13, 63] {
        for npages in [100, 512 * 64, WINDOW - 512, WINDOW, WINDOW + 512 * 64 + 1] {
            let mut rig = Rig::emulated();
            if shift != 0 {
                rig.map(BASE, shift * PAGE).expect("map");
            }
            rig.map(BASE + shift * PAGE, npages * PAGE).expect("map");
            rig.start();
            // The ends of the mapping, of lines, of blocks of lines, and of
            // copies.
            let ends = [0, 512, 512 * 64, WINDOW / 2, WINDOW, npages];
            for end in ends.into_iter().flat_map(|end| [end, end + shift]) {
                let last = shift + npages - 1;
                let near = [end.saturating_sub(64), end.saturating_sub(1), end, end + 64];
                // Each page by itself, and with a page in another line.
                for mut pages in near
                    .into_iter()
                    .flat_map(|at| [vec![at], vec![at, end + 3000]])
                {
                    pages.retain(|page| *page <= last);
                    pages.iter().for_each(|page| rig.mark(BASE + page * PAGE));
                    let size = (shift + npages) * PAGE;
                    assert_eq!(rig.dirty(BASE, size), pages, "{shift}, {npages}");
                    assert_eq!(rig.dirty(BASE, size), [], "{shift}, {npages}, {pages:?}");
                }
            }
        }
    }
}

#[test]
fn a_full_line_is_told_once() {
    for shift in [0, 1, 63] {
        let mut rig = Rig::emulated();
        if shift != 0 {
            rig.map(BASE, shift * PAGE).expect("map");
        }
        let npages = 130 * 512;
        rig.map(BASE + shift * PAGE, npages * PAGE).expect("map");
        rig.start();
        for line in [0, 1, 63, 64, 129] {
            let first = shift + line * 512;
            let marked = rig.backend().mark(BASE + first * PAGE, 512 * PAGE);
            assert_eq!(marked, Ok(()));
            let size = (shift + npages) * PAGE;
            let pages: Vec<u64> = (first..first + 512).collect();
            assert_eq!(rig.dirty(BASE, size), pages, "{shift}, {line}");
            assert_eq!(rig.dirty(BASE, size), [], "{shift}, {line}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn nothing_is_left_of_a_report(mappings in mappings(), ops in ops()) {
        let mut rig = Rig::emulated();
        let mut ends = Vec::new();
        let mut total = 0;
        for pages in &mappings {
            rig.map(BASE + total * PAGE, pages * PAGE).expect("map");
            total += pages;
            ends.push(total);
        }
        rig.start();
        let nwords = total.div_ceil(64);
        let page = |near, by: u64| match near {
            Near::Start => by % total,
            Near::Copy(k) => (k * WINDOW + 65).saturating_sub(by).min(total - 1),
            Near::Mapping(k) => (ends[k % ends.len()] - 1).saturating_sub(by),
        };
        let (mut dirty, mut pinned) = (BTreeSet::new(), BTreeSet::new());
        for op in ops {
            match op {
                Op::Mark { near, by, n } => {
                    let first = page(near, by);
                    let n = n.min(total - first);
                    let marked = rig.backend().mark(BASE + first * PAGE, n * PAGE);
                    prop_assert_eq!(marked, Ok(()));
                    dirty.extend(first..first + n);
                }
                Op::Pin { near, by } => {
                    rig.pin(BASE + page(near, by) * PAGE, 1).expect("pin");
                    pinned.insert(page(near, by));
                }
                Op::Get => {
                    let told = rig.dirty(BASE, total * PAGE);
                    let want: Vec<u64> = dirty.union(&pinned).copied().collect();
                    prop_assert_eq!(told, want);
                    dirty.clear();
                }
                Op::Fault { word } => {
                    rig.host.no_write = Some(BITMAP + word % nwords * 8);
                    let arg = Rig::get_arg(BASE, total * PAGE, PAGE, nwords * 8);
                    let got = rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &arg);
                    prop_assert_eq!(got, Err(Error::BadAddress));
                    rig.host.no_write = None;
                }
                Op::Rescaled => {
                    let mut words = vec![0; (2 * total).div_ceil(64) as usize];
                    let got = rig.get(Via::Words, BASE, total * PAGE, PAGE / 2, &mut words);
                    prop_assert_eq!(got, Ok(()));
                    let halves = dirty.union(&pinned).flat_map(|page| [2 * page, 2 * page + 1]);
                    prop_assert_eq!(bits(&words), halves.collect::<Vec<u64>>());
                    dirty.clear();
                }
            }
        }
        let told = rig.dirty(BASE, total * PAGE);
        let want: Vec<u64> = dirty.union(&pinned).copied().collect();
        prop_assert_eq!(told, want);
    }
}
