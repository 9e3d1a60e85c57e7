// SPDX-License-Identifier: MIT OR Apache-2.0
//! START of a guest of 1 TiB in 64 mappings, without pins and with 100,000.

use std::time::{Duration, Instant};

use dirty_core::Dest;

use crate::data::{check, distinct, naive, zeroed, TIB_1};
use crate::guest::Guest;
use crate::harness::{after, median, Bench};
use crate::host::{allocating, live};
use crate::report::row::{Row, Who};
use crate::sets::{Atomic, PageSet};

const MAPPINGS: usize = 64;
/// 16 GiB.
const PAGES: u64 = TIB_1.pages / MAPPINGS as u64;

pub(crate) fn run(bench: &mut Bench) {
    let mut row = Row::new("start", "no pins", TIB_1.name);
    let mut memory = Row::bytes("a tracked GiB, no pins", TIB_1.name);
    start(bench, &mut row, &mut memory, mapped, |_| {});
    bench.time(&mut row, Who::Peer, Atomic::NAME, |b| {
        let new = |_: usize| Atomic::new(PAGES);
        after(
            b,
            &mut Vec::new(),
            |bitmaps| {
                bitmaps.clear();
                give_back();
            },
            |bitmaps| bitmaps.extend((0..MAPPINGS).map(new)),
        );
    });
    bench.add(row);
    bench.add(memory);

    let mut row = Row::new("start", "1e5 pins", TIB_1.name);
    let mut memory = Row::bytes("a tracked GiB, 1e5 pins", TIB_1.name);
    start(bench, &mut row, &mut memory, pinned, check_pins);
    bench.add(row);
    bench.add(memory);
}

/// Times START of `guest`, and counts the bytes that it takes.
fn start(
    bench: &mut Bench,
    row: &mut Row,
    memory: &mut Row,
    guest: fn() -> Guest,
    check: fn(&mut Guest),
) {
    let mut bytes = None;
    let mut allocations = Vec::new();
    let setup = || {
        let mut guest = guest();
        let before = live();
        guest.start();
        bytes = Some((live() - before) as f64 / 1024.0);
        check(&mut guest);
        guest
    };
    bench.time_on(row, Who::Ours, "ours", setup, |guest, b| {
        b.iter_custom(|iters| {
            let mut total = Duration::ZERO;
            for _ in 0..iters {
                guest.stop();
                give_back();
                let before = allocating();
                let start = Instant::now();
                guest.start();
                total += start.elapsed();
                allocations.push(allocating() - before);
            }
            total
        });
    });
    if let Some(median) = median(allocations) {
        row.push(Who::Limit, "zeroed allocation", median);
    }
    if let Some(bytes) = bytes {
        memory.push(Who::Ours, "ours", bytes);
        let bitmap = (TIB_1.words() * 8) as f64 / 1024.0;
        memory.push(Who::Limit, "one bitmap", bitmap);
    }
}

/// Not tracking, without pins.
fn mapped() -> Guest {
    let mut guest = Guest::new();
    (0..MAPPINGS as u64).for_each(|k| guest.map(k * PAGES, PAGES));
    guest
}

/// Not tracking, with pins in every mapping.
fn pinned() -> Guest {
    let mut guest = mapped();
    for page in distinct(TIB_1.pages, 100_000) {
        guest.pin(page, &mut [0]);
    }
    guest
}

fn check_pins(guest: &mut Guest) {
    let mut out = zeroed(TIB_1.words());
    guest.get(0, TIB_1.pages, Dest::Words(&mut out));
    let pins = distinct(TIB_1.pages, 100_000);
    let want = naive(TIB_1.pages, pins);
    check("pins after START", &out, &want);
}

/// Gives free memory back to the system. START comes once in a migration, and its
/// memory is fresh then.
fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it touches free memory only.
    unsafe {
        libc::malloc_trim(0);
    }
}
