// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pinned pages of a guest of 1 TiB: pin, lookup, unpin, a report with pins, and
//! their bytes.

use std::cell::LazyCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::data::{check, distinct, naive, zeroed, TIB_1};
use crate::harness::{after, Bench, Bencher};
use crate::report::row::{Row, Who};
use crate::rows::books::{Map, Ours, Pins};
use crate::rows::get::Fill;

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
    gets: [(Fill, Row); 2],
    memory: Row,
}

fn random_pins(bench: &mut Bench, n: usize, name: &'static str) {
    let pages = LazyCell::new(|| distinct(TIB_1.pages, n));
    let pages = || pages.as_slice();
    let batch = BATCH.min(n / 16);
    let row = |case| Row::new("pins", case, name).per(batch);
    let get_row = |fill: Fill| {
        let case = format!("get of 1 TiB, {}", fill.name());
        (fill, Row::new("pins", case, name))
    };
    let mut rows = Rows {
        pin: row("pin, random"),
        lookup: row("lookup, random"),
        unpin: row("unpin, random"),
        gets: [Fill::Lines, Fill::Words].map(get_row),
        memory: Row::bytes("a pin, random", name),
    };
    operations::<Ours>(bench, &mut rows, Who::Ours, &pages, batch);
    operations::<Map>(bench, &mut rows, Who::Peer, &pages, batch);
    let mut without = None;
    let new = || (Ours::new(), zeroed(TIB_1.words()));
    for (fill, row) in &mut rows.gets {
        bench.time(row, Who::Limit, "no pins", |b| {
            get(b, without.get_or_insert_with(new), *fill);
        });
    }
    let Rows {
        pin,
        lookup,
        unpin,
        gets: [(_, lines), (_, words)],
        memory,
    } = rows;
    for row in [pin, lookup, unpin, lines, words, memory] {
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
    let mut all = None;
    for (fill, row) in &mut rows.gets {
        bench.time(row, who, P::NAME, |b| {
            let all = all.get_or_insert_with(|| {
                let pinned = pinned.take().unwrap_or_else(new);
                (pinned.pin_all(), zeroed(TIB_1.words()))
            });
            get(b, all, *fill);
        });
    }
}

/// Times reports of what `fill` makes dirty, and of the pins.
fn get<P: Pins>(b: &mut Bencher<'_>, state: &mut (P, Vec<u64>), fill: Fill) {
    after(
        b,
        state,
        |(pins, _)| fill.mark(TIB_1.pages, |first, n| pins.mark(first, n)),
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
        let bytes = pins.bytes().map(|bytes| bytes as f64 / n as f64);
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

    /// Returns the pins on all pages. The second of two reports, which has nothing but
    /// pins, is checked.
    fn pin_all(mut self) -> P {
        for page in self.batch(self.free) {
            self.pins.pin(*page);
        }
        let mut out = zeroed(TIB_1.words());
        self.pins.get(&mut out);
        self.pins.get(&mut out);
        let want = naive(TIB_1.pages, self.pages.iter().copied());
        check(P::NAME, &out, &want);
        self.pins
    }
}

/// Pages in a call, at most.
const RUN: usize = 512;
/// Pages in an iteration.
const RUNS: usize = 128 * RUN;

fn sequential_pins(bench: &mut Bench) {
    let row = Row::new("pins", "pin, sequential", "65536");
    let mut row = row.per(RUNS);
    let mut memory = Row::bytes("a pin, sequential", "65536");
    sequential::<Ours>(bench, &mut row, &mut memory, Who::Ours);
    sequential::<Map>(bench, &mut row, &mut memory, Who::Peer);
    bench.add(row);
    bench.add(memory);
}

fn sequential<P: Pins>(bench: &mut Bench, row: &mut Row, memory: &mut Row, who: Who) {
    let mut bytes = None;
    let setup = || {
        let mut pins = P::new();
        pin_runs(&mut pins);
        bytes = pins.bytes().map(|bytes| bytes as f64 / RUNS as f64);
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
