// SPDX-License-Identifier: MIT OR Apache-2.0
//! A mapping's pages in the IOMMU's domains: pinned, charged and mapped
//! together, and undone together.

use crate::error::Error;
use crate::host::{DomainId, DomainInfo, Host, Memory, PageKind};
use crate::pgsize::PageSize;
use crate::type1::dma::Dma;

/// A domain of the container.
#[derive(Clone, Copy)]
pub(crate) struct Domain {
    pub(crate) id: DomainId,
    pub(crate) info: DomainInfo,
}

/// Pages pinned at a time; their pfns are on the stack.
const BATCH: usize = 64;

/// A run of neighbouring pages that lie together in memory too.
#[derive(Clone, Copy)]
struct Run {
    iova: u64,
    pfn: u64,
    npages: u64,
}

impl Run {
    /// Appends a page, unless it is no neighbour.
    fn extend(&mut self, pfn: u64) -> bool {
        let neighbour = self.pfn.checked_add(self.npages) == Some(pfn);
        if neighbour {
            self.npages = self.npages.saturating_add(1);
        }
        neighbour
    }
}

/// Maps `run` in each of `domains`, or in none.
fn map_run<M: Memory>(
    host: &mut dyn Host,
    dma: &Dma<M>,
    domains: &[Domain],
    run: Run,
) -> Result<(), Error> {
    for (done, domain) in domains.iter().enumerate() {
        let mapped = host.map(domain.id, run.iova, run.pfn, run.npages, dma.prot);
        if let Err(e) = mapped {
            for domain in domains.iter().take(done) {
                host.unmap(domain.id, run.iova, run.npages);
            }
            return Err(Error::Iommu(e));
        }
    }
    Ok(())
}

/// Pins every page of `dma`, charges for it, and maps it in each of `domains`.
/// On an error nothing stays of it.
pub(crate) fn pin_and_map<M: Memory>(
    host: &mut dyn Host,
    dma: &mut Dma<M>,
    domains: &[Domain],
    page: PageSize,
) -> Result<(), Error> {
    let npages = dma.npages(page);
    let mut pinned: u64 = 0; // pages pinned and charged
    let mut run: Option<Run> = None; // of these, the last ones, not mapped yet
    let result = loop {
        if pinned == npages {
            break match run {
                Some(r) => map_run(host, dma, domains, r),
                None => Ok(()),
            };
        }
        match pin_batch(host, dma, page, pinned, npages, &mut run, domains) {
            Ok(n) => pinned = pinned.saturating_add(n),
            Err(e) => break Err(e),
        }
    };
    if result.is_ok() {
        dma.iommu_mapped = true;
        return Ok(());
    }
    if let Some(r) = run {
        release(host, dma, page, r);
        pinned = page.pages(r.iova.wrapping_sub(dma.iova));
    }
    unmap_pages(host, dma, domains, page, pinned);
    result
}

/// Pins and charges the next pages of `dma`, from page `done` on; what no
/// longer continues `run` is mapped. Returns how many were pinned; on an error
/// `run` still says what is pinned and not mapped.
fn pin_batch<M: Memory>(
    host: &mut dyn Host,
    dma: &mut Dma<M>,
    page: PageSize,
    done: u64,
    npages: u64,
    run: &mut Option<Run>,
    domains: &[Domain],
) -> Result<u64, Error> {
    let mut pfns = [0; BATCH];
    let iova = dma.iova.wrapping_add(done << page.shift());
    let left = usize::try_from(npages.saturating_sub(done)).unwrap_or(BATCH);
    let room = pfns.get_mut(..left.min(BATCH)).unwrap_or_default();
    let pfns = dma.pin(host, iova, room)?;
    let cost = dma.chargeable(host, iova, pfns.iter().copied(), page);
    if let Err(e) = dma.charge(host, cost) {
        pfns.iter().for_each(|pfn| host.unpin(*pfn, 1, dma.prot));
        return Err(e);
    }
    for (k, pfn) in (0u64..).zip(pfns) {
        if run.as_mut().is_some_and(|r| r.extend(*pfn)) {
            continue;
        }
        let next = Run {
            iova: iova.wrapping_add(k << page.shift()),
            pfn: *pfn,
            npages: 1,
        };
        if let Some(ended) = run.replace(next) {
            if let Err(e) = map_run(host, dma, domains, ended) {
                // The rest of the batch has no run of its own yet.
                let rest = pfns.get(usize::try_from(k).unwrap_or(0)..);
                release_pages(host, dma, page, next.iova, rest.unwrap_or_default());
                *run = Some(ended);
                return Err(e);
            }
        }
    }
    Ok(pfns.len() as u64)
}

/// Unpins and uncharges `pfns`, pinned for a domain at `iova`.
fn release_pages<M: Memory>(
    host: &mut dyn Host,
    dma: &mut Dma<M>,
    page: PageSize,
    iova: u64,
    pfns: &[u64],
) {
    let cost = dma.chargeable(host, iova, pfns.iter().copied(), page);
    pfns.iter().for_each(|pfn| host.unpin(*pfn, 1, dma.prot));
    dma.uncharge(host, cost);
}

/// Likewise a whole run.
fn release<M: Memory>(host: &mut dyn Host, dma: &mut Dma<M>, page: PageSize, run: Run) {
    let pfns = run.pfn..run.pfn.saturating_add(run.npages);
    let cost = dma.chargeable(host, run.iova, pfns, page);
    host.unpin(run.pfn, run.npages, dma.prot);
    dma.uncharge(host, cost);
}

/// Unmaps the first `npages` pages of `dma` from every domain; then unpins and
/// uncharges them. No device may reach a page when it is unpinned.
fn unmap_pages<M: Memory>(
    host: &mut dyn Host,
    dma: &mut Dma<M>,
    domains: &[Domain],
    page: PageSize,
    npages: u64,
) {
    let Some((first, others)) = domains.split_first() else {
        return;
    };
    if npages == 0 {
        return;
    }
    for domain in others {
        host.unmap(domain.id, dma.iova, npages);
    }
    // In the longest runs, so that no large page is unmapped in part.
    let mut done: u64 = 0;
    while done < npages {
        let Some(run) = run_from(host, dma, *first, page, done, npages) else {
            done = done.saturating_add(1); // was never mapped
            continue;
        };
        host.unmap(first.id, run.iova, run.npages);
        release(host, dma, page, run);
        done = done.saturating_add(run.npages);
    }
}

/// The run of pages that starts with page `done` of `dma` in `domain`, which
/// ends at page `npages` at the latest.
fn run_from<M: Memory>(
    host: &dyn Host,
    dma: &Dma<M>,
    domain: Domain,
    page: PageSize,
    done: u64,
    npages: u64,
) -> Option<Run> {
    let iova = dma.iova.wrapping_add(done << page.shift());
    let pfn = host.translate(domain.id, iova)?;
    let mut run = Run {
        iova,
        pfn,
        npages: 1,
    };
    while done.saturating_add(run.npages) < npages {
        let next = iova.wrapping_add(run.npages << page.shift());
        match host.translate(domain.id, next) {
            Some(pfn) if run.extend(pfn) => {}
            _ => break,
        }
    }
    Some(run)
}

/// Undoes [`pin_and_map`]; no-op on a mapping that is in no domain.
pub(crate) fn unmap_and_unpin<M: Memory>(
    host: &mut dyn Host,
    dma: &mut Dma<M>,
    domains: &[Domain],
    page: PageSize,
) {
    if dma.iommu_mapped {
        let npages = dma.npages(page);
        unmap_pages(host, dma, domains, page, npages);
        dma.iommu_mapped = false;
    }
}

/// Maps the pages that `dma` has in domain `from` in domain `to` as well. On an
/// error nothing stays of it.
fn copy_to_domain<M: Memory>(
    host: &mut dyn Host,
    dma: &Dma<M>,
    from: Domain,
    to: Domain,
    page: PageSize,
) -> Result<(), Error> {
    let npages = dma.npages(page);
    let mut mapped: u64 = 0;
    while mapped < npages {
        let Some(run) = run_from(host, dma, from, page, mapped, npages) else {
            mapped = mapped.saturating_add(1); // was never mapped
            continue;
        };
        if let Err(e) = map_run(host, dma, &[to], run) {
            if mapped != 0 {
                host.unmap(to.id, dma.iova, mapped);
            }
            return Err(e);
        }
        mapped = mapped.saturating_add(run.npages);
    }
    Ok(())
}

/// Brings one mapping into the new domain `to`, beside `domains`.
pub(crate) fn replay<M: Memory>(
    host: &mut dyn Host,
    dma: &mut Dma<M>,
    domains: &[Domain],
    to: Domain,
    page: PageSize,
) -> Result<(), Error> {
    match domains.first() {
        Some(from) => copy_to_domain(host, dma, *from, to, page),
        None => pin_and_map(host, dma, &[to], page),
    }
}

/// Undoes [`replay`] of one mapping.
pub(crate) fn unreplay<M: Memory>(
    host: &mut dyn Host,
    dma: &mut Dma<M>,
    domains: &[Domain],
    to: Domain,
    page: PageSize,
) {
    if domains.is_empty() {
        unmap_and_unpin(host, dma, &[to], page);
    } else {
        host.unmap(to.id, dma.iova, dma.npages(page));
    }
}

/// Pages that devices pinned in `dma` and that count as locked memory.
pub(crate) fn pinned_charge<M: Memory>(host: &dyn Host, dma: &Dma<M>) -> u64 {
    let normal = |(_, pfn): &(u64, u64)| host.page_kind(*pfn) == PageKind::Normal;
    dma.pins.iter().filter(normal).count() as u64
}
