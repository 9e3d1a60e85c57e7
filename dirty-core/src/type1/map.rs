// SPDX-License-Identifier: MIT OR Apache-2.0
//! MAP_DMA, and the removal of a mapping.

use crate::error::Error;
use crate::host::{Host, Memory, Prot};
use crate::pins::Pins;
use crate::span::Span;
use crate::type1::dma::Dma;
use crate::type1::domain::Domains;
use crate::type1::iova;
use crate::type1::Type1;

/// What to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Map {
    /// First address for devices.
    pub iova: u64,
    /// First address in the user's memory.
    pub vaddr: u64,
    /// Bytes.
    pub size: u64,
    /// What devices may do. `None` maps nothing new: it gives the mapping of
    /// this range, whose vaddr was invalidated, a new one.
    pub prot: Option<Prot>,
}

impl<M: Memory> Type1<M> {
    /// MAP_DMA: maps `map.size` bytes of the caller's memory at `map.iova`, or
    /// gives a mapping a new vaddr (rule A4 in docs/rules.md).
    ///
    /// # Errors
    ///
    /// In this order: `ZeroSize`; `Wraps`; `FlagCombination` for no rights at
    /// all and `UnknownFlags` for rights other than READ and WRITE;
    /// `Misaligned`. Then for a new vaddr: `NoMapping`; `VaddrMismatch`; `Mm`;
    /// `Charge`. For a new mapping: `Overlap`; `MappingLimit`; `ForbiddenIova`;
    /// `Mm`; `NoMemory`; with an IOMMU `Pin`, `Charge` or `Iommu`; while
    /// tracking `BitmapBudget`, `TooManyPages` or `NoMemory`. Nothing changes
    /// then.
    pub fn map(&mut self, host: &mut dyn Host, map: &Map) -> Result<(), Error> {
        let span = Span::new(map.iova, map.size)?;
        Span::new(map.vaddr, map.size)?;
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
            return self.set_vaddr(host, span, map.vaddr);
        };
        self.dmas.seek(span.first());
        if self.dmas.overlaps(span) {
            return Err(Error::Overlap);
        }
        let Some(dma_avail) = self.dma_avail.checked_sub(1) else {
            return Err(Error::MappingLimit);
        };
        if !iova::allowed(&self.iova_ranges, span) {
            return Err(Error::ForbiddenIova);
        }
        let mm = host.grab().map_err(Error::Mm)?;
        let lock_cap = host.lock_cap();
        let dma = || Dma {
            span,
            vaddr: map.vaddr,
            vaddr_invalid: false,
            prot,
            lock_cap,
            mm,
            locked: 0,
            iommu_mapped: false,
            run_starts: 0,
            pins: Pins::new(&self.mem, map.iova, self.options.page_size),
            bitmap: None,
        };
        let dma = match self.dmas.insert(span, dma) {
            Ok(dma) => dma,
            Err(e) => {
                host.release(mm);
                return Err(e.into());
            }
        };
        self.dma_avail = dma_avail;
        let domains = Domains {
            list: &self.domains,
            page: self.options.page_size,
        };
        let mapped = match domains.list {
            [] => Ok(()),
            _ => domains.pin_and_map(host, dma),
        };
        let tracked = mapped.and_then(|()| match &self.tracking {
            Some(tracking) => dma.track(tracking.pgsize, &mut self.budget),
            None => Ok(()),
        });
        if tracked.is_err() {
            self.remove_first(host, span);
        }
        tracked
    }

    fn set_vaddr(&mut self, host: &mut dyn Host, span: Span, vaddr: u64) -> Result<(), Error> {
        let first_hit = self.dmas.range_mut(span).next();
        let dma = first_hit.ok_or(Error::NoMapping)?;
        if !dma.vaddr_invalid || dma.span != span {
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
        dma.vaddr = vaddr;
        dma.vaddr_invalid = false;
        self.vaddr_invalid = self.vaddr_invalid.saturating_sub(1);
        Ok(())
    }

    /// Removes the first mapping that overlaps `span`, and returns what it spanned:
    /// it leaves every domain, its pages are unpinned and uncharged, its bitmap is
    /// freed.
    pub(super) fn remove_first(&mut self, host: &mut dyn Host, span: Span) -> Option<Span> {
        let mut dma = self.dmas.remove_first(span)?;
        let domains = Domains {
            list: &self.domains,
            page: self.options.page_size,
        };
        domains.unmap_and_unpin(host, &mut dma);
        if !dma.pins.is_empty() {
            for (_, pfn) in dma.pins.iter() {
                host.unpin(pfn, 1, dma.prot);
            }
        }
        let locked = dma.locked;
        dma.uncharge(host, locked);
        host.release(dma.mm);
        dma.untrack(&mut self.budget);
        if dma.vaddr_invalid {
            self.vaddr_invalid = self.vaddr_invalid.saturating_sub(1);
        }
        self.dma_avail = self.dma_avail.saturating_add(1);
        Some(dma.span)
    }
}
