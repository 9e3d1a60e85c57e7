// SPDX-License-Identifier: MIT OR Apache-2.0
//! A mapping of IOVAs to guest memory, which a device marks through.

use std::fmt;
use std::sync::Arc;

use super::slots::Slot;
use crate::dirty_bits::DirtyBits;
use crate::error::TrackError;

/// A mapping of an [`IovaView`](super::IovaView): a device marks through it from
/// any thread, without a lock. A clone is another handle to the same mapping.
///
/// Marks go straight to the bits of the guest's slots. So a mark that comes after
/// the unmap is reported like any other. A mark that comes after the memory's
/// slot was removed is refused.
#[derive(Clone)]
pub struct Mapping {
    iova: u64,
    gpa: u64,
    size: u64,
    /// The slots behind the mapping as it was made, in order and without a hole.
    parts: Arc<[Part]>,
    /// How many bytes of `parts` come before this mapping, which an unmap may have
    /// cut.
    skip: u64,
}

/// A slot behind a mapping.
struct Part {
    /// Where the slot starts, in bytes from the start of the mapping.
    start: u64,
    bits: DirtyBits,
    /// Where the mapping starts, in bytes from the start of the slot.
    at: u64,
}

impl Mapping {
    /// Creates a mapping of `size` bytes, not 0, where neither the IOVAs nor the
    /// guest addresses wrap. It fails if an address is in none of `slots`, which
    /// are sorted.
    pub(super) fn new(iova: u64, gpa: u64, size: u64, slots: &[Slot]) -> Result<Self, TrackError> {
        Ok(Mapping {
            iova,
            gpa,
            size,
            parts: parts(gpa, size, slots)?,
            skip: 0,
        })
    }

    /// Returns the first IOVA.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// Returns the first guest-physical address.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The last IOVA.
    pub(super) fn last(&self) -> u64 {
        self.iova + (self.size - 1)
    }

    /// Marks as dirty every page that the `len` bytes at IOVA `iova` touch. No
    /// bytes mark nothing.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is
    /// done.
    ///
    /// # Errors
    ///
    /// The other bytes are marked all the same:
    ///
    /// - [`Error::NotTracking`](crate::Error::NotTracking) if a slot behind the
    ///   bytes was removed: no report has those pages.
    /// - [`TrackError::Unmapped`] if some of the bytes are outside this mapping.
    pub fn mark(&self, iova: u64, len: u64) -> Result<(), TrackError> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let offset = iova.wrapping_sub(self.iova);
        if offset < self.size && more < self.size - offset {
            let first = self.skip + offset;
            return self.mark_parts(first, first + more);
        }
        let last = iova.saturating_add(more);
        if let Some(part) = self.cut(iova, last) {
            part.mark(part.iova, part.size)?;
        }
        Err(TrackError::Unmapped { addr: iova })
    }

    fn mark_parts(&self, first: u64, last: u64) -> Result<(), TrackError> {
        let mut result = Ok(());
        for Part { start, bits, at } in self.parts.iter() {
            let end = start + (bits.len() - at); // where the next part starts
            let (first, stop) = (first.max(*start), end.min(last + 1));
            if first < stop {
                result = result.and(bits.mark(at + (first - start), stop - first));
            }
        }
        Ok(result?)
    }

    /// Marks the whole mapping. A slot that was removed is no error here: nobody
    /// asks for its pages any more.
    pub(super) fn mark_all(&self) {
        let _ = self.mark(self.iova, self.size);
    }

    /// Returns the part of the mapping between two IOVAs, if there is one.
    pub(super) fn cut(&self, first: u64, last: u64) -> Option<Mapping> {
        let (first, last) = (first.max(self.iova), last.min(self.last()));
        (first <= last).then(|| {
            let before = first - self.iova;
            Mapping {
                iova: first,
                gpa: self.gpa + before,
                size: last - first + 1,
                parts: Arc::clone(&self.parts),
                skip: self.skip + before,
            }
        })
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x} -> {:#x}", self.iova, self.size, self.gpa)
    }
}

/// Returns the slots behind `size` bytes at `gpa`, which do not wrap.
fn parts(gpa: u64, size: u64, slots: &[Slot]) -> Result<Arc<[Part]>, TrackError> {
    let mut parts = Vec::new();
    let mut done = 0;
    for slot in slots {
        let addr = gpa + done;
        if addr < slot.gpa || addr > slot.last() {
            continue;
        }
        let at = addr - slot.gpa;
        parts.push(Part {
            start: done,
            bits: slot.bits.clone(),
            at,
        });
        done += slot.bits.len() - at;
        if done >= size {
            return Ok(parts.into());
        }
    }
    Err(TrackError::Unmapped { addr: gpa + done })
}
