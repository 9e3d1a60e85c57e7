// SPDX-License-Identifier: MIT OR Apache-2.0
//! The map of spans against the standard library's map, with allocations that fail.

use std::collections::BTreeMap;
use std::vec::Vec;

use proptest::collection::vec;
use proptest::prelude::*;

use super::memory::TestMemory;
use crate::mem::spans::Spans;
use crate::span::Span;

/// The last address and the value of each span, by its first.
type Model = BTreeMap<u64, (u64, u64)>;

/// Both maps, which are changed and asked together.
struct Pair {
    mem: TestMemory,
    spans: Spans<Value, TestMemory>,
    model: Model,
    /// The next value: each is another one.
    next: u64,
}

struct Value {
    span: Span,
    value: u64,
}

fn span(first: u64, last: u64) -> Span {
    Span::between(first, last).expect("in order")
}

impl Pair {
    fn new() -> Pair {
        let mem = TestMemory::default();
        Pair {
            spans: Spans::new(&mem),
            mem,
            model: Model::new(),
            next: 0,
        }
    }

    /// The first address of each span in the model that overlaps `range`.
    fn hits(&self, range: Span) -> Vec<u64> {
        let before = self.model.range(..=range.first()).next_back();
        let before = before.filter(|(_, (last, _))| *last >= range.first());
        let from = before.map_or(range.first(), |(first, _)| *first);
        let hits = self.model.range(from..=range.last());
        hits.map(|(first, _)| *first).collect()
    }

    /// Inserts a span unless it overlaps another. The allocation of this number fails,
    /// if it is not 0.
    fn insert(&mut self, new: Span, fail: u64) {
        self.ask(new);
        if !self.hits(new).is_empty() {
            return;
        }
        let value = self.next;
        self.next += 1;
        let (live, bytes) = (self.mem.live(), self.mem.bytes());
        self.mem.fault().arm(fail);
        let inserted = self.spans.insert(new, || Value { span: new, value });
        let struck = fail != 0 && !self.mem.fault().pending();
        self.mem.fault().arm(0);
        match inserted {
            Ok(inserted) => {
                assert!(!struck);
                assert_eq!(inserted.value, value);
                self.model.insert(new.first(), (new.last(), value));
            }
            Err(_) => {
                assert!(struck);
                assert_eq!((self.mem.live(), self.mem.bytes()), (live, bytes));
            }
        }
        self.ask(new);
    }

    /// Removes the first span that overlaps `range`, which must take no memory.
    fn remove_first(&mut self, range: Span) {
        self.mem.fault().arm(1);
        let removed = self.spans.remove_first(range);
        assert!(self.mem.fault().pending(), "memory was asked for");
        self.mem.fault().arm(0);
        let expected = self.hits(range).first().copied();
        let removed = removed.map(|removed| (removed.span.first(), removed.value));
        let expected = expected.and_then(|first| Some((first, self.model.remove(&first)?.1)));
        assert_eq!(removed, expected);
        self.ask(range);
    }

    fn remove_all(&mut self, range: Span) {
        while !self.hits(range).is_empty() {
            self.remove_first(range);
        }
        self.remove_first(range);
    }

    /// Every question about a range.
    fn ask(&mut self, range: Span) {
        let hits = self.hits(range);
        let found: Vec<_> = self.spans.range(range).map(|v| v.span.first()).collect();
        assert_eq!(found, hits, "in {range:?}");
        let found = self.spans.range_mut(range).map(|v| v.span.first());
        assert!(found.eq(hits.iter().copied()), "in {range:?}");
        assert_eq!(self.spans.overlaps(range), !hits.is_empty());
        let first = range.first().checked_sub(1);
        let last = range.last().checked_add(1);
        let bisects = first.is_some_and(|before| self.inside(range.first(), before))
            || last.is_some_and(|after| self.inside(range.last(), after));
        assert_eq!(self.spans.bisects(range), bisects, "{range:?}");
        for iova in [range.first(), range.last()] {
            let expected = self.at(iova);
            assert_eq!(self.spans.find(iova).map(|v| v.value), expected);
            assert_eq!(self.spans.find_mut(iova).map(|v| v.value), expected);
        }
    }

    /// The value of the span at an address.
    fn at(&self, iova: u64) -> Option<u64> {
        let (_, (last, value)) = self.model.range(..=iova).next_back()?;
        (*last >= iova).then_some(*value)
    }

    /// Whether one span has both addresses.
    fn inside(&self, one: u64, other: u64) -> bool {
        self.at(one).is_some() && self.at(one) == self.at(other)
    }

    fn check(&mut self) {
        let all = |v: &Value| (v.span.first(), (v.span.last(), v.value));
        let expected = self.model.iter().map(|(first, rest)| (*first, *rest));
        let found = self.spans.iter().map(all);
        assert!(found.eq(expected.clone()), "a span is lost or made up");
        let found = self.spans.iter_mut().map(|v| all(v));
        assert!(found.eq(expected), "a span is lost or made up");
        // Besides the values only chunks are allocated.
        let chunks = self.mem.live() - self.model.len();
        assert!(chunks <= 2 * self.model.len() / 33 + 1, "{chunks} chunks");
        assert_eq!(chunks == 0, self.model.is_empty());
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            while let Some((first, (_, value))) = self.model.pop_first() {
                let removed = self.spans.remove_first(Span::ALL).expect("a span");
                assert_eq!((removed.span.first(), removed.value), (first, value));
            }
            assert_eq!(self.mem.live(), 0, "without spans no memory");
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// The allocation of this number fails, if it is not 0.
    Insert(Span, u64),
    RemoveFirst(Span),
    RemoveAll(Span),
    Seek(u64),
}

/// An address, most often near others; some are at the end of the address space.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0..600u64,
        1 => u64::MAX - 20..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn range() -> impl Strategy<Value = Span> {
    let size = prop_oneof![4 => Just(1u64), 4 => 1..5u64, 1 => 1..200u64];
    (address(), size).prop_map(|(first, size)| span(first, first.saturating_add(size - 1)))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => range().prop_map(|span| Op::Insert(span, 0)),
        2 => (range(), 1..3u64).prop_map(|(span, fail)| Op::Insert(span, fail)),
        6 => range().prop_map(Op::RemoveFirst),
        1 => range().prop_map(Op::RemoveAll),
        1 => address().prop_map(Op::Seek),
    ]
}

proptest! {
    #[test]
    fn spans_are_a_map(dense in 0..200u64, ops in vec(op(), 0..300)) {
        let mut pair = Pair::new();
        for k in 0..dense {
            pair.insert(span(k * 3, k * 3), 0);
        }
        pair.check();
        for op in ops {
            match op {
                Op::Insert(span, fail) => pair.insert(span, fail),
                Op::RemoveFirst(range) => pair.remove_first(range),
                Op::RemoveAll(range) => pair.remove_all(range),
                Op::Seek(iova) => pair.spans.seek(iova),
            }
            pair.check();
        }
    }
}

/// The first address of the k-th of n spans, in several orders. Between neighbours
/// there is room for another one.
const ORDERS: [fn(u64, u64) -> u64; 4] = [
    |k, _| 2 * k,
    |k, n| 2 * (n - 1 - k),
    |k, n| 2 * (k * 40_009 % n),
    // From both ends to the middle.
    |k, n| if k % 2 == 0 { k } else { 2 * n - 1 - k },
];

/// As many spans as chunks of every fill need, and then each place where one may come
/// or go, with each allocation that may fail.
#[test]
fn each_place_at_each_fill() {
    for order in ORDERS {
        for n in (0..150).filter(|n| n % 16 < 3 || n % 11 == 0) {
            let mut pair = Pair::new();
            for k in 0..n {
                pair.insert(span(order(k, n), order(k, n)), 0);
            }
            pair.check();
            for k in 0..n {
                for fail in [1, 2, 0] {
                    pair.insert(span(2 * k + 1, 2 * k + 1), fail);
                    pair.check();
                    pair.remove_first(span(2 * k + 1, 2 * k + 1));
                    pair.check();
                }
                pair.remove_first(span(2 * k, 2 * k));
                pair.check();
                pair.insert(span(2 * k, 2 * k), 0);
                pair.check();
            }
            // One goes after the other, from this place on and around.
            let from = n / 3;
            for k in 0..n {
                let at = 2 * ((from + k) % n);
                pair.remove_first(span(at, at));
                pair.check();
            }
        }
    }
}

/// A chunk that fills from below keeps some room: a span that comes between others
/// later takes no new chunk.
#[test]
fn spans_in_ascending_order_leave_room_between_them() {
    let n = 1200;
    let mut pair = Pair::new();
    for k in 0..n {
        pair.insert(span(2 * k, 2 * k), 0);
    }
    let chunks = pair.mem.live() - pair.model.len();
    assert!(chunks <= 31, "{chunks} chunks of 40 spans");
    for k in (0..n).step_by(4) {
        pair.insert(span(2 * k + 1, 2 * k + 1), 0);
    }
    pair.check();
    assert_eq!(pair.mem.live() - pair.model.len(), chunks);
}

/// A map that is dropped with its spans frees them and their chunks.
#[test]
fn a_dropped_map_frees_its_spans() {
    for n in [0, 1, 64, 65, 200] {
        let mem = TestMemory::default();
        let mut spans = Spans::new(&mem);
        for value in 0..n {
            let span = span(value, value);
            spans
                .insert(span, || Value { span, value })
                .expect("memory");
        }
        drop(spans);
        assert_eq!((mem.live(), mem.bytes()), (0, 0), "{n} spans");
    }
}

/// As many spans as a container may have, in each order; most of them go again in
/// another order. Chunks that are nearly empty do not stay.
#[test]
fn no_order_makes_it_large() {
    let n = 65_535;
    for come in ORDERS {
        for go in ORDERS {
            let mut pair = Pair::new();
            let mut values = 0;
            for k in 0..n {
                let at = span(come(k, n), come(k, n));
                let value = Value { span: at, value: k };
                pair.spans.insert(at, || value).expect("memory");
                pair.model.insert(at.first(), (at.last(), k));
            }
            pair.check();
            for keep in [2, 32, 500] {
                for k in (0..n).filter(|k| go(*k, n) / 2 % keep != 0) {
                    let at = go(k, n);
                    if pair.model.remove(&at).is_some() {
                        let removed = pair.spans.remove_first(span(at, at));
                        values +=
                            removed.map_or(0, |removed| u64::from(removed.span.first() == at));
                    }
                }
                pair.check();
            }
            assert_eq!(values, n - pair.model.len() as u64);
        }
    }
}
