// SPDX-License-Identifier: MIT OR Apache-2.0
//! The memory of the core, from the global allocator.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::ptr::NonNull;

use dirty_core::host::Memory;

/// The global allocator, as the memory of a [`dirty_core::Container`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Heap;

// SAFETY: `alloc_zeroed` returns zeroed memory of the layout's size and alignment
// that nobody else uses until `dealloc`, which is what `Memory` demands. The core
// never asks for 0 bytes.
unsafe impl Memory for Heap {
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        // SAFETY: the size is not 0: `Memory::alloc_zeroed` promises it.
        NonNull::new(unsafe { alloc_zeroed(layout) })
    }

    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller promises that `alloc_zeroed` returned `ptr` for this
        // layout, and that nobody uses it any more.
        unsafe { dealloc(ptr.as_ptr(), layout) }
    }
}
