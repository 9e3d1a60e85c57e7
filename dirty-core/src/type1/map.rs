// SPDX-License-Identifier: MIT OR Apache-2.0
//! MAP_DMA, and the removal of a mapping.

use crate::error::Error;
use crate::host::{Host, Memory, Prot};
use crate::pins::Pins;
use crate::type1::dma::Dma;
use crate::type1::domain;
use crate::type1::iova;
use crate::type1::Type1;

/// What to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// Address for devices.
    pub iova: u64,
    /// Address in the user's memory.
    pub vaddr: u64,
    /// Bytes.
    pub size: u64,
    /// What devices may do; `None` gives an existing mapping, whose vaddr was
    /// invalidated, a new one.
    pub prot: Option<Prot>,
}

/// The last address of `size` bytes from `first` on.
pub(crate) fn last_of(first: u64, size: u64) -> Result<u64, Error> {
    let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
    first.checked_add(more).ok_or(Error::Wraps)
}

impl<M: Memory> Type1<M> {
    /// MAP_DMA: maps `map.size` bytes at `map.iova`, or with `map.prot` `None`
    /// gives a mapping whose vaddr was invalidated a new one.
    ///
    /// # Errors
    ///
    /// In this order: `ZeroSize`; `Wraps`; `FlagCombination` for rights that
    /// allow nothing, `UnknownFlags` for others than READ and WRITE;
    /// `Misaligned`. For a new vaddr then `NoMapping`, `VaddrMismatch`, `Mm` or
    /// `Charge`. For a new mapping then `Overlap`; `MappingLimit`;
    /// `ForbiddenIova`; `Mm`; `NoMemory`; with an IOMMU `Pin`, `Charge` or
    /// `Iommu`; while tracking `TooManyPages`, `BitmapBudget` or `NoMemory`.
    /// Nothing is mapped then.
    pub fn map(&mut self, host: &mut dyn Host, map: &Map) -> Result<(), Error> {
        let last = last_of(map.iova, map.size)?;
        last_of(map.vaddr, map.size)?;
        match map.prot {
            Some(Prot(0)) => return Err(Error::FlagCombination),
            Some(Prot(bits)) if bits & !Prot::READ_WRITE.0 != 0 => {
                return Err(Error::UnknownFlags);
            }
            _ => {}
        }
        let align = self.dirty_page().max(self.min_page()); // D6
        if !align.aligns(map.iova | map.vaddr | map.size) {
            return Err(Error::Misaligned);
        }
        let Some(prot) = map.prot else {
            return self.set_vaddr(host, map, last);
        };
        if self.dmas.overlaps(map.iova, last) {
            return Err(Error::Overlap);
        }
        let Some(dma_avail) = self.dma_avail.checked_sub(1) else {
            return Err(Error::MappingLimit);
        };
        if !iova::allowed(&self.iova_ranges, map.iova, last) {
            return Err(Error::ForbiddenIova);
        }
        let mm = host.grab().map_err(Error::Mm)?;
        let dma = Dma {
            iova: map.iova,
            last,
            vaddr: map.vaddr,
            vaddr_invalid: false,
            prot,
            lock_cap: host.lock_cap(),
            mm,
            locked: 0,
            iommu_mapped: false,
            pins: Pins::new(&self.mem, map.iova, self.options.page_size),
            bitmap: None,
        };
        if let Err(e) = self.dmas.insert(dma) {
            host.release(mm);
            return Err(e.into());
        }
        self.dma_avail = dma_avail;
        if let Err(e) = self.populate(host, map.iova) {
            self.remove_dma(host, map.iova);
            return Err(e);
        }
        Ok(())
    }

    /// Gives a new mapping what the container's state asks for.
    fn populate(&mut self, host: &mut dyn Host, iova: u64) -> Result<(), Error> {
        let Some(dma) = self.dmas.get_mut(iova) else {
            return Ok(());
        };
        if !self.domains.is_empty() {
            domain::pin_and_map(host, dma, &self.domains, self.options.page_size)?;
        }
        if let Some(tracking) = &self.tracking {
            let budget = self.options.bitmap_budget;
            dma.track(&self.mem, tracking.pgsize, budget, &mut self.bitmap_bytes)?;
        }
        Ok(())
    }

    fn set_vaddr(&mut self, host: &mut dyn Host, map: &Map, last: u64) -> Result<(), Error> {
        let first_hit = self.dmas.range_mut(map.iova, last).next();
        let dma = first_hit.ok_or(Error::NoMapping)?;
        if !dma.vaddr_invalid || dma.iova != map.iova || dma.last != last {
            return Err(Error::VaddrMismatch);
        }
        let mm = host.grab().map_err(Error::Mm)?;
        if mm != dma.mm {
            let lock_cap = host.lock_cap();
            if dma.locked != 0 {
                if let Err(e) = host.charge(mm, dma.locked, lock_cap) {
                    host.release(mm);
                    return Err(Error::Charge(e));
                }
                host.uncharge(dma.mm, dma.locked);
            }
            dma.lock_cap = lock_cap;
        }
        host.release(dma.mm);
        dma.mm = mm;
        dma.vaddr = map.vaddr;
        dma.vaddr_invalid = false;
        self.vaddr_invalid = self.vaddr_invalid.saturating_sub(1);
        Ok(())
    }

    /// Removes the mapping at `iova`: out of every domain, unpinned, uncharged,
    /// its bitmap gone.
    pub(crate) fn remove_dma(&mut self, host: &mut dyn Host, iova: u64) {
        let Some(mut dma) = self.dmas.remove(iova) else {
            return;
        };
        domain::unmap_and_unpin(host, &mut dma, &self.domains, self.options.page_size);
        for (_, pfn) in dma.pins.iter() {
            host.unpin(pfn, 1, dma.prot);
        }
        let locked = dma.locked;
        dma.uncharge(host, locked);
        host.release(dma.mm);
        dma.untrack(&mut self.bitmap_bytes);
        if dma.vaddr_invalid {
            self.vaddr_invalid = self.vaddr_invalid.saturating_sub(1);
        }
        self.dma_avail = self.dma_avail.saturating_add(1);
    }
}
