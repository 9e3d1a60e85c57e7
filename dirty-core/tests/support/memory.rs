// SPDX-License-Identifier: MIT OR Apache-2.0
//! An allocator that counts what it hands out, and fails on command.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_core::host::Memory;

/// A fault that strikes once: the n-th time after it was armed.
#[derive(Debug, Default)]
pub(crate) struct Nth(AtomicU64);

impl Nth {
    /// Makes the `n`-th time from now on fail; 0 for none.
    pub(crate) fn arm(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// Whether it is armed and has not struck yet.
    pub(crate) fn pending(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    /// Whether it strikes the next time.
    pub(crate) fn is_next(&self) -> bool {
        self.0.load(Relaxed) == 1
    }

    /// Counts one time. Returns whether it strikes.
    pub(crate) fn strikes(&self) -> bool {
        let left = self.0.load(Relaxed);
        self.0.store(left.saturating_sub(1), Relaxed);
        left == 1
    }
}

/// A handle to the allocator; clones share their counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct TestMemory(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    live: Mutex<BTreeMap<usize, Layout>>,
    fault: Nth,
}

impl TestMemory {
    /// The fault that allocations meet.
    pub(crate) fn fault(&self) -> &Nth {
        &self.0.fault
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Layout>> {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of allocations that were not freed.
    pub(crate) fn live(&self) -> usize {
        self.lock().len()
    }

    /// The bytes of the allocations that were not freed.
    pub(crate) fn bytes(&self) -> usize {
        self.lock().values().map(Layout::size).sum()
    }
}

// SAFETY: `alloc_zeroed` of the standard library keeps the same promise; no
// address is given out twice, because memory goes back only in `free`.
unsafe impl Memory for TestMemory {
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        assert_ne!(layout.size(), 0, "an allocation of nothing");
        if self.0.fault.strikes() {
            return None;
        }
        // SAFETY: the size is not 0.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        self.lock().insert(ptr.as_ptr() as usize, layout);
        Some(ptr)
    }

    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout) {
        let known = self.lock().remove(&(ptr.as_ptr() as usize));
        assert_eq!(known, Some(layout), "freed twice, or as something else");
        // SAFETY: allocated with this layout, and not freed since.
        unsafe { dealloc(ptr.as_ptr(), layout) };
    }
}
