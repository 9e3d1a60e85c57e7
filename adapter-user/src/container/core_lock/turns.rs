// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who may be inside: any number of threads that share, or one that excludes.
//!
//! # Two ways in
//!
//! A thread shares **by turn**, which is a `RwLock`, or **by its slot**, which costs two
//! plain stores and no atomic read-modify-write. The slots are open or closed.
//!
//! - To enter by its slot, a thread stores this lock's key there (E1), has the light
//!   barrier (E2), and loads `open` (E3). If that is true it is inside. If not, it
//!   leaves and enters by turn.
//! - To leave, it stores 0 in its slot (L1), has the light barrier (L2), and loads
//!   `open` (L3). If that is false it wakes whoever waits.
//! - To exclude, a thread takes the `RwLock` for writing. If the slots are open it
//!   stores false in `open` (X1), has the heavy barrier (X2), and waits for each slot
//!   until it has another value than the key (X3). The slots stay closed afterwards.
//! - A thread that has entered by turn opens the slots (O) if many have entered by turn
//!   since somebody excluded. So an exclusion pays for a heavy barrier only if the
//!   entries before it have saved as much: with membarrier(2) it takes a few
//!   microseconds and interrupts every running thread of the process, guest CPUs too.
//!
//! # Why nobody is inside beside whoever excludes
//!
//! Those who entered by turn are excluded by the `RwLock`. O needs the `RwLock` too, so
//! `open` does not change to true between X1 and the end of the exclusion.
//!
//! Take a thread T that enters by its slot. The heavy barrier X2 makes T execute a full
//! barrier at some point P of its program, between the start and the end of X2; the
//! light barrier E2 keeps the compiler from moving E1 and E3 across each other. E2 comes
//! before P, or after it.
//!
//! - **E2 comes before P.** Then E1, and before it the `next` that leads to the slot, are
//!   visible to X3. X3 waits until it loads what T stored after E1: 0, or the key of
//!   another lock. T's stores to its slot are releases, X3 is an acquire, and T stores
//!   nothing there between E1 and L1. So all that T did inside happens before the
//!   exclusion goes on. That includes its marks, and the writes to guest memory that
//!   came before them.
//! - **E2 comes after P.** Then E3 loads false as X1 stored it, and T does not get in.
//!   Or E3 loads true as a later O stored it. O's thread had entered by turn after the
//!   exclusion ended, O is a release and E3 an acquire. So the exclusion happens before
//!   all that T does inside: T finds the bits that it cleared clear.
//!
//! In both cases the section of T and the exclusion have an order, as with a `RwLock`.
//! So a mark needs no order of its own: it may be relaxed, and it may skip a bit that is
//! set. A write that comes before its mark is in the copy that follows the report which
//! has the mark.
//!
//! # Why whoever waits is woken
//!
//! By the same argument with L1, L2 and L3 for E1, E2 and E3: either X3 sees the slot
//! left, or L3 loads false and T takes the mutex `leaving`. X3 looks at the slot under
//! that mutex before it sleeps. If it does so first, it sleeps when T notifies it; if
//! T is first, it sees L1.
//!
//! A thread that was preempted inside keeps whoever excludes asleep until it runs again,
//! as with a `RwLock`. Nobody waits by spinning for longer than a moment, so a waiter of
//! a higher priority leaves the processor to the thread that it waits for.
//!
//! # If there is no heavy barrier
//!
//! If membarrier(2) is not to be had when the lock is made, the slots never open, and
//! the lock is a `RwLock`. It may be refused later, by a seccomp filter that came
//! since. Then X2 is a sleep, once, and the slots never open again. This is the only
//! step that needs more than the memory model: that a store which a processor has
//! executed is visible to the others after [`GRACE`], and that loads after it see X1.

use std::ptr;
use std::sync::PoisonError;
use std::time::Duration;

use super::slot::{self, Slot};
use super::sync::*;

/// So many entries by turn have lost about as much time as a heavy barrier takes on a
/// large machine, some 20 microseconds.
pub(crate) const OFTEN: u64 = 1024;
/// The slots never open.
pub(crate) const NEVER: u64 = u64::MAX;

/// How long a store gets to reach the other processors. It takes less than a
/// microsecond.
const GRACE: Duration = Duration::from_millis(10);

/// A reader-writer lock around nothing.
pub(crate) struct Turns {
    /// Whether threads may enter by their slots. Only a thread that has `turn` changes
    /// it: one that shares to true, and one that excludes to false.
    open: AtomicBool,
    /// How many entries by turn open the slots.
    opens_after: AtomicU64,
    /// About how many entries by turn there were since somebody excluded.
    by_turn: AtomicU64,
    turn: RwLock<()>,
    leaving: Mutex<()>,
    left: Condvar,
}

/// A thread that is inside by its slot, and leaves when this is dropped.
struct BySlot<'a>(&'a Turns, &'static Slot);

/// A thread that excludes.
pub(crate) struct Alone<'a>(#[allow(dead_code)] RwLockWriteGuard<'a, ()>);

impl Turns {
    pub(crate) fn new(opens_after: u64) -> Self {
        Turns {
            open: AtomicBool::new(false),
            opens_after: AtomicU64::new(opens_after),
            by_turn: AtomicU64::new(0),
            turn: RwLock::new(()),
            leaving: Mutex::new(()),
            left: Condvar::new(),
        }
    }

    /// What a slot has whose thread is inside of this lock. It is not 0, and no other
    /// lock has it as long as somebody is inside, because that borrows the lock.
    #[inline]
    fn key(&self) -> u64 {
        ptr::from_ref(self) as u64
    }

    /// Waits until nobody excludes, and calls `act` while nobody does.
    #[inline]
    pub(crate) fn share<R>(&self, act: impl FnOnce() -> R) -> R {
        match self.enter_by_slot() {
            Some(_inside) => act(),
            None => self.share_by_turn(act),
        }
    }

    #[inline]
    fn enter_by_slot(&self) -> Option<BySlot<'_>> {
        // Whoever cannot get in must not touch its slot: it would have to wake.
        if !self.open.load(Ordering::Relaxed) {
            return None;
        }
        let slot = slot::own()?;
        if slot.inside.load(Ordering::Relaxed) != 0 {
            return None; // inside another lock, or of this one once more
        }
        slot.inside.store(self.key(), Ordering::Release); // E1
        light(); // E2
        let inside = BySlot(self, slot);
        // E3. If it is false, `inside` leaves.
        self.open.load(Ordering::Acquire).then_some(inside)
    }

    #[cold]
    fn wake(&self) {
        drop(self.leaving.lock().unwrap_or_else(PoisonError::into_inner));
        self.left.notify_one();
    }

    #[cold]
    #[inline(never)]
    fn share_by_turn<R>(&self, act: impl FnOnce() -> R) -> R {
        let _turn = self.turn.read().unwrap_or_else(PoisonError::into_inner);
        self.count_entry();
        act()
    }

    /// Opens the slots if there were many entries, for a thread that is inside by turn.
    fn count_entry(&self) {
        // Some may be lost, which does no harm.
        let entries = self.by_turn.load(Ordering::Relaxed).saturating_add(1);
        self.by_turn.store(entries, Ordering::Relaxed);
        if entries >= self.opens_after.load(Ordering::Relaxed) {
            slot::claim();
            if !self.open.load(Ordering::Relaxed) {
                self.open.store(true, Ordering::Release); // O
            }
        }
    }

    /// Waits until nobody else is inside, and lets nobody in.
    pub(crate) fn exclude(&self) -> Alone<'_> {
        let turn = self.turn.write().unwrap_or_else(PoisonError::into_inner);
        self.by_turn.store(0, Ordering::Relaxed);
        if self.open.load(Ordering::Relaxed) {
            self.close_slots();
        }
        Alone(turn)
    }

    #[cold]
    fn close_slots(&self) {
        self.open.store(false, Ordering::Relaxed); // X1
        if heavy().is_err() {
            self.opens_after.store(NEVER, Ordering::Relaxed);
            sleep(GRACE);
        } // X2
        for slot in slot::all() {
            self.wait_for(slot); // X3
        }
    }

    fn wait_for(&self, slot: &Slot) {
        let is_inside = || slot.inside.load(Ordering::Acquire) == self.key();
        for _ in 0..SPINS {
            if !is_inside() {
                return;
            }
            spin_loop();
        }
        let mut leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        while is_inside() {
            let woken = self.left.wait(leaving);
            leaving = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for BySlot<'_> {
    #[inline]
    fn drop(&mut self) {
        let BySlot(turns, slot) = self;
        slot.inside.store(0, Ordering::Release); // L1
        light(); // L2
        if !turns.open.load(Ordering::Relaxed) {
            turns.wake(); // L3
        }
    }
}
