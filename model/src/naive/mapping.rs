// SPDX-License-Identifier: MIT OR Apache-2.0
//! A mapping of user memory, and the mappings of a container.

use std::collections::{BTreeMap, BTreeSet};

use dirty_core::Errno;
use dirty_script::op::{DeviceIndex, DEVICES, PAGE};

use super::process::{Process, Result};

pub(super) const READ: u32 = 1;
pub(super) const WRITE: u32 = 2;

/// A domain of an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Domain {
    pub(super) pgsizes: u64,
    /// First and last address that it translates.
    pub(super) aperture: (u64, u64),
    /// Whether it is asked which pages were written.
    pub(super) tells: bool,
}

impl Domain {
    /// The domain of a device that is alone; `None` if it is emulated. `ask`: the
    /// container asks IOMMUs that track (rule D12).
    pub(super) fn of(device: DeviceIndex, ask: bool) -> Option<Domain> {
        let spec = &DEVICES[device];
        spec.pgsizes.map(|pgsizes| Domain {
            pgsizes,
            aperture: spec.aperture,
            tells: ask && spec.dirty_tracking,
        })
    }
}

#[derive(Clone, Debug)]
pub(super) struct Mapping {
    pub(super) iova: u64,
    pub(super) size: u64,
    pub(super) vaddr: u64,
    pub(super) prot: u32,
    /// Whether the mapper had CAP_IPC_LOCK.
    pub(super) lock_cap: bool,
    pub(super) vaddr_invalid: bool,
    /// Whether it is in the domains, with all its pages pinned.
    pub(super) iommu_mapped: bool,
    /// Pages charged for it as locked.
    pub(super) charged: u64,
    /// Iovas that devices have pinned, and how often.
    pub(super) pins: BTreeMap<u64, u64>,
    /// While tracking is on, whether its bitmap has pinned bits.
    pub(super) pinned_bits: bool,
    /// What is dirty, while tracking is on: first and last granule of each
    /// range. A granule is what a dirty bit stands for.
    pub(super) dirty: BTreeSet<(u64, u64)>,
}

impl Mapping {
    pub(super) fn last(&self) -> u64 {
        self.iova + (self.size - 1)
    }

    pub(super) fn writable(&self) -> bool {
        self.prot & WRITE != 0
    }

    /// Marks bytes `first..=last`, which lie in it, as dirty.
    pub(super) fn mark(&mut self, granule: u64, first: u64, last: u64) {
        let (first, last) = (first - self.iova, last - self.iova);
        self.dirty.insert((first / granule, last / granule));
    }

    pub(super) fn mark_all(&mut self, granule: u64) {
        self.dirty.clear();
        self.mark(granule, self.iova, self.last());
    }

    /// Makes everything clean but the pages that devices have pinned.
    pub(super) fn clean(&mut self, granule: u64) {
        self.dirty.clear();
        let pins: Vec<u64> = self.pins.keys().copied().collect();
        for pin in pins {
            self.mark(granule, pin, pin);
        }
    }

    /// Checks that all its pages can be pinned for a domain while `locked`
    /// pages are charged. Returns how many pages that charges.
    pub(super) fn pin_all(&self, process: &Process, locked: u64) -> Result<u64> {
        let pages = self.size / PAGE;
        let bytes = process.accessible(self.vaddr, self.size, self.writable());
        let inaccessible = bytes / PAGE; // index of the first such page
        let offsets = self.pins.keys().map(|pin| pin - self.iova);
        let paid: Vec<u64> = offsets
            .filter(|o| o % PAGE == 0)
            .map(|o| o / PAGE)
            .collect();
        // Index of the page whose charge exceeds the limit, if there are so
        // many pages.
        let mut refused = process.limit.saturating_sub(locked);
        for page in &paid {
            if *page <= refused {
                refused += 1;
            }
        }
        if !self.lock_cap && refused < inaccessible {
            return Err(Errno::ENOMEM);
        }
        if inaccessible < pages {
            return Err(Errno::EFAULT);
        }
        Ok(pages - paid.len() as u64)
    }

    /// Fails unless this domain can map it.
    pub(super) fn iommu_map(&self, domain: Domain) -> Result<()> {
        let page = smallest(domain.pgsizes);
        if [self.iova, self.size, self.vaddr]
            .iter()
            .any(|v| v % page != 0)
        {
            return Err(Errno::EINVAL);
        }
        if self.iova < domain.aperture.0 || self.last() > domain.aperture.1 {
            return Err(Errno::ERANGE);
        }
        Ok(())
    }
}

/// The smallest of some page sizes.
pub(super) fn smallest(pgsizes: u64) -> u64 {
    1 << pgsizes.trailing_zeros()
}

/// The mappings of a container by iova. They do not overlap.
#[derive(Clone, Debug, Default)]
pub(super) struct Mappings(pub(super) BTreeMap<u64, Mapping>);

impl Mappings {
    /// The iovas of the mappings that share a byte with `first..=last`, in
    /// order.
    pub(super) fn overlapping(&self, first: u64, last: u64) -> Vec<u64> {
        let before = self.0.range(..first).next_back();
        let before = before.filter(|(_, m)| m.last() >= first);
        let inside = self.0.range(first..=last);
        before.into_iter().chain(inside).map(|(k, _)| *k).collect()
    }

    /// The mapping that contains an address.
    pub(super) fn find(&self, iova: u64) -> Option<&Mapping> {
        let (_, m) = self.0.range(..=iova).next_back()?;
        (m.last() >= iova).then_some(m)
    }

    pub(super) fn find_mut(&mut self, iova: u64) -> Option<&mut Mapping> {
        let (_, m) = self.0.range_mut(..=iova).next_back()?;
        (m.last() >= iova).then_some(m)
    }

    /// Whether a range starts or ends inside a mapping.
    pub(super) fn bisected(&self, first: u64, last: u64) -> bool {
        let start = self.find(first).is_some_and(|m| m.iova != first);
        start || self.find(last).is_some_and(|m| m.last() != last)
    }
}
