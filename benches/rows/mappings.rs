// SPDX-License-Identifier: MIT OR Apache-2.0
//! One mapping among few and among as many as a container may hold.

use std::collections::BTreeMap;
use std::hint::black_box;

use dirty_core::Dest;
use rand::Rng;

use crate::data::{check, naive, random};
use crate::guest::Guest;
use crate::harness::Bench;
use crate::host::live;
use crate::report::row::{Row, Who};

/// Pages of a mapping, and of the gap behind it.
pub(crate) const PAGES: u64 = 512;
const WORDS: usize = PAGES as usize / 64;
/// Operations in an iteration.
pub(crate) const BATCH: usize = 256;

pub(crate) const FEW: usize = 64;
/// With the mapping that comes and goes, the most that a container may hold.
pub(crate) const MANY: usize = 65_534;

pub(crate) fn run(bench: &mut Bench) {
    let row = |case| Row::new("mappings", case, "65535").per(BATCH);
    let mut memory = Row::bytes("a mapping, not tracked", "65535");

    let mut map_row = row("container: map + unmap");
    let mut bytes = None;
    let mut setup = |n| {
        let before = live();
        let mut guest = guest(n);
        bytes = Some((live() - before) as f64 / n as f64);
        guest.start();
        (guest, Batches::new(n))
    };
    let mut map_and_unmap = |who, name, n| {
        let setup = || setup(n);
        bench.time_on(&mut map_row, who, name, setup, |(guest, batches), b| {
            b.iter(|| {
                for k in batches.next() {
                    guest.map(gap(*k), PAGES);
                    guest.unmap(gap(*k), PAGES);
                }
            });
        });
    };
    map_and_unmap(Who::Limit, "among 64", FEW);
    map_and_unmap(Who::Ours, "ours", MANY);
    let setup = || (Map::new(MANY), Batches::new(MANY));
    let name = "BTreeMap";
    bench.time_on(&mut map_row, Who::Peer, name, setup, |(map, batches), b| {
        b.iter(|| {
            for k in batches.next() {
                map.map(gap(*k));
                map.unmap(gap(*k));
            }
        });
    });
    bench.add(map_row);

    let mut get_row = row("container: get of one");
    get(bench, &mut get_row, Who::Limit, "among 64", FEW);
    get(bench, &mut get_row, Who::Ours, "ours", MANY);
    let setup = || {
        let mut map = Map::new(MANY);
        map.mark(place(MANY / 2) + 65);
        let mut out = [!0; WORDS];
        map.get(place(MANY / 2), &mut out);
        check(name, &out, &naive(PAGES, [65]));
        (map, Batches::new(MANY))
    };
    bench.time_on(&mut get_row, Who::Peer, name, setup, |(map, batches), b| {
        let mut out = [0; WORDS];
        b.iter(|| {
            for k in batches.next() {
                map.get(place(*k), black_box(&mut out));
            }
        });
    });
    bench.add(get_row);

    if let Some(bytes) = bytes {
        memory.push(Who::Ours, "ours", bytes);
        bench.add(memory);
    }
}

/// GET of one mapping.
fn get(bench: &mut Bench, row: &mut Row, who: Who, name: &'static str, n: usize) {
    let setup = || {
        let mut guest = guest(n);
        guest.start();
        guest.mark(place(n / 2) + 65, 1);
        let mut out = [!0; WORDS];
        guest.get(place(n / 2), PAGES, Dest::Words(&mut out));
        check("one mapping", &out, &naive(PAGES, [65]));
        (guest, Batches::new(n))
    };
    bench.time_on(row, who, name, setup, |(guest, batches), b| {
        let mut out = [0; WORDS];
        b.iter(|| {
            for k in batches.next() {
                guest.get(place(*k), PAGES, Dest::Words(black_box(&mut out)));
            }
        });
    });
}

/// First page of the k-th mapping.
pub(crate) fn place(k: usize) -> u64 {
    k as u64 * 2 * PAGES
}

/// First page of the gap behind it.
pub(crate) fn gap(k: usize) -> u64 {
    place(k) + PAGES
}

/// A guest with `n` mappings, not tracking.
fn guest(n: usize) -> Guest {
    let mut guest = Guest::new();
    (0..n).for_each(|k| guest.map(place(k), PAGES));
    guest
}

/// Mappings in random order.
pub(crate) struct Batches {
    order: Vec<usize>,
    at: usize,
}

impl Batches {
    pub(crate) fn new(n: usize) -> Self {
        let mut rng = random(5);
        let order = (0..256 * BATCH).map(|_| rng.random_range(0..n)).collect();
        Batches { order, at: 0 }
    }

    pub(crate) fn next(&mut self) -> &[usize] {
        self.at = (self.at + BATCH) % self.order.len();
        &self.order[self.at..][..BATCH]
    }
}

/// Mappings with dirty and pinned words, in the standard library's map.
struct Map(BTreeMap<u64, (u64, Vec<u64>)>);

impl Map {
    fn new(n: usize) -> Self {
        let mut map = Map(BTreeMap::new());
        (0..n).for_each(|k| map.map(place(k)));
        map
    }

    fn map(&mut self, first: u64) {
        let before = self.0.range(..first + PAGES).next_back();
        assert!(before.is_none_or(|(at, (pages, _))| at + pages <= first));
        let words = vec![0; 2 * WORDS];
        self.0.insert(first, (PAGES, words));
    }

    fn unmap(&mut self, first: u64) {
        let pages = self.0.remove(&first).map(|(pages, _)| pages);
        assert_eq!(pages, Some(PAGES));
    }

    fn mark(&mut self, page: u64) {
        let (first, (_, words)) = self.0.range_mut(..=page).next_back().expect("a mapping");
        let page = (page - first) as usize;
        words[page / 64] |= 1 << (page % 64);
    }

    fn get(&mut self, first: u64, out: &mut [u64; WORDS]) {
        let (_, (pages, words)) = self.0.range_mut(..=first).next_back().expect("a mapping");
        assert_eq!(*pages, PAGES);
        let (dirty, pinned) = words.split_at_mut(WORDS);
        for ((out, dirty), pinned) in out.iter_mut().zip(dirty).zip(pinned) {
            *out = std::mem::take(dirty) | *pinned;
        }
    }
}
