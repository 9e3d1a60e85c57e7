// SPDX-License-Identifier: MIT OR Apache-2.0
//! The union of what all sources report as dirty, by guest address.

use dirty_core::{normalise, Error, Extent, PageSize};

use super::slots::Slot;
use super::words::set;
use crate::error::TrackError;

/// A range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
}

/// The dirty pages of a guest: a bitmap for each slot.
///
/// What is ORed into it stays until [`clear`](Report::clear). A dirty page that is
/// in no slot is an error; the pages that are in a slot are taken all the same.
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
    /// Bit k % 64 of word k / 64 stands for page k of the slot.
    ///
    /// INVARIANT: as many words as `slot.bits` has, and no bit beyond its pages.
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

    /// Sets the pages that hold bytes `first` to `last` of the slot.
    fn set(&mut self, first: u64, last: u64) {
        let pgsize = self.slot.bits.pgsize();
        let first = pgsize.pages(first);
        set(&mut self.words, first, pgsize.pages(last) - first + 1);
    }
}

impl Report {
    /// Creates a report without slots. It gets them from
    /// [`Tracker::take`](super::Tracker::take).
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes this a report of `slots`. Slots that it has already keep their dirty
    /// pages.
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
            // This cannot fail: the words have the length of the bits.
            let _ = slot.bits.take(words);
        }
    }

    fn of(&mut self, id: u32) -> Result<&mut SlotReport, TrackError> {
        let found = self.slots.iter_mut().find(|s| s.slot.id == id);
        found.ok_or(TrackError::UnknownSlot { id })
    }

    /// ORs a slot's bitmap as KVM_GET_DIRTY_LOG returns it: bit k % 64 of word
    /// k / 64 is the k-th page of 4 KiB of the slot. Bits beyond the slot's last
    /// page are ignored, as KVM pads its bitmap.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`TrackError::UnknownSlot`].
    /// - [`Error::BitmapSize`] if `words` is too short for the slot: it says
    ///   nothing about the rest.
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

    /// ORs a bitmap by guest address, at any page size: bit `extent.bit + k` of
    /// `words` is the page at `extent.iova + k * extent.pgsize`, which is a
    /// guest-physical address here. A dirty page makes every page of a slot dirty
    /// that shares a byte with it.
    ///
    /// # Errors
    ///
    /// If `extent` does not describe `words`, nothing changes:
    ///
    /// - [`Error::Misaligned`] if its address is not a multiple of its page size.
    /// - [`Error::BitmapSize`] if it has more bits than `words`.
    /// - [`Error::Wraps`] if it goes beyond the last address.
    ///
    /// [`TrackError::Unmapped`] if a dirty page shares no byte with a slot; the
    /// other pages are taken all the same.
    pub fn or_bitmap(&mut self, words: &[u64], extent: Extent) -> Result<(), TrackError> {
        let ranges = extent.ranges(words)?;
        let mut inside = 0;
        for at in &mut self.slots {
            or(words, extent, at)?;
            inside += overlap(at, extent);
        }
        // If every page of the extent is inside a slot, no bit can be outside.
        if inside < extent.npages {
            for (first, last) in ranges {
                for page in 0..=extent.pgsize.pages(last - first) {
                    self.check_in_slot(first + (page << extent.pgsize.shift()), extent.pgsize)?;
                }
            }
        }
        Ok(())
    }

    /// Checks that the page at `addr` shares a byte with a slot.
    fn check_in_slot(&self, addr: u64, pgsize: PageSize) -> Result<(), TrackError> {
        let last = addr | (pgsize.bytes() - 1);
        let hit = |at: &SlotReport| at.slot.gpa <= last && at.slot.last() >= addr;
        match self.slots.iter().any(hit) {
            true => Ok(()),
            false => Err(TrackError::Unmapped { addr }),
        }
    }

    /// ORs entries of KVM's dirty ring: a slot's number, and the index of a page of
    /// 4 KiB in the slot. Reset the ring only after this call.
    ///
    /// # Errors
    ///
    /// The first error is returned; the other entries are taken all the same:
    ///
    /// - [`TrackError::UnknownSlot`].
    /// - [`TrackError::Unmapped`] for a page beyond the slot's end.
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

    /// ORs every page that the `size` bytes at guest-physical address `gpa` touch.
    /// No bytes change nothing.
    ///
    /// # Errors
    ///
    /// - [`Error::Wraps`] if the addresses wrap; nothing changes then.
    /// - [`TrackError::Unmapped`] if some of the bytes are in no slot; the others
    ///   are taken all the same.
    pub fn or_range(&mut self, gpa: u64, size: u64) -> Result<(), TrackError> {
        self.or_addresses(gpa, size, |slot| Some(slot.gpa))
    }

    /// As [`or_range`](Report::or_range), but `addr` is an address of this process.
    /// A `page_region` of PAGEMAP_SCAN is such a range: `addr` is its `start`, and
    /// `size` is `end - start`. Slots without a host address do not count.
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

    /// Makes every page of every slot dirty, as when a source fails.
    pub fn set_all(&mut self) {
        for at in &mut self.slots {
            at.set(0, at.slot.bits.len() - 1);
        }
    }

    /// Makes every page clean. Call it when the copies of the pages have arrived.
    pub fn clear(&mut self) {
        for at in &mut self.slots {
            at.words.fill(0);
        }
    }

    /// Returns the number of dirty pages. Each slot counts in pages of its own
    /// size, [`DirtyBits::pgsize`](crate::DirtyBits::pgsize).
    #[must_use]
    pub fn pages(&self) -> u64 {
        let words = self.slots.iter().flat_map(|at| &at.words);
        words.map(|w| u64::from(w.count_ones())).sum()
    }

    /// Returns the bitmap of slot `id`, or `None` if the report has no such slot.
    /// Bit k % 64 of word k / 64 is page k of the slot, in pages of
    /// [`DirtyBits::pgsize`](crate::DirtyBits::pgsize).
    #[must_use]
    pub fn slot(&self, id: u32) -> Option<&[u64]> {
        let found = self.slots.iter().find(|at| at.slot.id == id);
        found.map(|at| &at.words[..])
    }

    /// ORs the dirty pages of slot `id` into `out`, in pages of `pgsize` bytes,
    /// which may be any power of two. Bit 0 is the page that holds the slot's first
    /// byte, also where the slot starts inside that page.
    ///
    /// # Errors
    ///
    /// In this order; `out` is unchanged then:
    ///
    /// - [`TrackError::PageSize`] unless `pgsize` is a power of two.
    /// - [`TrackError::UnknownSlot`].
    /// - [`Error::BitmapSize`] if `out` is too short.
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

    /// Returns the dirty ranges, sorted by address. Each consists of whole pages of
    /// `pgsize` bytes, which may be any power of two, cut at the ends of its slot.
    /// Two ranges of one slot never touch.
    ///
    /// # Errors
    ///
    /// [`TrackError::PageSize`] unless `pgsize` is a power of two.
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

/// Returns how many pages of `extent` lie wholly in a slot.
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

/// ORs the bits of `words` that are in the slot of `at`. `log` says which pages
/// `words` stands for.
fn or(words: &[u64], log: Extent, at: &mut SlotReport) -> Result<(), TrackError> {
    let own = at.extent();
    if log.bit == 0 && log.iova == own.iova && log.npages == own.npages && log.pgsize == own.pgsize
    {
        // The bits stand for the same pages, so whole words can be ORed.
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
