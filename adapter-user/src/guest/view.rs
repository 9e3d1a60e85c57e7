// SPDX-License-Identifier: MIT OR Apache-2.0
//! What devices behind a virtual IOMMU see: IOVAs, and the guest memory behind.
//!
//! Marks go straight to the guest's bits, so the dirt of a mapping outlives it.
//! A device that logs by itself (VFIO's DMA logging) speaks of IOVAs and is
//! asked later, so the view remembers where mappings that are gone led to until
//! every log was harvested since.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::{Error, Extent};

use super::tracker::Shared;
use crate::dirty_bits::{DirtyBits, BASE_PAGE};
use crate::error::TrackError;

/// Mappings that are gone and still remembered, at most. What one more led to
/// is marked at once, as if all of it had been written.
const MAX_GONE: usize = 1 << 16;

/// What the devices behind one virtual IOMMU domain see of guest memory.
///
/// Keep it in step with the real IOMMU, if there is one: [`map`](IovaView::map)
/// before the mapping there, [`unmap`](IovaView::unmap) after the unmapping
/// there, when the device can write no more. Finish a [`harvest`](IovaView::harvest)
/// with every report, an empty one if all devices mark: it forgets the mappings
/// that are gone, of which 65536 are remembered; what one more led to counts as
/// dirty. Clones are handles to one view.
#[derive(Clone)]
pub struct IovaView {
    shared: Arc<Shared>,
    maps: Arc<RwLock<Maps>>,
}

#[derive(Default)]
struct Maps {
    /// By first IOVA; no two overlap.
    live: BTreeMap<u64, Mapping>,
    /// By first IOVA, first guest address and size: the unmap that it went in
    /// last, and its bits.
    gone: BTreeMap<(u64, u64, u64), (u64, Mapping)>,
    /// No mapping that is gone is larger.
    largest_gone: u64,
    /// The last unmap that there was no room for in `gone`.
    not_remembered: Option<u64>,
    /// Counts unmaps.
    unmaps: u64,
}

/// A mapping: what a device marks through, from any thread, without a lock.
///
/// Marks go to the guest's own bits. So a mark that comes after the unmap is
/// reported like any other; one that comes after the memory's slot was removed
/// is refused.
#[derive(Clone)]
pub struct Mapping {
    iova: u64,
    gpa: u64,
    size: u64,
    /// The slots behind, in order and without a hole.
    parts: Arc<[Part]>,
    /// Where this mapping starts in `parts`, of which an unmap may have cut.
    skip: u64,
}

/// A slot behind a mapping.
struct Part {
    /// Where it starts in the mapping.
    start: u64,
    bits: DirtyBits,
    /// Where the mapping starts in its memory.
    at: u64,
}

impl Mapping {
    /// First IOVA.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.iova
    }

    /// First guest-physical address.
    #[must_use]
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    fn last(&self) -> u64 {
        self.iova + (self.size - 1)
    }

    /// Marks `len` bytes from `iova` on: *after* the write, and before telling
    /// anybody that it is done.
    ///
    /// # Errors
    ///
    /// [`TrackError::Unmapped`] if a part is outside this mapping, and
    /// `NotTracking` if its slot was removed: no report tells of that part. The
    /// others are marked.
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

    fn mark_all(&self) {
        // Of a slot that was removed nobody wants to know.
        let _ = self.mark(self.iova, self.size);
    }

    /// The part of it between two IOVAs, if any.
    fn cut(&self, first: u64, last: u64) -> Option<Mapping> {
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

impl Maps {
    /// Live mappings that overlap a range.
    fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping> {
        let before = self.live.range(..first).next_back();
        let before = before.map(|(_, m)| m).filter(move |m| m.last() >= first);
        let inside = self.live.range(first..=last).map(|(_, m)| m);
        before.into_iter().chain(inside)
    }

    /// Likewise gone ones, and some more.
    fn gone(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping> {
        let first = first.saturating_sub(self.largest_gone);
        let range = (first, 0, 0)..=(last, u64::MAX, u64::MAX);
        self.gone.range(range).map(|(_, (_, mapping))| mapping)
    }

    fn remember(&mut self, mapping: Mapping) {
        let key = (mapping.iova, mapping.gpa, mapping.size);
        self.largest_gone = self.largest_gone.max(mapping.size);
        if self.gone.len() < MAX_GONE || self.gone.contains_key(&key) {
            self.gone.insert(key, (self.unmaps, mapping));
        } else {
            mapping.mark_all();
            self.not_remembered = Some(self.unmaps);
        }
    }
}

impl IovaView {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let maps = Arc::default();
        IovaView { shared, maps }
    }

    fn read(&self) -> RwLockReadGuard<'_, Maps> {
        self.maps.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Maps> {
        self.maps.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `size` bytes of guest memory from `gpa` on at `iova`. All of it
    /// must be in slots.
    ///
    /// # Errors
    ///
    /// `Misaligned` unless all are multiples of 4 KiB, `ZeroSize`, `Wraps`,
    /// [`TrackError::Unmapped`] for memory that is in no slot, `Overlap` with
    /// another mapping.
    pub fn map(&self, iova: u64, gpa: u64, size: u64) -> Result<Mapping, TrackError> {
        if !BASE_PAGE.aligns(iova | gpa | size) {
            return Err(Error::Misaligned.into());
        }
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        gpa.checked_add(more).ok_or(Error::Wraps)?;
        let mapping = Mapping {
            iova,
            gpa,
            size,
            parts: self.shared.parts(gpa, size)?,
            skip: 0,
        };
        let mut maps = self.write();
        if maps.overlapping(iova, last).next().is_some() {
            return Err(Error::Overlap.into());
        }
        maps.live.insert(iova, mapping.clone());
        Ok(mapping)
    }

    /// Unmaps what is mapped in a range, cutting mappings that reach beyond it,
    /// and returns its bytes. What was marked through them stays dirty.
    ///
    /// # Errors
    ///
    /// `Misaligned` unless both are multiples of 4 KiB, `ZeroSize`, `Wraps`.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64, TrackError> {
        if !BASE_PAGE.aligns(iova | size) {
            return Err(Error::Misaligned.into());
        }
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        let mut maps = self.write();
        maps.unmaps += 1;
        let hit: Vec<Mapping> = maps.overlapping(iova, last).cloned().collect();
        let mut unmapped = 0;
        for mapping in hit {
            maps.live.remove(&mapping.iova);
            let before = iova.checked_sub(1).and_then(|end| mapping.cut(0, end));
            let after = last
                .checked_add(1)
                .and_then(|start| mapping.cut(start, u64::MAX));
            for rest in [before, after].into_iter().flatten() {
                maps.live.insert(rest.iova, rest);
            }
            if let Some(gone) = mapping.cut(iova, last) {
                unmapped += gone.size;
                maps.remember(gone);
            }
        }
        Ok(unmapped)
    }

    /// The guest-physical address behind an IOVA.
    #[must_use]
    pub fn translate(&self, iova: u64) -> Option<u64> {
        let maps = self.read();
        let mapping = maps.overlapping(iova, iova).next()?;
        Some(mapping.gpa + (iova - mapping.iova))
    }

    /// Marks `len` bytes from `iova` on, which may span mappings: for devices
    /// that keep no [`Mapping`]. It shares the view's lock with other marks.
    ///
    /// # Errors
    ///
    /// [`TrackError::Unmapped`] if a part is in no mapping, `NotTracking` if a
    /// slot was removed. The other parts are marked.
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
            if next != Some(part.iova) {
                result = result.and(Err(TrackError::Unmapped {
                    addr: next.unwrap_or(iova),
                }));
            }
            result = result.and(part.mark(part.iova, part.size));
            next = part.last().checked_add(1);
        }
        match next {
            Some(addr) if addr <= last => result.and(Err(TrackError::Unmapped { addr })),
            _ => result,
        }
    }

    /// Begins to harvest the logs of this view's devices.
    #[must_use = "a harvest that is not finished forgets nothing"]
    pub fn harvest(&self) -> Harvest<'_> {
        Harvest {
            before: self.read().unmaps,
            view: self,
        }
    }

    /// Mappings that are gone and remembered, because no harvest was finished
    /// since.
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

impl Shared {
    /// The slots behind a range of guest memory that does not wrap.
    fn parts(&self, gpa: u64, size: u64) -> Result<Arc<[Part]>, TrackError> {
        let mut parts = Vec::new();
        let mut done = 0;
        for slot in self.slots().iter() {
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
}

/// One harvest of all logs of a view's devices: VFIO's DMA_LOGGING_REPORT,
/// iommufd's GET_DIRTY_BITMAP, a type1 container's GET_BITMAP.
///
/// A log tells of an IOVA, not of the mapping through which it was written. So
/// each dirty page counts for every mapping that was there since the harvest
/// before: live ones, and gone ones that the view remembers.
///
/// ```
/// use adapter_user::guest::{Report, Tracker};
/// use adapter_user::{Extent, PageSize};
///
/// let tracker = Tracker::new(None);
/// tracker.add_slot(0, 0, None, 1 << 20)?;
/// let view = tracker.iova_view();
/// view.map(0x8000, 0x1000, 0x1000)?;
/// view.unmap(0x8000, 0x1000)?;
/// view.map(0x8000, 0x2000, 0x1000)?;
///
/// // The device's log says: page 0x8000 was written. Which one was it?
/// let harvest = view.harvest();
/// let pgsize = PageSize::new(4096).unwrap();
/// harvest.or(&[1], Extent { bit: 0, iova: 0x8000, npages: 1, pgsize })?;
/// harvest.finish(); // every log of this view was read
///
/// let mut report = Report::new();
/// tracker.take(&mut report)?;
/// assert_eq!(report.slot(0).unwrap()[0], 0b110);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Harvest<'a> {
    view: &'a IovaView,
    /// Unmaps that were over when it began.
    before: u64,
}

impl Harvest<'_> {
    /// Marks what a device's log says: bit `extent.bit + k` is the page at IOVA
    /// `extent.iova + k * pgsize`, at any page size.
    ///
    /// # Errors
    ///
    /// `BitmapSize`, `Misaligned` or `Wraps` if the extent is none; nothing is
    /// marked then. [`TrackError::Unmapped`] if a dirty page was in no mapping,
    /// `NotTracking` if its memory's slot was removed under its mapping: the
    /// others are marked.
    pub fn or(&self, words: &[u64], extent: Extent) -> Result<(), TrackError> {
        let ranges = extent.ranges(words)?;
        let maps = self.view.read();
        let inside = extent.pgsize.bytes() - 1;
        let mut result = Ok(());
        for (first, last) in ranges {
            // Pages of the log that each mapping has a byte of.
            let mut seen = Vec::new();
            for part in maps
                .overlapping(first, last)
                .filter_map(|m| m.cut(first, last))
            {
                result = result.and(part.mark(part.iova, part.size));
                seen.push((part.iova & !inside, part.last() | inside));
            }
            for part in maps.gone(first, last).filter_map(|m| m.cut(first, last)) {
                part.mark_all();
                seen.push((part.iova & !inside, part.last() | inside));
            }
            // What is not remembered was marked when it went.
            if maps.not_remembered.is_none() {
                result = result.and(covered(seen, first, last));
            }
        }
        result
    }

    /// Every log of the view's devices was read since the harvest began: gone
    /// mappings from before are forgotten.
    pub fn finish(self) {
        let before = self.before;
        let mut maps = self.view.write();
        maps.gone.retain(|_, (unmap, _)| *unmap > before);
        maps.not_remembered = maps.not_remembered.filter(|unmap| *unmap > before);
    }
}

/// Whether ranges (first and last addresses) cover a whole one.
pub(crate) fn covered(
    mut ranges: Vec<(u64, u64)>,
    first: u64,
    last: u64,
) -> Result<(), TrackError> {
    ranges.sort_unstable();
    let mut addr = first;
    for (start, end) in ranges {
        if start > addr {
            break;
        }
        match end.checked_add(1) {
            Some(next) => addr = addr.max(next),
            None => return Ok(()),
        }
    }
    match addr <= last {
        true => Err(TrackError::Unmapped { addr }),
        false => Ok(()),
    }
}
