// SPDX-License-Identifier: MIT OR Apache-2.0
//! The type1 backend of a container: its state, and the groups in it.
//!
//! What is done with the state is beside it: `map`, `unmap`, `dirty`
//! (tracking and reports) and `access` (what devices do).

mod access;
pub(crate) mod dirty;
pub(crate) mod dma;
pub(crate) mod domain;
pub mod ioctl;
pub(crate) mod iova;
pub(crate) mod map;
pub(crate) mod report;
pub(crate) mod unmap;
pub(crate) mod user_report;

use crate::bitmap::Bitmap;
use crate::error::Error;
use crate::host::{DomainId, DomainInfo, GroupId, Host, Memory};
use crate::mem::{List, Words};
use crate::pgsize::PageSize;
use crate::type1::dma::{Dma, Dmas};
use crate::type1::domain::Domain;
use crate::type1::iova::Ranges;

/// Choices made when a container is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The CPU's page size: what a pin covers. 4096 by default.
    pub page_size: PageSize,
    /// Most mappings at a time (the driver's module parameter): 65535.
    pub dma_entry_limit: u32,
    /// Most bytes for bitmaps (D5); `None`, the default, for any amount.
    pub bitmap_budget: Option<u64>,
    /// Leave mappings without WRITE out of the all-dirty rule (D10).
    pub skip_read_only: bool,
    /// Take groups whose interrupts are not isolated (module parameter).
    pub allow_unsafe_interrupts: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            page_size: const {
                match PageSize::new(4096) {
                    Some(size) => size,
                    None => panic!(), // 4096 is a power of two
                }
            },
            dma_entry_limit: 65535,
            bitmap_budget: None,
            skip_read_only: false,
            allow_unsafe_interrupts: false,
        }
    }
}

/// A group in the backend.
#[derive(Clone, Copy)]
struct Group {
    id: GroupId,
    /// `None`: an emulated group.
    domain: Option<DomainId>,
    /// Dirty scope: its devices write through pins only, so its mappings are
    /// not dirty as a whole.
    pinned_page_dirty_scope: bool,
}

/// Dirty-page tracking, while it is on.
pub(crate) struct Tracking<M: Memory> {
    /// Granularity, latched by START (D6).
    pub(crate) pgsize: PageSize,
    /// Where words wait for a copy to the user.
    pub(crate) staging: Words<M>,
}

pub(crate) struct Type1<M: Memory> {
    pub(crate) mem: M,
    pub(crate) options: Options,
    pub(crate) v2: bool,
    pub(crate) dmas: Dmas<M>,
    /// INVARIANT: with the number of mappings, `options.dma_entry_limit`.
    pub(crate) dma_avail: u32,
    /// Mappings whose vaddr is invalid.
    pub(crate) vaddr_invalid: u32,
    groups: List<Group, M>,
    pub(crate) domains: List<Domain, M>,
    pub(crate) iova_ranges: Ranges<M>,
    /// Page sizes that every domain has; INVARIANT: not 0.
    pub(crate) pgsize_bitmap: u64,
    /// Groups whose dirty scope is everything.
    num_non_pinned_groups: u32,
    pub(crate) tracking: Option<Tracking<M>>,
    /// Bytes of all bitmaps.
    pub(crate) bitmap_bytes: u64,
}

impl<M: Memory> Type1<M> {
    pub(crate) fn new(mem: &M, options: Options, v2: bool) -> Self {
        Type1 {
            mem: mem.clone(),
            options,
            v2,
            dmas: Dmas::new(mem),
            dma_avail: options.dma_entry_limit,
            vaddr_invalid: 0,
            groups: List::new(mem),
            domains: List::new(mem),
            iova_ranges: List::new(mem),
            pgsize_bitmap: common_pgsizes(&[], options.page_size),
            num_non_pinned_groups: 0,
            tracking: None,
            bitmap_bytes: 0,
        }
    }

    /// The smallest page of every domain: alignment of mappings, and the
    /// granularity of tracking that starts now.
    pub(crate) fn min_page(&self) -> PageSize {
        PageSize::smallest(self.pgsize_bitmap).unwrap_or(self.options.page_size)
    }

    /// Page size of the dirty bitmaps.
    pub(crate) fn dirty_page(&self) -> PageSize {
        let latched = self.tracking.as_ref().map(|t| t.pgsize);
        latched.unwrap_or_else(|| self.min_page())
    }

    pub(crate) fn has_emulated_group(&self) -> bool {
        self.groups.iter().any(|g| g.domain.is_none())
    }

    pub(crate) fn is_coherent(&self) -> bool {
        self.domains.iter().all(|d| d.info.coherent)
    }

    /// Whether a group's devices may write anywhere without a mark.
    pub(crate) fn writes_unseen(&self) -> bool {
        self.num_non_pinned_groups != 0
    }

    /// Adds a group that the container has not, while every vaddr is valid;
    /// `emulated` ones have no IOMMU.
    pub(crate) fn attach_group(
        &mut self,
        host: &mut dyn Host,
        id: GroupId,
        emulated: bool,
    ) -> Result<(), Error> {
        self.groups.reserve()?;
        if emulated {
            return Ok(self.groups.push(Group {
                id,
                domain: None,
                pinned_page_dirty_scope: true,
            })?);
        }
        self.domains.reserve()?;
        let (new, info) = host.attach(id).map_err(Error::Iommu)?;
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
            pinned_page_dirty_scope: false,
        })?; // cannot fail: reserved above
        self.num_non_pinned_groups = self.num_non_pinned_groups.saturating_add(1);
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
        // No mapping lies outside the ranges.
        if let (Some(head), Some(tail)) = (self.iova_ranges.first(), self.iova_ranges.last()) {
            let below = first > head.0 && self.dmas.overlaps(head.0, first.saturating_sub(1));
            let above = last < tail.1 && self.dmas.overlaps(last.saturating_add(1), tail.1);
            if below || above {
                return Err(Error::Aperture);
            }
        }
        for index in 0.. {
            let Some((start, end)) = host.reserved(id, index) else {
                break;
            };
            if self.dmas.overlaps(start, end) {
                return Err(Error::ReservedRegion);
            }
        }
        let mut ranges = iova::narrowed(&self.mem, &self.iova_ranges, info.aperture)?;
        iova::exclude_reserved(&mut ranges, host, id)?;
        if ranges.is_empty() {
            return Err(Error::Aperture);
        }
        if !info.isolated_msi && !self.options.allow_unsafe_interrupts {
            return Err(Error::UnsafeInterrupts);
        }
        for domain in self.domains.iter() {
            let alike = domain.info.kind == info.kind && domain.info.coherent == info.coherent;
            if alike && host.join(id, new, domain.id) {
                self.iova_ranges = ranges;
                return Ok(domain.id);
            }
        }
        let domain = Domain { id: new, info };
        let pgsizes = self.pgsizes_with(info)?;
        self.replay(host, domain)?;
        self.domains.push(domain)?; // cannot fail: reserved by the caller
        self.pgsize_bitmap = pgsizes;
        self.iova_ranges = ranges;
        Ok(new)
    }

    /// The common page sizes once a domain is added. Every mapping must fit
    /// the smallest.
    fn pgsizes_with(&self, info: DomainInfo) -> Result<u64, Error> {
        let mut pgsizes = domain_pgsizes(&self.domains) & info.pgsize_bitmap;
        if pgsizes == 0 {
            return Err(Error::NoPageSize);
        }
        pgsizes = usable_pgsizes(pgsizes, self.options.page_size);
        let min = PageSize::smallest(pgsizes).ok_or(Error::NoPageSize)?;
        let fits = |dma: &Dma<M>| min.aligns(dma.iova) && min.aligns(dma.last.wrapping_add(1));
        if !self.dmas.iter().all(fits) {
            return Err(Error::NoPageSize);
        }
        Ok(pgsizes)
    }

    /// Brings every mapping into a new domain, or none.
    fn replay(&mut self, host: &mut dyn Host, to: Domain) -> Result<(), Error> {
        let page = self.options.page_size;
        let mut failed = None;
        for dma in self.dmas.iter_mut() {
            if let Err(e) = domain::replay(host, dma, &self.domains, to, page) {
                failed = Some((dma.iova, e));
                break;
            }
        }
        let Some((end, e)) = failed else {
            return Ok(());
        };
        for dma in self.dmas.iter_mut().take_while(|dma| dma.iova < end) {
            domain::unreplay(host, dma, &self.domains, to, page);
        }
        Err(e)
    }

    /// Removes a group. With the last one every mapping vanishes; with the
    /// last IOMMU only what devices pinned stays pinned.
    pub(crate) fn detach_group(&mut self, host: &mut dyn Host, id: GroupId) {
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
            self.remove_all(host);
        }
        if !group.pinned_page_dirty_scope {
            self.narrow_scope();
        }
    }

    fn leave_domain(&mut self, host: &mut dyn Host, id: GroupId, domain: DomainId) {
        let last = !self.groups.iter().any(|g| g.domain == Some(domain));
        if last && self.domains.len() == 1 {
            self.unpin_for_domains(host);
        }
        host.detach(id, domain, last);
        if last {
            if let Some(at) = self.domains.iter().position(|d| d.id == domain) {
                self.domains.remove(at);
            }
            self.pgsize_bitmap = common_pgsizes(&self.domains, self.options.page_size);
        }
        // Out of memory: the old ranges stay, which are narrower and still right.
        if let Ok(ranges) = self.widened_ranges(host) {
            self.iova_ranges = ranges;
        }
    }

    /// The last domain goes: unmaps and unpins every mapping. What devices
    /// pinned has to be paid for from now on, and nothing else.
    fn unpin_for_domains(&mut self, host: &mut dyn Host) {
        let page = self.options.page_size;
        for dma in self.dmas.iter_mut() {
            domain::unmap_and_unpin(host, dma, &self.domains, page);
            let due = domain::pinned_charge(host, dma);
            let surplus = dma.locked.saturating_sub(due);
            dma.uncharge(host, surplus);
            // Beyond the limit the pins stay, and stay unpaid, as in Linux.
            let _ = dma.charge(host, due.saturating_sub(dma.locked));
        }
    }

    /// The valid iovas of the groups that are left.
    fn widened_ranges(&self, host: &dyn Host) -> Result<Ranges<M>, Error> {
        let mut all = (0, u64::MAX);
        for domain in self.domains.iter() {
            let (first, last) = domain.info.aperture;
            all = (all.0.max(first), all.1.min(last));
        }
        let mut ranges = List::new(&self.mem);
        ranges.push(all)?;
        for group in self.groups.iter().filter(|g| g.domain.is_some()) {
            iova::exclude_reserved(&mut ranges, host, group.id)?;
        }
        Ok(ranges)
    }

    /// The devices of group `id` write through pins only from now on.
    pub(crate) fn set_pinned_scope(&mut self, id: GroupId) {
        let group = self.groups.as_mut_slice().iter_mut().find(|g| g.id == id);
        if let Some(group) = group.filter(|g| !g.pinned_page_dirty_scope) {
            group.pinned_page_dirty_scope = true;
            self.narrow_scope();
        }
    }

    /// One group fewer writes unseen. What it wrote until now is reported once
    /// more (D11).
    fn narrow_scope(&mut self) {
        self.num_non_pinned_groups = self.num_non_pinned_groups.saturating_sub(1);
        let skip_read_only = self.options.skip_read_only;
        for dma in self.dmas.iter_mut() {
            if may_be_written(dma, skip_read_only) {
                dma.bitmap.iter_mut().for_each(Bitmap::set_all);
            }
        }
    }

    /// Removes every mapping, pins of devices and all.
    fn remove_all(&mut self, host: &mut dyn Host) {
        while let Some(iova) = self.dmas.first_in(0, u64::MAX) {
            self.remove_dma(host, iova);
        }
    }

    /// Empties the backend before it goes.
    pub(crate) fn close(&mut self, host: &mut dyn Host) {
        while let Some(id) = self.groups.last().map(|g| g.id) {
            self.detach_group(host, id);
        }
        self.remove_all(host);
    }
}

/// Whether the all-dirty rule counts `dma` (D10).
pub(crate) fn may_be_written<M: Memory>(dma: &Dma<M>, skip_read_only: bool) -> bool {
    !skip_read_only || dma.prot.contains(crate::host::Prot::WRITE)
}

fn domain_pgsizes(domains: &[Domain]) -> u64 {
    domains
        .iter()
        .fold(u64::MAX, |all, d| all & d.info.pgsize_bitmap)
}

/// Sizes below a CPU page cannot be pinned: a CPU page stands for them.
fn usable_pgsizes(pgsizes: u64, page: PageSize) -> u64 {
    if pgsizes & page.mask() == 0 {
        pgsizes
    } else {
        pgsizes & !page.mask() | page.bytes()
    }
}

fn common_pgsizes(domains: &[Domain], page: PageSize) -> u64 {
    usable_pgsizes(domain_pgsizes(domains), page)
}
