// SPDX-License-Identifier: MIT OR Apache-2.0
//! A write of 64 bytes through vm-memory: without a bitmap, with one that is off, and
//! with one that is on.

use std::hint::black_box;

use adapter_user::guest::Tracker;
use adapter_user::DirtyBits;
use vm_memory::bitmap::{AtomicBitmap, NewBitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::harness::Bench;
use crate::host::PAGE;
use crate::row::{Row, Who};
use crate::sets::{Atomic, PageSet};

/// Writes in an iteration, each to another page.
const BATCH: usize = 256;

pub(crate) fn run(bench: &mut Bench) {
    let row = |case| Row::new("write", case, "64 bytes").per(BATCH);
    let mut off = row("tracker off").of("no bitmap", 1.1);
    write(bench, &mut off, Who::Ours, "ours", || tracked(false));
    write(bench, &mut off, Who::Limit, "no bitmap", || {
        (memory::<()>(), None)
    });
    bench.add(off);
    let mut on = row("tracker on").of(Atomic::NAME, 1.1);
    write(bench, &mut on, Who::Ours, "ours", || tracked(true));
    write(bench, &mut on, Who::Peer, Atomic::NAME, || {
        (memory::<AtomicBitmap>(), None)
    });
    bench.add(on);
}

fn memory<B: NewBitmap>() -> GuestMemoryMmap<B> {
    let ram = [(GuestAddress(0), BATCH * PAGE as usize)];
    GuestMemoryMmap::from_ranges(&ram).expect("memory")
}

/// Memory whose writes are tracked if `on` is set, with the tracker.
fn tracked(on: bool) -> (GuestMemoryMmap<DirtyBits>, Option<Tracker>) {
    let memory = memory();
    let tracker = Tracker::new(None);
    tracker.add_memory(memory.iter()).expect("new slots");
    if on {
        tracker.start().expect("the kernel has membarrier(2)");
    }
    (memory, Some(tracker))
}

fn write<B: NewBitmap + 'static>(
    bench: &mut Bench,
    row: &mut Row,
    who: Who,
    name: &'static str,
    setup: impl FnOnce() -> (GuestMemoryMmap<B>, Option<Tracker>),
) {
    bench.time_on(row, who, name, setup, |(memory, _), b| {
        b.iter(|| writes(memory));
    });
}

/// Writes to each page. It is one function for each bitmap, with one call in it, so that
/// the compiler treats them alike: what it inlines of vm-memory decides more than what
/// the bitmap does.
#[inline(never)]
fn writes<B: NewBitmap + 'static>(memory: &GuestMemoryMmap<B>) {
    let bytes = [7; 64];
    for page in 0..BATCH as u64 {
        let at = GuestAddress(page * PAGE + page % 63 * 64); // in all sets of the cache
        let written = memory.write_slice(black_box(&bytes), at);
        written.expect("inside the memory");
    }
}
