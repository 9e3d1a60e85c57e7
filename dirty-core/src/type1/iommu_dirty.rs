// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty pages that IOMMUs know of (D12).
//!
//! They are moved into the bitmaps before a report copies anything, so a report
//! that faults loses nothing. From then on they are dirty pages as any others.
//! What was written before START is thrown away.

use crate::bitmap::Bitmap;
use crate::error::Error;
use crate::host::{Host, Memory};
use crate::pgsize::PageSize;
use crate::span::Span;
use crate::type1::dma::Dma;
use crate::type1::domain::{Domain, Domains};
use crate::type1::Type1;

impl Domains<'_> {
    /// The domains that track.
    fn tracking(&self) -> impl Iterator<Item = &Domain> {
        self.list.iter().filter(|d| d.info.dirty_tracking)
    }

    /// Moves what the IOMMUs know of `dma` into its bitmap, whose pages are
    /// `pgsize`. Returns whether they knew anything.
    fn harvest<M: Memory>(self, host: &mut dyn Host, dma: &Dma<M>, pgsize: PageSize) -> bool {
        let (iova, npages) = (dma.span.first(), dma.npages(self.page));
        let mut any = false;
        for domain in self.tracking() {
            host.read_and_clear_dirty(domain.id, iova, npages, &mut |iova, npages| {
                let size = npages.saturating_mul(self.page.bytes());
                let end = iova.saturating_add(size.saturating_sub(1));
                let written = Span::between(iova, end).filter(|_| size != 0);
                if let Some(span) = written.and_then(|span| span.intersect(dma.span)) {
                    dma.mark(span, pgsize);
                    any = true;
                }
            });
        }
        any
    }

    /// As [`unmap_and_unpin`](Domains::unmap_and_unpin), and moves what the
    /// IOMMUs know until then into the bitmap. Returns whether they knew anything.
    fn unmap_and_harvest<M: Memory>(
        self,
        host: &mut dyn Host,
        dma: &mut Dma<M>,
        pgsize: PageSize,
    ) -> bool {
        let before = self.harvest(host, dma, pgsize);
        self.unmap_and_unpin(host, dma);
        self.harvest(host, dma, pgsize) || before
    }
}

impl<M: Memory> Type1<M> {
    /// Switches tracking on in each domain that has it, or in none, and throws
    /// away what was written before.
    pub(super) fn start_iommus(&self, host: &mut dyn Host) -> Result<(), Error> {
        let domains = self.all_domains();
        for (started, domain) in domains.tracking().enumerate() {
            if let Err(e) = host.set_dirty_tracking(domain.id, true) {
                for domain in domains.tracking().take(started) {
                    let _ = host.set_dirty_tracking(domain.id, false);
                }
                return Err(Error::Iommu(e));
            }
        }
        for domain in domains.tracking() {
            for dma in self.dmas.iter().filter(|dma| dma.iommu_mapped) {
                let npages = dma.npages(domains.page);
                host.read_and_clear_dirty(domain.id, dma.span.first(), npages, &mut |_, _| {});
            }
        }
        Ok(())
    }

    /// Undoes [`start_iommus`](Type1::start_iommus).
    pub(super) fn stop_iommus(&self, host: &mut dyn Host) {
        for domain in self.all_domains().tracking() {
            let _ = host.set_dirty_tracking(domain.id, false);
        }
    }

    /// Moves what the IOMMUs know of the mappings in `span` into their bitmaps.
    pub(super) fn harvest(&self, host: &mut dyn Host, span: Span) {
        let Some((domains, pgsize)) = self.harvested() else {
            return;
        };
        for dma in self.dmas.range(span).filter(|dma| dma.iommu_mapped) {
            domains.harvest(host, dma, pgsize);
        }
    }

    /// Takes the mappings in `span` out of every domain for good, and moves what
    /// the IOMMUs know until then into their bitmaps. Returns whether they knew
    /// anything. No-op if no IOMMU tracks.
    pub(super) fn unmap_and_harvest(&mut self, host: &mut dyn Host, span: Span) -> bool {
        let Some((_, pgsize)) = self.harvested() else {
            return false;
        };
        let all_dirty = self.all_dirty();
        let domains = Domains {
            list: &self.domains,
            page: self.options.page_size,
        };
        let mut any = false;
        for dma in self.dmas.range_mut(span).filter(|dma| dma.iommu_mapped) {
            if all_dirty(dma) {
                dma.bitmap.iter_mut().for_each(Bitmap::set_all); // the rule ends for it
            }
            any |= domains.unmap_and_harvest(host, dma, pgsize);
        }
        any
    }

    /// The last group leaves `domain`, and other domains are left: takes every
    /// mapping out of it, and moves what it knows until then into their bitmaps.
    /// No-op if it does not track.
    pub(super) fn empty_and_harvest(&self, host: &mut dyn Host, domain: &Domain) {
        let Some(pgsize) = self.tracking().filter(|_| domain.info.dirty_tracking) else {
            return;
        };
        let domains = Domains {
            list: core::slice::from_ref(domain),
            page: self.options.page_size,
        };
        for dma in self.dmas.iter().filter(|dma| dma.iommu_mapped) {
            domains.harvest(host, dma, pgsize);
            host.unmap(domain.id, dma.span.first(), dma.npages(domains.page));
            domains.harvest(host, dma, pgsize);
        }
    }

    fn all_domains(&self) -> Domains<'_> {
        Domains {
            list: &self.domains,
            page: self.options.page_size,
        }
    }

    /// The domains and the page size of the bitmaps, if bitmaps are there and some
    /// domain knows dirty pages.
    fn harvested(&self) -> Option<(Domains<'_>, PageSize)> {
        let domains = self.all_domains();
        domains.tracking().next()?;
        Some((domains, self.tracking()?))
    }
}
