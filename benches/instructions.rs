// SPDX-License-Identifier: MIT OR Apache-2.0
//! The cases that `.ci/instructions` counts under callgrind: instructions, unlike
//! times, are the same in every run. Without an argument it prints the names.

use std::hint::black_box;
use std::ops::Range;

use adapter_user::guest::Tracker;
use adapter_user::DirtyBits;
use dirty_core::{normalise, Dest, Extent, PageSize};
use vm_memory::bitmap::NewBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

#[allow(dead_code)]
mod data;
#[allow(dead_code)]
mod flag;
#[allow(dead_code)]
mod guest;
#[allow(dead_code)]
mod host;

use data::{distinct, huge_pages, naive, random_words, scattered, zeroed, Size, GIB_1, GIB_64};
use flag::Flag;
use guest::Guest;
use host::{Heap, PAGE};

type Bitmap = dirty_core::Bitmap<Heap>;

/// Runs what is counted: callgrind looks for the name of this function.
#[inline(never)]
fn counted(work: impl FnOnce()) {
    work();
}

/// A name, the unit per which it is counted, and what runs it and returns how many
/// units there were.
type Case = (&'static str, &'static str, fn() -> usize);

const CASES: &[Case] = &[
    ("mark one dirty page", "mark", || {
        marks(1, true, |b, p| b.set(p, 1))
    }),
    ("mark one clean page", "mark", || {
        marks(1, false, |b, p| b.set(p, 1))
    }),
    ("mark one dirty page, shared", "mark", || {
        marks(1, true, |b, p| b.mark(p, 1))
    }),
    ("mark one clean page, shared", "mark", || {
        marks(1, false, |b, p| b.mark(p, 1))
    }),
    ("mark 512 pages", "mark", || {
        marks(512, true, |b, p| b.set(p, 512))
    }),
    ("mark 512 pages, shared", "mark", || {
        marks(512, true, |b, p| b.mark(p, 512))
    }),
    ("snapshot", "word", || snapshot(0)),
    ("shifted snapshot", "word", || snapshot(13)),
    ("snapshot of 0.01 %, zeroed", "dirty page", sparse),
    ("ioctl, clean", "word", || ioctl(&[GIB_64.pages], &[])),
    ("ioctl, dense", "word", || ioctl(&[GIB_64.pages], &dense())),
    ("ioctl, 4 MiB mappings, clean", "mapping", || {
        ioctl(&[1024; 16384], &[]) / 16
    }),
    ("ioctl, 4 MiB mappings, 0.01 %", "mapping", || {
        ioctl(&[1024; 16384], &scattered(GIB_64.pages, 0.0001)) / 16
    }),
    ("ioctl, 4 MiB mappings, dense", "mapping", || {
        ioctl(&[1024; 16384], &dense()) / 16
    }),
    ("coarsen 16 to 1", "word of 4K pages", || rescale(1, 16)),
    ("coarsen 512 to 1", "word of 4K pages", || rescale(1, 512)),
    ("refine 1 to 16", "word of 4K pages", || rescale(16, 1)),
    ("refine 1 to 512", "word of 4K pages", || rescale(512, 1)),
    ("pages, 10 %", "page", || {
        iterate(|words| dirty_core::pages(words).count())
    }),
    ("runs, 10 %", "run", || {
        iterate(|words| dirty_core::runs(words).count())
    }),
    ("pin a page of 1e5", "pin", || {
        pins(|guest, page| guest.pin(page, &mut [0]))
    }),
    ("unpin a page of 1e5", "unpin", || {
        pins(|guest, page| guest.unpin(page, 1))
    }),
    ("map a page among 60,000", "map", || {
        among(|guest, page| guest.map(page, 1))
    }),
    ("unmap a page among 60,000", "unmap", || {
        among(|guest, page| guest.unmap(page - 1, 1))
    }),
    ("write 64 bytes, no bitmap", "write", || {
        writes(&guest_memory::<()>())
    }),
    // The least that a bitmap which can be switched on costs.
    ("write 64 bytes, a flag", "write", || {
        writes(&guest_memory::<Flag>())
    }),
    ("write 64 bytes, tracker off", "write", || {
        let memory = guest_memory::<DirtyBits>();
        let tracker = Tracker::new(None);
        tracker.add_memory(memory.iter()).expect("new slots");
        writes(&memory)
    }),
];

fn main() {
    let Some(name) = std::env::args().nth(1) else {
        CASES.iter().for_each(|(name, ..)| println!("{name}"));
        return;
    };
    let case = CASES.iter().find(|(n, ..)| *n == name);
    let (_, unit, run) = case.expect("a name of a case");
    println!("{} {unit}", run());
}

fn marks(n: u64, dirty: bool, mark: fn(&mut Bitmap, u64)) -> usize {
    let mut bitmap = bitmap(GIB_1);
    let pages = distinct(GIB_1.pages - n, 10_000);
    if dirty {
        pages.iter().for_each(|page| mark(&mut bitmap, *page));
    }
    counted(|| {
        for page in &pages {
            mark(black_box(&mut bitmap), *page);
        }
    });
    pages.len()
}

fn bitmap(size: Size) -> Bitmap {
    Bitmap::new(&Heap, size.pages).expect("memory for a bitmap")
}

fn snapshot(shift: u32) -> usize {
    let mut bitmap = bitmap(GIB_64);
    bitmap.set_all();
    let mut out = zeroed(GIB_64.words() + 1);
    counted(|| bitmap.take(shift, &mut out).expect("enough words"));
    GIB_64.words()
}

fn sparse() -> usize {
    let mut bitmap = bitmap(GIB_64);
    let pages = scattered(GIB_64.pages, 0.0001);
    pages.iter().for_each(|page| bitmap.set(page.start, 1));
    let mut out = zeroed(GIB_64.words());
    counted(|| bitmap.take_sparse(0, &mut out).expect("enough words"));
    pages.len()
}

/// All of 64 GiB, in runs: single pages at random would take minutes.
fn dense() -> Vec<Range<u64>> {
    huge_pages(GIB_64.pages, 1.0)
}

/// GET_BITMAP of 64 GiB by the ioctl, with these pages dirty.
fn ioctl(mappings: &[u64], dirty: &[Range<u64>]) -> usize {
    let mut guest = Guest::tracking(mappings);
    for run in dirty {
        guest.mark(run.start, run.end - run.start);
    }
    let mut out = zeroed(GIB_64.words());
    counted(|| guest.get_by_ioctl(GIB_64.pages, &mut out));
    GIB_64.words()
}

/// Rescales from pages of `from` times 4K to pages of `to` times 4K.
fn rescale(from: u64, to: u64) -> usize {
    let extent = |times: u64| Extent {
        bit: 0,
        iova: 0,
        npages: GIB_64.pages / times,
        pgsize: PageSize::new(PAGE * times).expect("a power of two"),
    };
    let words = random_words(GIB_64.words() / from as usize, 2);
    let mut out = zeroed(GIB_64.words() / to as usize);
    counted(|| normalise(&words, extent(from), &mut out, extent(to)).expect("whole bitmaps"));
    GIB_64.words()
}

fn iterate(count: fn(&[u64]) -> usize) -> usize {
    let words = naive(
        GIB_1.pages,
        scattered(GIB_1.pages, 0.1).into_iter().flatten(),
    );
    let mut n = 0;
    counted(|| n = count(black_box(&words)));
    n
}

/// One operation on each of 10,000 pages, in a guest with 100,000 pins: a pin counts
/// up a page that is pinned.
fn pins(op: fn(&mut Guest, u64)) -> usize {
    let mut guest = Guest::tracking(&[GIB_64.pages]);
    let pages = distinct(GIB_64.pages, 100_000);
    pages.iter().for_each(|page| guest.pin(*page, &mut [0]));
    let pages = &pages[..10_000];
    counted(|| pages.iter().for_each(|page| op(&mut guest, *page)));
    let mut out = zeroed(GIB_64.words());
    guest.get(0, GIB_64.pages, Dest::Words(&mut out));
    pages.len()
}

/// One operation beside each of 1,000 mappings of 60,000. These are pages with a page's
/// gap behind each.
fn among(op: fn(&mut Guest, u64)) -> usize {
    let mut guest = Guest::new();
    (0..60_000).for_each(|k| guest.map(2 * k, 1));
    counted(|| (0..1000).for_each(|k| op(&mut guest, 2 * 59 * k + 1)));
    1000
}

/// 1 MiB of guest memory.
fn guest_memory<B: NewBitmap>() -> GuestMemoryMmap<B> {
    let ram = [(GuestAddress(0), 1 << 20)];
    GuestMemoryMmap::from_ranges(&ram).expect("memory")
}

/// Writes through vm-memory, in one page.
fn writes<B: NewBitmap + 'static>(memory: &GuestMemoryMmap<B>) -> usize {
    let bytes = [7; 64];
    let write = |k: u64| {
        let at = GuestAddress(0x3000 + k % 32 * 64);
        let written = memory.write_slice(black_box(&bytes), at);
        written.expect("inside the memory");
    };
    counted(|| (0..10_000).for_each(write));
    10_000
}
