// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pinned pages of a guest of 1 TiB: pin, lookup, unpin, a report with pins, and
//! their bytes.

use std::cell::LazyCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::rows::books::{Map, Ours, Pins, Tree};
use crate::data::{check, distinct, naive, zeroed, TIB_1};
use crate::harness::{after, Bench, Bencher};
use crate::report::row::{Row, Who};

/// Pages pinned in an iteration, at most.
const BATCH: usize = 1 << 14;

pub(crate) fn run(bench: &mut Bench) {
    random_pins(bench, 100_000, "1e5");
    random_pins(bench, 10_000_000, "1e7");
    sequential_pins(bench);
}

/// The rows of so many random pins.
struct Rows {
    pin: Row,
    lookup: Row,
    unpin: Row,
    get: Row,
    memory: Row,
}

fn random_pins(bench: &mut Bench, n: usize, name: &'static str) {
    let pages = LazyCell::new(|| distinct(TIB_1.pages, n));
    let pages = || pages.as_slice();
    let batch = BATCH.min(n / 16);
    // The target: 3 times as fast as the tree among few pins, 10 times among many.
    let most = if n > 1_000_000 { 0.1 } else { 1.0 / 3.0 };
    let row = |case| Row::new("pins", case, name);
    let fast = |case| row(case).per(batch).of(Tree::NAME, most);
    let mut rows = Rows {
        pin: fast("pin, random"),
        lookup: fast("lookup, random"),
        unpin: fast("unpin, random"),
        get: row("dense get of 1 TiB").of("no pins", 1.3),
        memory: Row::bytes("a pin, random", name).at_most(28.0),
    };
    operations::<Ours>(bench, &mut rows, Who::Ours, &pages, batch);
    operations::<Tree>(bench, &mut rows, Who::Peer, &pages, batch);
    operations::<Map>(bench, &mut rows, Who::Peer, &pages, batch);
    let setup = || (Ours::new(), zeroed(TIB_1.words()));
    bench.time_on(&mut rows.get, Who::Limit, "no pins", setup, |state, b| {
        dense_get(b, state);
    });
    for row in [rows.pin, rows.lookup, rows.unpin, rows.get, rows.memory] {
        bench.add(row);
    }
}

/// Times all operations on the same pins, which are made once and only if needed.
fn operations<'a, P: Pins>(
    bench: &mut Bench,
    rows: &mut Rows,
    who: Who,
    pages: &impl Fn() -> &'a [u64],
    batch: usize,
) {
    let mut pinned = None;
    let new = || Pinned::<P>::new(pages(), batch);
    bench.time(&mut rows.pin, who, P::NAME, |b| {
        pinned.get_or_insert_with(new).time(b, |step| step.pin);
    });
    bench.time(&mut rows.lookup, who, P::NAME, |b| {
        pinned.get_or_insert_with(new).time_lookup(b);
    });
    bench.time(&mut rows.unpin, who, P::NAME, |b| {
        pinned.get_or_insert_with(new).time(b, |step| step.unpin);
    });
    if let Some(bytes) = pinned.as_ref().and_then(|p| p.bytes) {
        rows.memory.push(who, P::NAME, bytes);
    }
    if who == Who::Ours {
        let setup = || {
            let pins = pinned.take().unwrap_or_else(new).checked_get().0;
            (pins, zeroed(TIB_1.words()))
        };
        bench.time_on(&mut rows.get, who, P::NAME, setup, |state, b| {
            dense_get(b, state);
        });
    } else if rows.get.ours().is_some() {
        // It takes seconds, so it is timed once.
        let (_, time) = pinned.take().unwrap_or_else(new).checked_get();
        rows.get.push(who, P::NAME, time.as_nanos() as f64);
    }
}

fn dense_get<P: Pins>(b: &mut Bencher<'_>, state: &mut (P, Vec<u64>)) {
    after(
        b,
        state,
        |(pins, _)| pins.mark_all(),
        |(pins, out)| pins.get(out),
    );
}

/// Pins on all of `pages` but one batch, which changes with each step.
struct Pinned<'a, P> {
    pins: P,
    pages: &'a [u64],
    batch: usize,
    /// Index of the batch that is not pinned.
    free: usize,
    /// Bytes a pin.
    bytes: Option<f64>,
}

/// The times of a batch.
struct Step {
    unpin: Duration,
    pin: Duration,
}

impl<'a, P: Pins> Pinned<'a, P> {
    fn new(pages: &'a [u64], batch: usize) -> Self {
        let mut pins = P::new();
        pins.fill(pages);
        let n = pages.len();
        let bytes = pins.bytes(n).map(|bytes| bytes as f64 / n as f64);
        for page in &pages[..1000] {
            assert_eq!(pins.lookup(*page), *page, "{}: the pfn", P::NAME);
            pins.forget(*page);
        }
        for page in &pages[..batch] {
            pins.unpin(*page);
        }
        Pinned {
            pins,
            pages,
            batch,
            free: 0,
            bytes,
        }
    }

    fn batch(&self, index: usize) -> &'a [u64] {
        &self.pages[index * self.batch..][..self.batch]
    }

    fn next(&self) -> usize {
        (self.free + 1) % (self.pages.len() / self.batch)
    }

    /// Unpins the next batch and pins the free one, so that each finds caches that
    /// the other has filled.
    fn step(&mut self) -> Step {
        let (free, next) = (self.batch(self.free), self.batch(self.next()));
        self.free = self.next();
        let start = Instant::now();
        next.iter().for_each(|page| self.pins.unpin(*page));
        let unpinned = Instant::now();
        for page in free {
            black_box(self.pins.pin(*page));
        }
        Step {
            unpin: unpinned - start,
            pin: unpinned.elapsed(),
        }
    }

    fn time(&mut self, b: &mut Bencher<'_>, part: impl Fn(Step) -> Duration) {
        b.iter_custom(|iters| (0..iters).map(|_| part(self.step())).sum());
    }

    fn time_lookup(&mut self, b: &mut Bencher<'_>) {
        let mut at = self.free;
        b.iter_custom(|iters| {
            let mut total = Duration::ZERO;
            for _ in 0..iters {
                at = (at + 1) % (self.pages.len() / self.batch);
                if at == self.free {
                    at = self.next();
                }
                let batch = self.batch(at);
                let start = Instant::now();
                for page in batch {
                    black_box(self.pins.lookup(*page));
                }
                total += start.elapsed();
                batch.iter().for_each(|page| self.pins.forget(*page));
            }
            total
        });
    }

    /// Makes two reports with every page pinned. The second has nothing but pins; its
    /// time is returned.
    fn checked_get(mut self) -> (P, Duration) {
        for page in self.batch(self.free) {
            self.pins.pin(*page);
        }
        let mut out = zeroed(TIB_1.words());
        self.pins.get(&mut out);
        let start = Instant::now();
        self.pins.get(&mut out);
        let time = start.elapsed();
        let want = naive(TIB_1.pages, self.pages.iter().copied());
        check(P::NAME, &out, &want);
        (self.pins, time)
    }
}

/// Pages in a call, at most.
const RUN: usize = 512;
/// Pages in an iteration.
const RUNS: usize = 128 * RUN;

fn sequential_pins(bench: &mut Bench) {
    let row = Row::new("pins", "pin, sequential", "65536");
    let mut row = row.per(RUNS).at_most(25.0);
    let mut memory = Row::bytes("a pin, sequential", "65536").at_most(28.0);
    sequential::<Ours>(bench, &mut row, &mut memory, Who::Ours);
    sequential::<Tree>(bench, &mut row, &mut memory, Who::Peer);
    sequential::<Map>(bench, &mut row, &mut memory, Who::Peer);
    bench.add(row);
    bench.add(memory);
}

fn sequential<P: Pins>(bench: &mut Bench, row: &mut Row, memory: &mut Row, who: Who) {
    let mut bytes = None;
    let setup = || {
        let mut pins = P::new();
        pin_runs(&mut pins);
        bytes = pins.bytes(RUNS).map(|bytes| bytes as f64 / RUNS as f64);
        let mut out = zeroed(TIB_1.words());
        pins.get(&mut out);
        pins.get(&mut out);
        check(P::NAME, &out, &naive(TIB_1.pages, 0..RUNS as u64));
        pins
    };
    bench.time_on(row, who, P::NAME, setup, |pins, b| {
        after(
            b,
            pins,
            |pins| (0..RUNS as u64).for_each(|page| pins.unpin(page)),
            pin_runs,
        );
    });
    if let Some(bytes) = bytes {
        memory.push(who, P::NAME, bytes);
    }
}

fn pin_runs(pins: &mut impl Pins) {
    for first in (0..RUNS).step_by(RUN) {
        let mut pfns = [0; RUN];
        pins.pin_run(first as u64, &mut pfns);
        assert_eq!(pfns[RUN - 1], (first + RUN) as u64 - 1);
    }
}
