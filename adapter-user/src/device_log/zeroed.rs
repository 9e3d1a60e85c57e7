// SPDX-License-Identifier: MIT OR Apache-2.0
//! Zeroed words that take no memory before they are used.

use std::alloc::{alloc_zeroed, Layout};

use crate::atomic::AtomicU64;

/// Allocates `count` zeroed words, or returns `None` if there is no memory. A large
/// allocation comes from the kernel, which provides each page when it is first
/// written.
pub(super) fn zeroed(count: usize) -> Option<Box<[AtomicU64]>> {
    if count == 0 {
        return Some(Box::default());
    }
    let layout = Layout::array::<AtomicU64>(count).ok()?;
    // SAFETY: `count` is not 0, so the layout has a size.
    let start = unsafe { alloc_zeroed(layout) }.cast::<AtomicU64>();
    if start.is_null() {
        return None;
    }
    let words = std::ptr::slice_from_raw_parts_mut(start, count);
    // SAFETY: the global allocator returned `words` for the layout of `count` words,
    // nobody else has them, and a word of zeros is a valid `AtomicU64`.
    Some(unsafe { Box::from_raw(words) })
}
