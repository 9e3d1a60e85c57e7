// SPDX-License-Identifier: MIT OR Apache-2.0
//! vm-memory's traits for [`DirtyBits`]: `GuestMemoryMmap<DirtyBits>` marks every
//! write that goes through it.

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::slots::Slot;
use super::tracker::Tracker;
use crate::dirty_bits::{DirtyBits, BASE_PAGE};
use crate::error::TrackError;

/// The dirty bits of a region from some byte on. vm-memory hands one out with each
/// piece of a region.
#[derive(Clone, Copy, Debug)]
pub struct BitsSlice<'a> {
    bits: &'a DirtyBits,
    start: usize,
}

impl<'a> BitsSlice<'a> {
    /// Returns the bits of the whole region.
    #[must_use]
    pub fn bits(&self) -> &'a DirtyBits {
        self.bits
    }
}

#[cfg_attr(docsrs, doc(cfg(feature = "vm-memory")))]
impl<'a> WithBitmapSlice<'a> for DirtyBits {
    type S = BitsSlice<'a>;
}

#[cfg_attr(docsrs, doc(cfg(feature = "vm-memory")))]
impl Bitmap for DirtyBits {
    /// Marks the pages of `len` bytes from `offset` on. Bytes beyond the end are
    /// ignored, as vm-memory's own bitmap does.
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

#[cfg_attr(docsrs, doc(cfg(feature = "vm-memory")))]
impl NewBitmap for DirtyBits {
    /// Creates clean bits for `len` bytes, one per page of 4 KiB.
    ///
    /// # Panics
    ///
    /// If there is no memory for the bits: the trait cannot return an error.
    fn with_len(len: usize) -> Self {
        let bits = DirtyBits::new(len as u64, BASE_PAGE);
        bits.unwrap_or_else(|cause| panic!("{cause}"))
    }
}

#[cfg_attr(docsrs, doc(cfg(feature = "vm-memory")))]
impl Tracker {
    /// Adds each region of `memory` as a slot. The slots have the numbers 0, 1, 2
    /// and so on, in the order of the regions' addresses. From then on every write
    /// that goes through `memory` is tracked.
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
    /// As [`add`](Tracker::add), for the first region that fails. The regions
    /// before it stay in the tracker.
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
