// SPDX-License-Identifier: MIT OR Apache-2.0
//! A value in memory of its own, which stays at its place until it is dropped.
#![allow(unsafe_code)]

use core::alloc::Layout;
use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};
use core::ptr::{self, NonNull};

use crate::error::NoMemory;
use crate::host::Memory;

/// INVARIANT: `value` is initialised, in memory from `mem` with its layout, and
/// reachable only through this `Own` and what is borrowed from it.
pub(crate) struct Own<T, M: Memory> {
    value: NonNull<T>,
    mem: M,
}

// SAFETY: owned like a Box<T>; `T` and `mem` must be Send themselves.
unsafe impl<T: Send, M: Memory + Send> Send for Own<T, M> {}
// SAFETY: `&Own` gives out `&T` only; `T` and `mem` must be Sync themselves.
unsafe impl<T: Sync, M: Memory + Sync> Sync for Own<T, M> {}

impl<T, M: Memory> Own<T, M> {
    /// Makes a value in its place, if there is memory.
    #[inline]
    pub(crate) fn new(mem: &M, value: impl FnOnce() -> T) -> Result<Self, NoMemory> {
        const { assert!(size_of::<T>() != 0) };
        let place = mem.alloc_zeroed(Layout::new::<T>()).ok_or(NoMemory)?;
        let place = place.cast::<T>();
        // SAFETY: fresh memory of T's size and alignment.
        unsafe { place.write(value()) };
        Ok(Own {
            value: place,
            mem: mem.clone(),
        })
    }

    /// Where the value is.
    #[inline]
    pub(crate) fn as_ptr(&self) -> NonNull<T> {
        self.value
    }

    /// Gives the value up to whoever calls [`from_raw`](Own::from_raw).
    #[inline]
    pub(crate) fn into_raw(self) -> NonNull<T> {
        let own = ManuallyDrop::new(self);
        // SAFETY: read once, since `own` is never dropped.
        drop(unsafe { ptr::read(&own.mem) });
        own.value
    }

    /// # Safety
    ///
    /// `value` came from [`into_raw`](Own::into_raw) of a value that was made with
    /// `mem` or a clone of it, and is not used by anybody else any more.
    #[inline]
    pub(crate) unsafe fn from_raw(value: NonNull<T>, mem: &M) -> Self {
        let mem = mem.clone();
        Own { value, mem }
    }
}

impl<T, M: Memory> Deref for Own<T, M> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: by the invariant; borrowed as long as `self`.
        unsafe { self.value.as_ref() }
    }
}

impl<T, M: Memory> DerefMut for Own<T, M> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: by the invariant; borrowed as long as `self`, exclusively.
        unsafe { self.value.as_mut() }
    }
}

impl<T, M: Memory> Drop for Own<T, M> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: initialised, and dropped once.
        unsafe { self.value.drop_in_place() };
        // SAFETY: allocated from `mem` with this layout, and used no more.
        unsafe { self.mem.free(self.value.cast(), Layout::new::<T>()) };
    }
}
