// SPDX-License-Identifier: MIT OR Apache-2.0
//! A mapping of IOVAs to guest memory, which a device marks through.

use std::fmt;
use std::ops::Deref;
use std::slice;
use std::sync::Arc;

use dirty_core::Error;

use super::slots::{Slot, Slots};
use crate::dirty_bits::DirtyBits;
use crate::error::TrackError;

/// A mapping of an [`IovaView`](super::IovaView): a device marks through it from
/// any thread, without a lock. A clone is another handle to the same mapping.
///
/// Marks go straight to the bits of the guest's slots. So a mark that comes after
/// the unmap is reported like any other, and one of memory that has moved is told
/// at the new address.
///
/// A part that leads to no slot, such as another device's BAR, is legal. If a slot
/// comes there later, marks reach it, but they take the lock of the slots.
#[derive(Clone)]
pub struct Mapping {
    iova: u64,
    size: u64,
    behind: Arc<Behind>,
    /// How many bytes of `behind` come before this mapping, which an unmap may have
    /// cut.
    skip: u64,
}

/// What is behind a mapping as it was made.
struct Behind {
    gpa: u64,
    /// How often the list of slots had changed when the mapping was made.
    version: u64,
    /// In order; there may be holes.
    parts: Parts,
    slots: Arc<Slots>,
}

/// The parts of a mapping. Most mappings have one, which then needs no memory of its own.
enum Parts {
    One(Part),
    Many(Box<[Part]>),
}

/// A slot behind a mapping.
struct Part {
    /// Its first and last byte, from the start of the mapping.
    first: u64,
    last: u64,
    bits: DirtyBits,
    /// The byte of the slot that `first` is.
    at: u64,
    /// Its address in this process, if the slot has one.
    #[cfg_attr(not(feature = "container"), expect(dead_code))]
    host: Option<u64>,
}

impl Mapping {
    /// Creates a mapping of `size` bytes, not 0, where neither the IOVAs nor the
    /// guest addresses wrap.
    pub(super) fn new(iova: u64, gpa: u64, size: u64, slots: &Arc<Slots>) -> Self {
        let state = slots.read();
        let last = gpa + (size - 1);
        let hit = state.list[state.from(gpa)..].iter();
        let parts = hit.take_while(|slot| slot.gpa <= last);
        let parts = parts.map(|slot| Part::new(slot, gpa, last)).collect();
        Mapping {
            iova,
            size,
            behind: Arc::new(Behind {
                gpa,
                version: state.version,
                parts,
                slots: Arc::clone(slots),
            }),
            skip: 0,
        }
    }

    /// Creates a mapping as a saved view had it: IOVAs, guest addresses and size, and its
    /// parts by their first and last byte, the slot, and the byte of the slot. `number`
    /// tells it apart from mappings of the same addresses.
    pub(super) fn restored<'a>(
        (iova, gpa, size): (u64, u64, u64),
        number: u64,
        parts: impl Iterator<Item = (u64, u64, &'a Slot, u64)>,
        slots: &Arc<Slots>,
    ) -> Self {
        let parts = parts.map(|(first, last, slot, at)| Part {
            first,
            last,
            bits: slot.bits.clone(),
            at,
            host: slot.host.map(|host| host + at),
        });
        Mapping {
            iova,
            size,
            behind: Arc::new(Behind {
                gpa,
                version: u64::MAX - number, // the list of slots never changes that often
                parts: parts.collect(),
                slots: Arc::clone(slots),
            }),
            skip: 0,
        }
    }

    /// The parts that lead to a slot: the first and last byte of the mapping, the bits,
    /// and their first byte.
    pub(super) fn bound(&self) -> impl Iterator<Item = (u64, u64, &DirtyBits, u64)> + '_ {
        let (skip, end) = (self.skip, self.skip + (self.size - 1));
        let parts = self.behind.parts.iter();
        let parts = parts.filter(move |part| part.first <= end && skip <= part.last);
        parts.map(move |part| {
            let first = part.first.max(skip);
            let last = part.last.min(end);
            let at = part.at + (first - part.first);
            (first - skip, last - skip, &part.bits, at)
        })
    }

    /// Returns the first IOVA.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Returns the first guest-physical address, as the mapping was made.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.behind.gpa + self.skip
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Mappings with the same IOVAs, guest addresses and version lead to the same
    /// memory. With another version, slots may have moved in between.
    pub(super) fn version(&self) -> u64 {
        self.behind.version
    }

    /// The last IOVA.
    pub(crate) fn last(&self) -> u64 {
        self.iova + (self.size - 1)
    }

    /// Marks as dirty every page that the `len` bytes at IOVA `iova` touch. No
    /// bytes mark nothing. While the tracker is off, nothing is marked.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is
    /// done.
    ///
    /// # Errors
    ///
    /// The other bytes are marked all the same:
    ///
    /// - [`Error::NotTracking`](crate::Error::NotTracking) if a slot behind the
    ///   bytes was removed, and no other slot came to its address: no report has
    ///   those pages, unless the slot comes back.
    /// - [`TrackError::Unmapped`] if some of the bytes are outside this mapping.
    pub fn mark(&self, iova: u64, len: u64) -> Result<(), TrackError> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let offset = iova.wrapping_sub(self.iova);
        if offset < self.size && more < self.size - offset {
            let first = self.skip + offset;
            return self.behind.mark(first, first + more, false);
        }
        let last = iova.saturating_add(more);
        if let Some(part) = self.cut(iova, last) {
            part.mark(part.iova, part.size)?;
        }
        Err(TrackError::Unmapped { addr: iova })
    }

    /// Marks the bytes between two IOVAs inside the mapping, which were written since
    /// the logs were read. A slot that was removed is no error here: nobody asks for
    /// its pages any more.
    pub(super) fn mark_inside(&self, first: u64, last: u64) {
        let start = self.skip + (first - self.iova);
        let _ = self.behind.mark(start, start + (last - first), true);
    }

    /// The parts of a mapping, which nobody has cut, that lead to a slot: the first
    /// IOVA, the address in this process if the slot has one, and the bytes.
    #[cfg(feature = "container")]
    pub(crate) fn parts(&self) -> impl Iterator<Item = (u64, Option<u64>, u64)> + '_ {
        let parts = self.behind.parts.iter();
        parts.map(|part| {
            (
                self.iova + part.first,
                part.host,
                part.last - part.first + 1,
            )
        })
    }

    /// Marks the whole mapping.
    pub(super) fn mark_all(&self) {
        self.mark_inside(self.iova, self.last());
    }

    /// Returns the part of the mapping between two IOVAs, if there is one.
    pub(super) fn cut(&self, first: u64, last: u64) -> Option<Mapping> {
        let (first, last) = (first.max(self.iova), last.min(self.last()));
        (first <= last).then(|| {
            let before = first - self.iova;
            Mapping {
                iova: first,
                size: last - first + 1,
                behind: Arc::clone(&self.behind),
                skip: self.skip + before,
            }
        })
    }
}

impl Behind {
    /// Marks the bytes `first` to `last`. If they were written some time `since` the
    /// logs were read, what no part has counts for each slot that was there.
    #[inline]
    fn mark(&self, first: u64, last: u64, since: bool) -> Result<(), TrackError> {
        // Most often one part has all.
        if let Parts::One(part) = &self.parts {
            let inside = part.first <= first && last <= part.last;
            if inside && part.mark(first, last).is_ok() {
                return Ok(());
            }
        }
        self.mark_parts(first, last, since)
    }

    /// As `mark`, part by part.
    #[inline(never)]
    fn mark_parts(&self, first: u64, last: u64, since: bool) -> Result<(), TrackError> {
        let from = self.parts.partition_point(|part| part.last < first);
        let mut result = Ok(());
        let mut next = first; // the first byte that is not marked yet
        for part in &self.parts[from..] {
            if part.first > last {
                break;
            }
            let (first, stop) = (part.first.max(first), part.last.min(last));
            if next < first {
                let (from, to) = (self.gpa + next, self.gpa + (first - 1));
                self.slots.mark(from, to, since);
            }
            if let Err(cause) = part.mark(first, stop) {
                // The slot is gone. Another may have its address.
                let (from, to) = (self.gpa + first, self.gpa + stop);
                if !self.slots.mark(from, to, since) {
                    result = result.and(Err(cause.into()));
                }
            }
            if stop == last {
                return result;
            }
            next = stop + 1;
        }
        self.slots.mark(self.gpa + next, self.gpa + last, since);
        result
    }
}

impl FromIterator<Part> for Parts {
    fn from_iter<I: IntoIterator<Item = Part>>(parts: I) -> Self {
        let mut parts = parts.into_iter();
        match (parts.next(), parts.next()) {
            (Some(one), None) => Parts::One(one),
            (one, two) => Parts::Many(one.into_iter().chain(two).chain(parts).collect()),
        }
    }
}

impl Deref for Parts {
    type Target = [Part];

    #[inline]
    fn deref(&self) -> &[Part] {
        match self {
            Parts::One(part) => slice::from_ref(part),
            Parts::Many(parts) => parts,
        }
    }
}

impl Part {
    /// The part of `slot` between two guest addresses; the first is that of the
    /// mapping.
    fn new(slot: &Slot, gpa: u64, last: u64) -> Part {
        let from = gpa.max(slot.gpa);
        Part {
            first: from - gpa,
            last: last.min(slot.last()) - gpa,
            bits: slot.bits.clone(),
            at: from - slot.gpa,
            host: slot.host.map(|host| host + (from - slot.gpa)),
        }
    }

    /// Marks the bytes `first` to `last`, counted from the start of the mapping.
    #[inline]
    fn mark(&self, first: u64, last: u64) -> Result<(), Error> {
        let offset = self.at + (first - self.first);
        self.bits.mark(offset, last - first + 1)
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x} -> {:#x}", self.iova, self.size, self.gpa())
    }
}
