// SPDX-License-Identifier: MIT OR Apache-2.0
//! The test host: simulated user memory, pages, locked memory and IOMMUs.
//!
//! Its [`Books`] list everything that it has handed out; tests compare them
//! before and after a call. It panics when something is given back that was not
//! handed out, or when a page is unpinned while a device can still reach it.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use dirty_core::host::{
    Accounting, DomainId, DomainInfo, Fault, GroupId, Iommu, Mm, PageKind, Pinning, Prot, Reach,
    Run, UserMemory,
};
use dirty_core::Errno;

use super::memory::Nth;
use super::rig::PAGE;

/// The end of user addresses.
pub(crate) const USER_END: u64 = 1 << 47;

/// The IOMMU of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) pgsize_bitmap: u64,
    pub(crate) aperture: (u64, u64),
    pub(crate) reserved: Vec<(u64, u64)>,
    pub(crate) coherent: bool,
    pub(crate) isolated_msi: bool,
    pub(crate) kind: u64,
    pub(crate) dirty_tracking: bool,
    /// Groups whose specs are equal share a domain, unless this is false.
    pub(crate) joins: bool,
}

impl Spec {
    /// An IOMMU with every page size from `smallest` on and every address.
    pub(crate) fn pages(smallest: u64) -> Self {
        Spec {
            pgsize_bitmap: smallest.wrapping_neg(),
            aperture: (0, u64::MAX),
            reserved: Vec::new(),
            coherent: true,
            isolated_msi: true,
            kind: 0,
            dirty_tracking: false,
            joins: true,
        }
    }
}

/// A domain. `table` has the pfn and the protection of each page, by iova.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Domain {
    pub(crate) spec: Spec,
    pub(crate) table: BTreeMap<u64, (u64, u32)>,
}

/// Everything that is handed out. Entries that drop to 0 are removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Books {
    /// The number of pins of each pfn.
    pub(crate) pins: BTreeMap<u64, u64>,
    /// Locked pages of each mm.
    pub(crate) charged: BTreeMap<u64, u64>,
    /// References to each mm.
    pub(crate) grabbed: BTreeMap<u64, u64>,
    pub(crate) domains: BTreeMap<u64, Domain>,
    /// How often each pfn is mapped, in all domains together.
    pub(crate) mapped: BTreeMap<u64, u64>,
}

fn add(counts: &mut BTreeMap<u64, u64>, key: u64, n: u64) {
    *counts.entry(key).or_default() += n;
}

fn sub(counts: &mut BTreeMap<u64, u64>, key: u64, n: u64) {
    let left = counts.get(&key).and_then(|have| have.checked_sub(n));
    match left.expect("more given back than was given out") {
        0 => counts.remove(&key),
        left => counts.insert(key, left),
    };
}

impl Books {
    /// The number of pins of all pages.
    pub(crate) fn pinned(&self) -> u64 {
        self.pins.values().sum()
    }

    /// The locked pages of `mm`.
    pub(crate) fn locked(&self, mm: u64) -> u64 {
        self.charged.get(&mm).copied().unwrap_or(0)
    }
}

/// The test host. Tests set its fields.
#[derive(Debug, Default)]
pub(crate) struct TestHost {
    pub(crate) books: Books,
    /// Bytes of a CPU page, which a pin covers.
    pub(crate) page: u64,
    /// User memory, by mm and address. Everything else is a hole.
    pages: BTreeMap<(u64, u64), Vec<u8>>,
    /// A write to this address faults.
    pub(crate) no_write: Option<u64>,
    /// The address space of the caller.
    pub(crate) mm: u64,
    /// The caller is a kernel thread, which may reach every address space.
    pub(crate) kthread: bool,
    pub(crate) lock_cap: bool,
    /// Most locked pages of each mm.
    pub(crate) limit: BTreeMap<u64, u64>,
    /// Address spaces that have ended.
    pub(crate) gone: Vec<u64>,
    /// Most pages that one call pins; 0 for any number.
    pub(crate) pin_batch: u64,
    /// Neighbouring pages have neighbouring pfns, unless this is true.
    pub(crate) scattered: bool,
    /// After so many pages of user memory a pfn is left out; 0 for never.
    pub(crate) piece: u64,
    /// Counts calls of `unmap`.
    pub(crate) unmaps: u64,
    /// Pfns that are not normal pages.
    pub(crate) kinds: Vec<(Range<u64>, PageKind)>,
    /// Counts pages that are pinned; the errno is EFAULT.
    pub(crate) pin_fault: Nth,
    /// Counts calls of `map`; the errno is EIO.
    pub(crate) map_fault: Nth,
    /// Counts calls of `charge`; the errno is EINTR.
    pub(crate) charge_fault: Nth,
    pub(crate) specs: BTreeMap<u64, Spec>,
    /// The domains whose dirty tracking is on.
    pub(crate) tracking: BTreeSet<u64>,
    /// Counts domains whose dirty tracking is switched on; the errno is EIO.
    pub(crate) track_fault: Nth,
    /// The dirty pages that domains know of: domain and iova.
    written: BTreeSet<(u64, u64)>,
    /// A page that devices write just before it is unmapped.
    pub(crate) late: Option<u64>,
    /// As `no_write`, from when that page is written.
    pub(crate) no_write_late: Option<u64>,
    /// How many pages an entry of an IOMMU stands for; 0 for one.
    pub(crate) entry_pages: u64,
}

impl TestHost {
    /// Adds memory to the caller's address space.
    pub(crate) fn add_memory(&mut self, addr: u64, size: u64) {
        for page in (addr..addr + size).step_by(PAGE as usize) {
            self.pages.insert((self.mm, page), vec![0; PAGE as usize]);
        }
    }

    /// The pfn behind an address.
    pub(crate) fn pfn(&self, mm: u64, vaddr: u64) -> u64 {
        let stride = if self.scattered { 3 } else { 1 };
        let page = vaddr / self.page;
        (mm << 42) + page * stride + page.checked_div(self.piece).unwrap_or(0)
    }

    /// Calls `f` for each byte from `addr` on, with its index, up to a bad
    /// address.
    fn access(
        &mut self,
        mm: u64,
        addr: u64,
        len: usize,
        write: bool,
        mut f: impl FnMut(usize, &mut u8),
    ) -> Result<(), Fault> {
        let mut done = 0;
        while done < len {
            let fault = Fault { done };
            let at = addr.checked_add(done as u64).ok_or(fault)?;
            let offset = (at % PAGE) as usize;
            let n = (len - done).min(PAGE as usize - offset);
            let page = self.pages.get_mut(&(mm, at - at % PAGE)).ok_or(fault)?;
            let bad = self.no_write.filter(|_| write);
            for (k, byte) in page[offset..offset + n].iter_mut().enumerate() {
                if bad == Some(at + k as u64) {
                    return Err(Fault { done: done + k });
                }
                f(done + k, byte);
            }
            done += n;
        }
        Ok(())
    }

    fn domain(&self, id: DomainId) -> &Domain {
        self.books.domains.get(&id.0).expect("a known domain")
    }

    fn domain_mut(&mut self, id: DomainId) -> &mut Domain {
        self.books.domains.get_mut(&id.0).expect("a known domain")
    }

    /// Devices in `domain` write the page at `iova`, which must be mapped there.
    pub(crate) fn dma(&mut self, domain: u64, iova: u64) {
        assert!(self.translate(DomainId(domain), iova).is_some());
        self.written.insert((domain, iova));
    }

    fn drop_domain(&mut self, id: DomainId) {
        self.tracking.remove(&id.0);
        self.written.retain(|(domain, _)| *domain != id.0);
        let domain = self.books.domains.remove(&id.0).expect("a known domain");
        for (pfn, _) in domain.table.into_values() {
            sub(&mut self.books.mapped, pfn, 1);
        }
    }
}

impl Pinning for TestHost {
    fn pin(
        &mut self,
        mm: Mm,
        vaddr: u64,
        npages: u64,
        _: Prot,
        runs: &mut [Run],
    ) -> Result<usize, Errno> {
        if self.gone.contains(&mm.0) {
            return Err(Errno::ENODEV);
        }
        let most = match self.pin_batch {
            0 => npages,
            n => npages.min(n),
        };
        let mut n: usize = 0;
        for k in 0..most {
            let pfn = self.pfn(mm.0, vaddr + k * self.page);
            let next = Run {
                pfn,
                npages: 1,
                kind: self.page_kind(pfn),
            };
            let full = n == runs.len();
            let last = n.checked_sub(1).map(|last| &mut runs[last]);
            let longer = last.filter(|r| r.pfn + r.npages == pfn && r.kind == next.kind);
            if longer.is_none() && full {
                break;
            }
            if k != 0 && self.pin_fault.is_next() {
                break; // the fault waits for the next call
            }
            if self.pin_fault.strikes() {
                return Err(Errno::EFAULT);
            }
            add(&mut self.books.pins, pfn, 1);
            match longer {
                Some(run) => run.npages += 1,
                None => {
                    runs[n] = next;
                    n += 1;
                }
            }
        }
        Ok(n)
    }

    fn unpin(&mut self, pfn: u64, npages: u64, _: Prot) -> u64 {
        let mut normal = 0;
        for pfn in pfn..pfn + npages {
            normal += u64::from(self.page_kind(pfn) == PageKind::Normal);
            sub(&mut self.books.pins, pfn, 1);
            let pins = self.books.pins.get(&pfn).copied().unwrap_or(0);
            let mapped = self.books.mapped.get(&pfn).copied().unwrap_or(0);
            let reachable = mapped != 0 && pins == 0;
            assert!(!reachable, "pfn {pfn:#x} unpinned while it is mapped");
        }
        normal
    }

    fn page_kind(&self, pfn: u64) -> PageKind {
        let kind = self.kinds.iter().find(|(pfns, _)| pfns.contains(&pfn));
        kind.map_or(PageKind::Normal, |(_, kind)| *kind)
    }
}

impl Accounting for TestHost {
    fn grab(&mut self) -> Result<Mm, Errno> {
        if self.gone.contains(&self.mm) {
            return Err(Errno::ESRCH);
        }
        add(&mut self.books.grabbed, self.mm, 1);
        Ok(Mm(self.mm))
    }

    fn release(&mut self, mm: Mm) {
        sub(&mut self.books.grabbed, mm.0, 1);
    }

    fn reach(&self, mm: Mm) -> Reach {
        if self.gone.contains(&mm.0) {
            Reach::Gone
        } else if mm.0 == self.mm || self.kthread {
            Reach::Own
        } else {
            Reach::Other
        }
    }

    fn lock_cap(&self) -> bool {
        self.lock_cap
    }

    fn charge(&mut self, mm: Mm, npages: u64, lock_cap: bool) -> Result<(), Errno> {
        if self.charge_fault.strikes() {
            return Err(Errno::EINTR);
        }
        if self.gone.contains(&mm.0) {
            return Err(Errno::ESRCH);
        }
        let limit = self.limit.get(&mm.0).copied().unwrap_or(u64::MAX);
        if !lock_cap && self.books.locked(mm.0) + npages > limit {
            return Err(Errno::ENOMEM);
        }
        add(&mut self.books.charged, mm.0, npages);
        Ok(())
    }

    fn uncharge(&mut self, mm: Mm, npages: u64) {
        sub(&mut self.books.charged, mm.0, npages);
    }
}

impl TestHost {
    /// Copies bytes at `addr` of the caller's memory.
    pub(crate) fn copy_from_user(&mut self, addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        self.read_mm(Mm(self.mm), addr, buf)
    }
}

impl UserMemory for TestHost {
    fn is_user_range(&self, addr: u64, len: u64) -> bool {
        addr.checked_add(len).is_some_and(|end| end <= USER_END)
    }

    fn copy_to_user(&mut self, addr: u64, buf: &[u8]) -> Result<(), Fault> {
        self.write_mm(Mm(self.mm), addr, buf)
    }

    fn read_mm(&mut self, mm: Mm, vaddr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        self.access(mm.0, vaddr, buf.len(), false, |k, byte| buf[k] = *byte)
    }

    fn write_mm(&mut self, mm: Mm, vaddr: u64, buf: &[u8]) -> Result<(), Fault> {
        self.access(mm.0, vaddr, buf.len(), true, |k, byte| *byte = buf[k])
    }
}

impl Iommu for TestHost {
    fn attach(&mut self, group: GroupId) -> Result<(DomainId, DomainInfo), Errno> {
        let spec = self.specs.get(&group.0).ok_or(Errno::ENODEV)?.clone();
        let info = DomainInfo {
            pgsize_bitmap: spec.pgsize_bitmap,
            aperture: spec.aperture,
            coherent: spec.coherent,
            isolated_msi: spec.isolated_msi,
            kind: spec.kind,
            dirty_tracking: spec.dirty_tracking,
        };
        let unused = |id: &u64| !self.books.domains.contains_key(id);
        let id = (1..).find(unused).expect("a number");
        let table = BTreeMap::new();
        self.books.domains.insert(id, Domain { spec, table });
        Ok((DomainId(id), info))
    }

    fn join(&mut self, _: GroupId, old: DomainId, domain: DomainId) -> bool {
        let (spec, other) = (&self.domain(old).spec, &self.domain(domain).spec);
        let alike = spec.kind == other.kind && spec.coherent == other.coherent;
        assert!(alike, "domains that are not alike cannot be joined");
        let other = Spec {
            dirty_tracking: spec.dirty_tracking,
            ..other.clone()
        };
        let joins = spec.joins && *spec == other;
        if joins {
            self.drop_domain(old);
        }
        joins
    }

    fn detach(&mut self, _: GroupId, domain: DomainId, last: bool) {
        if last {
            self.drop_domain(domain);
        }
    }

    fn reserved(&self, group: GroupId, index: usize) -> Option<(u64, u64)> {
        self.specs.get(&group.0)?.reserved.get(index).copied()
    }

    fn map(
        &mut self,
        id: DomainId,
        iova: u64,
        pfn: u64,
        npages: u64,
        prot: Prot,
    ) -> Result<(), Errno> {
        if self.map_fault.strikes() {
            return Err(Errno::EIO);
        }
        let page = self.page;
        let domain = self.domain_mut(id);
        let size = npages * page;
        let (first, last) = domain.spec.aperture;
        if iova < first || iova + (size - 1) > last {
            return Err(Errno::ERANGE);
        }
        let smallest = 1 << domain.spec.pgsize_bitmap.trailing_zeros();
        if [iova, pfn * page, size].iter().any(|v| v % smallest != 0) {
            return Err(Errno::EINVAL);
        }
        for k in 0..npages {
            let old = domain.table.insert(iova + k * page, (pfn + k, prot.0));
            assert_eq!(old, None, "mapped over a mapping");
        }
        self.written
            .retain(|(domain, at)| *domain != id.0 || at.wrapping_sub(iova) >= size);
        for pfn in pfn..pfn + npages {
            assert!(self.books.pins.contains_key(&pfn), "mapped but not pinned");
            add(&mut self.books.mapped, pfn, 1);
        }
        Ok(())
    }

    fn unmap(&mut self, id: DomainId, iova: u64, npages: u64) {
        assert_ne!(npages, 0, "an unmap of nothing");
        self.unmaps += 1;
        let page = self.page;
        let domain = self.domain_mut(id);
        let smallest = 1 << domain.spec.pgsize_bitmap.trailing_zeros();
        let aligned = iova % smallest == 0 && (npages * page) % smallest == 0;
        assert!(aligned, "a part of an IOMMU page cannot be unmapped");
        let inside = |at: &u64| at.wrapping_sub(iova) < npages * page;
        let late = self.late.filter(inside);
        if let Some(at) = late {
            self.dma(id.0, at);
            self.no_write = self.no_write_late;
        }
        for k in 0..npages {
            let entry = self.domain_mut(id).table.remove(&(iova + k * page));
            let (pfn, _) = entry.expect("unmapped where nothing is mapped");
            sub(&mut self.books.mapped, pfn, 1);
        }
    }

    fn set_dirty_tracking(&mut self, id: DomainId, on: bool) -> Result<(), Errno> {
        assert!(
            self.domain(id).spec.dirty_tracking,
            "a domain that cannot track"
        );
        if on && self.track_fault.strikes() {
            return Err(Errno::EIO);
        }
        let changed = match on {
            true => self.tracking.insert(id.0),
            false => self.tracking.remove(&id.0),
        };
        assert!(changed, "tracking is switched twice");
        Ok(())
    }

    fn read_and_clear_dirty(
        &mut self,
        id: DomainId,
        iova: u64,
        npages: u64,
        mark: &mut dyn FnMut(u64, u64),
    ) {
        assert!(self.tracking.contains(&id.0), "the domain does not track");
        let (size, entry) = (npages * self.page, self.entry_pages.max(1));
        let page = self.page;
        self.written.retain(|(domain, at)| {
            let told = *domain == id.0 && at.wrapping_sub(iova) < size;
            if told {
                mark(at - at % (entry * page), entry);
            }
            !told
        });
    }

    fn translate(&self, id: DomainId, iova: u64) -> Option<u64> {
        let page = iova - iova % self.page;
        self.domain(id).table.get(&page).map(|(pfn, _)| *pfn)
    }
}
