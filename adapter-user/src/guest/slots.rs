// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's memory, slot by slot.

use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::Error;

use super::whole::{Wholes, Why};
use crate::dirty_bits::{check_budget, start, DirtyBits, BASE_PAGE};
use crate::error::TrackError;

/// A piece of guest memory that is contiguous in guest-physical addresses.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Slot {
    /// The slot's number: the one that KVM has for it, if KVM is a source.
    pub id: u32,
    /// The first guest-physical address.
    pub gpa: u64,
    /// The address of the first byte in this process, for sources that report
    /// host addresses; see [`Report::or_host`](super::Report::or_host).
    pub host: Option<u64>,
    /// The length in bytes.
    pub size: u64,
    /// The dirty pages. They stand for `size` bytes.
    pub bits: DirtyBits,
}

impl Slot {
    /// A slot of `size` bytes from `gpa` on, whose address in this process is not known.
    #[must_use]
    pub fn new(id: u32, gpa: u64, size: u64, bits: DirtyBits) -> Self {
        Slot {
            id,
            gpa,
            host: None,
            size,
            bits,
        }
    }

    /// The last guest-physical address.
    pub(super) fn last(&self) -> u64 {
        self.gpa + (self.size - 1)
    }
}

/// The slots of a tracker, which its views share.
pub(super) struct Slots {
    /// The number of the tracker, which no other has.
    pub(super) id: u64,
    /// How many bytes all bitmaps may take.
    pub(super) budget: Option<u64>,
    /// What is told as dirty as a whole.
    pub(super) wholes: Wholes,
    state: RwLock<State>,
}

/// What the lock of the slots protects.
#[derive(Debug, Default)]
pub(super) struct State {
    /// INVARIANT: sorted by address; no two slots overlap, by guest address or by
    /// host address, and none is empty or wraps. The tracker owns the bits of each.
    pub(super) list: Vec<Slot>,
    /// Whether the tracker is started.
    pub(super) on: bool,
    /// How often the list has changed.
    pub(super) version: u64,
    /// Slots as they were before they moved or went, since the logs were read. A log
    /// may have what was written to them through a mapping of their old address.
    pub(super) departed: Vec<Slot>,
}

/// How many departed slots are remembered. All of one more is marked at once.
pub(super) const MAX_DEPARTED: usize = 1 << 12;

impl State {
    /// The index of the first slot that ends at `gpa` or after it.
    pub(super) fn from(&self, gpa: u64) -> usize {
        self.list.partition_point(|slot| slot.last() < gpa)
    }

    /// How many departed slots are remembered.
    pub(super) fn departed(&self) -> usize {
        self.departed.len()
    }

    fn find(&self, id: u32) -> Result<usize, TrackError> {
        let found = self.list.iter().position(|slot| slot.id == id);
        found.ok_or(TrackError::UnknownSlot { id })
    }

    /// Checks that `wanted` overlaps no slot but the one at index `but`.
    fn check_free(&self, wanted: &Slot, but: Option<usize>) -> Result<(), TrackError> {
        let more = wanted.size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = wanted.gpa.checked_add(more).ok_or(Error::Wraps)?;
        let others = || {
            let others = self.list.iter().enumerate();
            others
                .filter(move |(at, _)| Some(*at) != but)
                .map(|(_, slot)| slot)
        };
        let hosts = wanted.host.map(|host| (host, host.checked_add(more)));
        if let Some((_, None)) = hosts {
            return Err(Error::Wraps.into());
        }
        if but.is_none() && others().any(|slot| slot.id == wanted.id) {
            return Err(TrackError::DuplicateSlot { id: wanted.id });
        }
        if others().any(|slot| slot.gpa <= last && wanted.gpa <= slot.last()) {
            return Err(Error::Overlap.into());
        }
        let Some((first, Some(last))) = hosts else {
            return Ok(());
        };
        let hit = others().find(|slot| {
            let at = slot.host.map(|host| (host, host + (slot.size - 1)));
            at.is_some_and(|(host, end)| host <= last && first <= end)
        });
        match hit {
            Some(slot) => Err(TrackError::HostOverlap { id: slot.id }),
            None => Ok(()),
        }
    }

    /// The smallest number that no slot has.
    #[cfg(feature = "vm-memory")]
    fn free_id(&self) -> u32 {
        let mut ids: Vec<u32> = self.list.iter().map(|slot| slot.id).collect();
        ids.sort_unstable();
        let taken = (0..).zip(ids).take_while(|(id, taken)| id == taken);
        taken.count() as u32
    }

    /// Takes a slot out of the list, and remembers where it was.
    fn take_out(&mut self, at: usize, wholes: &Wholes) -> Slot {
        let slot = self.list.remove(at);
        self.version += 1;
        if self.on && self.departed.len() < MAX_DEPARTED {
            self.departed.push(slot.clone());
        } else if self.on {
            let what = "the tracker remembers 4096 slots";
            mark_whole(&slot, 0, wholes, Why::ForgottenSlot, &what);
        }
        slot
    }

    fn move_to(&mut self, at: usize, gpa: u64, wholes: &Wholes) -> Result<(), TrackError> {
        let slot = Slot {
            gpa,
            ..self.list[at].clone()
        };
        if !slot.bits.pgsize().aligns(gpa) || !BASE_PAGE.aligns(gpa) {
            return Err(Error::Misaligned.into());
        }
        self.check_free(&slot, Some(at))?;
        self.take_out(at, wholes);
        self.insert(slot);
        Ok(())
    }

    fn insert(&mut self, slot: Slot) {
        let at = self.from(slot.gpa);
        self.list.insert(at, slot);
        self.version += 1;
    }

    /// The bytes that the bitmaps take.
    pub(super) fn used(&self) -> u64 {
        self.list
            .iter()
            .map(|slot| slot.bits.words() as u64 * 8)
            .sum()
    }
}

impl Slots {
    pub(super) fn new(budget: Option<u64>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Slots {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            budget,
            wholes: Wholes::default(),
            state: RwLock::default(),
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a slot with new bits of 4 KiB pages, and returns the bits.
    pub(super) fn add_new(
        &self,
        id: u32,
        gpa: u64,
        host: Option<u64>,
        size: u64,
    ) -> Result<DirtyBits, TrackError> {
        let mut state = self.write();
        let mut slot = Slot {
            id,
            gpa,
            host,
            size,
            bits: DirtyBits::default(),
        };
        if !BASE_PAGE.aligns(gpa) {
            return Err(Error::Misaligned.into());
        }
        state.check_free(&slot, None)?;
        check_budget(self.budget, state.used(), DirtyBits::bytes(size, BASE_PAGE))?;
        slot.bits = DirtyBits::new(size, BASE_PAGE)?;
        let bits = slot.bits.clone();
        self.own(&mut state, slot, false)?;
        Ok(bits)
    }

    /// Adds a slot that has bits already. If the tracker is on, all of it is dirty
    /// unless its content is `known`.
    pub(super) fn add(&self, slot: Slot, known: bool) -> Result<(), TrackError> {
        self.add_to(&mut self.write(), slot, known)
    }

    /// Adds a slot that has bits already, or moves the one that has these bits. Its
    /// number is `id`, or else one that is free.
    #[cfg(feature = "vm-memory")]
    pub(super) fn put(&self, mut slot: Slot, id: Option<u32>) -> Result<(), TrackError> {
        let mut state = self.write();
        let Some(at) = state.list.iter().position(|old| old.bits.same(&slot.bits)) else {
            slot.id = id.unwrap_or_else(|| state.free_id());
            return self.add_to(&mut state, slot, false);
        };
        let old = &state.list[at];
        let (bits, memory) = (old.size, slot.size);
        if id.is_some_and(|id| id != old.id) || slot.host != old.host {
            return Err(TrackError::BitsInUse);
        }
        if bits != memory {
            return Err(TrackError::BitsLength { bits, memory });
        }
        match old.gpa == slot.gpa {
            true => Ok(()),
            false => state.move_to(at, slot.gpa, &self.wholes),
        }
    }

    fn add_to(&self, state: &mut State, slot: Slot, known: bool) -> Result<(), TrackError> {
        let pgsize = slot.bits.pgsize();
        if !pgsize.aligns(slot.gpa | slot.host.unwrap_or(0)) || !BASE_PAGE.aligns(slot.gpa) {
            return Err(Error::Misaligned.into());
        }
        let (bits, memory) = (slot.bits.len(), slot.size);
        if bits != memory {
            return Err(TrackError::BitsLength { bits, memory });
        }
        state.check_free(&slot, None)?;
        if slot.bits.owner() != 0 {
            return Err(TrackError::BitsInUse);
        }
        check_budget(
            self.budget,
            state.used(),
            DirtyBits::bytes(slot.size, pgsize),
        )?;
        self.own(state, slot, known)
    }

    /// Inserts a slot that was checked, and takes its bits.
    fn own(&self, state: &mut State, slot: Slot, known: bool) -> Result<(), TrackError> {
        if !slot.bits.claim(self.id) {
            return Err(TrackError::BitsInUse);
        }
        if !state.on {
            slot.bits.turn_off();
        } else if let Err(cause) = start([&slot.bits].into_iter(), false) {
            slot.bits.disown();
            return Err(cause);
        } else if !known {
            mark_whole(&slot, 0, &self.wholes, Why::NewMemory, &"a slot is added");
        }
        state.insert(slot);
        Ok(())
    }

    /// Removes a slot, whose bits refuse marks from now on.
    pub(super) fn remove(&self, id: u32) -> Result<Slot, TrackError> {
        let mut state = self.write();
        let at = state.find(id)?;
        let slot = state.take_out(at, &self.wholes);
        slot.bits.close();
        slot.bits.disown();
        Ok(slot)
    }

    /// Moves a slot to guest address `gpa`.
    pub(super) fn move_to(&self, id: u32, gpa: u64) -> Result<(), TrackError> {
        let mut state = self.write();
        let at = state.find(id)?;
        state.move_to(at, gpa, &self.wholes)
    }

    /// Lets a slot have `size` bytes, of which the new ones are dirty if the
    /// tracker is on.
    pub(super) fn grow(&self, id: u32, size: u64) -> Result<(), TrackError> {
        let mut state = self.write();
        let at = state.find(id)?;
        let old = state.list[at].clone();
        if size < old.size {
            return Err(TrackError::Shrinks);
        }
        let slot = Slot {
            size,
            ..old.clone()
        };
        state.check_free(&slot, Some(at))?;
        let had = old.bits.words() as u64 * 8;
        let wanted = DirtyBits::bytes(size, old.bits.pgsize()).saturating_sub(had);
        check_budget(self.budget, state.used(), wanted)?;
        slot.bits.grow_owned(size)?;
        if state.on {
            mark_whole(
                &slot,
                old.size,
                &self.wholes,
                Why::NewMemory,
                &"a slot grows",
            );
        }
        state.list[at] = slot;
        state.version += 1;
        Ok(())
    }

    /// Marks the pages of slots between two guest addresses, and returns whether a
    /// slot has each of the bytes. If `since` is set, slots count too that have been
    /// there since the logs were read.
    pub(super) fn mark(&self, first: u64, last: u64, since: bool) -> bool {
        let state = self.read();
        let mark_in = |slot: &Slot| {
            let (from, to) = (first.max(slot.gpa), last.min(slot.last()));
            if from <= to {
                mark(&slot.bits, from - slot.gpa, to - from + 1);
            }
            (from, to)
        };
        if since {
            for slot in &state.departed {
                mark_in(slot);
            }
        }
        let (mut next, mut whole) = (Some(first), true);
        for slot in &state.list[state.from(first)..] {
            if slot.gpa > last {
                break;
            }
            let (from, to) = mark_in(slot);
            whole &= next == Some(from);
            next = to.checked_add(1);
        }
        whole && next.is_none_or(|next| next > last)
    }

    /// How many departed slots are remembered, when a take begins.
    pub(super) fn departed(&self) -> usize {
        self.read().departed()
    }

    /// Every log was read in a take that began when `departed` slots were remembered.
    pub(super) fn forget(&self, departed: usize) {
        if departed > 0 {
            self.write().departed.drain(..departed);
        }
    }

    /// Switches tracking on: marks are taken from now on, and what was marked so
    /// far is forgotten.
    pub(super) fn start(&self) -> Result<(), TrackError> {
        let mut state = self.write();
        start(state.list.iter().map(|slot| &slot.bits), true)?;
        state.on = true;
        state.departed.clear();
        Ok(())
    }

    /// Switches tracking off: marks do nothing from now on.
    pub(super) fn stop(&self) {
        let mut state = self.write();
        state.on = false;
        state.departed.clear();
        state.list.iter().for_each(|slot| slot.bits.turn_off());
    }

    /// Gives up the bits of all slots: the tracker is gone.
    pub(super) fn release(&self) {
        let mut state = self.write();
        state.on = false;
        state.version += 1;
        state.departed.clear();
        for slot in state.list.drain(..) {
            slot.bits.turn_off();
            slot.bits.disown();
        }
    }
}

/// Marks all of a slot from byte `from` on, whoever wrote it.
pub(super) fn mark_whole(slot: &Slot, from: u64, wholes: &Wholes, why: Why, what: &dyn Display) {
    let bytes = slot.size - from;
    if bytes != 0 {
        mark(&slot.bits, from, bytes);
        wholes.add(why, bytes, &format_args!("slot {}: {what}", slot.id));
    }
}

/// Marks bytes that are inside the bits. The bits of a slot that is gone may
/// refuse the mark, but they keep it: the slot may come back.
pub(super) fn mark(bits: &DirtyBits, offset: u64, len: u64) {
    let _ = bits.mark(offset, len);
}
