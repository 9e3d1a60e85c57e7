// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core's memory, from the program's allocator.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::ptr::NonNull;

use dirty_core::host::Memory;

/// The program's global allocator.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heap;

// SAFETY: the global allocator keeps what `Memory` asks for; the core never
// asks for 0 bytes.
unsafe impl Memory for Heap {
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        // SAFETY: the size is not 0, see `Memory::alloc_zeroed`.
        NonNull::new(unsafe { alloc_zeroed(layout) })
    }

    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's promise: allocated above with this layout.
        unsafe { dealloc(ptr.as_ptr(), layout) }
    }
}
