// SPDX-License-Identifier: GPL-2.0-only
//! A value behind a mutex. The kernel crate's own mutex has no way to stop waiting
//! when the caller is killed.

use core::cell::UnsafeCell;
use core::ops::{Deref, DerefMut};

use crate::sys;

pub(crate) struct Lock<T> {
    /// INVARIANT: valid, and this lock's own.
    mutex: *mut sys::Mutex,
    value: UnsafeCell<T>,
}

// SAFETY: it owns the value, and the mutex may be used by any thread.
unsafe impl<T: Send> Send for Lock<T> {}
// SAFETY: the mutex lets one thread at a time have the value.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// `None` if there is no memory.
    pub(crate) fn new(value: T) -> Option<Self> {
        let mutex = sys::dirty_mutex_new();
        let value = UnsafeCell::new(value);
        // Made only then: dropping a lock frees its mutex.
        (!mutex.is_null()).then(|| Lock { mutex, value })
    }

    pub(crate) fn lock(&self) -> Guard<'_, T> {
        // SAFETY: valid, see `mutex`. No caller holds it: guards are not nested.
        unsafe { sys::dirty_mutex_lock(self.mutex) };
        Guard(self)
    }

    /// `None` if the caller is being killed.
    pub(crate) fn lock_killable(&self) -> Option<Guard<'_, T>> {
        // SAFETY: as in `lock`.
        let locked = unsafe { sys::dirty_mutex_lock_killable(self.mutex) };
        // Made only then: dropping a guard unlocks, and somebody else has the lock.
        locked.then(|| Guard(self))
    }
}

impl<T> Drop for Lock<T> {
    fn drop(&mut self) {
        // SAFETY: valid, see `mutex`, and nobody has it: a guard borrows the lock.
        unsafe { sys::dirty_mutex_free(self.mutex) };
    }
}

/// The value, while this thread has the mutex.
pub(crate) struct Guard<'a, T>(&'a Lock<T>);

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: this thread has the mutex, and this guard is not borrowed
        // exclusively.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this thread has the mutex, and this guard is borrowed exclusively.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: this thread has the mutex.
        unsafe { sys::dirty_mutex_unlock(self.0.mutex) };
    }
}
