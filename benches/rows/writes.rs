// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's writes through vm-memory: without a bitmap, with one that is off, and
//! with one that is on.
//!
//! A bitmap costs more than its own instructions. vm-memory moves a slice of memory
//! several times in each write, and the bitmap's slice is a part of it: two words for
//! every bitmap that knows its pages. [`Flag`] is the least such bitmap, so it shows
//! how much of the cost is vm-memory's.

use std::hint::black_box;

use adapter_user::guest::Tracker;
use adapter_user::DirtyBits;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::flag::Flag;
use crate::harness::Bench;
use crate::host::PAGE;
use crate::report::row::{Row, Who};
use crate::sets::{Atomic, PageSet};

/// Descriptors in an iteration, each of another page.
const BATCH: usize = 256;

/// Writes for a descriptor: the data, and the entry of a used ring.
const WRITES: usize = 2;

pub(crate) fn run(bench: &mut Bench) {
    let row = |case| Row::new("vmm", case, "64 and 8 bytes").per(BATCH * WRITES);
    for (case, on) in [("write, tracker off", false), ("write, tracker on", true)] {
        let mut row = row(case);
        write(bench, &mut row, (Who::Ours, "ours", on), || tracked(on));
        write(bench, &mut row, (Who::Limit, "no bitmap", false), || {
            (memory::<()>(), None)
        });
        if !on {
            write(bench, &mut row, (Who::Limit, Flag::NAME, false), || {
                (memory::<Flag>(), None)
            });
        }
        // It cannot be switched off.
        write(bench, &mut row, (Who::Peer, Atomic::NAME, true), || {
            (memory::<AtomicBitmap>(), None)
        });
        bench.add(row);
    }
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

/// Times the requests, which leave every page dirty if the memory `marks`.
fn write<B: NewBitmap + 'static>(
    bench: &mut Bench,
    row: &mut Row,
    (who, name, marks): (Who, &'static str, bool),
    setup: impl FnOnce() -> (GuestMemoryMmap<B>, Option<Tracker>),
) {
    let setup = || {
        let (memory, tracker) = setup();
        let descriptors = black_box(descriptors());
        requests(&memory, &descriptors);
        let region = memory.iter().next().expect("a region");
        let dirty = |d: &Descriptor| region.bitmap().dirty_at(d.at.0 as usize);
        let marked = descriptors.iter().filter(|d| dirty(d)).count();
        assert_eq!(marked, if marks { BATCH } else { 0 }, "{name}: marks");
        ((memory, tracker), descriptors)
    };
    bench.time_on(row, who, name, setup, |((memory, _), descriptors), b| {
        b.iter(|| requests(memory, descriptors));
    });
}

/// A buffer of the guest that a device writes.
struct Descriptor {
    at: GuestAddress,
    len: usize,
}

fn descriptors() -> Vec<Descriptor> {
    let pages = 0..BATCH as u64;
    let descriptors = pages.map(|page| Descriptor {
        at: GuestAddress(page * PAGE + page % 63 * 64), // in all sets of the cache
        len: 64,
    });
    descriptors.collect()
}

/// Serves requests as a device model does. It is one function for each bitmap, so that
/// the compiler treats them alike.
#[inline(never)]
fn requests<B: NewBitmap + 'static>(memory: &GuestMemoryMmap<B>, descriptors: &[Descriptor]) {
    let data = black_box([7; 256]);
    for (used, Descriptor { at, len }) in (0..).zip(descriptors) {
        let written = memory.write_slice(&data[..*len], *at);
        written.expect("inside the memory");
        let entry = GuestAddress(PAGE + used % 256 * 8);
        let written = memory.write_obj(used << 32 | *len as u64, entry);
        written.expect("inside the memory");
    }
}
