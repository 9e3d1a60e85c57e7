// SPDX-License-Identifier: MIT OR Apache-2.0
//! vm-memory's view of dirty bits: `GuestMemoryMmap<DirtyBits>` marks each write
//! that goes through it.

use ::vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use ::vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::dirty_bits::{DirtyBits, BASE_PAGE};
use crate::error::TrackError;
use crate::guest::{Slot, Tracker};

/// Dirty bits from some byte on: what vm-memory hands out with a piece of a
/// region.
#[derive(Clone, Copy, Debug)]
pub struct BitsSlice<'a> {
    bits: &'a DirtyBits,
    start: usize,
}

impl<'a> BitsSlice<'a> {
    /// The bits that it is a part of.
    #[must_use]
    pub fn bits(&self) -> &'a DirtyBits {
        self.bits
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBits {
    type S = BitsSlice<'a>;
}

impl Bitmap for DirtyBits {
    /// Marks memory beyond the end as vm-memory's own bitmap does: not at all.
    fn mark_dirty(&self, offset: usize, len: usize) {
        let _ = self.mark(offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(offset as u64)
    }

    fn slice_at(&self, offset: usize) -> BitsSlice<'_> {
        BitsSlice {
            bits: self,
            start: offset,
        }
    }
}

impl<'a> WithBitmapSlice<'_> for BitsSlice<'a> {
    type S = BitsSlice<'a>;
}

impl BitmapSlice for BitsSlice<'_> {}

impl<'a> Bitmap for BitsSlice<'a> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bits.mark_dirty(self.start.saturating_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bits.dirty_at(self.start.saturating_add(offset))
    }

    fn slice_at(&self, offset: usize) -> BitsSlice<'a> {
        BitsSlice {
            bits: self.bits,
            start: self.start.saturating_add(offset),
        }
    }
}

impl NewBitmap for DirtyBits {
    /// Bits for `len` bytes in pages of 4 KiB.
    ///
    /// # Panics
    ///
    /// Without memory for them: the trait has no other way to say so.
    fn with_len(len: usize) -> Self {
        let bits = DirtyBits::new(len as u64, BASE_PAGE);
        bits.unwrap_or_else(|cause| panic!("{cause}"))
    }
}

impl Tracker {
    /// Adds each region of a guest's memory as a slot, numbered from 0 on in
    /// the order of their addresses. Every write that goes through `memory` is
    /// tracked then.
    ///
    /// ```
    /// use adapter_user::guest::{Report, Tracker};
    /// use adapter_user::DirtyBits;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    ///
    /// let ram = [(GuestAddress(0), 1 << 20)];
    /// let memory = GuestMemoryMmap::<DirtyBits>::from_ranges(&ram)?;
    /// let tracker = Tracker::new(None);
    /// tracker.add_memory(&memory)?;
    ///
    /// tracker.start();
    /// memory.write_obj(1u8, GuestAddress(0x3000))?;
    /// let mut report = Report::new();
    /// tracker.take(&mut report)?;
    /// assert_eq!(report.slot(0).unwrap()[0], 1 << 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// See [`add`](Tracker::add); regions before the one at fault stay.
    pub fn add_memory<M>(&self, memory: &M) -> Result<(), TrackError>
    where
        M: GuestMemoryBackend,
        M::R: GuestMemoryRegion<B = DirtyBits>,
    {
        for (id, region) in (0..).zip(memory.iter()) {
            let gpa = region.start_addr();
            let host = memory.get_host_address(gpa).ok();
            self.add(Slot {
                id,
                gpa: gpa.raw_value(),
                host: host.map(|at| at as u64),
                bits: region.bitmap().bits().clone(),
            })?;
        }
        Ok(())
    }
}
