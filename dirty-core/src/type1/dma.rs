// SPDX-License-Identifier: MIT OR Apache-2.0
//! A mapping, and the tree of mappings ordered by iova.

use crate::bitmap::Bitmap;
use crate::error::{Errno, Error, NoMemory};
use crate::host::{Host, Memory, Mm, PageKind, Prot};
use crate::mem::tree::Tree;
use crate::pgsize::{Extent, PageSize};
use crate::pins::Pins;
use crate::uapi::DIRTY_BITMAP_PAGES_MAX;

/// A mapping of user memory for devices.
pub(crate) struct Dma<M: Memory> {
    pub(crate) iova: u64,
    /// Last address, so that a mapping may end with the address space.
    pub(crate) last: u64,
    pub(crate) vaddr: u64,
    pub(crate) vaddr_invalid: bool,
    pub(crate) prot: Prot,
    /// Whether whoever mapped it might lock memory without limit.
    pub(crate) lock_cap: bool,
    /// Held by `Accounting::grab` until the mapping goes.
    pub(crate) mm: Mm,
    /// Pages charged to `mm` for this mapping.
    pub(crate) locked: u64,
    /// Whether its pages are pinned and mapped in every domain.
    pub(crate) iommu_mapped: bool,
    pub(crate) pins: Pins<M>,
    /// INVARIANT: there while tracking is on, and only then.
    pub(crate) bitmap: Option<Bitmap<M>>,
}

impl<M: Memory> Dma<M> {
    /// Bytes; wraps to 0 for the whole address space, which one mapping
    /// cannot have.
    pub(crate) fn size(&self) -> u64 {
        self.last.wrapping_sub(self.iova).wrapping_add(1)
    }

    pub(crate) fn npages(&self, pgsize: PageSize) -> u64 {
        pgsize.pages(self.size())
    }

    /// The user address behind `iova`, which is in the mapping.
    pub(crate) fn vaddr_of(&self, iova: u64) -> u64 {
        self.vaddr.wrapping_add(iova.wrapping_sub(self.iova))
    }

    /// The bit of `iova`, which is in the mapping.
    pub(crate) fn bit(&self, iova: u64, pgsize: PageSize) -> u64 {
        pgsize.pages(iova.wrapping_sub(self.iova))
    }

    /// Pages `done..` of the mapping, at most so many as fit `words` words.
    pub(crate) fn pages_from(&self, done: u64, words: usize, pgsize: PageSize) -> Extent {
        let left = self.npages(pgsize).saturating_sub(done);
        Extent {
            bit: 0,
            iova: self.iova.wrapping_add(done << pgsize.shift()),
            npages: left.min((words as u64).saturating_mul(64)),
            pgsize,
        }
    }

    /// Pins pages behind `iova`, at least one and as many as `pfns` has room
    /// for; returns the pfns.
    pub(crate) fn pin<'a>(
        &self,
        host: &mut dyn Host,
        iova: u64,
        pfns: &'a mut [u64],
    ) -> Result<&'a [u64], Error> {
        let n = host
            .pin(self.mm, self.vaddr_of(iova), self.prot, pfns)
            .map_err(Error::Pin)?;
        match pfns.get(..n) {
            Some(pinned @ [_, ..]) => Ok(pinned),
            _ => Err(Error::Pin(Errno::EFAULT)), // no host pins none, or more
        }
    }

    /// Charges `npages` to the mapping's owner.
    pub(crate) fn charge(&mut self, host: &mut dyn Host, npages: u64) -> Result<(), Error> {
        if npages != 0 {
            host.charge(self.mm, npages, self.lock_cap)
                .map_err(Error::Charge)?;
            self.locked = self.locked.saturating_add(npages);
        }
        Ok(())
    }

    /// Gives a charge back, but never more than was charged: pins beyond the
    /// limit may have gone unpaid when the last domain left.
    pub(crate) fn uncharge(&mut self, host: &mut dyn Host, npages: u64) {
        let npages = npages.min(self.locked);
        if npages != 0 {
            host.uncharge(self.mm, npages);
            self.locked = self.locked.saturating_sub(npages);
        }
    }

    /// How many of `npages` pages at `iova` and `pfn` a domain's mapping pays
    /// for: reserved pages are free, and pages that a device pinned are paid.
    pub(crate) fn chargeable(
        &self,
        host: &dyn Host,
        iova: u64,
        pfns: impl Iterator<Item = u64>,
        page: PageSize,
    ) -> u64 {
        let iovas = (0..).map(|k: u64| iova.wrapping_add(k << page.shift()));
        let free = |(pfn, iova): &(u64, u64)| {
            host.page_kind(*pfn) == PageKind::Normal && self.pins.get(*iova).is_none()
        };
        pfns.zip(iovas).filter(free).count() as u64
    }

    /// Gives the mapping a bitmap at `pgsize`, in which what is pinned is
    /// pinned, and counts its bytes in `used`, up to `budget`.
    pub(crate) fn track(
        &mut self,
        mem: &M,
        pgsize: PageSize,
        budget: Option<u64>,
        used: &mut u64,
    ) -> Result<(), Error> {
        let npages = self.npages(pgsize);
        let total = used.saturating_add(Bitmap::<M>::bytes(npages));
        if npages <= DIRTY_BITMAP_PAGES_MAX && budget.is_some_and(|b| total > b) {
            return Err(Error::BitmapBudget);
        }
        let mut bitmap = Bitmap::new(mem, npages)?;
        for (iova, _) in self.pins.iter() {
            bitmap.pin(self.bit(iova, pgsize));
        }
        self.bitmap = Some(bitmap);
        *used = total;
        Ok(())
    }

    /// Undoes [`track`](Dma::track).
    pub(crate) fn untrack(&mut self, used: &mut u64) {
        if let Some(bitmap) = self.bitmap.take() {
            *used = used.saturating_sub(Bitmap::<M>::bytes(bitmap.npages()));
        }
    }
}

/// The mappings of a container; none overlap.
pub(crate) struct Dmas<M: Memory> {
    tree: Tree<Dma<M>, M>,
}

impl<M: Memory> Dmas<M> {
    pub(crate) fn new(mem: &M) -> Self {
        Dmas {
            tree: Tree::new(mem),
        }
    }

    /// Adds a mapping where none is.
    pub(crate) fn insert(&mut self, dma: Dma<M>) -> Result<&mut Dma<M>, NoMemory> {
        self.tree.insert(dma.iova, dma)
    }

    pub(crate) fn remove(&mut self, iova: u64) -> Option<Dma<M>> {
        self.tree.remove(iova)
    }

    pub(crate) fn get_mut(&mut self, iova: u64) -> Option<&mut Dma<M>> {
        self.tree.get_mut(iova)
    }

    /// The mapping that `iova` lies in.
    pub(crate) fn find(&self, iova: u64) -> Option<&Dma<M>> {
        self.tree.floor(iova).filter(|dma| dma.last >= iova)
    }

    /// Likewise, exclusively.
    pub(crate) fn find_mut(&mut self, iova: u64) -> Option<&mut Dma<M>> {
        self.tree.floor_mut(iova).filter(|dma| dma.last >= iova)
    }

    /// The mappings that overlap `first..=last`, in order.
    pub(crate) fn range(&self, first: u64, last: u64) -> impl Iterator<Item = &Dma<M>> {
        self.tree
            .range(first, move |dma| dma.last >= last)
            .skip_while(move |dma| dma.last < first)
            .take_while(move |dma| dma.iova <= last)
    }

    /// Likewise, exclusively.
    pub(crate) fn range_mut(&mut self, first: u64, last: u64) -> impl Iterator<Item = &mut Dma<M>> {
        self.tree
            .range_mut(first, move |dma| dma.last >= last)
            .skip_while(move |dma| dma.last < first)
            .take_while(move |dma| dma.iova <= last)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Dma<M>> {
        self.range(0, u64::MAX)
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Dma<M>> {
        self.range_mut(0, u64::MAX)
    }

    pub(crate) fn overlaps(&self, first: u64, last: u64) -> bool {
        self.first_in(first, last).is_some()
    }

    /// Where the first mapping that overlaps `first..=last` starts.
    pub(crate) fn first_in(&self, first: u64, last: u64) -> Option<u64> {
        self.range(first, last).next().map(|dma| dma.iova)
    }

    /// Whether `first..=last` starts or ends inside a mapping.
    pub(crate) fn bisected(&self, first: u64, last: u64) -> bool {
        let start = self.find(first);
        let end = start.filter(|dma| dma.last >= last); // most often
        let end = end.or_else(|| self.find(last));
        start.is_some_and(|dma| dma.iova != first) || end.is_some_and(|dma| dma.last != last)
    }
}
