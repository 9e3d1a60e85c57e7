// SPDX-License-Identifier: MIT OR Apache-2.0
//! A word of each thread, which says what the thread is inside of.
//!
//! A thread gets its slot when it first needs one and gives it back when it ends, so
//! there are as many slots as ever had one at once. They stay allocated, in one list.
//! A child of fork(2) has the slots of all threads of its parent. Its own thread keeps
//! its slot, and a thread that was inside something stays inside there for good, as
//! with a `RwLock`.

use std::cell::Cell;
use std::iter;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;

/// The slot of one thread. It has cache lines of its own: processors fetch two at once.
#[repr(align(128))]
pub(super) struct Slot {
    /// What the thread is inside of, or 0. Only its thread stores here.
    pub(super) inside: AtomicU64,
    /// Whether a thread has this slot.
    taken: AtomicBool,
    next: OnceLock<&'static Slot>,
}

impl Slot {
    const fn new(taken: bool) -> Self {
        Slot {
            inside: AtomicU64::new(0),
            taken: AtomicBool::new(taken),
            next: OnceLock::new(),
        }
    }

    /// Takes this slot if it is free. Acquire, with the Release of the thread that gave
    /// it back: so stores of the two have an order.
    fn take(&self) -> bool {
        !self.taken.load(Ordering::Relaxed) && !self.taken.swap(true, Ordering::Acquire)
    }
}

static FIRST: Slot = Slot::new(false);

thread_local! {
    static OWN: Own = const { Own(Cell::new(None)) };
}

/// The slot of this thread.
struct Own(Cell<Option<&'static Slot>>);

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(slot) = self.0.get() {
            // Else the thread has forgotten that it is inside, and stays there.
            if slot.inside.load(Ordering::Relaxed) == 0 {
                slot.taken.store(false, Ordering::Release);
            }
        }
    }
}

/// The slot of this thread, if it has one.
#[inline]
pub(super) fn own() -> Option<&'static Slot> {
    OWN.try_with(|own| own.0.get()).ok().flatten()
}

/// Gives this thread a slot, unless it has one or is about to end.
pub(super) fn claim() {
    let _ = OWN.try_with(|own| {
        if own.0.get().is_none() {
            own.0
                .set(Some(all().find(|slot| slot.take()).unwrap_or_else(append)));
        }
    });
}

/// Appends a slot that is taken.
fn append() -> &'static Slot {
    let new: &'static Slot = Box::leak(Box::new(Slot::new(true)));
    let mut last = &FIRST;
    while last.next.set(new).is_err() {
        last = last.next.get().copied().unwrap_or(last); // another thread was faster
    }
    new
}

/// All slots, also those that no thread has.
pub(super) fn all() -> impl Iterator<Item = &'static Slot> {
    iter::successors(Some(&FIRST), |slot| slot.next.get().copied())
}
