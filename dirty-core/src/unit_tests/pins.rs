// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pins against a map of them, with allocations that fail.

use std::collections::BTreeMap;
use std::vec::Vec;

use proptest::collection::vec;
use proptest::prelude::*;

use super::memory::TestMemory;
use crate::pgsize::PageSize;
use crate::pins::window::{NotRepinned, Unpinned, SHIFT};
use crate::pins::Pins;

const SHIFT_4K: u32 = 12;
const PAGE: u64 = 1 << SHIFT_4K;
const BASE: u64 = 0x7_0000_3000;

/// Pfn and count of each pinned iova.
type Model = BTreeMap<u64, (u64, u32)>;

#[derive(Clone, Debug)]
enum Op {
    /// So many pages from one on, each the n-th after the one before.
    Pin(u64, u64, u64),
    Unpin(u64, u64, u64),
    /// The next pin has this many allocations only.
    Starve(usize, u64),
}

/// The factor of the tables' hash undone: pages that lie this far apart have
/// homes next to each other.
const CLOSE: u64 = {
    let mut step = 1u64;
    while step * 0x9_e377 % (1 << SHIFT) != 1 {
        step += 2;
    }
    step
};

/// A place in the mapping: near its start, around ends of windows, beyond what
/// windows hold, inside a page.
fn place() -> impl Strategy<Value = u64> {
    let pages = prop_oneof![
        8 => 0..200u64,
        2 => (1 << SHIFT) - 40..(1 << SHIFT) + 40u64,
        1 => 0..3u64 << SHIFT,
        1 => (1 << 31) - 20..(1 << 31) + 20u64,
        1 => (1 << 32) - 20..(1 << 32) + 20u64,
    ];
    let offset = prop_oneof![9 => Just(0u64), 1 => 0..PAGE];
    (pages, offset).prop_map(|(page, offset)| page * PAGE + offset)
}

fn run() -> impl Strategy<Value = (u64, u64, u64)> {
    let step = prop_oneof![6 => Just(1u64), 1 => Just(3u64), 2 => Just(CLOSE)];
    let n = prop_oneof![Just(1u64), 0..40u64, 0..300u64];
    (place(), n, step)
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => run().prop_map(|(first, n, step)| Op::Pin(first, n, step)),
        5 => run().prop_map(|(first, n, step)| Op::Unpin(first, n, step)),
        1 => (1..4usize, place()).prop_map(|(n, first)| Op::Starve(n, first)),
    ]
}

fn pin(pins: &mut Pins<TestMemory>, model: &mut Model, iova: u64, may_fail: bool) {
    let pfn = iova.rotate_left(17);
    match pins.repin(iova) {
        Ok(found) => {
            let (expected, refs) = model.get_mut(&iova).expect("it is pinned");
            assert_eq!(found, *expected);
            *refs += 1;
        }
        Err(NotRepinned::Full) => panic!("so many pins"),
        Err(NotRepinned::NotPinned) => {
            assert!(!model.contains_key(&iova), "a pin is lost");
            match pins.insert(iova, pfn) {
                Ok(()) => drop(model.insert(iova, (pfn, 1))),
                Err(_) => assert!(may_fail),
            }
        }
    }
}

fn unpin(pins: &mut Pins<TestMemory>, model: &mut Model, iova: u64) {
    let expected = match model.get_mut(&iova) {
        None => Unpinned::NotPinned,
        Some((pfn, 1)) => Unpinned::Last(*pfn),
        Some((_, refs)) => {
            *refs -= 1;
            Unpinned::Shared
        }
    };
    assert_eq!(pins.remove(iova), expected, "at {iova:#x}");
    if let Unpinned::Last(_) = expected {
        model.remove(&iova);
        // A page, and a granule of 16 of them, that the pin was in.
        for size in [PAGE, 16 * PAGE] {
            let first = BASE + (iova - BASE) / size * size;
            let last = first + size - 1;
            let beside = model.range(first..=last).next().is_some();
            assert_eq!(pins.any_beside(iova, first, last), beside, "at {iova:#x}");
        }
    }
}

fn check(pins: &Pins<TestMemory>, model: &Model) {
    let mut found: Vec<_> = pins.iter().collect();
    found.sort_unstable();
    let expected = model.iter().map(|(iova, (pfn, _))| (*iova, *pfn));
    assert!(
        found.iter().copied().eq(expected),
        "a pin is lost or made up"
    );
    for (iova, (pfn, _)) in model {
        assert_eq!(pins.get(*iova), Some(*pfn));
    }
    assert_eq!(pins.is_empty(), model.is_empty());
}

fn iovas((first, n, step): (u64, u64, u64)) -> impl Iterator<Item = u64> {
    (0..n).map(move |k| BASE + first + k * step % (3 << SHIFT) * PAGE)
}

proptest! {
    #[test]
    fn pins_are_what_was_pinned(ops in vec(op(), 0..30)) {
        let mem = TestMemory::default();
        let page = PageSize::new(PAGE).expect("a power of two");
        let mut pins = Pins::new(&mem, BASE, page);
        let mut model = Model::new();
        for op in ops {
            match op {
                Op::Pin(first, n, step) => iovas((first, n, step))
                    .for_each(|iova| pin(&mut pins, &mut model, iova, false)),
                Op::Unpin(first, n, step) => iovas((first, n, step))
                    .for_each(|iova| unpin(&mut pins, &mut model, iova)),
                Op::Starve(n, first) => {
                    mem.fault().arm(n as u64);
                    pin(&mut pins, &mut model, BASE + first, true);
                    mem.fault().arm(0);
                }
            }
            check(&pins, &model);
        }
        let all: Vec<_> = model.iter().flat_map(|(iova, (_, refs))| (0..*refs).map(|_| *iova)).collect();
        all.into_iter().for_each(|iova| unpin(&mut pins, &mut model, iova));
        check(&pins, &model);
        prop_assert_eq!(mem.live(), 0, "without pins no memory");
    }
}

/// A window of pages in each order, with every other page gone in between.
#[test]
fn a_whole_window() {
    let mem = TestMemory::default();
    let page = PageSize::new(PAGE).expect("a power of two");
    let pages = 1 << 16;
    let orders: [fn(u64, u64) -> u64; 4] = [
        |k, _| k,
        |k, n| n - 1 - k,
        |k, n| k * 40_503 % n,
        |k, _| k * CLOSE % (1 << SHIFT),
    ];
    for order in orders {
        let mut pins = Pins::new(&mem, BASE, page);
        let iova = |k| BASE + order(k, pages) * PAGE;
        for k in 0..pages {
            pins.insert(iova(k), k).expect("memory");
        }
        for k in (0..pages).step_by(2) {
            assert_eq!(pins.remove(iova(k)), Unpinned::Last(k));
        }
        for k in 0..pages {
            assert_eq!(pins.get(iova(k)), (k % 2 == 1).then_some(k));
        }
        for k in (1..pages).step_by(2) {
            assert_eq!(pins.repin(iova(k)), Ok(k));
            assert_eq!(pins.remove(iova(k)), Unpinned::Shared);
            assert_eq!(pins.remove(iova(k)), Unpinned::Last(k));
        }
        assert_eq!(mem.live(), 0);
    }
}
