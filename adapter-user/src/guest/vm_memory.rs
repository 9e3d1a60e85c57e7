// SPDX-License-Identifier: MIT OR Apache-2.0
//! vm-memory's traits for [`DirtyBits`]: `GuestMemoryMmap<DirtyBits>` marks every
//! write that goes through it.

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{Address, GuestMemoryRegion, MemoryRegionAddress};

use super::slots::Slot;
use super::tracker::Tracker;
use crate::dirty_bits::{DirtyBits, BASE_PAGE};
use crate::error::TrackError;

/// The dirty bits of a region from some byte on. vm-memory hands one out with each
/// piece of a region.
///
/// While the tracker is off, a mark takes four instructions. A write through vm-memory
/// still costs more than one without a bitmap: vm-memory moves each piece several
/// times, and this slice makes a piece two words longer. Any bitmap whose slice has an
/// offset costs as much. On a Zen 4 processor, a write of 64 bytes took 1.15 times as
/// long as without a bitmap in a program built with `lto = true`, `codegen-units = 1`
/// and `opt-level = "s"`, and 1.45 times with `opt-level = 3`. With several codegen
/// units it took from 1.05 to 5 times, because the cut between them decides what of
/// vm-memory is inlined.
#[derive(Clone, Copy, Debug)]
pub struct BitsSlice<'a> {
    bits: &'a DirtyBits,
    start: usize,
}

impl<'a> BitsSlice<'a> {
    /// Returns the bits of the whole region.
    #[inline]
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
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if !self.is_off() {
            mark_on(self, 0, offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.is_dirty(offset as u64)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> BitsSlice<'_> {
        BitsSlice {
            bits: self,
            start: offset,
        }
    }
}

/// Marks bits that are not off. It is cold and not inlined, so that a write which is
/// not tracked has only a load and a branch that falls through.
#[cold]
#[inline(never)]
fn mark_on(bits: &DirtyBits, start: usize, offset: usize, len: usize) {
    let _ = bits.mark(start.saturating_add(offset) as u64, len as u64);
}

impl<'a> WithBitmapSlice<'_> for BitsSlice<'a> {
    type S = BitsSlice<'a>;
}

impl BitmapSlice for BitsSlice<'_> {}

impl<'a> Bitmap for BitsSlice<'a> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if !self.bits.is_off() {
            mark_on(self.bits, self.start, offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bits.dirty_at(self.start.saturating_add(offset))
    }

    #[inline]
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
    /// Adds each region of guest memory as a slot, so that every write that goes
    /// through vm-memory is tracked. A slot gets the smallest number that is free.
    ///
    /// Call it again whenever the memory has changed: regions that are slots already
    /// stay as they are, those that have another address move there as with
    /// [`move_slot`](Tracker::move_slot), and new ones are added as with
    /// [`add`](Tracker::add). Slots without a region stay too, so remove those that
    /// are gone first.
    ///
    /// ```
    /// use adapter_user::guest::{Report, Tracker};
    /// use adapter_user::DirtyBits;
    /// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
    ///
    /// let ram = [(GuestAddress(0), 1 << 20)];
    /// let memory = GuestMemoryMmap::<DirtyBits>::from_ranges(&ram)?;
    /// let tracker = Tracker::new(None);
    /// tracker.add_memory(memory.iter())?;
    ///
    /// tracker.start()?;
    /// memory.write_obj(1u8, GuestAddress(0x3000))?;
    /// let mut report = Report::new();
    /// tracker.take(&mut report)?;
    /// assert_eq!(report.slot(0).unwrap()[0], 1 << 3);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`add`](Tracker::add) and `move_slot`, for the first region that fails.
    /// What was done for the regions before it stays.
    pub fn add_memory<'a, R>(
        &self,
        regions: impl IntoIterator<Item = &'a R>,
    ) -> Result<(), TrackError>
    where
        R: GuestMemoryRegion<B = DirtyBits> + 'a,
    {
        self.add_regions(regions, |_| None)
    }

    /// As [`add_memory`](Tracker::add_memory), with the numbers that the VMM has for
    /// its slots: `number` returns the one of a region, such as KVM's.
    ///
    /// # Errors
    ///
    /// As `add_memory`, and [`TrackError::BitsInUse`] for a region that is a slot
    /// with another number already.
    pub fn add_memory_as<'a, R>(
        &self,
        regions: impl IntoIterator<Item = &'a R>,
        mut number: impl FnMut(&R) -> u32,
    ) -> Result<(), TrackError>
    where
        R: GuestMemoryRegion<B = DirtyBits> + 'a,
    {
        self.add_regions(regions, |region| Some(number(region)))
    }

    fn add_regions<'a, R>(
        &self,
        regions: impl IntoIterator<Item = &'a R>,
        mut number: impl FnMut(&R) -> Option<u32>,
    ) -> Result<(), TrackError>
    where
        R: GuestMemoryRegion<B = DirtyBits> + 'a,
    {
        for region in regions {
            let bitmap = region.bitmap();
            let host = region.get_host_address(MemoryRegionAddress(0)).ok();
            let slot = Slot {
                id: 0,
                gpa: region.start_addr().raw_value(),
                host: host.map(|at| at as u64),
                size: region.len(),
                bits: bitmap.bits().clone(),
            };
            if bitmap.start != 0 {
                let (bits, memory) = (
                    slot.bits.len().saturating_sub(bitmap.start as u64),
                    slot.size,
                );
                return Err(TrackError::BitsLength { bits, memory });
            }
            self.slots_().put(slot, number(region))?;
        }
        Ok(())
    }
}
