// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's memory as owned values: [`Words`] and [`List`].
//!
//! The core uses `unsafe` in this folder and in `bitmap/layout`, and for
//! instructions of x86 in `bits/stream` and `rescale/sse2`.
#![allow(unsafe_code)]

pub(crate) mod own;
mod slots;
pub(crate) mod spans;
pub(crate) mod tree;

use core::alloc::Layout;
use core::mem;
use core::ops::Deref;
use core::ptr::{self, NonNull};
use core::slice;

use crate::error::NoMemory;
use crate::host::Memory;

/// Named here so that a test can put the types of `loom` in their place.
pub(crate) use core::hint::spin_loop;
pub(crate) use core::sync::atomic::AtomicU64;

/// Allocates a zeroed array; `Ok(None)` if it has no bytes.
fn alloc_array<T, M: Memory>(mem: &M, layout: Layout) -> Result<Option<NonNull<T>>, NoMemory> {
    if layout.size() == 0 {
        return Ok(None);
    }
    let array = mem.alloc_zeroed(layout).ok_or(NoMemory)?;
    Ok(Some(array.cast()))
}

/// The memory of `len` words. They start with a cache line, but for few words: an
/// allocator takes long for what is aligned to more than all that it hands out.
fn words_layout(len: usize) -> Result<Layout, NoMemory> {
    const LINE: usize = 64;
    let align = if len < LINE {
        align_of::<AtomicU64>()
    } else {
        LINE
    };
    let words = Layout::array::<u64>(len).and_then(|words| words.align_to(align));
    words.map_err(|_| NoMemory)
}

/// A fixed number of 64-bit words, zero at first: plain words through `&mut self`,
/// atomics through `&self`.
pub(crate) struct Words<M: Memory> {
    /// INVARIANT: `len` initialised words, allocated from `mem` with the layout of
    /// so many; or dangling, and `len` is 0.
    array: NonNull<u64>,
    len: usize,
    mem: M,
}

// SAFETY: the words are owned like a boxed slice of u64; `mem` must be Send itself.
unsafe impl<M: Memory + Send> Send for Words<M> {}
// SAFETY: through `&Words` the array is reachable as atomics only.
unsafe impl<M: Memory + Sync> Sync for Words<M> {}

impl<M: Memory> Words<M> {
    pub(crate) fn new(mem: &M, len: usize) -> Result<Self, NoMemory> {
        let array = alloc_array(mem, words_layout(len)?)?;
        Ok(Words {
            array: array.unwrap_or(NonNull::dangling()),
            len,
            mem: mem.clone(),
        })
    }

    #[inline]
    pub(crate) fn shared(&self) -> &[AtomicU64] {
        // SAFETY: `len` initialised words, alive as long as `self`; AtomicU64
        // has the size of u64, and the array its alignment; plain access needs
        // `&mut self`, which cannot exist beside this borrow.
        unsafe { slice::from_raw_parts(self.array.as_ptr().cast::<AtomicU64>(), self.len) }
    }

    #[inline]
    pub(crate) fn exclusive(&mut self) -> &mut [u64] {
        // SAFETY: `len` initialised words, alive as long as `self`, and
        // `&mut self` keeps every other access out.
        unsafe { slice::from_raw_parts_mut(self.array.as_ptr(), self.len) }
    }
}

impl<M: Memory> Drop for Words<M> {
    fn drop(&mut self) {
        if let (Ok(layout), true) = (words_layout(self.len), self.len != 0) {
            // SAFETY: allocated from `mem` with this layout, and dropped once.
            unsafe { self.mem.free(self.array.cast(), layout) };
        }
    }
}

/// A growable array.
pub(crate) struct List<T, M: Memory> {
    /// INVARIANT: room for `capacity` values, allocated from `mem` with the
    /// layout of such an array; or dangling, and `capacity` is 0.
    array: NonNull<T>,
    capacity: usize,
    /// INVARIANT: at most `capacity`. This many values are initialised.
    len: usize,
    mem: M,
}

// SAFETY: owned like a Vec<T>; `T` and `mem` must be Send themselves.
unsafe impl<T: Send, M: Memory + Send> Send for List<T, M> {}
// SAFETY: `&List` gives out `&T` only; `T` and `mem` must be Sync themselves.
unsafe impl<T: Sync, M: Memory + Sync> Sync for List<T, M> {}

impl<T, M: Memory> List<T, M> {
    pub(crate) fn new(mem: &M) -> Self {
        List {
            array: NonNull::dangling(),
            capacity: 0,
            len: 0,
            mem: mem.clone(),
        }
    }

    /// An empty list with room for `capacity` values.
    fn with_capacity(mem: &M, capacity: usize) -> Result<Self, NoMemory> {
        let mut list = List::new(mem);
        let layout = Layout::array::<T>(capacity).map_err(|_| NoMemory)?;
        if let Some(array) = alloc_array(mem, layout)? {
            list.array = array;
            list.capacity = capacity;
        }
        Ok(list)
    }

    /// Makes sure that the next `push` cannot fail.
    pub(crate) fn reserve(&mut self) -> Result<(), NoMemory> {
        const { assert!(size_of::<T>() != 0) };
        if self.len < self.capacity {
            return Ok(());
        }
        let capacity = self.capacity.saturating_mul(2).max(4);
        let mut more = List::with_capacity(&self.mem, capacity)?;
        // SAFETY: both have room for `len` values, and a new allocation does
        // not overlap an old one.
        unsafe { ptr::copy_nonoverlapping(self.array.as_ptr(), more.array.as_ptr(), self.len) };
        // The values have moved, so `self` has none any more.
        more.len = mem::take(&mut self.len);
        *self = more;
        Ok(())
    }

    pub(crate) fn push(&mut self, value: T) -> Result<(), NoMemory> {
        self.insert(self.len, value)
    }

    /// Inserts a value before the value at `index`, or at the end if `index` is
    /// beyond it.
    pub(crate) fn insert(&mut self, index: usize, value: T) -> Result<(), NoMemory> {
        self.reserve()?;
        // SAFETY: `reserve` made room for one more value, so `len` is in bounds.
        let end = unsafe { self.array.add(self.len) };
        // SAFETY: in bounds of one allocation, see above.
        unsafe { end.write(value) };
        self.len = self.len.saturating_add(1);
        if let Some(tail @ [_, ..]) = self.as_mut_slice().get_mut(index..) {
            tail.rotate_right(1);
        }
        Ok(())
    }

    /// Removes the value at `index` and keeps the order. No effect beyond the
    /// end.
    pub(crate) fn remove(&mut self, index: usize) {
        let Some(tail @ [_, ..]) = self.as_mut_slice().get_mut(index..) else {
            return;
        };
        tail.rotate_left(1);
        self.len = self.len.saturating_sub(1);
        // SAFETY: the value behind the last was initialised, and is no longer
        // one of the list's.
        let end = unsafe { self.array.add(self.len) };
        // SAFETY: as above; nobody reads it again.
        unsafe { end.drop_in_place() };
    }

    pub(crate) fn clear(&mut self) {
        let values = ptr::from_mut(self.as_mut_slice());
        self.len = 0;
        // SAFETY: they were initialised, and are no longer the list's.
        unsafe { values.drop_in_place() };
    }

    /// Removes every value and frees the memory.
    pub(crate) fn reset(&mut self) {
        *self = List::new(&self.mem);
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: `len` values are initialised, and `&mut self` is exclusive.
        unsafe { slice::from_raw_parts_mut(self.array.as_ptr(), self.len) }
    }
}

impl<T: Copy, M: Memory> List<T, M> {
    /// A list of `len` copies of `value`.
    pub(crate) fn filled(mem: &M, len: usize, value: T) -> Result<Self, NoMemory> {
        let mut list = List::with_capacity(mem, len)?;
        while list.len < len {
            list.push(value)?;
        }
        Ok(list)
    }
}

impl<T, M: Memory> Deref for List<T, M> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` values are initialised, and no `&mut self` exists.
        unsafe { slice::from_raw_parts(self.array.as_ptr(), self.len) }
    }
}

impl<T, M: Memory> Drop for List<T, M> {
    fn drop(&mut self) {
        self.clear();
        let layout = Layout::array::<T>(self.capacity);
        if let (Ok(layout), true) = (layout, self.capacity != 0) {
            // SAFETY: allocated from `mem` with this layout, and dropped once.
            unsafe { self.mem.free(self.array.cast(), layout) };
        }
    }
}

/// The bytes of `words`, as they lie in memory.
pub(crate) fn as_bytes(words: &[u64]) -> &[u8] {
    let len = size_of_val(words);
    // SAFETY: the same memory, borrowed as long; any byte of a u64 is a u8.
    unsafe { slice::from_raw_parts(words.as_ptr().cast(), len) }
}
