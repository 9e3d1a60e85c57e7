// SPDX-License-Identifier: MIT OR Apache-2.0
//! A simulated IOMMU: page tables for groups that have one.

use std::collections::{BTreeMap, HashMap};

use dirty_core::host::{DomainId, DomainInfo, GroupId, Prot};
use dirty_core::Errno;

use super::locked::PAGE_SHIFT;

/// The IOMMU of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IommuSpec {
    /// Page sizes: bit k stands for 2^k bytes.
    pub pgsize_bitmap: u64,
    /// First and last address that it translates.
    pub aperture: (u64, u64),
    /// Regions where nothing may be mapped: first and last address.
    pub reserved: Vec<(u64, u64)>,
    /// Whether it makes all DMA cache-coherent.
    pub coherent: bool,
    /// Whether interrupts are isolated from other groups'.
    pub isolated_msi: bool,
}

impl Default for IommuSpec {
    /// An Intel IOMMU: 4K, 2M and 1G pages, 48 bits, the x86 MSI window.
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
    pgsize_bitmap: u64,
    aperture: (u64, u64),
    /// By iova; runs do not overlap.
    table: BTreeMap<u64, Entry>,
}

impl Domain {
    /// The run that `iova` is in.
    fn entry(&self, iova: u64) -> Option<(u64, Entry)> {
        let (&start, &entry) = self.table.range(..=iova).next_back()?;
        ((iova - start) >> PAGE_SHIFT < entry.npages).then_some((start, entry))
    }

    /// Makes sure that a run ends where `iova` starts.
    fn split(&mut self, iova: u64) {
        if let Some((start, entry)) = self.entry(iova).filter(|(start, _)| *start != iova) {
            let head = (iova - start) >> PAGE_SHIFT;
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
#[derive(Debug, Default)]
pub(crate) struct Iommus {
    specs: HashMap<u64, IommuSpec>,
    domains: HashMap<u64, Domain>,
    next: u64,
}

impl Iommus {
    /// Says what is behind `group`, before it is attached.
    pub(crate) fn insert(&mut self, group: GroupId, spec: IommuSpec) {
        self.specs.insert(group.0, spec);
    }

    pub(crate) fn remove(&mut self, group: GroupId) {
        self.specs.remove(&group.0);
    }

    pub(crate) fn attach(&mut self, group: GroupId) -> Result<(DomainId, DomainInfo), Errno> {
        let spec = self.specs.get(&group.0).ok_or(Errno::ENODEV)?;
        let id = self.next;
        self.next += 1;
        let domain = Domain {
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
        };
        Ok((DomainId(id), info))
    }

    pub(crate) fn join(&mut self, old: DomainId, domain: DomainId) -> bool {
        let (Some(a), Some(b)) = (self.domains.get(&old.0), self.domains.get(&domain.0)) else {
            return false;
        };
        let alike = a.pgsize_bitmap == b.pgsize_bitmap && a.aperture == b.aperture;
        if alike {
            self.domains.remove(&old.0);
        }
        alike
    }

    pub(crate) fn detach(&mut self, domain: DomainId, last: bool) {
        if last {
            self.domains.remove(&domain.0);
        }
    }

    pub(crate) fn reserved(&self, group: GroupId, index: usize) -> Option<(u64, u64)> {
        self.specs.get(&group.0)?.reserved.get(index).copied()
    }

    /// Maps a run of pages; ERANGE beyond the aperture, EINVAL if a page size
    /// does not fit, EEXIST over another mapping.
    pub(crate) fn map(
        &mut self,
        domain: DomainId,
        iova: u64,
        pfn: u64,
        npages: u64,
        _prot: Prot,
    ) -> Result<(), Errno> {
        let domain = self.domains.get_mut(&domain.0).ok_or(Errno::ENODEV)?;
        let (addr, size) = (pfn << PAGE_SHIFT, npages << PAGE_SHIFT);
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

    pub(crate) fn unmap(&mut self, domain: DomainId, iova: u64, npages: u64) {
        let Some(domain) = self.domains.get_mut(&domain.0) else {
            return;
        };
        let end = iova.saturating_add(npages << PAGE_SHIFT);
        domain.split(iova);
        domain.split(end);
        while let Some((&start, _)) = domain.table.range(iova..end).next() {
            domain.table.remove(&start);
        }
    }

    pub(crate) fn translate(&self, domain: DomainId, iova: u64) -> Option<u64> {
        let (start, entry) = self.domains.get(&domain.0)?.entry(iova)?;
        Some(entry.pfn + ((iova - start) >> PAGE_SHIFT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RW: Prot = Prot::READ_WRITE;

    fn attached(spec: IommuSpec) -> (Iommus, DomainId) {
        let mut iommus = Iommus::default();
        iommus.insert(GroupId(1), spec);
        let (domain, _) = iommus.attach(GroupId(1)).expect("attach");
        (iommus, domain)
    }

    #[test]
    fn a_page_table_splits_and_translates() {
        let (mut iommus, domain) = attached(IommuSpec::default());
        iommus.map(domain, 0x10000, 100, 16, RW).expect("map");
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
        assert_eq!(iommus.map(domain, 0x13000, 0, 2, RW), Err(Errno::EEXIST));
        assert_eq!(iommus.map(domain, 0x14000, 7, 4, RW), Ok(()));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let spec = IommuSpec {
            pgsize_bitmap: 1 << 16,
            ..IommuSpec::default()
        };
        let (mut iommus, domain) = attached(spec);
        assert_eq!(iommus.map(domain, 0x1000, 0, 16, RW), Err(Errno::EINVAL));
        assert_eq!(iommus.map(domain, 0, 1, 16, RW), Err(Errno::EINVAL));
        assert_eq!(iommus.map(domain, 0, 0, 8, RW), Err(Errno::EINVAL));
        assert_eq!(iommus.map(domain, 1 << 48, 0, 16, RW), Err(Errno::ERANGE));
        assert_eq!(iommus.map(domain, !0xffff, 0, 32, RW), Err(Errno::ERANGE));
        assert_eq!(iommus.map(domain, 0, 0, 16, RW), Ok(()));
    }
}
