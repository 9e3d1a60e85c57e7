// SPDX-License-Identifier: MIT OR Apache-2.0
//! The union of what all sources found dirty, by guest address.

use dirty_core::{normalise, Error, Extent, PageSize};

use super::tracker::Slot;
use super::words::set;
use crate::error::TrackError;

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
}

/// The dirty pages of a guest: a bitmap for each slot.
///
/// Whatever is ORed into it stays until [`clear`](Report::clear). Bits for
/// memory that is in no slot are an error, never dropped in silence; what is in
/// a slot is taken in any case.
///
/// ```
/// use adapter_user::guest::{Report, Tracker};
///
/// let tracker = Tracker::new(None);
/// tracker.add_slot(7, 0x10_0000, Some(0x7f00_0000_0000), 1 << 20)?;
/// let mut report = Report::new();
/// tracker.take(&mut report)?;
///
/// report.or_slot(7, &[0b1, 0, 0, 0])?; // KVM_GET_DIRTY_LOG
/// report.or_ring([(7, 2)])?; // entries of KVM's dirty ring: slot and offset
/// report.or_host(0x7f00_0000_3000, 0x1000)?; // PAGEMAP_SCAN: a page_region
/// report.or_range(0x10_4000, 1)?; // guest addresses
/// assert_eq!(report.slot(7).unwrap()[0], 0b11101);
///
/// let mut coarse = [0];
/// report.bitmap(7, 2 << 20, &mut coarse)?;
/// assert_eq!(coarse, [1]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Report {
    slots: Vec<SlotReport>,
}

#[derive(Clone, Debug)]
struct SlotReport {
    slot: Slot,
    /// INVARIANT: the length of `slot.bits`, no bit beyond its pages.
    words: Vec<u64>,
}

impl SlotReport {
    fn extent(&self) -> Extent {
        Extent {
            bit: 0,
            iova: self.slot.gpa,
            npages: self.slot.bits.npages(),
            pgsize: self.slot.bits.pgsize(),
        }
    }

    /// Sets the pages of bytes `first` to `last` of the slot.
    fn set(&mut self, first: u64, last: u64) {
        let pgsize = self.slot.bits.pgsize();
        let first = pgsize.pages(first);
        set(&mut self.words, first, pgsize.pages(last) - first + 1);
    }
}

impl Report {
    /// An empty report. It gets its slots from [`Tracker::take`](super::Tracker::take).
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Becomes a report of `slots`: what it has of those that stay stays.
    pub(super) fn follow(&mut self, slots: &[Slot]) {
        let same = |old: &SlotReport, new: &Slot| old.slot.bits.same(&new.bits);
        if self.slots.len() == slots.len() && self.slots.iter().zip(slots).all(|(o, n)| same(o, n))
        {
            return;
        }
        let mut old = std::mem::take(&mut self.slots);
        self.slots = slots
            .iter()
            .map(|slot| match old.iter().position(|o| same(o, slot)) {
                Some(at) => old.swap_remove(at),
                None => SlotReport {
                    slot: slot.clone(),
                    words: vec![0; slot.bits.words()],
                },
            })
            .collect();
    }

    pub(super) fn take_marks(&mut self) {
        for SlotReport { slot, words } in &mut self.slots {
            // The words are of these bits: nothing to fail.
            let _ = slot.bits.take(words);
        }
    }

    fn of(&mut self, id: u32) -> Result<&mut SlotReport, TrackError> {
        let found = self.slots.iter_mut().find(|s| s.slot.id == id);
        found.ok_or(TrackError::UnknownSlot { id })
    }

    /// ORs a slot's bitmap as KVM_GET_DIRTY_LOG gives it: bit k is page k of
    /// the slot, 4 KiB each. Bits beyond the slot's last page mean nothing, as
    /// in KVM's padding.
    ///
    /// # Errors
    ///
    /// `UnknownSlot`; `BitmapSize` if `words` does not cover the slot: nothing
    /// is known of the rest.
    pub fn or_slot(&mut self, id: u32, words: &[u64]) -> Result<(), TrackError> {
        let at = self.of(id)?;
        let len = at.slot.bits.len();
        let log = Extent {
            bit: 0,
            iova: at.slot.gpa,
            npages: len.div_ceil(4096),
            pgsize: crate::dirty_bits::BASE_PAGE,
        };
        or(words, log, at)
    }

    /// ORs a bitmap by guest address, at any page size: bit `extent.bit + k` is
    /// the page at `extent.iova + k * pgsize`, a guest-physical address here.
    ///
    /// # Errors
    ///
    /// `BitmapSize`, `Misaligned` or `Wraps` if the extent is none; nothing
    /// changes then. `Unmapped` if a dirty page is in no slot at all.
    pub fn or_bitmap(&mut self, words: &[u64], extent: Extent) -> Result<(), TrackError> {
        let ranges = extent.ranges(words)?;
        let mut inside = 0;
        for at in &mut self.slots {
            or(words, extent, at)?;
            inside += overlap(at, extent);
        }
        // Only then can a bit be outside.
        if inside < extent.npages {
            for (first, last) in ranges {
                for page in 0..=extent.pgsize.pages(last - first) {
                    self.covers(first + (page << extent.pgsize.shift()), extent.pgsize)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the page at `addr` shares a byte with a slot.
    fn covers(&self, addr: u64, pgsize: PageSize) -> Result<(), TrackError> {
        let last = addr | (pgsize.bytes() - 1);
        let hit = |at: &SlotReport| at.slot.gpa <= last && at.slot.last() >= addr;
        match self.slots.iter().any(hit) {
            true => Ok(()),
            false => Err(TrackError::Unmapped { addr }),
        }
    }

    /// ORs entries of KVM's dirty ring: a slot's number and a page's offset in
    /// it. Reset the ring only after the pages are in a report.
    ///
    /// # Errors
    ///
    /// `UnknownSlot`, or `Unmapped` for an offset beyond the slot's end; the
    /// other entries are taken.
    pub fn or_ring(
        &mut self,
        entries: impl IntoIterator<Item = (u32, u64)>,
    ) -> Result<(), TrackError> {
        let mut result = Ok(());
        for (id, page) in entries {
            let entry = self.of(id).and_then(|at| {
                let addr = page.saturating_mul(4096);
                if addr >= at.slot.bits.len() {
                    let addr = at.slot.gpa.saturating_add(addr);
                    return Err(TrackError::Unmapped { addr });
                }
                at.set(addr, (addr + 4095).min(at.slot.bits.len() - 1));
                Ok(())
            });
            result = result.and(entry);
        }
        result
    }

    /// ORs `size` bytes of guest memory from `gpa` on.
    ///
    /// # Errors
    ///
    /// `Wraps`; `Unmapped` if a byte is in no slot: the others are taken.
    pub fn or_range(&mut self, gpa: u64, size: u64) -> Result<(), TrackError> {
        self.or_addresses(gpa, size, |slot| Some(slot.gpa))
    }

    /// ORs `size` bytes of this process from `addr` on, as PAGEMAP_SCAN gives
    /// them (start, and end - start).
    ///
    /// # Errors
    ///
    /// As [`or_range`](Report::or_range).
    pub fn or_host(&mut self, addr: u64, size: u64) -> Result<(), TrackError> {
        self.or_addresses(addr, size, |slot| slot.host)
    }

    fn or_addresses(
        &mut self,
        addr: u64,
        size: u64,
        base: impl Fn(&Slot) -> Option<u64>,
    ) -> Result<(), TrackError> {
        let Some(more) = size.checked_sub(1) else {
            return Ok(());
        };
        let end = addr.checked_add(more).ok_or(Error::Wraps)?;
        let mut covered = 0;
        for at in &mut self.slots {
            let Some(base) = base(&at.slot) else {
                continue;
            };
            let (first, last) = (addr.max(base), end.min(base + (at.slot.bits.len() - 1)));
            if first <= last {
                at.set(first - base, last - base);
                covered += last - first + 1;
            }
        }
        match covered < size {
            true => Err(TrackError::Unmapped { addr }),
            false => Ok(()),
        }
    }

    /// Every page is dirty: what an error of a source means.
    pub fn set_all(&mut self) {
        for at in &mut self.slots {
            at.set(0, at.slot.bits.len() - 1);
        }
    }

    /// Empties the report: its pages have arrived.
    pub fn clear(&mut self) {
        for at in &mut self.slots {
            at.words.fill(0);
        }
    }

    /// Dirty pages, each of the size that its slot is tracked in.
    #[must_use]
    pub fn pages(&self) -> u64 {
        let words = self.slots.iter().flat_map(|at| &at.words);
        words.map(|w| u64::from(w.count_ones())).sum()
    }

    /// A slot's bitmap, at the page size that it is tracked in.
    #[must_use]
    pub fn slot(&self, id: u32) -> Option<&[u64]> {
        let found = self.slots.iter().find(|at| at.slot.id == id);
        found.map(|at| &at.words[..])
    }

    /// ORs a slot's dirty pages into `out`, in pages of `pgsize`, any power of
    /// two: bit 0 is the page with the slot's first byte.
    ///
    /// # Errors
    ///
    /// `UnknownSlot`, `PageSize`; `BitmapSize` if `out` is too short.
    pub fn bitmap(&self, id: u32, pgsize: u64, out: &mut [u64]) -> Result<(), TrackError> {
        let pgsize = PageSize::new(pgsize).ok_or(TrackError::PageSize)?;
        let found = self.slots.iter().find(|at| at.slot.id == id);
        let at = found.ok_or(TrackError::UnknownSlot { id })?;
        let first = pgsize.pages(at.slot.gpa);
        let to = Extent {
            bit: 0,
            iova: first << pgsize.shift(),
            npages: pgsize.pages(at.slot.last()) - first + 1,
            pgsize,
        };
        Ok(normalise(&at.words, at.extent(), out, to)?)
    }

    /// The dirty ranges by address, in whole pages of `pgsize` (any power of
    /// two) as far as slots reach; no two touch inside a slot.
    ///
    /// # Errors
    ///
    /// `PageSize`.
    pub fn ranges(&self, pgsize: u64) -> Result<impl Iterator<Item = Range> + '_, TrackError> {
        let pgsize = PageSize::new(pgsize).ok_or(TrackError::PageSize)?;
        let ranges = self.slots.iter().map(|at| at.ranges(pgsize));
        let ranges = ranges.collect::<Result<Vec<_>, _>>()?;
        Ok(ranges.into_iter().flatten())
    }
}

impl SlotReport {
    fn ranges(&self, pgsize: PageSize) -> Result<impl Iterator<Item = Range> + '_, Error> {
        let (start, end) = (self.slot.gpa, self.slot.last());
        let inside = pgsize.bytes() - 1;
        let ranges = self.extent().ranges(&self.words)?;
        let mut runs = ranges
            .map(move |(first, last)| ((first & !inside).max(start), (last | inside).min(end)))
            .peekable();
        Ok(std::iter::from_fn(move || {
            let (first, mut last) = runs.next()?;
            while let Some((_, next)) = runs.next_if(|(next, _)| *next <= last.saturating_add(1)) {
                last = last.max(next);
            }
            Some(Range {
                gpa: first,
                size: last - first + 1,
            })
        }))
    }
}

/// Pages of `extent` that lie wholly in a slot.
fn overlap(at: &SlotReport, extent: Extent) -> u64 {
    let pgsize = extent.pgsize;
    let first = at.slot.gpa.max(extent.iova);
    let end = extent.iova.saturating_add(extent.npages << pgsize.shift());
    let end = end.min(at.slot.last().saturating_add(1));
    match first.checked_add(pgsize.bytes() - 1) {
        Some(up) if up < end => pgsize.pages(end).saturating_sub(pgsize.pages(up)),
        _ => 0,
    }
}

/// ORs those bits of a foreign bitmap that are in one slot.
fn or(words: &[u64], log: Extent, at: &mut SlotReport) -> Result<(), TrackError> {
    let own = at.extent();
    if log.bit == 0 && log.iova == own.iova && log.npages == own.npages && log.pgsize == own.pgsize
    {
        // The same pages: word by word.
        let len = at.words.len();
        let words = words.get(..len).ok_or(Error::BitmapSize)?;
        at.words.iter_mut().zip(words).for_each(|(a, b)| *a |= b);
        if let (Some(tail), rest @ 1..) = (at.words.last_mut(), own.npages % 64) {
            *tail &= (1 << rest) - 1;
        }
        return Ok(());
    }
    Ok(normalise(words, log, &mut at.words, own)?)
}
