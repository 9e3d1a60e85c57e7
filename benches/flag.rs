// SPDX-License-Identifier: MIT OR Apache-2.0
//! The least bitmap that can be switched on.

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};

/// A bitmap of nothing but a flag that says whether to mark. It is off. Its slice is
/// vm-memory's own: a reference and an offset, as in every bitmap that finds a page.
#[derive(Default)]
pub(crate) struct Flag(AtomicU64);

impl Flag {
    pub(crate) const NAME: &'static str = "a flag";
}

impl<'a> WithBitmapSlice<'a> for Flag {
    type S = RefSlice<'a, Flag>;
}

impl Bitmap for Flag {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.0.load(Ordering::Relaxed) != 0 {
            mark(self, offset, len);
        }
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> RefSlice<'_, Flag> {
        RefSlice::new(self, offset)
    }
}

/// It uses what it is called with, so that the compiler keeps the slice.
#[cold]
#[inline(never)]
fn mark(flag: &Flag, offset: usize, len: usize) {
    flag.0.store(offset as u64 ^ len as u64, Ordering::Relaxed);
}

impl NewBitmap for Flag {
    fn with_len(_len: usize) -> Flag {
        Flag::default()
    }
}
