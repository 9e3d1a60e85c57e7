// SPDX-License-Identifier: MIT OR Apache-2.0
//! A simulated IOMMU: the page tables of the groups that have one.

use std::collections::{BTreeMap, HashMap};

use dirty_core::host::{DomainId, DomainInfo, GroupId};
use dirty_core::{Errno, PageSize};

/// What the simulated IOMMU behind a group can do. Start with the default and set fields:
/// there may be more of them in a later version.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IommuSpec {
    /// The page sizes that it maps: bit k stands for 2^k bytes.
    pub pgsize_bitmap: u64,
    /// The first and the last IOVA that it translates.
    pub aperture: (u64, u64),
    /// The regions where nothing may be mapped, each by its first and last IOVA.
    pub reserved: Vec<(u64, u64)>,
    /// Whether it makes all DMA cache-coherent, whatever a device asks for.
    pub coherent: bool,
    /// Whether the group's interrupts are isolated from those of other groups.
    pub isolated_msi: bool,
}

impl Default for IommuSpec {
    /// An Intel IOMMU on every host: pages of 4 KiB, 2 MiB and 1 GiB, IOVAs of 48 bits,
    /// and the MSI window of x86 as a reserved region.
    fn default() -> Self {
        IommuSpec {
            pgsize_bitmap: 1 << 12 | 1 << 21 | 1 << 30,
            aperture: (0, (1 << 48) - 1),
            reserved: vec![(0xfee0_0000, 0xfeef_ffff)],
            coherent: false,
            isolated_msi: true,
        }
    }
}

/// A run of pages in a page table.
#[derive(Clone, Copy, Debug)]
struct Entry {
    pfn: u64,
    npages: u64,
}

#[derive(Debug)]
struct Domain {
    /// The size of the pages that pfns count.
    page: PageSize,
    pgsize_bitmap: u64,
    aperture: (u64, u64),
    /// The runs by their first IOVA; no two overlap.
    table: BTreeMap<u64, Entry>,
}

impl Domain {
    /// Returns the run that maps `iova`, and its first IOVA.
    fn entry(&self, iova: u64) -> Option<(u64, Entry)> {
        let (&start, &entry) = self.table.range(..=iova).next_back()?;
        (self.page.pages(iova - start) < entry.npages).then_some((start, entry))
    }

    /// Cuts the run that maps `iova` in two, so that one starts there.
    fn split(&mut self, iova: u64) {
        if let Some((start, entry)) = self.entry(iova).filter(|(start, _)| *start != iova) {
            let head = self.page.pages(iova - start);
            let tail = Entry {
                pfn: entry.pfn + head,
                npages: entry.npages - head,
            };
            self.table.insert(
                start,
                Entry {
                    npages: head,
                    ..entry
                },
            );
            self.table.insert(iova, tail);
        }
    }
}

/// The IOMMUs of one container.
#[derive(Debug)]
pub(super) struct Iommus {
    page: PageSize,
    specs: HashMap<u64, IommuSpec>,
    domains: HashMap<u64, Domain>,
    next: u64,
}

impl Iommus {
    pub(super) fn new(page: PageSize) -> Self {
        Iommus {
            page,
            specs: HashMap::new(),
            domains: HashMap::new(),
            next: 0,
        }
    }

    /// Adds the IOMMU behind `group`, before the group is attached.
    pub(super) fn insert(&mut self, group: GroupId, spec: IommuSpec) {
        self.specs.insert(group.0, spec);
    }

    pub(super) fn remove(&mut self, group: GroupId) {
        self.specs.remove(&group.0);
    }

    pub(super) fn attach(&mut self, group: GroupId) -> Result<(DomainId, DomainInfo), Errno> {
        let spec = self.specs.get(&group.0).ok_or(Errno::ENODEV)?;
        let id = self.next;
        self.next += 1;
        let domain = Domain {
            page: self.page,
            pgsize_bitmap: spec.pgsize_bitmap,
            aperture: spec.aperture,
            table: BTreeMap::new(),
        };
        self.domains.insert(id, domain);
        let info = DomainInfo {
            pgsize_bitmap: spec.pgsize_bitmap,
            aperture: spec.aperture,
            coherent: spec.coherent,
            isolated_msi: spec.isolated_msi,
            kind: 0,
            dirty_tracking: false,
        };
        Ok((DomainId(id), info))
    }

    pub(super) fn join(&mut self, old: DomainId, domain: DomainId) -> bool {
        let (Some(a), Some(b)) = (self.domains.get(&old.0), self.domains.get(&domain.0)) else {
            return false;
        };
        let alike = a.pgsize_bitmap == b.pgsize_bitmap && a.aperture == b.aperture;
        if alike {
            self.domains.remove(&old.0);
        }
        alike
    }

    pub(super) fn detach(&mut self, domain: DomainId, last: bool) {
        if last {
            self.domains.remove(&domain.0);
        }
    }

    pub(super) fn reserved(&self, group: GroupId, index: usize) -> Option<(u64, u64)> {
        self.specs.get(&group.0)?.reserved.get(index).copied()
    }

    /// Maps a run of pages. It answers EINVAL if an address does not fit the smallest
    /// page size, then ERANGE beyond the aperture, then EEXIST over another run.
    pub(super) fn map(
        &mut self,
        domain: DomainId,
        iova: u64,
        pfn: u64,
        npages: u64,
    ) -> Result<(), Errno> {
        let domain = self.domains.get_mut(&domain.0).ok_or(Errno::ENODEV)?;
        let shift = self.page.shift();
        let (addr, size) = (pfn << shift, npages << shift);
        let smallest = domain.pgsize_bitmap & domain.pgsize_bitmap.wrapping_neg();
        if (iova | addr | size) & smallest.wrapping_sub(1) != 0 {
            return Err(Errno::EINVAL);
        }
        let last = size.checked_sub(1).and_then(|more| iova.checked_add(more));
        let last = last.ok_or(Errno::ERANGE)?;
        if iova < domain.aperture.0 || last > domain.aperture.1 {
            return Err(Errno::ERANGE);
        }
        if domain.entry(iova).is_some() || domain.table.range(iova..=last).next().is_some() {
            return Err(Errno::EEXIST);
        }
        domain.table.insert(iova, Entry { pfn, npages });
        Ok(())
    }

    pub(super) fn unmap(&mut self, domain: DomainId, iova: u64, npages: u64) {
        let Some(domain) = self.domains.get_mut(&domain.0) else {
            return;
        };
        let Some(more) = (npages << self.page.shift()).checked_sub(1) else {
            return;
        };
        let last = iova.saturating_add(more);
        domain.split(iova);
        if let Some(end) = last.checked_add(1) {
            domain.split(end);
        }
        while let Some((&start, _)) = domain.table.range(iova..=last).next() {
            domain.table.remove(&start);
        }
    }

    pub(super) fn translate(&self, domain: DomainId, iova: u64) -> Option<u64> {
        let (start, entry) = self.domains.get(&domain.0)?.entry(iova)?;
        Some(entry.pfn + self.page.pages(iova - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attached(spec: IommuSpec) -> (Iommus, DomainId) {
        let mut iommus = Iommus::new(PageSize::new(4096).expect("a power of two"));
        iommus.insert(GroupId(1), spec);
        let (domain, _) = iommus.attach(GroupId(1)).expect("attach");
        (iommus, domain)
    }

    #[test]
    fn a_page_table_splits_and_translates() {
        let (mut iommus, domain) = attached(IommuSpec::default());
        iommus.map(domain, 0x10000, 100, 16).expect("map");
        assert_eq!(iommus.translate(domain, 0x10000), Some(100));
        assert_eq!(iommus.translate(domain, 0x1ffff), Some(115));
        assert_eq!(iommus.translate(domain, 0x20000), None);
        iommus.unmap(domain, 0x14000, 4);
        let pages: Vec<_> = (0x10..0x20)
            .map(|p| iommus.translate(domain, p << 12))
            .collect();
        for (k, pfn) in (0u64..).zip(pages) {
            let hole = (4..8).contains(&k);
            assert_eq!(pfn, (!hole).then_some(100 + k), "page {k}");
        }
        assert_eq!(iommus.map(domain, 0x13000, 0, 2), Err(Errno::EEXIST));
        assert_eq!(iommus.map(domain, 0x14000, 7, 4), Ok(()));
    }

    /// The IOMMU refused a second MAP after the last page of the address space.
    #[test]
    fn the_last_page_is_unmapped_too() {
        let spec = IommuSpec {
            aperture: (0, u64::MAX),
            ..IommuSpec::default()
        };
        let (mut iommus, domain) = attached(spec);
        let top = 0u64.wrapping_sub(2 << 12);
        for _ in 0..2 {
            assert_eq!(iommus.map(domain, top, 5, 2), Ok(()));
            assert_eq!(iommus.translate(domain, u64::MAX), Some(6));
            iommus.unmap(domain, top, 2);
            assert_eq!(iommus.translate(domain, u64::MAX), None);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let spec = IommuSpec {
            pgsize_bitmap: 1 << 16,
            ..IommuSpec::default()
        };
        let (mut iommus, domain) = attached(spec);
        assert_eq!(iommus.map(domain, 0x1000, 0, 16), Err(Errno::EINVAL));
        assert_eq!(iommus.map(domain, 0, 1, 16), Err(Errno::EINVAL));
        assert_eq!(iommus.map(domain, 0, 0, 8), Err(Errno::EINVAL));
        assert_eq!(iommus.map(domain, 1 << 48, 0, 16), Err(Errno::ERANGE));
        assert_eq!(iommus.map(domain, !0xffff, 0, 32), Err(Errno::ERANGE));
        assert_eq!(iommus.map(domain, 0, 0, 16), Ok(()));
    }
}
