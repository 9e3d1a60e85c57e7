// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the devices behind one IOMMU domain see: IOVAs, and the guest memory
//! behind them.
//!
//! Marks go straight to the guest's bits, so a page stays dirty after its mapping
//! is gone. A device that has a log of its own is read later, and its log has
//! IOVAs. So the view remembers where the mappings led that are gone, until every
//! log was read.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use dirty_core::{Error, Extent};

use super::harvest::{mark_all, translate, Expected};
use super::log::runs;
#[cfg(feature = "container")]
use super::log::DirtyIovas;
use super::mapping::Mapping;
use super::maps::Maps;
use super::slots::Slots;
use super::whole::{Wholes, Why};
use crate::dirty_bits::BASE_PAGE;
use crate::error::TrackError;

/// What the devices behind one virtual IOMMU domain see of guest memory.
///
/// A clone is another handle to the same view, and any thread may call it. Only
/// the calls on the view itself take its lock; marks through a [`Mapping`] do not.
///
/// If there is a real IOMMU, keep the view in step with it: call
/// [`map`](IovaView::map) before the mapping there, and
/// [`unmap`](IovaView::unmap) after the unmapping there, when the device can no
/// longer write.
///
/// While the tracker is on and logs are [added](super::Tracker::add_log) for the
/// view, it remembers mappings that go, until each log was read. It remembers 65536
/// of them; the memory of each one more is reported as dirty.
#[derive(Clone)]
pub struct IovaView {
    inner: Arc<Inner>,
}

struct Inner {
    slots: Arc<Slots>,
    maps: RwLock<Maps>,
}

/// A view, for whoever must not keep it alive.
pub(super) struct WeakView(Weak<Inner>);

impl WeakView {
    pub(super) fn upgrade(&self) -> Option<IovaView> {
        self.0.upgrade().map(|inner| IovaView { inner })
    }
}

impl IovaView {
    pub(super) fn new(slots: Arc<Slots>, on: bool) -> Self {
        let mut maps = Maps::default();
        maps.set_on(on);
        let maps = RwLock::new(maps);
        IovaView {
            inner: Arc::new(Inner { slots, maps }),
        }
    }

    pub(super) fn downgrade(&self) -> WeakView {
        WeakView(Arc::downgrade(&self.inner))
    }

    /// What distinguishes this view from all others that exist.
    pub(super) fn key(&self) -> usize {
        Arc::as_ptr(&self.inner).cast::<()>() as usize
    }

    /// The number of the tracker.
    pub(super) fn tracker(&self) -> u64 {
        self.inner.slots.id
    }

    /// Checks a range of IOVAs, and an address that must be aligned as they are, and
    /// returns the last IOVA.
    pub(crate) fn last_of(iova: u64, aligned: u64, size: u64) -> Result<u64, Error> {
        if !BASE_PAGE.aligns(iova | aligned | size) {
            return Err(Error::Misaligned);
        }
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        iova.checked_add(more).ok_or(Error::Wraps)
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Maps> {
        let maps = self.inner.maps.read();
        maps.unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Maps> {
        let maps = self.inner.maps.write();
        maps.unwrap_or_else(PoisonError::into_inner)
    }

    /// The mappings that overlap the IOVAs from `first` to `last`, in order.
    pub(crate) fn mappings(&self, first: u64, last: u64) -> Vec<Mapping> {
        self.read().overlapping(first, last).cloned().collect()
    }

    /// Marks the memory behind dirty IOVAs. What is in no mapping is left out.
    #[cfg(feature = "container")]
    pub(crate) fn mark_dirty(&self, dirty: &DirtyIovas) {
        let marked = translate(self, dirty.runs(), Expected::Anything, &mut 0);
        debug_assert_eq!(marked, Ok(()));
    }

    /// Where memory is counted that is told as dirty as a whole.
    pub(super) fn wholes(&self) -> &Wholes {
        &self.inner.slots.wholes
    }

    /// Marks all memory that a log of the view may report, since a log failed.
    pub(super) fn mark_all(&self, what: &dyn fmt::Display) {
        let all = self.read().all();
        mark_all(self, &all, Why::LogFailed, what);
    }

    /// How many mappings there are, and how many that are gone are remembered.
    pub(super) fn counts(&self) -> (usize, usize) {
        let maps = self.read();
        (maps.live.len(), maps.remembered())
    }

    /// Maps `size` bytes of guest memory at guest address `gpa` to the IOVAs from
    /// `iova` on. The bytes may span slots, and some may be in no slot, as a
    /// device's BAR is: what is written there is ignored.
    ///
    /// The mapping leads to the memory that is at `gpa` now. It stays with that
    /// memory when a slot moves.
    ///
    /// # Errors
    ///
    /// In this order; nothing is mapped then:
    ///
    /// - [`Error::Misaligned`] unless all three are multiples of 4 KiB.
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs or the guest addresses wrap.
    /// - [`Error::Overlap`] if an IOVA is mapped already.
    pub fn map(&self, iova: u64, gpa: u64, size: u64) -> Result<Mapping, TrackError> {
        let last = Self::last_of(iova, gpa, size)?;
        gpa.checked_add(size - 1).ok_or(Error::Wraps)?;
        let mapping = Mapping::new(iova, gpa, size, &self.inner.slots);
        let mut maps = self.write();
        if maps.has(iova, last) {
            return Err(Error::Overlap.into());
        }
        maps.live.insert(iova, mapping.clone());
        Ok(mapping)
    }

    /// Unmaps the `size` bytes of IOVAs from `iova` on, and returns how many of
    /// them were mapped. A mapping that reaches beyond the range keeps the part
    /// outside. Pages that were marked through the mappings stay dirty.
    ///
    /// # Errors
    ///
    /// In this order; nothing is unmapped then:
    ///
    /// - [`Error::Misaligned`] unless both are multiples of 4 KiB.
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs wrap.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64, TrackError> {
        let last = Self::last_of(iova, 0, size)?;
        let (unmapped, no_room) = self.write().unmap(iova, last);
        // The view's lock is free again: this walks words.
        if !no_room.is_empty() {
            let what = "a view remembers 65536 mappings";
            mark_all(self, &no_room, Why::ForgottenMapping, &what);
        }
        Ok(unmapped)
    }

    /// As [`unmap`](IovaView::unmap), with the dirty pages of the range: those that
    /// VFIO_IOMMU_UNMAP_DMA returned, or that a log had which was read between two
    /// takes. Bit `dirty.bit + k` of `words` is the page at IOVA
    /// `dirty.iova + k * dirty.pgsize`.
    ///
    /// # Errors
    ///
    /// In this order; nothing is marked or unmapped then:
    ///
    /// - As `unmap`.
    /// - If `dirty` does not describe `words`: [`Error::Misaligned`],
    ///   [`Error::BitmapSize`], [`Error::Wraps`].
    pub fn unmap_dirty(
        &self,
        iova: u64,
        size: u64,
        words: &[u64],
        dirty: Extent,
    ) -> Result<u64, TrackError> {
        Self::last_of(iova, 0, size)?;
        translate(self, runs(words, dirty)?, Expected::Anything, &mut 0)?;
        self.unmap(iova, size)
    }

    /// Returns the guest-physical address behind an IOVA, if it is mapped. It is the
    /// one that [`map`](IovaView::map) was given.
    #[must_use]
    pub fn translate(&self, iova: u64) -> Option<u64> {
        let maps = self.read();
        let mapping = maps.overlapping(iova, iova).next()?;
        Some(mapping.gpa() + (iova - mapping.iova()))
    }

    /// Marks as dirty every page that the `len` bytes at IOVA `iova` touch; they
    /// may span mappings. No bytes mark nothing. While the tracker is off, nothing
    /// is marked.
    ///
    /// This is for devices that keep no [`Mapping`]. Marks share the view's lock
    /// with each other, and wait while a thread maps or unmaps.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is
    /// done.
    ///
    /// # Errors
    ///
    /// [`Error::Wraps`] if the IOVAs wrap; nothing is marked then. After these the
    /// other bytes are marked all the same, and the first error is returned:
    ///
    /// - [`TrackError::Unmapped`] if some of the bytes are in no mapping.
    /// - [`Error::NotTracking`] as [`Mapping::mark`].
    pub fn mark(&self, iova: u64, len: u64) -> Result<(), TrackError> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        let maps = self.read();
        if let Some(mapping) = maps.around(iova, last) {
            return mapping.mark(iova, len); // most often
        }
        let mut result = Ok(());
        let mut next = Some(iova); // the first byte that no mapping had so far
        for mapping in maps.overlapping(iova, last) {
            let (first, end) = (iova.max(mapping.iova()), last.min(mapping.last()));
            if next != Some(first) {
                result = result.and(Err(TrackError::Unmapped {
                    addr: next.unwrap_or(iova),
                }));
            }
            result = result.and(mapping.mark(first, end - first + 1));
            next = end.checked_add(1);
        }
        match next {
            Some(addr) if addr <= last => result.and(Err(TrackError::Unmapped { addr })),
            _ => result,
        }
    }

    /// Returns how many mappings that are gone the view remembers, because a log may
    /// still report what was written through them.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.read().remembered()
    }
}

impl fmt::Debug for IovaView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let maps = self.read();
        f.debug_list().entries(maps.live.values()).finish()
    }
}
