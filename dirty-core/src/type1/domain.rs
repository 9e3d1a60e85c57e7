// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pages of a mapping in IOMMU domains: pinned, charged and mapped
//! together, and released together.

use crate::error::Error;
use crate::host::{DomainId, DomainInfo, Host, Memory};
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

/// Pages pinned at a time; their pfns are on the stack.
const BATCH: usize = 64;

/// Pages that are neighbours as iovas and as pfns.
#[derive(Clone, Copy)]
struct Run {
    iova: u64,
    pfn: u64,
    npages: u64,
}

impl Run {
    /// Appends a page; false if it is no neighbour.
    fn extend(&mut self, pfn: u64) -> bool {
        let neighbour = self.pfn.checked_add(self.npages) == Some(pfn);
        if neighbour {
            self.npages = self.npages.saturating_add(1);
        }
        neighbour
    }
}

/// How far a mapping is on its way into domains.
struct Filling {
    /// Pages that are pinned and charged.
    pinned: u64,
    /// The last of these pages, which are not mapped yet.
    run: Option<Run>,
}

impl Domains<'_> {
    /// Pins every page of `dma`, charges for it, and maps it in each domain. On
    /// an error nothing of it stays.
    pub(super) fn pin_and_map<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &mut Dma<M>,
    ) -> Result<(), Error> {
        let npages = dma.npages(self.page);
        let mut filling = Filling {
            pinned: 0,
            run: None,
        };
        let mut result = Ok(());
        while result.is_ok() && filling.pinned < npages {
            result = self.pin_batch(host, dma, &mut filling);
        }
        if let (Ok(()), Some(run)) = (result, filling.run) {
            result = self.map_run(host, dma, run);
        }
        if result.is_ok() {
            dma.iommu_mapped = true;
            return Ok(());
        }
        let mut mapped = filling.pinned;
        if let Some(run) = filling.run {
            self.release(host, dma, run);
            mapped = self.page.pages(run.iova.wrapping_sub(dma.span.first()));
        }
        self.unmap_first(host, dma, mapped);
        result
    }

    /// Pins and charges the next pages of `dma`, and maps each run that they
    /// end. On an error `filling` still says what is pinned and not mapped.
    fn pin_batch<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &mut Dma<M>,
        filling: &mut Filling,
    ) -> Result<(), Error> {
        let mut pfns = [0; BATCH];
        let iova = self.iova(dma, filling.pinned);
        let left = dma.npages(self.page).saturating_sub(filling.pinned);
        let left = usize::try_from(left).unwrap_or(BATCH).min(BATCH);
        let pfns = dma.pin(host, iova, pfns.get_mut(..left).unwrap_or_default())?;
        let cost = dma.chargeable(host, iova, pfns.iter().copied(), self.page);
        if let Err(e) = dma.charge(host, cost) {
            pfns.iter().for_each(|pfn| host.unpin(*pfn, 1, dma.prot));
            return Err(e);
        }
        for (k, pfn) in (0u64..).zip(pfns) {
            if filling.run.as_mut().is_some_and(|run| run.extend(*pfn)) {
                continue;
            }
            let next = Run {
                iova: iova.wrapping_add(k << self.page.shift()),
                pfn: *pfn,
                npages: 1,
            };
            let Some(ended) = filling.run.replace(next) else {
                continue;
            };
            if let Err(e) = self.map_run(host, dma, ended) {
                // The rest of the batch has no run of its own yet.
                let rest = pfns.get(usize::try_from(k).unwrap_or(0)..);
                self.release_batch(host, dma, next.iova, rest.unwrap_or_default());
                filling.run = Some(ended);
                return Err(e);
            }
        }
        filling.pinned = filling.pinned.saturating_add(pfns.len() as u64);
        Ok(())
    }

    /// The iova of page `n` of `dma`.
    fn iova<M: Memory>(self, dma: &Dma<M>, n: u64) -> u64 {
        dma.span.first().wrapping_add(n << self.page.shift())
    }

    /// Maps `run` in each domain, or in none.
    fn map_run<M: Memory>(self, host: &mut dyn Host, dma: &Dma<M>, run: Run) -> Result<(), Error> {
        for (done, domain) in self.list.iter().enumerate() {
            let mapped = host.map(domain.id, run.iova, run.pfn, run.npages, dma.prot);
            if let Err(e) = mapped {
                for domain in self.list.iter().take(done) {
                    host.unmap(domain.id, run.iova, run.npages);
                }
                return Err(Error::Iommu(e));
            }
        }
        Ok(())
    }

    /// Unpins and uncharges pages that were pinned for domains, from `iova` on.
    fn release_batch<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &mut Dma<M>,
        iova: u64,
        pfns: &[u64],
    ) {
        let cost = dma.chargeable(host, iova, pfns.iter().copied(), self.page);
        pfns.iter().for_each(|pfn| host.unpin(*pfn, 1, dma.prot));
        dma.uncharge(host, cost);
    }

    /// As `release_batch`, for a run.
    fn release<M: Memory>(self, host: &mut dyn Host, dma: &mut Dma<M>, run: Run) {
        let pfns = run.pfn..run.pfn.saturating_add(run.npages);
        let cost = dma.chargeable(host, run.iova, pfns, self.page);
        host.unpin(run.pfn, run.npages, dma.prot);
        dma.uncharge(host, cost);
    }

    /// Undoes [`pin_and_map`](Domains::pin_and_map); no-op for a mapping that is
    /// in no domain.
    pub(super) fn unmap_and_unpin<M: Memory>(self, host: &mut dyn Host, dma: &mut Dma<M>) {
        if dma.iommu_mapped {
            self.unmap_first(host, dma, dma.npages(self.page));
            dma.iommu_mapped = false;
        }
    }

    /// Unmaps the first `npages` pages of `dma` from every domain, then unpins
    /// and uncharges them: no device may reach a page that is unpinned.
    fn unmap_first<M: Memory>(self, host: &mut dyn Host, dma: &mut Dma<M>, npages: u64) {
        let Some((first, others)) = self.list.split_first() else {
            return;
        };
        if npages == 0 {
            return;
        }
        for domain in others {
            host.unmap(domain.id, dma.span.first(), npages);
        }
        // In the longest runs, so that no large page is unmapped in part.
        let mut done: u64 = 0;
        while done < npages {
            let Some(run) = self.run_in(host, dma, *first, done..npages) else {
                done = done.saturating_add(1); // was never mapped
                continue;
            };
            host.unmap(first.id, run.iova, run.npages);
            self.release(host, dma, run);
            done = done.saturating_add(run.npages);
        }
    }

    /// The run that starts with the first of these pages of `dma` in `domain`,
    /// and ends with their last at the latest.
    fn run_in<M: Memory>(
        self,
        host: &dyn Host,
        dma: &Dma<M>,
        domain: Domain,
        pages: core::ops::Range<u64>,
    ) -> Option<Run> {
        let iova = self.iova(dma, pages.start);
        let mut run = Run {
            iova,
            pfn: host.translate(domain.id, iova)?,
            npages: 1,
        };
        while pages.start.saturating_add(run.npages) < pages.end {
            let next = iova.wrapping_add(run.npages << self.page.shift());
            match host.translate(domain.id, next) {
                Some(pfn) if run.extend(pfn) => {}
                _ => break,
            }
        }
        Some(run)
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
        let mut mapped: u64 = 0;
        while mapped < npages {
            let Some(run) = self.run_in(host, dma, from, mapped..npages) else {
                mapped = mapped.saturating_add(1); // was never mapped
                continue;
            };
            if let Err(e) = self.only(&[to]).map_run(host, dma, run) {
                if mapped != 0 {
                    host.unmap(to.id, dma.span.first(), mapped);
                }
                return Err(e);
            }
            mapped = mapped.saturating_add(run.npages);
        }
        Ok(())
    }
}
