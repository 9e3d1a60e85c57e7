// SPDX-License-Identifier: MIT OR Apache-2.0
//! The groups of a backend: attach, detach, and their dirty scope.

use crate::bitmap::Bitmap;
use crate::error::Error;
use crate::host::{DomainId, DomainInfo, GroupId, Host, Memory, Prot};
use crate::mem::List;
use crate::pgsize::PageSize;
use crate::span::Span;
use crate::type1::dma::Dma;
use crate::type1::domain::{Domain, Domains};
use crate::type1::iova::{self, Ranges};
use crate::type1::Type1;

/// A group in the backend.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub(super) id: GroupId,
    /// `None`: an emulated group.
    pub(super) domain: Option<DomainId>,
    /// The dirty scope: whether the container learns what its devices write,
    /// because they write through pins only, or because the IOMMU tells. Others
    /// make mappings dirty as a whole.
    pub(super) pinned_page_dirty_scope: bool,
}

impl<M: Memory> Type1<M> {
    /// Refuses a group that may not be attached now.
    pub(crate) fn check_new_group(&self, id: GroupId) -> Result<(), Error> {
        if self.vaddr_invalid != 0 {
            return Err(Error::VaddrInvalid);
        }
        if self.groups.iter().any(|g| g.id == id) {
            return Err(Error::DuplicateGroup);
        }
        Ok(())
    }

    /// Adds a group. `emulated` groups have no IOMMU; for others the host
    /// creates a domain, which must fit what is mapped.
    ///
    /// # Errors
    ///
    /// In this order: `VaddrInvalid` while the vaddr of a mapping is invalid;
    /// `DuplicateGroup`; `NoMemory`; `Iommu` if the host cannot create a
    /// domain; `Aperture` or `ReservedRegion` if a mapping lies outside the
    /// addresses of the group; `UnsafeInterrupts`; `NoPageSize`; while tracking
    /// `Iommu` if dirty tracking of the IOMMU cannot be switched on; then why a
    /// mapping could not be pinned or mapped (`Pin`, `Charge`, `Iommu`).
    /// Nothing changes then.
    pub fn attach_group(
        &mut self,
        host: &mut dyn Host,
        id: GroupId,
        emulated: bool,
    ) -> Result<(), Error> {
        self.check_new_group(id)?;
        self.groups.reserve()?;
        if emulated {
            return Ok(self.groups.push(Group {
                id,
                domain: None,
                pinned_page_dirty_scope: true,
            })?);
        }
        self.domains.reserve()?;
        let (new, mut info) = host.attach(id).map_err(Error::Iommu)?;
        info.dirty_tracking &= self.options.iommu_dirty_tracking;
        let domain = match self.enter_domain(host, id, new, info) {
            Ok(domain) => domain,
            Err(e) => {
                host.detach(id, new, true);
                return Err(e);
            }
        };
        self.groups.push(Group {
            id,
            domain: Some(domain),
            pinned_page_dirty_scope: info.dirty_tracking,
        })?; // cannot fail: reserved above
        if !info.dirty_tracking {
            self.num_non_pinned_groups = self.num_non_pinned_groups.saturating_add(1);
        }
        Ok(())
    }

    /// Checks that the new domain of group `id` fits the container, and makes
    /// it, or one of the same kind, part of it.
    fn enter_domain(
        &mut self,
        host: &mut dyn Host,
        id: GroupId,
        new: DomainId,
        info: DomainInfo,
    ) -> Result<DomainId, Error> {
        let (first, last) = info.aperture;
        let aperture = Span::between(first, last).ok_or(Error::Aperture)?;
        if self.maps_outside(aperture) {
            return Err(Error::Aperture);
        }
        if iova::reserved(host, id).any(|hole| self.dmas.overlaps(hole)) {
            return Err(Error::ReservedRegion);
        }
        let mut ranges = iova::narrowed(&self.mem, &self.iova_ranges, aperture)?;
        iova::exclude_reserved(&mut ranges, host, id)?;
        if ranges.is_empty() {
            return Err(Error::Aperture);
        }
        if !info.isolated_msi {
            return Err(Error::UnsafeInterrupts);
        }
        for domain in self.domains.iter() {
            let alike = domain.info.kind == info.kind
                && domain.info.coherent == info.coherent
                && domain.info.dirty_tracking == info.dirty_tracking;
            if alike && host.join(id, new, domain.id) {
                self.iova_ranges = ranges;
                return Ok(domain.id);
            }
        }
        let domain = Domain { id: new, info };
        let pgsizes = self.pgsizes_with(info)?;
        if self.tracking.is_some() && info.dirty_tracking {
            host.set_dirty_tracking(new, true).map_err(Error::Iommu)?;
        }
        self.replay(host, domain)?;
        self.domains.push(domain)?; // cannot fail: reserved by the caller
        self.pgsize_bitmap = pgsizes;
        self.iova_ranges = ranges;
        Ok(new)
    }

    /// Whether a mapping lies where the valid iovas reach beyond `aperture`. (No
    /// mapping lies outside the valid iovas.)
    fn maps_outside(&self, aperture: Span) -> bool {
        let (Some(head), Some(tail)) = (self.iova_ranges.first(), self.iova_ranges.last()) else {
            return false;
        };
        let valid = Span::between(head.first(), tail.last());
        let beyond = valid.map_or([None, None], |valid| valid.without(aperture));
        beyond
            .into_iter()
            .flatten()
            .any(|span| self.dmas.overlaps(span))
    }

    /// The common page sizes once a domain is added. There must be one (D13), and
    /// every mapping must be aligned to the smallest.
    fn pgsizes_with(&self, info: DomainInfo) -> Result<u64, Error> {
        let mut pgsizes = domain_pgsizes(&self.domains) & info.pgsize_bitmap;
        if pgsizes == 0 {
            return Err(Error::NoPageSize);
        }
        pgsizes = usable_pgsizes(pgsizes, self.options.page_size);
        let min = PageSize::smallest(pgsizes).ok_or(Error::NoPageSize)?;
        if !self.dmas.iter().all(|dma| dma.span.is_aligned(min)) {
            return Err(Error::NoPageSize);
        }
        Ok(pgsizes)
    }

    /// Brings every mapping into a new domain, or none.
    fn replay(&mut self, host: &mut dyn Host, to: Domain) -> Result<(), Error> {
        let domains = Domains {
            list: &self.domains,
            page: self.options.page_size,
        };
        let mut failed = None;
        for dma in self.dmas.iter_mut() {
            if let Err(e) = domains.replay(host, dma, to) {
                failed = Some((dma.span.first(), e));
                break;
            }
        }
        let Some((end, e)) = failed else {
            return Ok(());
        };
        let done = self.dmas.iter_mut();
        for dma in done.take_while(|dma| dma.span.first() < end) {
            domains.unreplay(host, dma, to);
        }
        Err(e)
    }

    /// Removes a group; no-op for a group that is not attached. With the last
    /// group every mapping goes. With the last group that has an IOMMU the
    /// pages of mappings are unpinned, except those that devices pinned.
    ///
    /// What the group's devices may have written is in the next report.
    pub fn detach_group(&mut self, host: &mut dyn Host, id: GroupId) {
        let Some(at) = self.groups.iter().position(|g| g.id == id) else {
            return;
        };
        let Some(&group) = self.groups.get(at) else {
            return;
        };
        self.groups.remove(at);
        if let Some(domain) = group.domain {
            self.leave_domain(host, id, domain);
        }
        if self.groups.is_empty() {
            self.remove_all(host, Span::ALL);
        }
        if !group.pinned_page_dirty_scope {
            self.narrow_scope();
        }
    }

    fn leave_domain(&mut self, host: &mut dyn Host, id: GroupId, domain: DomainId) {
        let last = !self.groups.iter().any(|g| g.domain == Some(domain));
        if last && self.domains.len() == 1 {
            self.unpin_for_domains(host);
        } else if let Some(domain) = self.domains.iter().find(|d| last && d.id == domain) {
            self.empty_and_harvest(host, domain);
        }
        host.detach(id, domain, last);
        if last {
            if let Some(at) = self.domains.iter().position(|d| d.id == domain) {
                self.domains.remove(at);
            }
            self.pgsize_bitmap = common_pgsizes(&self.domains, self.options.page_size);
        }
        // If memory is short, the old ranges stay: they are narrower, so no
        // mapping can be made that a group cannot reach.
        if let Ok(ranges) = self.widened_ranges(host) {
            self.iova_ranges = ranges;
        }
    }

    /// The last domain goes: unmaps and unpins every mapping. From now on the
    /// pins of devices have to be paid for, and nothing else.
    fn unpin_for_domains(&mut self, host: &mut dyn Host) {
        self.unmap_and_harvest(host, Span::ALL);
        let domains = Domains {
            list: &self.domains,
            page: self.options.page_size,
        };
        for dma in self.dmas.iter_mut() {
            domains.unmap_and_unpin(host, dma);
            let due = dma.pinned_charge(host);
            let surplus = dma.locked.saturating_sub(due);
            dma.uncharge(host, surplus);
            // Beyond the limit the pins stay, and stay unpaid, as in Linux.
            let _ = dma.charge(host, due.saturating_sub(dma.locked));
        }
    }

    /// The valid iovas of the groups that are left.
    fn widened_ranges(&self, host: &dyn Host) -> Result<Ranges<M>, Error> {
        let mut ranges = List::new(&self.mem);
        let apertures = self.domains.iter().map(|domain| domain.info.aperture);
        let (first, last) = apertures.fold((0, u64::MAX), |all, (first, last)| {
            (all.0.max(first), all.1.min(last))
        });
        if let Some(all) = Span::between(first, last) {
            ranges.push(all)?;
        }
        for group in self.groups.iter().filter(|g| g.domain.is_some()) {
            iova::exclude_reserved(&mut ranges, host, group.id)?;
        }
        Ok(ranges)
    }

    /// Notes that the devices of group `id` write through pins only from now on.
    pub(super) fn set_pinned_scope(&mut self, id: GroupId) {
        let group = self.groups.as_mut_slice().iter_mut().find(|g| g.id == id);
        if let Some(group) = group.filter(|g| !g.pinned_page_dirty_scope) {
            group.pinned_page_dirty_scope = true;
            self.narrow_scope();
        }
    }

    /// Whether every page of a mapping counts as dirty (A8).
    pub(super) fn all_dirty(&self) -> impl Fn(&Dma<M>) -> bool {
        let unseen = self.num_non_pinned_groups != 0;
        let skip_read_only = self.options.skip_read_only;
        move |dma| unseen && dma.iommu_mapped && may_be_written(dma, skip_read_only)
    }

    /// One group fewer may write anywhere without a mark. What it wrote until
    /// now is reported once more (D11).
    fn narrow_scope(&mut self) {
        self.num_non_pinned_groups = self.num_non_pinned_groups.saturating_sub(1);
        let skip_read_only = self.options.skip_read_only;
        for dma in self.dmas.iter_mut() {
            if may_be_written(dma, skip_read_only) {
                dma.bitmap.iter_mut().for_each(Bitmap::set_all);
            }
        }
    }
}

/// Whether devices behind an IOMMU make `dma` dirty as a whole (D10).
fn may_be_written<M: Memory>(dma: &Dma<M>, skip_read_only: bool) -> bool {
    !skip_read_only || dma.prot.contains(Prot::WRITE)
}

fn domain_pgsizes(domains: &[Domain]) -> u64 {
    domains
        .iter()
        .fold(u64::MAX, |all, d| all & d.info.pgsize_bitmap)
}

/// A CPU page stands for all smaller sizes, because pins are CPU pages.
fn usable_pgsizes(pgsizes: u64, page: PageSize) -> u64 {
    if pgsizes & page.mask() == 0 {
        pgsizes
    } else {
        pgsizes & !page.mask() | page.bytes()
    }
}

pub(super) fn common_pgsizes(domains: &[Domain], page: PageSize) -> u64 {
    usable_pgsizes(domain_pgsizes(domains), page)
}
