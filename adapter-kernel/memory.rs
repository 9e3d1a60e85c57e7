// SPDX-License-Identifier: GPL-2.0-only
//! The core's memory: the kernel's, charged to the caller's memory cgroup.

use core::alloc::Layout;
use core::ptr::NonNull;

use dirty_core::host::Memory;

use crate::sys;

#[derive(Clone, Copy)]
pub(crate) struct KernelMemory;

// SAFETY: `dirty_alloc` zeroes memory and gives it to nobody else until it is
// freed. Both of its allocators align it to the largest power of two, up to a page,
// that divides the size; the padding makes that at least the layout's alignment,
// and more than a page is refused.
unsafe impl Memory for KernelMemory {
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        if layout.align() > kernel::page::PAGE_SIZE {
            return None;
        }
        NonNull::new(sys::dirty_alloc(layout.pad_to_align().size()).cast())
    }

    unsafe fn free(&self, ptr: NonNull<u8>, _layout: Layout) {
        // SAFETY: by contract it came from `alloc_zeroed`, and nobody uses it any
        // more.
        unsafe { sys::dirty_free(ptr.as_ptr().cast()) };
    }
}
