// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that is counted, and an allocation that fails on command.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_core::host::Memory;

/// A fault that is due once: the n-th time from when it is armed.
#[derive(Debug, Default)]
pub(crate) struct Nth(AtomicU64);

impl Nth {
    /// The `n`-th from now fails; 0 for none.
    pub(crate) fn arm(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// Whether an armed fault has not come to pass.
    pub(crate) fn pending(&self) -> bool {
        self.0.load(Relaxed) != 0
    }

    /// Whether the next one fails.
    pub(crate) fn is_next(&self) -> bool {
        self.0.load(Relaxed) == 1
    }

    /// Counts one; true if it has to fail.
    pub(crate) fn strikes(&self) -> bool {
        let left = self.0.load(Relaxed);
        self.0.store(left.saturating_sub(1), Relaxed);
        left == 1
    }
}

/// A handle to memory; clones count together.
#[derive(Clone, Debug, Default)]
pub(crate) struct TestMemory(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    live: Mutex<BTreeMap<usize, Layout>>,
    fault: Nth,
}

impl TestMemory {
    /// Which allocation fails.
    pub(crate) fn fault(&self) -> &Nth {
        &self.0.fault
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<usize, Layout>> {
        self.0.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocations that were not given back.
    pub(crate) fn live(&self) -> usize {
        self.lock().len()
    }

    /// Their bytes.
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
