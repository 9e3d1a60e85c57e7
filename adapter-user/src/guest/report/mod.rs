// SPDX-License-Identifier: MIT OR Apache-2.0
//! The union of what all sources tell as dirty, by guest address.

mod told;

use std::collections::HashMap;

use dirty_core::{normalise, Extent, PageSize};

use super::pages::{SlotInfo, SlotPages};
use super::ranges::Range;
use super::slots::{Slot, State};
use super::taken::SlotStats;
use crate::error::TrackError;

/// The dirty pages of a guest: a bitmap for each slot.
///
/// What is ORed into it stays until [`clear`](Report::clear). A dirty page that is
/// in no slot is an error; the pages that are in a slot are taken all the same.
///
/// ```
/// use adapter_user::guest::Tracker;
///
/// let tracker = Tracker::new(None);
/// tracker.add_slot(7, 0x10_0000, Some(0x7f00_0000_0000), 1 << 20)?;
/// let mut report = tracker.report();
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
    /// INVARIANT: as in the tracker, sorted by address and without overlaps.
    slots: Vec<SlotPages>,
    /// The index in `slots` by number, sorted.
    by_id: Vec<(u32, usize)>,
    /// The index in `slots` by host address, sorted.
    by_host: Vec<(u64, usize)>,
    /// What was dirty in slots that are removed now.
    removed: Vec<SlotPages>,
    /// The tracker and the version of its slots that the report follows.
    follows: (u64, u64),
    /// The bytes that sources have told since they were counted last.
    told: u64,
}

impl Report {
    /// Creates a report without slots. [`Tracker::take`](super::Tracker::take) gives
    /// it slots, and [`Tracker::report`](super::Tracker::report) creates one that
    /// has them.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes this a report of the slots of tracker `id`. Memory that it has already
    /// keeps its dirty pages, wherever it is now.
    pub(super) fn follow(&mut self, id: u64, now: &State) {
        if self.follows == (id, now.version) {
            return;
        }
        let old = self.slots.drain(..).chain(self.removed.drain(..));
        let mut old: HashMap<usize, SlotPages> =
            old.map(|pages| (pages.slot.bits.key(), pages)).collect();
        let new = now.list.iter().map(|slot| {
            let Some(old) = old.remove(&slot.bits.key()) else {
                return SlotPages::new(slot.clone(), Vec::new());
            };
            SlotPages {
                told: old.told,
                ..SlotPages::new(slot.clone(), old.words)
            }
        });
        self.slots = new.collect();
        self.removed = old
            .into_values()
            .filter(|pages| pages.count() != 0)
            .collect();
        self.removed.sort_unstable_by_key(|pages| pages.slot.gpa);
        let by = |(at, pages): (usize, &SlotPages)| (pages.slot.id, at);
        self.by_id = self.slots.iter().enumerate().map(by).collect();
        self.by_id.sort_unstable();
        let by = |(at, pages): (usize, &SlotPages)| pages.slot.host.map(|host| (host, at));
        self.by_host = self.slots.iter().enumerate().filter_map(by).collect();
        self.by_host.sort_unstable();
        self.follows = (id, now.version);
    }

    pub(super) fn take_marks(&mut self) {
        self.slots.iter_mut().for_each(SlotPages::take_marks);
    }

    /// Begins to count what sources tell.
    pub(super) fn count_anew(&mut self) {
        self.slots.iter_mut().for_each(|pages| pages.told = 0);
        self.told = 0;
    }

    /// The bytes that were told since the call before, or since
    /// [`count_anew`](Report::count_anew).
    pub(super) fn newly_told(&mut self) -> u64 {
        std::mem::take(&mut self.told)
    }

    fn add_told(&mut self, bytes: u64) {
        self.told = self.told.saturating_add(bytes);
    }

    /// What the take found in each slot.
    pub(super) fn slot_stats(&self) -> impl Iterator<Item = SlotStats> + '_ {
        self.slots.iter().map(|pages| SlotStats {
            id: pages.slot.id,
            marked: pages.marked,
            told: pages.told,
        })
    }

    /// The bytes of memory that all slots have.
    pub(super) fn memory(&self) -> u64 {
        let sizes = self.slots.iter().map(|pages| pages.slot.size);
        sizes.fold(0, u64::saturating_add)
    }

    /// Marks what the report has in the bits of the slots, for the next take.
    pub(super) fn give_back(self) {
        for SlotPages { slot, words, .. } in self.slots {
            // The bits of a slot that was just removed keep the marks.
            let _ = slot.bits.mark_words(&words);
        }
    }

    /// The number of the tracker that it is a report of, if there is one.
    pub(super) fn tracker(&self) -> Option<u64> {
        Some(self.follows.0).filter(|id| *id != 0)
    }

    /// ORs what it has of a slot into `words`, which are those of the slot's bits.
    pub(super) fn or_into(&self, slot: &Slot, words: &mut [u64]) {
        let all = self.slots.iter().chain(&self.removed);
        for pages in all.filter(|pages| pages.slot.bits.same(&slot.bits)) {
            words
                .iter_mut()
                .zip(&pages.words)
                .for_each(|(a, b)| *a |= b);
        }
    }

    fn at(&self, id: u32) -> Result<usize, TrackError> {
        let at = self.by_id.binary_search_by_key(&id, |(id, _)| *id);
        match at.ok().and_then(|at| self.by_id.get(at)) {
            Some((_, at)) => Ok(*at),
            None => Err(TrackError::UnknownSlot { id }),
        }
    }

    /// Returns the slots, sorted by address: those of the tracker when the report
    /// was taken or created.
    #[must_use]
    pub fn slots(&self) -> Vec<SlotInfo> {
        self.slots.iter().map(SlotPages::info).collect()
    }

    /// Returns the slots that were removed before their dirty pages were delivered,
    /// sorted by the address that they had, each with its bitmap as
    /// [`slot`](Report::slot) returns one. If the memory comes back, its pages are
    /// told at its new address instead.
    ///
    /// [`clear`](Report::clear) forgets them.
    pub fn removed(&self) -> impl Iterator<Item = (SlotInfo, &[u64])> + '_ {
        self.removed
            .iter()
            .map(|pages| (pages.info(), &pages.words[..]))
    }

    /// The index of the first slot that ends at `gpa` or after it.
    fn from(&self, gpa: u64) -> usize {
        self.slots.partition_point(|pages| pages.slot.last() < gpa)
    }

    /// Makes clean every page that lies wholly in the `size` bytes at guest-physical
    /// address `gpa`, which may span slots and what is in no slot. The end of a slot
    /// ends its last page. Other pages stay as they are.
    ///
    /// It is for pages that need not be copied: the guest gave them away, or they
    /// were sent by themselves. The report forgets what it has taken, and nothing
    /// else: a write that no take has seen yet is in the next report. So a page may
    /// be discarded if the guest gave it away *after* the take, or if it was sent
    /// *after* the take. If the guest gave it away before, it may have used it again
    /// since: discard it from the bits, with
    /// [`DirtyBits::discard`](crate::DirtyBits::discard), while the guest waits.
    pub fn discard(&mut self, gpa: u64, size: u64) {
        let Some(more) = size.checked_sub(1) else {
            return;
        };
        let last = gpa.saturating_add(more);
        let from = self.from(gpa);
        for pages in &mut self.slots[from..] {
            if pages.slot.gpa > last {
                break;
            }
            pages.discard(gpa.max(pages.slot.gpa), last.min(pages.slot.last()));
        }
    }

    /// As [`discard`](Report::discard), for each run of pages whose bits are set: bit
    /// `extent.bit + k` of `words` is the page at `extent.iova + k * extent.pgsize`,
    /// which is a guest-physical address here.
    ///
    /// # Errors
    ///
    /// As [`or_bitmap`](Report::or_bitmap) if `extent` does not describe `words`;
    /// nothing changes then.
    pub fn discard_bitmap(&mut self, words: &[u64], extent: Extent) -> Result<(), TrackError> {
        for (first, last) in extent.ranges(words)? {
            self.discard(first, (last - first).saturating_add(1));
        }
        Ok(())
    }

    /// Makes every page of every slot dirty, as when a source fails.
    pub fn set_all(&mut self) {
        self.slots.iter_mut().for_each(SlotPages::set_all);
    }

    /// Makes every page clean. Call it when the copies of the pages have arrived.
    pub fn clear(&mut self) {
        for pages in &mut self.slots {
            pages.words.fill(0);
        }
        self.removed.clear();
    }

    /// Returns the number of dirty pages. Each slot counts in pages of its own
    /// size, [`DirtyBits::pgsize`](crate::DirtyBits::pgsize).
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.slots.iter().map(SlotPages::count).sum()
    }

    /// Returns the bytes of the dirty pages, whatever the page size of each slot.
    /// [`DirtyRate`](crate::DirtyRate) takes them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let bytes = |pages: &SlotPages| {
            let pgsize = pages.slot.bits.pgsize().bytes();
            pages.count().saturating_mul(pgsize)
        };
        self.slots.iter().map(bytes).fold(0, u64::saturating_add)
    }

    /// Returns the bitmap of slot `id`, or `None` if the report has no such slot.
    /// Bit k % 64 of word k / 64 is page k of the slot, in pages of
    /// [`DirtyBits::pgsize`](crate::DirtyBits::pgsize).
    #[must_use]
    pub fn slot(&self, id: u32) -> Option<&[u64]> {
        self.pages_of(id).map(|pages| &pages.words[..])
    }

    /// What the report has of slot `id`.
    pub(super) fn pages_of(&self, id: u32) -> Option<&SlotPages> {
        self.slots.get(self.at(id).ok()?)
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
    /// - [`Error::BitmapSize`](crate::Error::BitmapSize) if `out` is too short.
    pub fn bitmap(&self, id: u32, pgsize: u64, out: &mut [u64]) -> Result<(), TrackError> {
        let pgsize = PageSize::new(pgsize).ok_or(TrackError::PageSize)?;
        let pages = &self.slots[self.at(id)?];
        let to = pages.extent_in(pgsize);
        Ok(normalise(&pages.words, pages.extent(), out, to)?)
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
        let ranges = self.slots.iter().map(|pages| pages.ranges(pgsize));
        let ranges = ranges.collect::<Result<Vec<_>, _>>()?;
        Ok(ranges.into_iter().flatten())
    }
}
