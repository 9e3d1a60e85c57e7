// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the devices behind one IOMMU domain see: IOVAs, and the guest memory
//! behind them.
//!
//! Marks go straight to the guest's bits, so a page stays dirty after its mapping
//! is gone. A device that has a log of its own is read later, and its log has
//! IOVAs. So the view remembers where the mappings led that are gone, until every
//! log was harvested.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::Error;

use super::mapping::Mapping;
use super::slots::Slots;
use crate::dirty_bits::BASE_PAGE;
use crate::error::TrackError;

/// How many gone mappings a view remembers. The memory of one more is marked at
/// once, as if all of it had been written.
const MAX_GONE: usize = 1 << 16;

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
/// Finish a [`harvest`](IovaView::harvest) with every report, even an empty one
/// when all devices mark: that makes the view forget the mappings that are gone.
/// It remembers 65536 of them; the memory of each one more is reported as dirty.
#[derive(Clone)]
pub struct IovaView {
    slots: Arc<Slots>,
    maps: Arc<RwLock<Maps>>,
}

/// The mappings of a view: the live ones, and those that are gone and that a log
/// may still report.
#[derive(Default)]
pub(super) struct Maps {
    /// By first IOVA; no two overlap.
    live: BTreeMap<u64, Mapping>,
    /// By first IOVA, first guest address and size: the number of the last unmap
    /// that removed such a mapping, and the mapping.
    gone: BTreeMap<(u64, u64, u64), (u64, Mapping)>,
    /// No gone mapping is larger, in bytes.
    largest_gone: u64,
    /// The last unmap of a mapping that `gone` had no room for.
    not_remembered: Option<u64>,
    /// How many unmaps there were.
    pub(super) unmaps: u64,
}

impl IovaView {
    pub(super) fn new(slots: Arc<Slots>) -> Self {
        let maps = Arc::default();
        IovaView { slots, maps }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, Maps> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `size` bytes of guest memory at guest address `gpa` to the IOVAs from
    /// `iova` on. The bytes may span slots that touch.
    ///
    /// # Errors
    ///
    /// In this order; nothing is mapped then:
    ///
    /// - [`Error::Misaligned`] unless all three are multiples of 4 KiB.
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs or the guest addresses wrap.
    /// - [`TrackError::Unmapped`] if a guest address is in no slot.
    /// - [`Error::Overlap`] if an IOVA is mapped already.
    pub fn map(&self, iova: u64, gpa: u64, size: u64) -> Result<Mapping, TrackError> {
        if !BASE_PAGE.aligns(iova | gpa | size) {
            return Err(Error::Misaligned.into());
        }
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        gpa.checked_add(more).ok_or(Error::Wraps)?;
        let mapping = Mapping::new(iova, gpa, size, &self.slots.read())?;
        let mut maps = self.write();
        if maps.overlapping(iova, last).next().is_some() {
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
        if !BASE_PAGE.aligns(iova | size) {
            return Err(Error::Misaligned.into());
        }
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        Ok(self.write().unmap(iova, last))
    }

    /// Returns the guest-physical address behind an IOVA, if it is mapped.
    #[must_use]
    pub fn translate(&self, iova: u64) -> Option<u64> {
        let maps = self.read();
        let mapping = maps.overlapping(iova, iova).next()?;
        Some(mapping.gpa() + (iova - mapping.iova()))
    }

    /// Marks as dirty every page that the `len` bytes at IOVA `iova` touch; they
    /// may span mappings. No bytes mark nothing.
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
    /// - [`Error::NotTracking`] if a slot behind the bytes was removed.
    pub fn mark(&self, iova: u64, len: u64) -> Result<(), TrackError> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        let mut result = Ok(());
        let mut next = Some(iova); // the first byte that no mapping had so far
        for part in self
            .read()
            .overlapping(iova, last)
            .filter_map(|m| m.cut(iova, last))
        {
            if next != Some(part.iova()) {
                result = result.and(Err(TrackError::Unmapped {
                    addr: next.unwrap_or(iova),
                }));
            }
            result = result.and(part.mark(part.iova(), part.size()));
            next = part.last().checked_add(1);
        }
        match next {
            Some(addr) if addr <= last => result.and(Err(TrackError::Unmapped { addr })),
            _ => result,
        }
    }

    /// Returns how many gone mappings the view remembers, because no harvest that
    /// began after their unmap is finished.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.read().gone.len()
    }
}

impl fmt::Debug for IovaView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let maps = self.read();
        f.debug_list().entries(maps.live.values()).finish()
    }
}

impl Maps {
    /// The live mappings that overlap a range, given by its first and last IOVA.
    pub(super) fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping> {
        let before = self.live.range(..first).next_back();
        let before = before.map(|(_, m)| m).filter(move |m| m.last() >= first);
        let inside = self.live.range(first..=last).map(|(_, m)| m);
        before.into_iter().chain(inside)
    }

    /// The gone mappings that overlap a range, and perhaps some that do not.
    pub(super) fn gone(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping> {
        let first = first.saturating_sub(self.largest_gone);
        let range = (first, 0, 0)..=(last, u64::MAX, u64::MAX);
        self.gone.range(range).map(|(_, (_, mapping))| mapping)
    }

    /// Whether a mapping went that there was no room to remember.
    pub(super) fn forgot_some(&self) -> bool {
        self.not_remembered.is_some()
    }

    fn unmap(&mut self, first: u64, last: u64) -> u64 {
        self.unmaps += 1;
        let hit: Vec<Mapping> = self.overlapping(first, last).cloned().collect();
        let mut unmapped = 0;
        for mapping in hit {
            self.live.remove(&mapping.iova());
            let before = first.checked_sub(1).and_then(|end| mapping.cut(0, end));
            let after = last
                .checked_add(1)
                .and_then(|start| mapping.cut(start, u64::MAX));
            for rest in [before, after].into_iter().flatten() {
                self.live.insert(rest.iova(), rest);
            }
            if let Some(gone) = mapping.cut(first, last) {
                unmapped += gone.size();
                self.remember(gone);
            }
        }
        unmapped
    }

    fn remember(&mut self, mapping: Mapping) {
        let key = (mapping.iova(), mapping.gpa(), mapping.size());
        self.largest_gone = self.largest_gone.max(mapping.size());
        if self.gone.len() < MAX_GONE || self.gone.contains_key(&key) {
            self.gone.insert(key, (self.unmaps, mapping));
        } else {
            mapping.mark_all();
            self.not_remembered = Some(self.unmaps);
        }
    }

    /// Forgets the mappings that went in the first `unmaps` unmaps.
    pub(super) fn forget(&mut self, unmaps: u64) {
        self.gone.retain(|_, (unmap, _)| *unmap > unmaps);
        self.not_remembered = self.not_remembered.filter(|unmap| *unmap > unmaps);
    }
}
