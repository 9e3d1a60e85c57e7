// SPDX-License-Identifier: MIT OR Apache-2.0
//! The union of what all sources report as dirty, by guest address.

use std::collections::HashMap;

use dirty_core::{normalise, Error, Extent, PageSize};

use super::pages::{SlotInfo, SlotPages};
use super::ranges::Range;
use super::slots::{Slot, State};
use super::taken::SlotStats;
use crate::error::TrackError;
use crate::host_page::host_page;

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

    /// ORs a slot's bitmap as KVM_GET_DIRTY_LOG returns it: bit k % 64 of word
    /// k / 64 is the k-th page of the slot, in pages of the host's size. Bits beyond
    /// the slot's last page are ignored, as KVM pads its bitmap. For bits of another
    /// page size there is [`or_bitmap`](Report::or_bitmap).
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`TrackError::UnknownSlot`].
    /// - [`Error::BitmapSize`] unless `words` has as many words as the slot's pages
    ///   need: the bits are of another slot, or of another page size.
    /// - [`Error::Misaligned`] if the slot's address is not a multiple of the host's
    ///   page size.
    pub fn or_slot(&mut self, id: u32, words: &[u64]) -> Result<(), TrackError> {
        self.or_slot_in(host_page(), id, words)
    }

    /// As `or_slot`, on a host with pages of this size.
    fn or_slot_in(&mut self, pgsize: PageSize, id: u32, words: &[u64]) -> Result<(), TrackError> {
        let at = self.at(id)?;
        let pages = &mut self.slots[at];
        let npages = pages.slot.size.div_ceil(pgsize.bytes());
        if words.len() as u64 != npages.div_ceil(64) {
            return Err(Error::BitmapSize.into());
        }
        let log = Extent {
            bit: 0,
            iova: pages.slot.gpa,
            npages,
            pgsize,
        };
        let told = pages.or(words, log)?;
        self.add_told(told);
        Ok(())
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
        let mut told = 0u64;
        for pages in &mut self.slots {
            told = told.saturating_add(pages.or(words, extent)?);
            inside += pages.overlap(extent);
        }
        self.add_told(told);
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

    /// The index of the first slot that ends at `gpa` or after it.
    fn from(&self, gpa: u64) -> usize {
        self.slots.partition_point(|pages| pages.slot.last() < gpa)
    }

    /// Checks that the page at `addr` shares a byte with a slot.
    fn check_in_slot(&self, addr: u64, pgsize: PageSize) -> Result<(), TrackError> {
        let last = addr | (pgsize.bytes() - 1);
        let at = self.from(addr);
        match self
            .slots
            .get(at)
            .is_some_and(|pages| pages.slot.gpa <= last)
        {
            true => Ok(()),
            false => Err(TrackError::Unmapped { addr }),
        }
    }

    /// ORs entries of KVM's dirty ring: a slot's number, and the index of a page in
    /// the slot, in pages of the host's size. Reset the ring only after this call.
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
        self.or_ring_in(host_page(), entries)
    }

    /// As `or_ring`, on a host with pages of this size.
    fn or_ring_in(
        &mut self,
        pgsize: PageSize,
        entries: impl IntoIterator<Item = (u32, u64)>,
    ) -> Result<(), TrackError> {
        let mut result = Ok(());
        for (id, page) in entries {
            let entry = self.at(id).and_then(|at| {
                let pages = &mut self.slots[at];
                let addr = page.saturating_mul(pgsize.bytes());
                if addr >= pages.slot.size {
                    let addr = pages.slot.gpa.saturating_add(addr);
                    return Err(TrackError::Unmapped { addr });
                }
                let last = addr | (pgsize.bytes() - 1);
                let told = pages.set(addr, last.min(pages.slot.size - 1));
                self.add_told(told);
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
        let Some(last) = last(gpa, size)? else {
            return Ok(());
        };
        let from = self.from(gpa);
        let mut covered = Covered::new(gpa, last);
        for pages in &mut self.slots[from..] {
            if !covered.or(pages.slot.gpa, pages) {
                break;
            }
        }
        self.add_told(covered.told);
        covered.result()
    }

    /// As [`or_range`](Report::or_range), but `addr` is an address of this process.
    /// A `page_region` of PAGEMAP_SCAN is such a range: `addr` is its `start`, and
    /// `size` is `end - start`. Slots without a host address do not count.
    ///
    /// # Errors
    ///
    /// As [`or_range`](Report::or_range).
    pub fn or_host(&mut self, addr: u64, size: u64) -> Result<(), TrackError> {
        let Some(last) = last(addr, size)? else {
            return Ok(());
        };
        // The one before may reach into the range.
        let from = self.by_host.partition_point(|(host, _)| *host <= addr);
        let from = from.saturating_sub(1);
        let mut covered = Covered::new(addr, last);
        for (host, at) in &self.by_host[from..] {
            if !covered.or(*host, &mut self.slots[*at]) {
                break;
            }
        }
        self.add_told(covered.told);
        covered.result()
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
    /// - [`Error::BitmapSize`] if `out` is too short.
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

/// The last address of a range, if it has one.
fn last(addr: u64, size: u64) -> Result<Option<u64>, Error> {
    let Some(more) = size.checked_sub(1) else {
        return Ok(None);
    };
    addr.checked_add(more).ok_or(Error::Wraps).map(Some)
}

/// The bytes of a range that are in a slot.
struct Covered {
    first: u64,
    last: u64,
    missing: u128,
    /// The bytes of the slots' pages that were set.
    told: u64,
}

impl Covered {
    fn new(first: u64, last: u64) -> Self {
        let missing = u128::from(last - first) + 1;
        Covered {
            first,
            last,
            missing,
            told: 0,
        }
    }

    /// Sets the pages of a slot that starts at `base`. Returns false if the slot is
    /// behind the range.
    fn or(&mut self, base: u64, pages: &mut SlotPages) -> bool {
        let first = self.first.max(base);
        let last = self.last.min(base + (pages.slot.size - 1));
        if first <= last {
            let told = pages.set(first - base, last - base);
            self.told = self.told.saturating_add(told);
            self.missing -= u128::from(last - first) + 1;
        }
        base <= self.last
    }

    fn result(self) -> Result<(), TrackError> {
        let addr = self.first;
        match self.missing {
            0 => Ok(()),
            _ => Err(TrackError::Unmapped { addr }),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::guest::Tracker;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A slot of 1 MiB and 20 KiB at 4 MiB, whose last page of the host is cut off.
    fn report() -> Report {
        let tracker = Tracker::new(None);
        tracker.add_slot(1, 4 * MIB, None, MIB + 0x5000).unwrap();
        tracker.report()
    }

    fn ranges(report: &Report) -> Vec<(u64, u64)> {
        let ranges = report.ranges(4096).unwrap();
        ranges
            .map(|range| (range.gpa - 4 * MIB, range.size))
            .collect()
    }

    /// KVM counts in pages of the host: of 4, 16 and 64 KiB.
    #[test]
    fn kvm_s_log_has_pages_of_the_host() {
        for size in [4096u64, 16384, 65536] {
            let host = PageSize::new(size).unwrap();
            let words = (MIB + 0x5000).div_ceil(size).div_ceil(64) as usize;
            let mut log = vec![0; words];
            log[0] = 1 << 2;
            let last = (MIB + 0x5000 - 1) / size;
            log[(last / 64) as usize] |= 1 << (last % 64);
            let mut by_log = report();
            by_log.or_slot_in(host, 1, &log).unwrap();
            let expected = [(2 * size, size), (last * size, MIB + 0x5000 - last * size)];
            assert_eq!(ranges(&by_log), expected);

            let mut by_ring = report();
            by_ring.or_ring_in(host, [(1, 2), (1, last)]).unwrap();
            assert_eq!(ranges(&by_ring), expected);
            let beyond = by_ring.or_ring_in(host, [(1, last + 1)]);
            assert!(matches!(beyond, Err(TrackError::Unmapped { .. })));
        }
    }

    /// Bits of 4 KiB on a host of 64 KiB, and the reverse, are refused and not misread.
    #[test]
    fn a_log_of_another_page_size_is_refused() {
        let words = |size: u64| vec![0; (MIB + 0x5000).div_ceil(size).div_ceil(64) as usize];
        for (host, log) in [(4096, 65536), (65536, 4096), (16384, 4096), (4096, 16384)] {
            let host = PageSize::new(host).unwrap();
            let refused = report().or_slot_in(host, 1, &words(log));
            assert_eq!(refused, Err(Error::BitmapSize.into()));
        }
    }
}
