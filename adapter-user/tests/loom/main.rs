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
        pub(crate) fn store(&self, value: u64, order: Ordering) {
            fenced(order, || self.0.store(value, order));
        }
        pub(crate) fn compare_exchange(
            &self,
            old: u64,
            new: u64,
            order: Ordering,
            failed: Ordering,
        ) -> Result<u64, u64> {
            fenced(order, || self.0.compare_exchange(old, new, order, failed))
        }
    }

    // membarrier(2) makes every running thread execute a full barrier. So the two
    // halves are ordered as two sequentially consistent fences, which loom knows.

    pub(crate) fn available() -> bool {
        true
    }
    pub(crate) fn light() {
        if !super::NO_BARRIER.get() {
            fence(SeqCst);
        }
    }
    pub(crate) fn heavy() -> Result<(), super::error::TrackError> {
        if !super::NO_BARRIER.get() {
            fence(SeqCst);
        }
        Ok(())
    }
}

thread_local! {
    /// Whether the barriers are left out, to show that they are needed. loom runs all
    /// threads of a model in one.
    static NO_BARRIER: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
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

/// Bits that are off go on beside a writer, and all memory is copied after that. Then
/// there is one round.
fn a_start() {
    loom::model(|| {
        let guest = Guest::new();
        guest.bits.turn_off();
        let writer = thread::spawn({
            let guest = Arc::clone(&guest);
            move || {
                guest.write(0);
                assert!(guest.mark(0));
            }
        });
        dirty_bits::start([&guest.bits].into_iter(), true).unwrap();
        let mut copy = [guest.pages[0].load(Relaxed), 0, 0];
        writer.join().unwrap();
        guest.round(&mut copy);
        assert_eq!(copy[0], 1, "a write is lost");
    });
}

#[test]
fn a_start_beside_writers_loses_nothing() {
    a_start();
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_start_without_the_barriers_loses_writes() {
    NO_BARRIER.set(true);
    a_start();
}

/// A page is written twice, while another thread reads the bits, discards a page and
/// copies it, in the order of `round`. Threads are preempted three times at most: all orders
/// are too many.
fn two_steps(round: fn(&Guest, &mut Copy)) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let guest = Guest::new();
        let writer = thread::spawn({
            let guest = Arc::clone(&guest);
            move || {
                for value in [1, 2] {
                    guest.pages[0].store(value, Relaxed);
                    assert!(guest.mark(0));
                }
            }
        });
        let mut copy = [0; 3];
        round(&guest, &mut copy);
        writer.join().unwrap();
        round(&guest, &mut copy);
        assert_eq!(copy[0], 2, "a write is lost");
    });
}

#[test]
fn a_discard_before_the_copy_loses_nothing() {
    two_steps(|guest, copy| {
        let mut words = [0; 2];
        guest.bits.read(&mut words).unwrap();
        for page in PAGES {
            if words[(page / 64) as usize] >> (page % 64) & 1 != 0 {
                guest.bits.discard(page * PAGE, PAGE);
            }
        }
        guest.copy(words, copy);
    });
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_discard_after_the_copy_loses_writes() {
    two_steps(|guest, copy| {
        let mut words = [0; 2];
        guest.bits.read(&mut words).unwrap();
        guest.copy(words, copy);
        guest.bits.discard_bitmap(&words);
    });
}

/// Bits grow while a writer marks what it finds there.
#[test]
fn growing_loses_no_mark() {
    loom::model(|| {
        let guest = Guest::new();
        let writer = thread::spawn({
            let guest = Arc::clone(&guest);
            move || {
                guest.write(0);
                guest.mark(0) && guest.bits.mark(200 * PAGE, 1).is_ok()
            }
        });
        guest.bits.grow(300 * PAGE).unwrap();
        let grown = writer.join().unwrap();
        let mut words = [0; 5];
        guest.bits.take(&mut words).unwrap();
        assert_eq!(words[0], 1 << PAGES[0]);
        assert_eq!(words[3] != 0, grown);
    });
}
