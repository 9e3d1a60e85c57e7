// SPDX-License-Identifier: MIT OR Apache-2.0
//! What sources tell a report: bitmaps, entries of a ring, and ranges.

use dirty_core::{Error, Extent, PageSize};

use super::Report;
use crate::error::TrackError;
use crate::guest::pages::SlotPages;
use crate::host_page::host_page;

impl Report {
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
