// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's memory, slot by slot.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::{Error, PageSize};

use crate::dirty_bits::{check_budget, DirtyBits, BASE_PAGE};
use crate::error::TrackError;

/// A piece of guest memory that is contiguous in guest-physical addresses.
#[derive(Clone, Debug)]
pub struct Slot {
    /// The slot's number: the one that KVM has for it, if KVM is a source.
    pub id: u32,
    /// The first guest-physical address.
    pub gpa: u64,
    /// The address of the first byte in this process, for sources that report
    /// host addresses; see [`Report::or_host`](super::Report::or_host).
    pub host: Option<u64>,
    /// The dirty pages. Its length is the slot's length.
    pub bits: DirtyBits,
}

impl Slot {
    /// The last guest-physical address.
    pub(super) fn last(&self) -> u64 {
        self.gpa + (self.bits.len() - 1)
    }
}

/// The slots of a tracker, which its views share.
pub(super) struct Slots {
    /// How many bytes all bitmaps may take.
    budget: Option<u64>,
    /// INVARIANT: sorted by address; no two slots overlap, and none is empty or
    /// wraps.
    list: RwLock<Vec<Slot>>,
}

impl Slots {
    pub(super) fn new(budget: Option<u64>) -> Self {
        Slots {
            budget,
            list: RwLock::default(),
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, Vec<Slot>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<Slot>> {
        self.list.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a slot with new bits of 4 KiB pages, and returns the bits.
    pub(super) fn add_new(
        &self,
        id: u32,
        gpa: u64,
        host: Option<u64>,
        size: u64,
    ) -> Result<DirtyBits, TrackError> {
        let mut list = self.write();
        let wanted = Wanted {
            id,
            gpa,
            host,
            size,
            pgsize: BASE_PAGE,
        };
        let at = wanted.place(&list, self.budget)?;
        let bits = DirtyBits::new(size, BASE_PAGE)?;
        let slot = Slot {
            id,
            gpa,
            host,
            bits: bits.clone(),
        };
        list.insert(at, slot);
        Ok(bits)
    }

    /// Adds a slot that has bits already.
    pub(super) fn add(&self, slot: Slot) -> Result<(), TrackError> {
        let mut list = self.write();
        let pgsize = slot.bits.pgsize();
        if !pgsize.aligns(slot.gpa | slot.host.unwrap_or(0)) {
            return Err(Error::Misaligned.into());
        }
        let wanted = Wanted {
            id: slot.id,
            gpa: slot.gpa,
            host: slot.host,
            size: slot.bits.len(),
            pgsize,
        };
        let at = wanted.place(&list, self.budget)?;
        list.insert(at, slot);
        Ok(())
    }

    /// Removes a slot and closes its bits.
    pub(super) fn remove(&self, id: u32) -> Result<Slot, TrackError> {
        let mut list = self.write();
        let at = list.iter().position(|slot| slot.id == id);
        let slot = list.remove(at.ok_or(TrackError::UnknownSlot { id })?);
        slot.bits.close();
        Ok(slot)
    }
}

/// A slot that somebody wants to add.
struct Wanted {
    id: u32,
    gpa: u64,
    host: Option<u64>,
    size: u64,
    pgsize: PageSize,
}

impl Wanted {
    /// Checks that the slot fits among `slots` and into the budget, and returns
    /// the index to insert it at.
    fn place(&self, slots: &[Slot], budget: Option<u64>) -> Result<usize, TrackError> {
        if !BASE_PAGE.aligns(self.gpa) {
            return Err(Error::Misaligned.into());
        }
        let more = self.size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = self.gpa.checked_add(more).ok_or(Error::Wraps)?;
        let host = self.host.unwrap_or(0);
        host.checked_add(more).ok_or(Error::Wraps)?;
        if slots.iter().any(|slot| slot.id == self.id) {
            return Err(TrackError::DuplicateSlot { id: self.id });
        }
        let at = slots.partition_point(|slot| slot.gpa <= self.gpa);
        let below = at.checked_sub(1).and_then(|before| slots.get(before));
        if below.is_some_and(|slot| slot.last() >= self.gpa)
            || slots.get(at).is_some_and(|slot| slot.gpa <= last)
        {
            return Err(Error::Overlap.into());
        }
        let used = slots.iter().map(|slot| slot.bits.words() as u64 * 8).sum();
        check_budget(budget, used, DirtyBits::bytes(self.size, self.pgsize))?;
        Ok(at)
    }
}
