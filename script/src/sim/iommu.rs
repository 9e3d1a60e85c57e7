// SPDX-License-Identifier: MIT OR Apache-2.0
//! The simulated IOMMUs: page tables with dirty bits.

use std::collections::BTreeMap;

use dirty_core::host::{DomainId, DomainInfo, GroupId, Prot};
use dirty_core::Errno;

use super::pages::Pages;
use crate::op::{DeviceSpec, DEVICES, PAGE};

/// In an entry: the page may be written.
const WRITE: u64 = 1 << 63;
/// In an entry: the page was written. It outlives an unmap.
const DIRTY: u64 = 1 << 62;
/// In an entry: 1 + the pfn that the page is mapped to, or 0.
const PFN: u64 = DIRTY - 1;

#[derive(Debug)]
struct Domain {
    pgsizes: u64,
    aperture: (u64, u64),
    dirty_tracking: bool,
    tracking: bool,
    /// The entry of each page of iovas.
    table: Pages,
}

impl Domain {
    /// The pages of iovas of the IOMMU's smallest pages that bytes `first..=last`
    /// touch: the first, and how many.
    fn touched(&self, first: u64, last: u64) -> (u64, u64) {
        let smallest = (1 << self.pgsizes.trailing_zeros()) / PAGE;
        let (first, last) = (first / PAGE, last / PAGE);
        let (first, last) = (first - first % smallest, last - last % smallest);
        (first, last - first + smallest)
    }

    /// Sets the dirty bits of those of `n` pages that may be written.
    fn write(&mut self, first: u64, n: u64) {
        self.table.update(first, n, |_, entries| {
            for entry in entries.iter_mut().filter(|entry| **entry & WRITE != 0) {
                *entry |= DIRTY;
            }
        });
    }
}

/// The IOMMUs of a host.
#[derive(Debug, Default)]
pub(super) struct Iommus {
    domains: BTreeMap<u64, Domain>,
    next: u64,
    /// The domain of each group.
    groups: BTreeMap<u64, u64>,
    /// What a group's device writes before it is unmapped: first and last address.
    late: Option<(GroupId, u64, u64)>,
}

pub(super) fn spec(group: GroupId) -> &'static DeviceSpec {
    &DEVICES[group.0 as usize]
}

impl Iommus {
    pub(super) fn is_empty(&self) -> bool {
        self.domains.is_empty() && self.groups.is_empty()
    }

    fn domain(&mut self, id: DomainId) -> &mut Domain {
        self.domains.get_mut(&id.0).expect("a domain that exists")
    }

    pub(super) fn attach(&mut self, group: GroupId) -> Result<(DomainId, DomainInfo), Errno> {
        let &DeviceSpec {
            aperture,
            dirty_tracking,
            ..
        } = spec(group);
        let pgsizes = spec(group).pgsizes.ok_or(Errno::ENODEV)?;
        let id = self.next;
        self.next += 1;
        let domain = Domain {
            pgsizes,
            aperture,
            dirty_tracking,
            tracking: false,
            table: Pages::default(),
        };
        self.domains.insert(id, domain);
        self.groups.insert(group.0, id);
        let info = DomainInfo {
            pgsize_bitmap: pgsizes,
            aperture,
            coherent: false,
            isolated_msi: true,
            kind: 0,
            dirty_tracking,
        };
        Ok((DomainId(id), info))
    }

    pub(super) fn join(&mut self, group: GroupId, old: DomainId, domain: DomainId) -> bool {
        let made_for = |d: &Domain| (d.pgsizes, d.aperture);
        let alike = made_for(self.domain(old)) == made_for(self.domain(domain));
        if alike {
            self.domains.remove(&old.0);
            self.groups.insert(group.0, domain.0);
        }
        alike
    }

    pub(super) fn detach(&mut self, group: GroupId, domain: DomainId, last: bool) {
        if last {
            self.domains.remove(&domain.0);
        }
        self.groups.remove(&group.0);
    }

    pub(super) fn map(
        &mut self,
        domain: DomainId,
        iova: u64,
        pfn: u64,
        npages: u64,
        prot: Prot,
    ) -> Result<(), Errno> {
        let domain = self.domain(domain);
        let smallest = 1 << domain.pgsizes.trailing_zeros();
        let fits = |v: u64| v % smallest == 0;
        if !(fits(iova) && fits(pfn * PAGE) && fits(npages * PAGE)) {
            return Err(Errno::EINVAL);
        }
        let last = iova.checked_add(npages * PAGE - 1).ok_or(Errno::ERANGE)?;
        if iova < domain.aperture.0 || last > domain.aperture.1 {
            return Err(Errno::ERANGE);
        }
        let first = iova / PAGE;
        let write = match prot.contains(Prot::WRITE) {
            true => WRITE,
            false => 0,
        };
        domain.table.update(first, npages, |page, entries| {
            let mapped = entries.iter().any(|entry| entry & PFN != 0);
            assert!(!mapped, "an iova from {page:#x}000 on is mapped");
            for (k, entry) in (page - first..).zip(entries) {
                *entry = (pfn + k + 1) | write;
            }
        });
        Ok(())
    }

    pub(super) fn unmap(&mut self, domain: DomainId, iova: u64, npages: u64) {
        let (first, end) = (iova / PAGE, iova / PAGE + npages);
        if let Some((group, from, to)) = self.late {
            if self.groups.get(&group.0) == Some(&domain.0) {
                let (from, n) = self.domain(domain).touched(from, to);
                let (from, to) = (from.max(first), (from + n).min(end));
                self.domain(domain).write(from, to.saturating_sub(from));
            }
        }
        let table = &mut self.domain(domain).table;
        table.update(first, npages, |_, entries| {
            entries.iter_mut().for_each(|entry| *entry &= DIRTY);
        });
    }

    pub(super) fn translate(&self, domain: DomainId, iova: u64) -> Option<u64> {
        let entry = self.domains.get(&domain.0)?.table.get(iova / PAGE);
        (entry & PFN).checked_sub(1)
    }

    pub(super) fn set_dirty_tracking(&mut self, domain: DomainId, on: bool) {
        let domain = self.domain(domain);
        assert!(domain.dirty_tracking, "a domain that cannot track");
        assert_ne!(domain.tracking, on, "tracking is switched twice");
        domain.tracking = on;
    }

    pub(super) fn read_and_clear_dirty(
        &mut self,
        domain: DomainId,
        iova: u64,
        npages: u64,
        mark: &mut dyn FnMut(u64, u64),
    ) {
        let domain = self.domain(domain);
        assert!(domain.tracking, "a domain whose tracking is off is asked");
        domain.table.update(iova / PAGE, npages, |first, entries| {
            for (page, entry) in (first..).zip(entries) {
                if *entry & DIRTY != 0 {
                    *entry &= !DIRTY;
                    mark(page * PAGE, 1);
                }
            }
        });
    }

    /// The device of `group` writes bytes `first..=last` by DMA, all or none.
    pub(super) fn write(&mut self, group: GroupId, first: u64, last: u64) -> Result<(), Errno> {
        let domain = self.groups.get(&group.0).ok_or(Errno::EFAULT)?;
        let domain = self.domain(DomainId(*domain));
        let mut pages = first / PAGE..=last / PAGE;
        if !pages.all(|page| domain.table.get(page) & WRITE != 0) {
            return Err(Errno::EFAULT);
        }
        let (first, n) = domain.touched(first, last);
        domain.write(first, n);
        Ok(())
    }

    /// The device of `group` writes those pages of `first..=last` that are unmapped,
    /// just before, until [`end_late`](Iommus::end_late).
    pub(super) fn write_late(&mut self, group: GroupId, first: u64, last: u64) {
        self.late = Some((group, first, last));
    }

    pub(super) fn end_late(&mut self) {
        self.late = None;
    }
}
