// SPDX-License-Identifier: MIT OR Apache-2.0
//! A mapping of user memory for devices.

use crate::bitmap::Bitmap;
use crate::error::{Errno, Error};
use crate::host::{Host, Memory, Mm, PageKind, Prot, Run};
use crate::mem::spans::Spans;
use crate::pgsize::PageSize;
use crate::pins::Pins;
use crate::span::Span;
use crate::type1::budget::Budget;

/// A mapping of user memory for devices.
#[repr(C)] // so that what marks and reports read is together, in front
pub(super) struct Dma<M: Memory> {
    /// Its iovas.
    pub(super) span: Span,
    /// INVARIANT: there while tracking is on, and only then. If there are pins, it
    /// has pinned bits.
    pub(super) bitmap: Option<Bitmap<M>>,
    pub(super) vaddr: u64,
    pub(super) vaddr_invalid: bool,
    /// Whether its pages are pinned and mapped in every domain.
    pub(super) iommu_mapped: bool,
    /// Whether whoever mapped it might lock memory without limit.
    pub(super) lock_cap: bool,
    pub(super) prot: Prot,
    /// Held by `Accounting::grab` until the mapping goes.
    pub(super) mm: Mm,
    /// Pages charged to `mm` for this mapping.
    pub(super) locked: u64,
    /// The pages at which a run of consecutive pfns starts in the domains, counted
    /// from the start of the mapping and combined by OR.
    pub(super) run_starts: u64,
    pub(super) pins: Pins<M>,
}

impl<M: Memory> Dma<M> {
    pub(super) fn npages(&self, pgsize: PageSize) -> u64 {
        pgsize.pages(self.span.size())
    }

    /// The user address behind `iova`, which is in the mapping.
    pub(super) fn vaddr_of(&self, iova: u64) -> u64 {
        self.vaddr
            .wrapping_add(iova.wrapping_sub(self.span.first()))
    }

    /// The bit of `iova`, which is in the mapping.
    #[inline]
    pub(super) fn bit(&self, iova: u64, pgsize: PageSize) -> u64 {
        pgsize.pages(iova.wrapping_sub(self.span.first()))
    }

    /// Marks the pages that `span`, inside the mapping, touches.
    #[inline]
    pub(super) fn mark(&self, span: Span, pgsize: PageSize) {
        if let Some(bitmap) = &self.bitmap {
            let first = self.bit(span.first(), pgsize);
            let last = self.bit(span.last(), pgsize);
            bitmap.mark(first, last.wrapping_sub(first).wrapping_add(1));
        }
    }

    /// Pins pages behind `iova`, at least one and at most `npages`.
    pub(super) fn pin<'a>(
        &self,
        host: &mut dyn Host,
        iova: u64,
        npages: u64,
        runs: &'a mut [Run],
    ) -> Result<&'a [Run], Error> {
        let n = host
            .pin(self.mm, self.vaddr_of(iova), npages, self.prot, runs)
            .map_err(Error::Pin)?;
        match runs.get(..n) {
            Some(runs @ [_, ..]) if runs.iter().all(|run| run.npages != 0) => Ok(runs),
            _ => Err(Error::Pin(Errno::EFAULT)), // no host pins none, or more
        }
    }

    /// Each multiple of so many pages, from the start of the mapping on, is followed
    /// by as many pages with consecutive pfns, or by the end of the mapping.
    pub(super) fn run_step(&self) -> u64 {
        match self.run_starts {
            0 => u64::MAX,
            starts => starts & starts.wrapping_neg(),
        }
    }

    /// Charges `npages` to the mapping's owner.
    pub(super) fn charge(&mut self, host: &mut dyn Host, npages: u64) -> Result<(), Error> {
        if npages != 0 {
            host.charge(self.mm, npages, self.lock_cap)
                .map_err(Error::Charge)?;
            self.locked = self.locked.saturating_add(npages);
        }
        Ok(())
    }

    /// Gives a charge back, but never more than was charged: pins beyond the
    /// limit may have gone unpaid when the last domain left.
    pub(super) fn uncharge(&mut self, host: &mut dyn Host, npages: u64) {
        let npages = npages.min(self.locked);
        if npages != 0 {
            host.uncharge(self.mm, npages);
            self.locked = self.locked.saturating_sub(npages);
        }
    }

    /// How many pages of `run`, which starts at `iova`, a domain's mapping pays
    /// for: reserved pages are free, and pages that a device pinned are paid for.
    pub(super) fn chargeable(&self, iova: u64, run: &Run, page: PageSize) -> u64 {
        if run.kind != PageKind::Normal {
            return 0;
        }
        if self.pins.is_empty() {
            return run.npages;
        }
        let iovas = (0..run.npages).map(|k| iova.wrapping_add(k << page.shift()));
        iovas.filter(|iova| self.pins.get(*iova).is_none()).count() as u64
    }

    /// Pages that devices pinned and that count as locked memory.
    pub(super) fn pinned_charge(&self, host: &dyn Host) -> u64 {
        self.normal_pins(host).count() as u64
    }

    /// As [`pinned_charge`](Dma::pinned_charge), without pins inside a page: these
    /// pay for themselves, whether or not the page is in a domain.
    pub(super) fn paid_by_pins(&self, host: &dyn Host, page: PageSize) -> u64 {
        let base = self.span.first();
        let starts_page = |iova: &u64| page.aligns(iova.wrapping_sub(base));
        self.normal_pins(host).filter(starts_page).count() as u64
    }

    /// Where pages that count as locked memory are pinned.
    fn normal_pins<'a>(&'a self, host: &'a dyn Host) -> impl Iterator<Item = u64> + 'a {
        let normal = move |&(_, pfn): &(u64, u64)| host.page_kind(pfn) == PageKind::Normal;
        self.pins.iter().filter(normal).map(|(iova, _)| iova)
    }

    /// Gives the mapping a bitmap at `pgsize`, in which every pinned page is
    /// pinned.
    pub(super) fn track(&mut self, pgsize: PageSize, budget: &mut Budget<M>) -> Result<(), Error> {
        let mut bitmap = budget.bitmap(self.npages(pgsize))?;
        if !self.pins.is_empty() {
            if let Err(e) = budget.reserve_pins(&mut bitmap) {
                budget.free(bitmap);
                return Err(e);
            }
            for (iova, _) in self.pins.iter() {
                bitmap.set_pinned(self.bit(iova, pgsize));
            }
        }
        self.bitmap = Some(bitmap);
        Ok(())
    }

    /// Undoes [`track`](Dma::track).
    pub(super) fn untrack(&mut self, budget: &mut Budget<M>) {
        if let Some(bitmap) = self.bitmap.take() {
            budget.free(bitmap);
        }
    }
}

/// The mappings of a container.
pub(super) type Dmas<M> = Spans<Dma<M>, M>;
