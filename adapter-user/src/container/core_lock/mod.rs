// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lock around a container's core: a reader-writer lock that a thread enters for
//! reading by two stores of its own, as into a percpu-rwsem of Linux.
//!
//! `turns` has the protocol and the proof that it excludes. `slot` has the word of each
//! thread that the protocol needs. This file lends the value.

mod slot;
mod turns;

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};

use self::turns::{Alone, Turns, NEVER, OFTEN};

/// What the protocol is built of. The loom tests replace it.
mod sync {
    pub(super) use crate::barrier::{heavy, light};
    pub(super) use std::hint::spin_loop;
    pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(super) use std::sync::{Condvar, Mutex, RwLock, RwLockWriteGuard};
    pub(super) use std::thread::sleep;

    /// How often a thread looks whether another has left before it sleeps.
    pub(super) const SPINS: u32 = 100;
}

/// A value that many threads read, or one changes.
pub(super) struct Lock<T> {
    turns: Turns,
    value: UnsafeCell<T>,
}

// SAFETY: `Turns` lends the value to any number of threads as `&T`, for which `T` must
// be `Sync`, or to one as `&mut T`, for which it must be `Send`.
unsafe impl<T: Send + Sync> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// Threads read without the lock's word if the kernel has membarrier(2), and
    /// through a `RwLock` if it has not.
    pub(super) fn new(value: T) -> Self {
        match crate::barrier::available() {
            true => Self::opens_after(OFTEN, value),
            false => Self::opens_after(NEVER, value),
        }
    }

    fn opens_after(entries: u64, value: T) -> Self {
        Lock {
            turns: Turns::new(entries),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits until nobody changes the value, and calls `act` with it.
    ///
    /// `act` must not change the value through the lock, and should not read it through
    /// the lock either: that waits forever if another thread waits to change it.
    #[inline]
    pub(super) fn read<R>(&self, act: impl FnOnce(&T) -> R) -> R {
        self.turns.share(|| {
            // SAFETY: while `Turns` runs this there is no `Alone`, and only an `Alone`
            // lends the value as `&mut T`. `R` cannot borrow the value.
            act(unsafe { &*self.value.get() })
        })
    }

    /// Waits until nobody else has the value.
    pub(super) fn write(&self) -> Writer<'_, T> {
        let alone = self.turns.exclude();
        Writer {
            value: &self.value,
            _alone: alone,
        }
    }

    pub(super) fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

/// The value, to change.
pub(super) struct Writer<'a, T> {
    value: &'a UnsafeCell<T>,
    _alone: Alone<'a>,
}

impl<T> Deref for Writer<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: as in `deref_mut`; this `Writer` lends no `&mut T` as long as it is
        // borrowed here.
        unsafe { &*self.value.get() }
    }
}

impl<T> DerefMut for Writer<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: while there is an `Alone` its turns run nothing in `share`, and there is
        // no other `Alone`. So nobody else has a reference to the value. What this returns
        // borrows `self`, which has the `Alone`.
        unsafe { &mut *self.value.get() }
    }
}

#[cfg(test)]
mod tests;
