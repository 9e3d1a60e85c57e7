// SPDX-License-Identifier: GPL-2.0-only
//! The core's memory: kvmalloc, charged to the caller's memory cgroup.

use core::alloc::Layout;
use core::ptr::NonNull;

use dirty_core::host::Memory;
use kernel::alloc::allocator::KVmalloc;
use kernel::alloc::flags::{__GFP_ZERO, GFP_KERNEL_ACCOUNT};
use kernel::alloc::{Allocator, NumaNode};

#[derive(Clone, Copy)]
pub(crate) struct KernelMemory;

// SAFETY: KVmalloc gives memory of this size and alignment to nobody else until
// it is freed, and zeroes it.
unsafe impl Memory for KernelMemory {
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        let flags = GFP_KERNEL_ACCOUNT | __GFP_ZERO;
        let memory = KVmalloc::alloc(layout, flags, NumaNode::NO_NODE);
        memory.ok().map(NonNull::cast)
    }

    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: by contract it came from `alloc_zeroed` with this layout, and
        // nobody uses it any more.
        unsafe { KVmalloc::free(ptr, layout) };
    }
}
