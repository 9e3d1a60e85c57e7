// SPDX-License-Identifier: MIT OR Apache-2.0
//! The type1 backend of a container: groups, mappings and tracking.

use std::collections::BTreeSet;

use dirty_core::Errno;
use dirty_script::op::{DeviceIndex, DEVICES, PAGE};

use super::abi::{MAP_VADDR, MAX_PAGES};
use super::mapping::{smallest, Domain, Mapping, Mappings};
use super::process::{Process, Result};

/// The options that a container was made with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Options {
    /// Most mappings.
    pub(super) entry_limit: u32,
    /// Most bytes of bitmaps.
    pub(super) budget: Option<u64>,
    /// Leave read-only mappings out of the all-dirty rule.
    pub(super) skip_read_only: bool,
    /// Ask IOMMUs that track for dirty pages.
    pub(super) iommu_dirty_tracking: bool,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) device: DeviceIndex,
    /// `None` if it is emulated.
    pub(super) domain: Option<Domain>,
    /// Whether its devices write to pinned pages only, or the IOMMU tells what
    /// they write.
    pub(super) pinned_only: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Backend {
    pub(super) v2: bool,
    pub(super) options: Options,
    pub(super) groups: Vec<Group>,
    pub(super) mappings: Mappings,
    /// Valid ranges of iovas; if there are none, every iova is valid.
    pub(super) ranges: Vec<(u64, u64)>,
    /// The bytes that a dirty bit stands for, latched by START; `None` while
    /// tracking is off.
    pub(super) granule: Option<u64>,
    /// What a device writes while the next operation unmaps it: its domain, the
    /// first and the last address.
    pub(super) late: Option<(Domain, u64, u64)>,
}

/// What the core's bitmap of so many pages costs: a dirty bit for each page, the
/// four summaries, and with `pins` a pinned bit for each page.
fn bitmap_bytes(pages: u64, pins: bool) -> u64 {
    let words = pages.div_ceil(64);
    let summary = words.div_ceil(8).div_ceil(64);
    let pinned = if pins { words } else { 0 };
    8 * (words + pinned + 4 * summary)
}

/// What is left of `ranges` inside an aperture and outside reserved regions.
fn cut(ranges: &[(u64, u64)], aperture: (u64, u64), reserved: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let inside = |r: &(u64, u64)| (r.0.max(aperture.0), r.1.min(aperture.1));
    let is_range = |r: &(u64, u64)| r.0 <= r.1;
    let mut left: Vec<(u64, u64)> = ranges.iter().map(inside).filter(is_range).collect();
    for hole in reserved {
        let mut parts = Vec::new();
        for range in left {
            if hole.1 < range.0 || range.1 < hole.0 {
                parts.push(range);
                continue;
            }
            if range.0 < hole.0 {
                parts.push((range.0, hole.0 - 1));
            }
            if hole.1 < range.1 {
                parts.push((hole.1 + 1, range.1));
            }
        }
        left = parts;
    }
    left
}

impl Backend {
    pub(super) fn new(v2: bool, options: Options) -> Self {
        Backend {
            v2,
            options,
            groups: Vec::new(),
            mappings: Mappings::default(),
            ranges: Vec::new(),
            granule: None,
            late: None,
        }
    }

    /// The domains. Groups whose domains would be the same share one.
    pub(super) fn domains(&self) -> BTreeSet<Domain> {
        self.groups.iter().filter_map(|g| g.domain).collect()
    }

    pub(super) fn has_emulated(&self) -> bool {
        self.groups.iter().any(|g| g.domain.is_none())
    }

    /// The page sizes that all domains have.
    pub(super) fn pgsizes(&self) -> u64 {
        let all = self.domains();
        all.iter().fold(!(PAGE - 1), |all, d| all & d.pgsizes)
    }

    /// The minimum page size.
    pub(super) fn page(&self) -> u64 {
        smallest(self.pgsizes())
    }

    pub(super) fn any_vaddr_invalid(&self) -> bool {
        self.mappings.0.values().any(|m| m.vaddr_invalid)
    }

    pub(super) fn attach(&mut self, process: &mut Process, device: DeviceIndex) -> Result<()> {
        if self.any_vaddr_invalid() {
            return Err(Errno::EBUSY);
        }
        if self.groups.iter().any(|g| g.device == device) {
            return Err(Errno::EINVAL);
        }
        let domain = Domain::of(device, self.options.iommu_dirty_tracking);
        if let Some(domain) = domain {
            self.attach_iommu(process, device, domain)?;
        }
        let pinned_only = domain.is_none_or(|domain| domain.tells);
        self.groups.push(Group {
            device,
            domain,
            pinned_only,
        });
        Ok(())
    }

    /// Attaches a group with an IOMMU, or changes nothing.
    fn attach_iommu(
        &mut self,
        process: &mut Process,
        device: DeviceIndex,
        domain: Domain,
    ) -> Result<()> {
        let (first, last) = domain.aperture;
        let reserved = DEVICES[device].reserved;
        // No mapping lies outside the ranges that were valid until now.
        let taken = |first, last| !self.mappings.overlapping(first, last).is_empty();
        if let (Some(&(start, _)), Some(&(_, end))) = (self.ranges.first(), self.ranges.last()) {
            let below = start < first && taken(start, first - 1);
            if below || (last < end && taken(last + 1, end)) {
                return Err(Errno::EINVAL);
            }
        }
        if reserved.iter().any(|(first, last)| taken(*first, *last)) {
            return Err(Errno::EINVAL);
        }
        let ranges = match &self.ranges[..] {
            [] => cut(&[(0, u64::MAX)], domain.aperture, reserved),
            ranges => cut(ranges, domain.aperture, reserved),
        };
        if ranges.is_empty() {
            return Err(Errno::EINVAL);
        }
        if !self.domains().contains(&domain) {
            self.add_domain(process, domain)?;
        }
        self.ranges = ranges;
        Ok(())
    }

    /// Pins and maps every mapping for a new domain, or changes nothing.
    fn add_domain(&mut self, process: &mut Process, domain: Domain) -> Result<()> {
        let pgsizes = self.pgsizes() & domain.pgsizes;
        if pgsizes == 0 {
            return Err(Errno::EINVAL); // D13
        }
        let mut costs = Vec::new();
        let mut locked = process.locked;
        for m in self.mappings.0.values() {
            let cost = match m.iommu_mapped {
                true => 0,
                false => m.pin_all(process, locked)?,
            };
            m.iommu_map(domain)?;
            locked += cost;
            costs.push(cost);
        }
        let page = smallest(pgsizes);
        let unfit = |m: &Mapping| m.iova % page != 0 || m.last().wrapping_add(1) % page != 0;
        if page > PAGE && self.mappings.0.values().any(unfit) {
            return Err(Errno::EINVAL);
        }
        process.locked = locked;
        for (m, cost) in self.mappings.0.values_mut().zip(costs) {
            m.iommu_mapped = true;
            m.charged += cost;
        }
        Ok(())
    }

    /// Takes out a group that is not the last one.
    pub(super) fn detach(&mut self, process: &mut Process, device: DeviceIndex) {
        let Some(at) = self.groups.iter().position(|g| g.device == device) else {
            return;
        };
        let domain = self.groups[at].domain;
        let last = self.groups.iter().filter(|g| g.domain == domain).count() == 1;
        if domain.is_some() && last {
            self.write_late(domain, 0, u64::MAX);
        }
        let group = self.groups.remove(at);
        if group.domain.is_some() && self.domains().is_empty() {
            for m in self.mappings.0.values_mut() {
                m.iommu_mapped = false;
                let pins = m.pins.len() as u64;
                if pins <= m.charged {
                    process.locked -= m.charged - pins;
                    m.charged = pins;
                } else if process.charge(pins - m.charged, m.lock_cap).is_ok() {
                    m.charged = pins;
                }
            }
        }
        if group.domain.is_some() {
            self.ranges = vec![(0, u64::MAX)];
            for Group { device, domain, .. } in &self.groups {
                if let Some(domain) = domain {
                    let reserved = DEVICES[*device].reserved;
                    self.ranges = cut(&self.ranges, domain.aperture, reserved);
                }
            }
        }
        if !group.pinned_only {
            self.mark_everything();
        }
    }

    /// Marks everything, because what was written before the scope narrowed
    /// must not be lost (rule D11).
    pub(super) fn mark_everything(&mut self) {
        let Some(granule) = self.granule else { return };
        for m in self.mappings.0.values_mut() {
            if m.writable() || !self.options.skip_read_only {
                m.mark_all(granule);
            }
        }
    }

    /// A device writes bytes `first..=last` of a domain by DMA.
    pub(super) fn dma_write(&mut self, domain: Domain, first: u64, last: u64) -> Result<()> {
        let iovas = self.mappings.overlapping(first, last);
        let mut next = Some(first);
        for m in iovas.iter().map(|iova| &self.mappings.0[iova]) {
            let here = next.is_some_and(|next| m.iova <= next);
            if !(here && m.iommu_mapped && m.writable()) {
                return Err(Errno::EFAULT);
            }
            next = m.last().checked_add(1);
        }
        if iovas.is_empty() || next.is_some_and(|next| next <= last) {
            return Err(Errno::EFAULT);
        }
        self.dma_dirty(domain, first, last);
        Ok(())
    }

    /// Marks the pages of a domain that bytes `first..=last` touch, if the domain
    /// tells and lets devices write them. Returns whether there are any.
    fn dma_dirty(&mut self, domain: Domain, first: u64, last: u64) -> bool {
        let Some(granule) = self.granule.filter(|_| domain.tells) else {
            return false;
        };
        let mut any = false;
        let page = smallest(domain.pgsizes);
        let (first, last) = (first / page * page, last / page * page + (page - 1));
        for iova in self.mappings.overlapping(first, last) {
            if let Some(m) = self.mappings.0.get_mut(&iova) {
                if m.iommu_mapped && m.writable() {
                    m.mark(granule, first.max(m.iova), last.min(m.last()));
                    any = true;
                }
            }
        }
        any
    }

    /// Those pages of `first..=last` that a device writes late leave their domain.
    /// Returns whether the domain tells any.
    pub(super) fn write_late(&mut self, leaving: Option<Domain>, first: u64, last: u64) -> bool {
        let Some((domain, from, to)) = self.late else {
            return false;
        };
        leaving.is_none_or(|leaving| leaving == domain)
            && from <= last
            && first <= to
            && self.dma_dirty(domain, from.max(first), to.min(last))
    }

    /// Whether the all-dirty rule (A8) holds for a mapping.
    pub(super) fn all_dirty(&self, m: &Mapping) -> bool {
        let unseen = self.groups.iter().any(|g| !g.pinned_only);
        let skipped = self.options.skip_read_only && !m.writable();
        unseen && m.iommu_mapped && !skipped
    }

    /// MAP_DMA, from step 7 of A4 on.
    pub(super) fn map(
        &mut self,
        process: &mut Process,
        iova: u64,
        size: u64,
        vaddr: u64,
        flags: u32,
    ) -> Result<()> {
        let page = self.page().max(self.granule.unwrap_or(0));
        if [iova, size, vaddr].iter().any(|v| v % page != 0) {
            return Err(Errno::EINVAL);
        }
        let last = iova + (size - 1);
        let overlapping = self.mappings.overlapping(iova, last);
        if flags & MAP_VADDR != 0 {
            let first = overlapping.first().ok_or(Errno::ENOENT)?;
            let m = self.mappings.find_mut(*first).ok_or(Errno::ENOENT)?;
            if !m.vaddr_invalid || m.iova != iova || m.size != size {
                return Err(Errno::EINVAL);
            }
            m.vaddr = vaddr;
            m.vaddr_invalid = false;
            return Ok(());
        }
        if !overlapping.is_empty() {
            return Err(Errno::EEXIST);
        }
        if self.avail() == 0 {
            return Err(Errno::ENOSPC);
        }
        let inside = |r: &(u64, u64)| r.0 <= iova && last <= r.1;
        if !self.ranges.is_empty() && !self.ranges.iter().any(inside) {
            return Err(Errno::EINVAL);
        }
        let mut m = Mapping {
            iova,
            size,
            vaddr,
            prot: flags,
            lock_cap: process.lock_cap,
            vaddr_invalid: false,
            iommu_mapped: false,
            charged: 0,
            pins: Default::default(),
            pinned_bits: false,
            dirty: Default::default(),
        };
        let domains = self.domains();
        if !domains.is_empty() {
            m.iommu_mapped = true;
            m.charged = m.pin_all(process, process.locked)?;
            for domain in domains {
                m.iommu_map(domain)?;
            }
        }
        if let Some(granule) = self.granule {
            self.check_bitmaps(granule, self.bitmaps().chain([(size, false)]))?;
        }
        process.locked += m.charged;
        self.mappings.0.insert(iova, m);
        Ok(())
    }

    /// How many more mappings are possible.
    pub(super) fn avail(&self) -> u32 {
        self.options.entry_limit - self.mappings.0.len() as u32
    }

    /// The size of each mapping that has a bitmap, and whether the bitmap has
    /// pinned bits. Without a budget it does not matter which there are.
    fn bitmaps(&self) -> impl Iterator<Item = (u64, bool)> + '_ {
        let budget = self.options.budget.is_some();
        let mappings = self.mappings.0.values().filter(move |_| budget);
        mappings.map(|m| (m.size, m.pinned_bits))
    }

    /// Fails unless mappings of these sizes can have bitmaps, with pinned bits or
    /// without.
    fn check_bitmaps(
        &self,
        granule: u64,
        bitmaps: impl Iterator<Item = (u64, bool)>,
    ) -> Result<()> {
        let mut used = 0;
        for (size, pins) in bitmaps {
            let pages = size / granule;
            if pages > MAX_PAGES {
                return Err(Errno::EINVAL);
            }
            used += bitmap_bytes(pages, pins);
            if self.options.budget.is_some_and(|budget| used > budget) {
                return Err(Errno::ENOMEM);
            }
        }
        Ok(())
    }

    /// Gives the mapping at `key` pinned bits, before its first pin while tracking
    /// is on.
    pub(super) fn add_pinned_bits(&mut self, key: u64) -> Result<()> {
        let Some((granule, m)) = self.granule.zip(self.mappings.0.get(&key)) else {
            return Ok(());
        };
        if m.pinned_bits {
            return Ok(());
        }
        let more = bitmap_bytes(m.size / granule, true) - bitmap_bytes(m.size / granule, false);
        let pages = |size| size / granule;
        let used = self
            .bitmaps()
            .map(|(size, pins)| bitmap_bytes(pages(size), pins));
        let total = used.sum::<u64>() + more;
        if self.options.budget.is_some_and(|budget| total > budget) {
            return Err(Errno::ENOMEM);
        }
        self.mappings
            .0
            .entry(key)
            .and_modify(|m| m.pinned_bits = true);
        Ok(())
    }

    /// After a failed pin of `n` pages: the mappings in the range that have no
    /// pins have no pinned bits either.
    pub(super) fn drop_pinned_bits(&mut self, iova: u64, n: u64) {
        for key in self.mappings.overlapping(iova, iova + (n * PAGE - 1)) {
            let m = self.mappings.0.entry(key);
            m.and_modify(|m| m.pinned_bits &= !m.pins.is_empty());
        }
    }

    /// START.
    pub(super) fn start(&mut self) -> Result<()> {
        if !self.v2 {
            return Err(Errno::EACCES);
        }
        if self.granule.is_some() {
            return Ok(());
        }
        let granule = self.page();
        let mappings = self.mappings.0.values();
        self.check_bitmaps(granule, mappings.map(|m| (m.size, !m.pins.is_empty())))?;
        self.granule = Some(granule);
        for m in self.mappings.0.values_mut() {
            m.pinned_bits = !m.pins.is_empty();
            m.clean(granule);
        }
        Ok(())
    }

    /// STOP.
    pub(super) fn stop(&mut self) -> Result<()> {
        if !self.v2 {
            return Err(Errno::EACCES);
        }
        self.granule = None;
        for m in self.mappings.0.values_mut() {
            m.dirty.clear();
        }
        Ok(())
    }

    /// Removes mappings.
    pub(super) fn remove(&mut self, process: &mut Process, iovas: &[u64]) {
        for iova in iovas {
            if let Some(m) = self.mappings.0.remove(iova) {
                process.locked -= m.charged;
            }
        }
    }
}
