// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads write and mark while another takes. `loom` runs every order of their steps,
//! and lets every relaxed load see every value that the memory model allows.
//!
//! The bits are the crate's own source, compiled once more with loom's atomics. Some
//! models keep a wrong order and must end in a lost write: they show that these tests
//! can fail.

#[path = "../../src/dirty_bits/mod.rs"]
#[allow(dead_code, unreachable_pub)]
mod dirty_bits;
mod error {
    pub(crate) use adapter_user::TrackError;
}

/// loom's atomics. loom treats a sequentially consistent operation as an
/// acquire-release one, but it knows sequentially consistent fences. So each such
/// operation has a fence before and after it here.
mod atomic {
    use loom::sync::atomic::{self, Ordering::SeqCst};

    pub(crate) use loom::sync::atomic::{fence, Ordering};

    fn fenced<T>(order: Ordering, act: impl FnOnce() -> T) -> T {
        if order == SeqCst {
            fence(SeqCst);
        }
        let value = act();
        if order == SeqCst {
            fence(SeqCst);
        }
        value
    }

    pub(crate) struct AtomicU64(atomic::AtomicU64);

    impl AtomicU64 {
        pub(crate) fn new(value: u64) -> Self {
            AtomicU64(atomic::AtomicU64::new(value))
        }
        pub(crate) fn load(&self, order: Ordering) -> u64 {
            fenced(order, || self.0.load(order))
        }
        pub(crate) fn swap(&self, value: u64, order: Ordering) -> u64 {
            fenced(order, || self.0.swap(value, order))
        }
        pub(crate) fn fetch_or(&self, value: u64, order: Ordering) -> u64 {
            fenced(order, || self.0.fetch_or(value, order))
        }
        pub(crate) fn fetch_and(&self, value: u64, order: Ordering) -> u64 {
            fenced(order, || self.0.fetch_and(value, order))
        }
    }

    pub(crate) struct AtomicBool(atomic::AtomicBool);

    impl AtomicBool {
        pub(crate) fn new(value: bool) -> Self {
            AtomicBool(atomic::AtomicBool::new(value))
        }
        pub(crate) fn load(&self, order: Ordering) -> bool {
            fenced(order, || self.0.load(order))
        }
        pub(crate) fn store(&self, value: bool, order: Ordering) {
            fenced(order, || self.0.store(value, order));
        }
    }
}

use std::sync::Arc;

use dirty_bits::DirtyBits;
use dirty_core::PageSize;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::thread;

const PAGE: u64 = 4096;
/// The pages that are written: two have bits in one word, and one in the next.
const PAGES: [u64; 3] = [3, 60, 64];

/// A guest: a few pages, each of which is one number, and their dirty bits.
struct Guest {
    pages: [AtomicU64; 3],
    bits: DirtyBits,
}

/// The pages at the destination.
type Copy = [u64; 3];

impl Guest {
    fn new() -> Arc<Guest> {
        Arc::new(Guest {
            pages: std::array::from_fn(|_| AtomicU64::new(0)),
            bits: DirtyBits::new(65 * PAGE, PageSize::new(PAGE).unwrap()).unwrap(),
        })
    }

    fn write(&self, at: usize) {
        self.pages[at].store(1, Relaxed);
    }

    fn mark(&self, at: usize) -> bool {
        self.bits.mark(PAGES[at] * PAGE, 1).is_ok()
    }

    fn copy(&self, words: [u64; 2], to: &mut Copy) {
        for (at, page) in PAGES.iter().enumerate() {
            if words[(page / 64) as usize] >> (page % 64) & 1 != 0 {
                to[at] = self.pages[at].load(Relaxed);
            }
        }
    }

    fn round(&self, to: &mut Copy) {
        let mut words = [0; 2];
        self.bits.take(&mut words).unwrap();
        self.copy(words, to);
    }

    /// A round as of a device's log, which reads the bits first and clears them second.
    fn log_round(&self, to: &mut Copy) {
        let mut words = [0; 2];
        self.bits.peek(0, &mut words);
        self.bits.clear(0, &words);
        self.copy(words, to);
    }
}

/// Runs two writers beside a thread that reports, and then a last report.
fn two_writers(which: [usize; 2], round: fn(&Guest, &mut Copy)) {
    loom::model(move || {
        let guest = Guest::new();
        let writers = which.map(|at| {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                guest.write(at);
                assert!(guest.mark(at));
            })
        });
        let mut copy = [0; 3];
        round(&guest, &mut copy);
        for writer in writers {
            writer.join().unwrap();
        }
        round(&guest, &mut copy);
        for at in which {
            assert_eq!(copy[at], 1, "a write is lost");
        }
    });
}

#[test]
fn takes_lose_nothing() {
    for which in [[0, 1], [0, 0], [0, 2]] {
        two_writers(which, Guest::round);
    }
}

#[test]
fn reports_of_a_log_lose_nothing() {
    for which in [[0, 1], [0, 0], [0, 2]] {
        two_writers(which, Guest::log_round);
    }
}

/// Runs a writer beside `end`, which closes the bits. The mark must be refused or be in
/// the last report.
fn an_end(end: fn(&Guest, &mut Copy)) {
    loom::model(move || {
        let guest = Guest::new();
        let writer = thread::spawn({
            let guest = Arc::clone(&guest);
            move || {
                guest.write(0);
                guest.mark(0)
            }
        });
        let mut copy = [0; 3];
        end(&guest, &mut copy);
        let marked = writer.join().unwrap();
        assert!(!marked || copy[0] == 1, "a write is lost");
    });
}

#[test]
fn a_mark_beside_the_end_is_refused_or_reported() {
    an_end(|guest, copy| {
        guest.bits.close();
        guest.round(copy);
    });
    an_end(|guest, copy| {
        guest.bits.close();
        guest.log_round(copy);
    });
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_last_report_before_the_end_loses_marks() {
    an_end(|guest, copy| {
        guest.round(copy);
        guest.bits.close();
    });
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_mark_before_the_write_loses_it() {
    loom::model(|| {
        let guest = Guest::new();
        let writer = thread::spawn({
            let guest = Arc::clone(&guest);
            move || {
                guest.mark(0);
                guest.write(0);
            }
        });
        let mut copy = [0; 3];
        guest.round(&mut copy);
        writer.join().unwrap();
        guest.round(&mut copy);
        assert_eq!(copy[0], 1, "a write is lost");
    });
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_copy_before_the_take_loses_writes() {
    two_writers([0, 1], |guest, copy| {
        let early = [
            guest.pages[0].load(Relaxed),
            guest.pages[1].load(Relaxed),
            0,
        ];
        let mut words = [0; 2];
        guest.bits.take(&mut words).unwrap();
        for (at, value) in early.into_iter().enumerate() {
            if words[(PAGES[at] / 64) as usize] >> (PAGES[at] % 64) & 1 != 0 {
                copy[at] = value;
            }
        }
    });
}
