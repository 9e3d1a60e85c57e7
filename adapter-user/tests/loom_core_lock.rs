// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads share a container's lock while another excludes them. `loom` runs every order
//! of their steps, and lets every relaxed load see every value that the memory model
//! allows. The source is the crate's own, with loom's atomics.
//!
//! membarrier(2) makes every running thread execute a full barrier. So the two halves
//! are ordered as two sequentially consistent fences, which loom knows.

#[path = "../src/container/core_lock/turns.rs"]
#[allow(dead_code, unreachable_pub)]
#[allow(clippy::reversed_empty_ranges)] // nobody spins here
mod turns;

mod sync {
    pub(crate) use loom::hint::spin_loop;
    use loom::sync::atomic::fence;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(crate) use loom::sync::{Condvar, Mutex, RwLock, RwLockWriteGuard};

    use super::{Wrong, WRONG};

    pub(crate) const SPINS: u32 = 0;

    pub(crate) fn light() {
        if WRONG.get() != Some(Wrong::Light) {
            fence(Ordering::SeqCst);
        }
    }

    pub(crate) fn heavy() -> Result<(), ()> {
        if WRONG.get() != Some(Wrong::Heavy) {
            fence(Ordering::SeqCst);
        }
        Ok(())
    }

    pub(crate) fn sleep(_: std::time::Duration) {
        unreachable!("the heavy barrier does not fail here");
    }
}

/// The slots: as many as a model has threads that share.
mod slot {
    use std::cell::Cell;

    use loom::sync::atomic::AtomicU64;

    use super::{Wrong, WRONG};

    pub(crate) struct Slot {
        pub(crate) inside: AtomicU64,
    }

    loom::lazy_static! {
        static ref SLOTS: [Slot; 2] = std::array::from_fn(|_| Slot { inside: AtomicU64::new(0) });
    }

    loom::thread_local! {
        static OWN: Cell<Option<usize>> = Cell::new(None);
    }

    /// Gives this thread a slot at once.
    pub(crate) fn give(k: usize) {
        OWN.with(|own| own.set(Some(k)));
    }

    pub(crate) fn own() -> Option<&'static Slot> {
        let slots: &'static [Slot; 2] = &SLOTS;
        OWN.with(Cell::get).map(|k| &slots[k])
    }

    pub(crate) fn claim() {}

    pub(crate) fn all() -> impl Iterator<Item = &'static Slot> {
        let none = WRONG.get() == Some(Wrong::NoWait);
        let slots: &'static [Slot; 2] = &SLOTS;
        slots.iter().filter(move |_| !none)
    }
}

/// What a model leaves out, to show that it is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Light,
    Heavy,
    NoWait,
}

thread_local! {
    /// loom runs all threads of a model in one.
    static WRONG: std::cell::Cell<Option<Wrong>> = const { std::cell::Cell::new(None) };
}

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::sync::Arc;
use loom::thread;
use turns::Turns;

/// A guest's page, its dirty bit, and a value that only whoever excludes changes.
struct World {
    turns: Turns,
    page: AtomicU64,
    bit: AtomicU64,
    value: UnsafeCell<u64>,
}

impl World {
    /// Writes, then marks. As in the core, the mark skips a bit that is set.
    fn write(&self, page: u64) {
        self.page.fetch_max(page, Relaxed);
        self.turns.share(|| {
            // SAFETY: loom checks that nobody changes it now.
            self.value.with(|value| unsafe { *value });
            if self.bit.load(Relaxed) == 0 {
                self.bit.store(1, Relaxed);
            }
        });
    }

    /// Takes the bit, then copies the page if it was set.
    fn report(&self, copy: &mut u64) {
        let alone = self.turns.exclude();
        // SAFETY: loom checks that nobody else has it now.
        self.value.with_mut(|value| unsafe { *value += 1 });
        let bit = self.bit.load(Relaxed);
        self.bit.store(0, Relaxed);
        drop(alone);
        if bit != 0 {
            *copy = self.page.load(Relaxed);
        }
    }
}

/// `writes` of each thread, beside `reports`, and a last report. The slots are open from
/// the start, and open again after each entry by turn.
fn run(writes: &'static [u64], reports: u32, wrong: Option<Wrong>) {
    WRONG.set(wrong);
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let world = Arc::new(World {
            turns: Turns::new(0),
            page: AtomicU64::new(0),
            bit: AtomicU64::new(0),
            value: UnsafeCell::new(0),
        });
        world.turns.share(|| ());
        let mut threads = Vec::new();
        for (k, writes) in writes.iter().enumerate() {
            let world = Arc::clone(&world);
            threads.push(thread::spawn(move || {
                slot::give(k);
                (0..*writes).for_each(|n| world.write(n + 1));
            }));
        }
        let mut copy = 0;
        (0..reports).for_each(|_| world.report(&mut copy));
        for thread in threads {
            thread.join().expect("no panic");
        }
        world.report(&mut copy);
        assert_eq!(Some(&copy), writes.iter().max(), "a write is lost");
    });
}

#[test]
fn one_writer_and_two_reports() {
    run(&[2], 2, None);
}

#[test]
fn two_writers_and_a_report() {
    run(&[1, 1], 1, None);
}

/// These tests can fail.
#[test]
#[should_panic(expected = "Causality violation")]
fn without_the_light_barrier_somebody_is_inside() {
    run(&[1], 1, Some(Wrong::Light));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_the_heavy_barrier_somebody_is_inside() {
    run(&[1], 1, Some(Wrong::Heavy));
}

#[test]
#[should_panic(expected = "Causality violation")]
fn without_waiting_somebody_is_inside() {
    run(&[1], 1, Some(Wrong::NoWait));
}
