// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pages of a mapping in IOMMU domains: pinned, charged and mapped
//! together, and released together.

use core::ops::Range;

use crate::error::Error;
use crate::host::{DomainId, DomainInfo, Host, Memory, Run};
use crate::mem::List;
use crate::pgsize::PageSize;
use crate::type1::dma::Dma;

/// A domain of the container.
#[derive(Clone, Copy)]
pub(super) struct Domain {
    pub(super) id: DomainId,
    pub(super) info: DomainInfo,
}

/// Domains that a mapping is in as a whole, or is to be in.
#[derive(Clone, Copy)]
pub(super) struct Domains<'a> {
    pub(super) list: &'a [Domain],
    /// The CPU's page size: what a pin covers.
    pub(super) page: PageSize,
}

/// Runs of pages that a host pins at a time; they are on the stack.
const PINNED_RUNS: usize = 64;
/// Runs of pages that are unmapped at a time, which costs one IOTLB sync. They are in
/// allocated memory. (Linux has the same number.)
const UNMAPPED_RUNS: u64 = 512;
/// Runs of pages that are copied to a new domain at a time; they are on the stack.
const COPIED_RUNS: usize = 16;

/// Pages that are neighbours as iovas and as pfns.
#[derive(Clone, Copy, Default)]
struct Pages {
    pfn: u64,
    npages: u64,
}

impl Pages {
    /// Appends pages; false if they are no neighbours.
    fn extend(&mut self, next: Pages) -> bool {
        let neighbour = self.pfn.checked_add(self.npages) == Some(next.pfn);
        if neighbour {
            self.npages = self.npages.saturating_add(next.npages);
        }
        neighbour
    }
}

/// The pages of some runs.
fn sum(runs: &[Pages]) -> u64 {
    runs.iter().fold(0, |n, run| n.saturating_add(run.npages))
}

/// How far a mapping is on its way into domains.
#[derive(Default)]
struct Filling {
    /// Pages that are pinned and charged.
    pinned: u64,
    /// The last of these pages, which are not mapped yet.
    unmapped: Option<Pages>,
}

impl Filling {
    /// Pages that are mapped.
    fn mapped(&self) -> u64 {
        let unmapped = self.unmapped.map_or(0, |run| run.npages);
        self.pinned.saturating_sub(unmapped)
    }
}

impl Domains<'_> {
    /// Pins every page of `dma`, charges for it, and maps it in each domain. On
    /// an error nothing of it stays.
    pub(super) fn pin_and_map<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &mut Dma<M>,
    ) -> Result<(), Error> {
        let locked = dma.locked;
        let mut filling = Filling::default();
        dma.run_starts = 0;
        let filled = if dma.npages(self.page) == 1 {
            self.fill(host, dma, &mut filling, &mut [Run::EMPTY])
        } else {
            self.fill(host, dma, &mut filling, &mut [Run::EMPTY; PINNED_RUNS])
        };
        if filled.is_ok() {
            dma.iommu_mapped = true;
            return Ok(());
        }
        if let Some(run) = filling.unmapped {
            host.unpin(run.pfn, run.npages, dma.prot);
        }
        self.unmap_first(host, dma, filling.mapped());
        let charged = dma.locked.saturating_sub(locked);
        dma.uncharge(host, charged);
        filled
    }

    /// As `pin_and_map`. On an error `filling` says what is pinned and mapped.
    fn fill<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &mut Dma<M>,
        filling: &mut Filling,
        runs: &mut [Run],
    ) -> Result<(), Error> {
        let npages = dma.npages(self.page);
        while filling.pinned < npages {
            let left = npages.saturating_sub(filling.pinned);
            let runs = dma.pin(host, self.iova(dma, filling.pinned), left, runs)?;
            for (k, run) in runs.iter().enumerate() {
                if let Err(e) = self.take(host, dma, filling, run) {
                    for run in runs.iter().skip(k) {
                        host.unpin(run.pfn, run.npages, dma.prot);
                    }
                    return Err(e);
                }
            }
        }
        self.map_unmapped(host, dma, filling)
    }

    /// Charges for a run that was pinned. If it does not continue the one before it,
    /// that one is mapped first.
    fn take<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &mut Dma<M>,
        filling: &mut Filling,
        run: &Run,
    ) -> Result<(), Error> {
        let pages = Pages {
            pfn: run.pfn,
            npages: run.npages,
        };
        let mut longer = filling.unmapped;
        if !longer.as_mut().is_some_and(|before| before.extend(pages)) {
            self.map_unmapped(host, dma, filling)?;
            dma.run_starts |= filling.pinned;
            longer = Some(pages);
        }
        let iova = self.iova(dma, filling.pinned);
        let cost = dma.chargeable(iova, run, self.page);
        dma.charge(host, cost)?;
        filling.unmapped = longer;
        filling.pinned = filling.pinned.saturating_add(run.npages);
        Ok(())
    }

    /// Maps the run that is not mapped yet, if there is one.
    fn map_unmapped<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &Dma<M>,
        filling: &mut Filling,
    ) -> Result<(), Error> {
        if let Some(run) = filling.unmapped {
            self.map_run(host, dma, filling.mapped(), run)?;
            filling.unmapped = None;
        }
        Ok(())
    }

    /// The iova of page `n` of `dma`.
    fn iova<M: Memory>(self, dma: &Dma<M>, n: u64) -> u64 {
        dma.span.first().wrapping_add(n << self.page.shift())
    }

    /// Maps `run`, which starts at page `n` of `dma`, in each domain, or in none.
    fn map_run<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &Dma<M>,
        n: u64,
        run: Pages,
    ) -> Result<(), Error> {
        let iova = self.iova(dma, n);
        for (done, domain) in self.list.iter().enumerate() {
            let mapped = host.map(domain.id, iova, run.pfn, run.npages, dma.prot);
            if let Err(e) = mapped {
                for domain in self.list.iter().take(done) {
                    host.unmap(domain.id, iova, run.npages);
                }
                return Err(Error::Iommu(e));
            }
        }
        Ok(())
    }

    /// Undoes [`pin_and_map`](Domains::pin_and_map); no-op for a mapping that is
    /// in no domain.
    pub(super) fn unmap_and_unpin<M: Memory>(self, host: &mut dyn Host, dma: &mut Dma<M>) {
        if dma.iommu_mapped {
            let normal = self.unmap_first(host, dma, dma.npages(self.page));
            let paid = match dma.pins.is_empty() {
                true => 0,
                false => dma.paid_by_pins(host, self.page),
            };
            dma.uncharge(host, normal.saturating_sub(paid));
            dma.iommu_mapped = false;
        }
    }

    /// Unmaps the first `npages` pages of `dma` from every domain, and unpins them.
    /// Returns how many of them are normal pages.
    fn unmap_first<M: Memory>(self, host: &mut dyn Host, dma: &Dma<M>, npages: u64) -> u64 {
        let Some((first, others)) = self.list.split_first() else {
            return 0;
        };
        if npages == 0 {
            return 0;
        }
        for domain in others {
            host.unmap(domain.id, dma.span.first(), npages);
        }
        let mut one = [Pages::default()];
        let run = self.runs(host, dma, *first, 0..npages, &mut one);
        if run.first().is_some_and(|run| run.npages == npages) {
            return self.release(host, dma, *first, 0, run);
        }
        let most = npages.checked_div(dma.run_step()).unwrap_or(0);
        let most = most.saturating_add(1).min(UNMAPPED_RUNS);
        let many = List::filled(dma.pins.mem(), most as usize, Pages::default());
        let mut many = many.unwrap_or(List::new(dma.pins.mem()));
        let room = match many.as_mut_slice() {
            [] => &mut one, // without memory each run is unmapped alone
            many => many,
        };
        let (mut done, mut normal): (u64, u64) = (0, 0);
        while done < npages {
            let runs = self.runs(host, dma, *first, done..npages, room);
            if runs.is_empty() {
                done = done.saturating_add(dma.run_step()); // was never mapped
                continue;
            }
            let n = self.release(host, dma, *first, done, runs);
            normal = normal.saturating_add(n);
            done = done.saturating_add(sum(runs));
        }
        normal
    }

    /// Unmaps the runs in `domain` that start with page `n` of `dma`, and unpins them.
    /// Returns how many of the pages are normal pages.
    fn release<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &Dma<M>,
        domain: Domain,
        n: u64,
        runs: &[Pages],
    ) -> u64 {
        // One unmap for all the runs. No device may reach a page that is unpinned.
        host.unmap(domain.id, self.iova(dma, n), sum(runs));
        let unpin = |run: &Pages| host.unpin(run.pfn, run.npages, dma.prot);
        runs.iter().map(unpin).fold(0, u64::saturating_add)
    }

    /// The runs of `dma` in `domain` that the pages in `pages` form, up to a page that
    /// is not mapped, and as many as `room` can hold.
    fn runs<'a, M: Memory>(
        self,
        host: &dyn Host,
        dma: &Dma<M>,
        domain: Domain,
        pages: Range<u64>,
        room: &'a mut [Pages],
    ) -> &'a [Pages] {
        let (mut at, mut n) = (pages.start, 0_usize);
        let mut last: Option<&mut Pages> = None;
        let mut slots = room.iter_mut();
        while at < pages.end {
            let left = pages.end.saturating_sub(at);
            let npages = dma.run_step().min(left);
            let Some(pfn) = host.translate(domain.id, self.iova(dma, at)) else {
                break;
            };
            let next = Pages { pfn, npages };
            if !last.as_mut().is_some_and(|last| last.extend(next)) {
                let Some(slot) = slots.next() else {
                    break;
                };
                *slot = next;
                last = Some(slot);
                n = n.saturating_add(1);
            }
            at = at.saturating_add(npages);
        }
        room.get(..n).unwrap_or_default()
    }

    /// Brings a mapping into the new domain `to` as well. On an error nothing
    /// of it is there.
    pub(super) fn replay<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &mut Dma<M>,
        to: Domain,
    ) -> Result<(), Error> {
        match self.list.first() {
            Some(from) => self.copy_mapping(host, dma, *from, to),
            None => self.only(&[to]).pin_and_map(host, dma),
        }
    }

    /// Undoes [`replay`](Domains::replay) of a mapping.
    pub(super) fn unreplay<M: Memory>(self, host: &mut dyn Host, dma: &mut Dma<M>, to: Domain) {
        if self.list.is_empty() {
            self.only(&[to]).unmap_and_unpin(host, dma);
        } else {
            host.unmap(to.id, dma.span.first(), dma.npages(self.page));
        }
    }

    fn only(self, list: &[Domain]) -> Domains<'_> {
        Domains {
            list,
            page: self.page,
        }
    }

    /// Maps the pages that `dma` has in domain `from` in domain `to`, which has
    /// none of them if it fails.
    fn copy_mapping<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &Dma<M>,
        from: Domain,
        to: Domain,
    ) -> Result<(), Error> {
        let npages = dma.npages(self.page);
        let mut room = [Pages::default(); COPIED_RUNS];
        let mut mapped: u64 = 0;
        while mapped < npages {
            let runs = self.runs(host, dma, from, mapped..npages, &mut room);
            if runs.is_empty() {
                mapped = mapped.saturating_add(dma.run_step()); // was never mapped
            }
            for run in runs {
                if let Err(e) = self.only(&[to]).map_run(host, dma, mapped, *run) {
                    if mapped != 0 {
                        host.unmap(to.id, dma.span.first(), mapped);
                    }
                    return Err(e);
                }
                mapped = mapped.saturating_add(run.npages);
            }
        }
        Ok(())
    }
}
