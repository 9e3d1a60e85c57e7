// SPDX-License-Identifier: MIT OR Apache-2.0
//! The memory of the core, from the global allocator.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::ptr::NonNull;

use dirty_core::host::Memory;

/// The global allocator, as the memory of a [`dirty_core::Container`].
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Heap;

// SAFETY: what `alloc_zeroed` returns is zeroed memory of the layout's size and
// alignment that nobody else uses until `dealloc`, which is what `Memory` demands.
unsafe impl Memory for Heap {
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        if layout.size() == 0 {
            return None; // the core never asks for it
        }
        // SAFETY: the size is not 0.
        NonNull::new(unsafe { alloc_zeroed(layout) })
    }

    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller promises that `alloc_zeroed` returned `ptr` for this
        // layout, and that nobody uses it any more.
        unsafe { dealloc(ptr.as_ptr(), layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_are_no_memory() {
        let layout = Layout::from_size_align(0, 8).expect("a layout");
        assert!(Heap.alloc_zeroed(layout).is_none());
    }
}
