// SPDX-License-Identifier: GPL-2.0-only
//! Boxes and vectors in memory of kmalloc. Every allocation can fail.

use core::alloc::Layout;
use core::ffi::c_void;
use core::marker::PhantomData;
use core::mem::{self, ManuallyDrop};
use core::ops::{Deref, DerefMut};
use core::ptr::{self, NonNull};
use core::slice;

extern "C" {
    fn dirty_kmalloc(size: usize, account: bool) -> *mut c_void;
    fn dirty_free(memory: *mut c_void);
}

/// Which memory cgroup pays.
#[derive(Clone, Copy)]
pub struct Flags {
    account: bool,
}

pub mod flags {
    use super::Flags;

    /// Nobody pays.
    pub const GFP_KERNEL: Flags = Flags { account: false };
    /// The caller's cgroup pays. If it has no room, the allocation fails, and nothing
    /// is killed for it.
    pub const GFP_KERNEL_ACCOUNT: Flags = Flags { account: true };
}

#[derive(Clone, Copy, Debug)]
pub struct AllocError;

/// No element has this index.
#[derive(Clone, Copy, Debug)]
pub struct RemoveError;

/// Memory that is aligned for a `T`: kmalloc aligns to 8.
fn allocate<T>(layout: Layout, flags: Flags) -> Result<NonNull<T>, AllocError> {
    const { assert!(mem::align_of::<T>() <= 8 && mem::size_of::<T>() != 0) };
    // SAFETY: C takes any size.
    let memory = unsafe { dirty_kmalloc(layout.size(), flags.account) };
    NonNull::new(memory.cast()).ok_or(AllocError)
}

/// A value in memory of its own.
pub struct KBox<T>(NonNull<T>, PhantomData<T>);

impl<T> KBox<T> {
    pub fn new(value: T, flags: Flags) -> Result<Self, AllocError> {
        let memory = allocate::<T>(Layout::new::<T>(), flags)?;
        // SAFETY: fresh memory, large enough and aligned.
        unsafe { memory.write(value) };
        Ok(KBox(memory, PhantomData))
    }

    pub fn into_raw(this: Self) -> *mut T {
        ManuallyDrop::new(this).0.as_ptr()
    }

    /// # Safety
    ///
    /// `raw` came from `into_raw`, and is not used any more.
    pub unsafe fn from_raw(raw: *mut T) -> Self {
        // SAFETY: by contract it is a box's, and so not null.
        KBox(unsafe { NonNull::new_unchecked(raw) }, PhantomData)
    }
}

impl<T> Drop for KBox<T> {
    fn drop(&mut self) {
        // SAFETY: the box owns the value, and its memory.
        unsafe { self.0.drop_in_place() };
        // SAFETY: it came from `dirty_kmalloc`.
        unsafe { dirty_free(self.0.as_ptr().cast()) };
    }
}

/// A vector that may fail to grow.
pub struct KVec<T> {
    /// INVARIANT: room for `capacity` values, of which `len` exist; dangling if
    /// `capacity` is 0.
    values: NonNull<T>,
    capacity: usize,
    len: usize,
}

// SAFETY: the vector owns its values.
unsafe impl<T: Send> Send for KVec<T> {}

impl<T> Default for KVec<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> KVec<T> {
    pub const fn new() -> Self {
        KVec {
            values: NonNull::dangling(),
            capacity: 0,
            len: 0,
        }
    }

    /// A vector of `len` copies.
    pub fn from_elem(value: T, len: usize, flags: Flags) -> Result<Self, AllocError>
    where
        T: Copy,
    {
        let mut all = Self::new();
        all.resize(len, value, flags)?;
        Ok(all)
    }

    /// Makes room for `more` values beyond those that exist.
    pub fn reserve(&mut self, more: usize, flags: Flags) -> Result<(), AllocError> {
        let need = self.len.checked_add(more).ok_or(AllocError)?;
        if need <= self.capacity {
            return Ok(());
        }
        let capacity = need.max(self.capacity.saturating_mul(2));
        let layout = Layout::array::<T>(capacity).map_err(|_| AllocError)?;
        let fresh = allocate::<T>(layout, flags)?;
        // SAFETY: `fresh` has room for more than `len` values, and is other memory.
        unsafe { ptr::copy_nonoverlapping(self.values.as_ptr(), fresh.as_ptr(), self.len) };
        self.free();
        self.values = fresh;
        self.capacity = capacity;
        Ok(())
    }

    pub fn push(&mut self, value: T, flags: Flags) -> Result<(), AllocError> {
        self.reserve(1, flags)?;
        // SAFETY: room for one more value.
        unsafe { self.values.add(self.len).write(value) };
        self.len += 1;
        Ok(())
    }

    pub fn remove(&mut self, at: usize) -> Result<T, RemoveError> {
        if at >= self.len {
            return Err(RemoveError);
        }
        // SAFETY: `at` is the index of a value.
        let place = unsafe { self.values.as_ptr().add(at) };
        // SAFETY: as above. The move below overwrites it, or the new length leaves it out.
        let value = unsafe { place.read() };
        self.len -= 1;
        // SAFETY: these are the values after it.
        unsafe { ptr::copy(place.add(1), place, self.len - at) };
        Ok(value)
    }

    /// Drops values from the end, or adds copies there.
    pub fn resize(&mut self, len: usize, value: T, flags: Flags) -> Result<(), AllocError>
    where
        T: Copy,
    {
        self.reserve(len.saturating_sub(self.len), flags)?;
        for at in self.len..len {
            // SAFETY: there is room for `len` values.
            unsafe { self.values.add(at).write(value) };
        }
        self.len = len;
        Ok(())
    }

    /// The values exist elsewhere, or are dropped.
    fn free(&mut self) {
        if self.capacity != 0 {
            // SAFETY: it came from `dirty_kmalloc`.
            unsafe { dirty_free(self.values.as_ptr().cast()) };
        }
    }
}

impl<T> Deref for KVec<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: so many values exist.
        unsafe { slice::from_raw_parts(self.values.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for KVec<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the vector is borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.values.as_ptr(), self.len) }
    }
}

impl<T> Drop for KVec<T> {
    fn drop(&mut self) {
        // SAFETY: the vector owns the values, which nobody uses any more.
        unsafe { ptr::drop_in_place(&mut **self as *mut [T]) };
        self.free();
    }
}
