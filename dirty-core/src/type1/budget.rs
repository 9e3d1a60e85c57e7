// SPDX-License-Identifier: MIT OR Apache-2.0
//! The memory of bitmaps, which may have a limit (D5).

use crate::bitmap::Bitmap;
use crate::error::Error;
use crate::host::Memory;
use crate::uapi::DIRTY_BITMAP_PAGES_MAX;

/// Makes and frees the bitmaps of a container, and counts their bytes.
pub(super) struct Budget<M: Memory> {
    mem: M,
    /// The most bytes.
    limit: Option<u64>,
    /// The bytes of all bitmaps. INVARIANT: at most `limit`.
    used: u64,
}

impl<M: Memory> Budget<M> {
    pub(super) fn new(mem: &M, limit: Option<u64>) -> Self {
        Budget {
            mem: mem.clone(),
            limit,
            used: 0,
        }
    }

    /// The bytes of all bitmaps.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// A clean bitmap of `npages` pages, without pinned bits.
    pub(super) fn bitmap(&mut self, npages: u64) -> Result<Bitmap<M>, Error> {
        if npages > DIRTY_BITMAP_PAGES_MAX {
            return Err(Error::TooManyPages);
        }
        let total = self.with(Bitmap::<M>::bytes(npages))?;
        let bitmap = Bitmap::new(&self.mem, npages)?;
        self.used = total;
        Ok(bitmap)
    }

    /// Gives a bitmap pinned bits, unless it has them.
    #[inline]
    pub(super) fn reserve_pins(&mut self, bitmap: &mut Bitmap<M>) -> Result<(), Error> {
        match bitmap.has_pins_reserved() {
            true => Ok(()),
            false => self.add_pins(bitmap),
        }
    }

    #[cold]
    #[inline(never)]
    fn add_pins(&mut self, bitmap: &mut Bitmap<M>) -> Result<(), Error> {
        let total = self.with(Bitmap::<M>::pinned_bytes(bitmap.npages()))?;
        bitmap.reserve_pins(&self.mem)?;
        self.used = total;
        Ok(())
    }

    /// Frees the pinned bits of a bitmap, if it has them. No page may be pinned.
    pub(super) fn free_pins(&mut self, bitmap: &mut Bitmap<M>) {
        if bitmap.has_pins_reserved() {
            bitmap.free_pins();
            let bytes = Bitmap::<M>::pinned_bytes(bitmap.npages());
            self.used = self.used.saturating_sub(bytes);
        }
    }

    pub(super) fn free(&mut self, mut bitmap: Bitmap<M>) {
        self.free_pins(&mut bitmap);
        let bytes = Bitmap::<M>::bytes(bitmap.npages());
        self.used = self.used.saturating_sub(bytes);
    }

    /// The bytes of all bitmaps with `more` bytes, unless they exceed the limit.
    fn with(&self, more: u64) -> Result<u64, Error> {
        let total = self.used.saturating_add(more);
        match self.limit.is_some_and(|limit| total > limit) {
            true => Err(Error::BitmapBudget),
            false => Ok(total),
        }
    }
}
