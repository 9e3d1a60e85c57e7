// SPDX-License-Identifier: MIT OR Apache-2.0
//! What devices do: pin, unpin, write, read, and mark what they wrote.

use crate::error::Error;
use crate::host::{Fault, GroupId, Host, Memory, PageKind, Prot, Reach, Run};
use crate::pgsize::PageSize;
use crate::pins::{NotRepinned, Unpinned};
use crate::rescale::Extent;
use crate::span::Span;
use crate::type1::dma::Dma;
use crate::type1::Type1;

/// A read or write of a device that stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partial {
    /// How many bytes were copied. What was written is marked.
    pub done: usize,
    /// Why it stopped there.
    pub error: Error,
}

impl From<Error> for Partial {
    fn from(error: Error) -> Partial {
        Partial { done: 0, error }
    }
}

impl From<Partial> for Error {
    fn from(partial: Partial) -> Error {
        partial.error
    }
}

impl<M: Memory> Type1<M> {
    /// pin_pages of a device in `group`: pins the page at `iova` and the pages
    /// that follow, one for each entry of `pfns`, and stores their pfns there
    /// (rule A9 in docs/rules.md). A pinned page is dirty in every report. The
    /// group's devices count as writing through pins only from now on.
    ///
    /// # Errors
    ///
    /// In this order: `NotV2`; `ZeroSize` if `pfns` is empty; `Wraps`;
    /// `VaddrInvalid` while the vaddr of any mapping is invalid. Then for each
    /// page: `Unmapped`; `Denied` if its mapping lacks a right of `prot`;
    /// `PinCount`; for the first pin in its mapping while tracking is on
    /// `BitmapBudget` or `NoMemory`, before the host pins; `Pin`; `Charge`;
    /// `NoStructPage`; `NoMemory`. No page stays pinned then, but pages that were
    /// pinned for a moment are dirty.
    #[inline]
    pub fn pin_pages(
        &mut self,
        host: &mut dyn Host,
        group: GroupId,
        iova: u64,
        prot: Prot,
        pfns: &mut [u64],
    ) -> Result<(), Error> {
        self.check_v2()?;
        let size = (pfns.len() as u64).checked_mul(self.options.page_size.bytes());
        let span = Span::new(iova, size.ok_or(Error::Wraps)?)?;
        if self.vaddr_invalid != 0 {
            return Err(Error::VaddrInvalid);
        }
        match self.pin_each(host, iova, prot, pfns) {
            Ok(()) => {
                self.set_pinned_scope(group);
                Ok(())
            }
            Err((pinned, e)) => {
                self.unpin_pages(host, iova, pinned);
                self.free_pinned_bits(span);
                Err(e)
            }
        }
    }

    /// Frees the pinned bits of the mappings in `span` that have no pins: a pin
    /// that fails leaves no memory behind.
    #[cold]
    fn free_pinned_bits(&mut self, span: Span) {
        for dma in self.dmas.range_mut(span).filter(|d| d.pins.is_empty()) {
            if let Some(bitmap) = &mut dma.bitmap {
                self.budget.free_pins(bitmap);
            }
        }
    }

    /// Pins pages until one cannot be pinned: after how many, and why.
    #[inline]
    fn pin_each(
        &mut self,
        host: &mut dyn Host,
        mut iova: u64,
        prot: Prot,
        pfns: &mut [u64],
    ) -> Result<(), (u64, Error)> {
        let pays = self.domains.is_empty(); // else a domain's pin has paid
        let pgsize = self.dirty_page();
        let page = self.options.page_size;
        let mut here: Option<&mut Dma<M>> = None;
        for (pinned, pfn) in (0..).zip(pfns) {
            let dma = match here {
                Some(dma) if iova <= dma.span.last() => dma,
                _ => {
                    let dma = self.dmas.find_mut(iova);
                    let dma = dma.ok_or((pinned, Error::Unmapped))?;
                    if !dma.prot.contains(prot) {
                        return Err((pinned, Error::Denied));
                    }
                    dma
                }
            };
            *pfn = match dma.pins.repin(iova) {
                Ok(pfn) => pfn,
                Err(NotRepinned::Full) => return Err((pinned, Error::PinCount)),
                Err(NotRepinned::NotPinned) => {
                    if let Some(bitmap) = &mut dma.bitmap {
                        let reserved = self.budget.reserve_pins(bitmap);
                        reserved.map_err(|e| (pinned, e))?;
                    }
                    let pfn = dma.pin_page(host, iova, pays, pgsize);
                    pfn.map_err(|e| (pinned, e))?
                }
            };
            iova = iova.wrapping_add(page.bytes());
            here = Some(dma);
        }
        Ok(())
    }

    /// unpin_pages: drops one pin of the page at `iova` and of each of the
    /// `npages - 1` pages that follow. Stops at the first page that is not
    /// mapped; passes over a page that is not pinned. A page whose last pin goes
    /// is dirty once more, so call it after the last write.
    ///
    /// Returns how many pages it went over: `npages`, or those before the first
    /// that is not mapped.
    pub fn unpin_pages(&mut self, host: &mut dyn Host, iova: u64, npages: u64) -> u64 {
        let pays = self.domains.is_empty();
        let pgsize = self.dirty_page();
        let page = self.options.page_size;
        for k in 0..npages {
            let Some(iova) = (k << page.shift()).checked_add(iova) else {
                return k;
            };
            if let Some(dma) = self.dmas.find_mut(iova) {
                dma.unpin_page(host, iova, pays, pgsize);
            } else if !self.maps_any(iova, iova.saturating_add(page.mask())) {
                return k;
            }
        }
        npages
    }

    fn maps_any(&self, first: u64, last: u64) -> bool {
        Span::between(first, last).is_some_and(|span| self.dmas.overlaps(span))
    }

    /// dma_rw: writes `data` to the memory behind `iova`, and marks every page
    /// that may have been written, also when the write fails half-way (D4).
    /// Threads may write at the same time.
    ///
    /// # Errors
    ///
    /// In this order: `ZeroSize`; `VaddrInvalid` while the vaddr of any mapping
    /// is invalid. Then for each mapping: `Unmapped`; `Denied` unless it allows
    /// both reading and writing; `OtherMm`, `MmGone`; `BadAddress`. What was
    /// written before stays; [`Partial`] says how much that is.
    pub fn write(&self, host: &mut dyn Host, iova: u64, data: &[u8]) -> Result<(), Partial> {
        let pgsize = self.dirty_page();
        self.check_access(data.len())?;
        let mut rest = data;
        while !rest.is_empty() {
            let done = data.len().saturating_sub(rest.len());
            let at = iova.wrapping_add(done as u64); // 0 follows the last address, as in Linux
            let stopped = |error| Partial { done, error };
            let chunk = self.chunk(host, at, rest.len(), Prot::READ_WRITE);
            let (dma, n) = chunk.map_err(stopped)?;
            let (chunk, tail) = rest.split_at_checked(n).unwrap_or((rest, &[]));
            let written = host.write_mm(dma.mm, dma.vaddr_of(at), chunk);
            let copied = copied(written, n);
            if let Ok(span) = Span::new(at, copied as u64) {
                dma.mark(span, pgsize);
            }
            written.map_err(|_| Partial {
                done: done.saturating_add(copied),
                error: Error::BadAddress,
            })?;
            rest = tail;
        }
        Ok(())
    }

    /// dma_rw: fills `data` from the memory behind `iova`.
    ///
    /// # Errors
    ///
    /// As [`write`](Type1::write), but a mapping needs to allow reading only.
    pub fn read(&self, host: &mut dyn Host, iova: u64, data: &mut [u8]) -> Result<(), Partial> {
        let len = data.len();
        self.check_access(len)?;
        let mut rest = data;
        while !rest.is_empty() {
            let done = len.saturating_sub(rest.len());
            let at = iova.wrapping_add(done as u64);
            let stopped = |error| Partial { done, error };
            let chunk = self.chunk(host, at, rest.len(), Prot::READ);
            let (dma, n) = chunk.map_err(stopped)?;
            let (chunk, tail) = rest.split_at_mut_checked(n).unwrap_or_default();
            let read = host.read_mm(dma.mm, dma.vaddr_of(at), chunk);
            read.map_err(|_| Partial {
                done: done.saturating_add(copied(read, n)),
                error: Error::BadAddress,
            })?;
            rest = tail;
        }
        Ok(())
    }

    fn check_access(&self, len: usize) -> Result<(), Error> {
        if len == 0 {
            return Err(Error::ZeroSize);
        }
        if self.vaddr_invalid != 0 {
            return Err(Error::VaddrInvalid);
        }
        Ok(())
    }

    /// The mapping at `iova`, and how many of `len` bytes lie in it.
    fn chunk(
        &self,
        host: &dyn Host,
        iova: u64,
        len: usize,
        prot: Prot,
    ) -> Result<(&Dma<M>, usize), Error> {
        let dma = self.dmas.find(iova).ok_or(Error::Unmapped)?;
        if !dma.prot.contains(prot) {
            return Err(Error::Denied);
        }
        match host.reach(dma.mm) {
            Reach::Own => {}
            Reach::Other => return Err(Error::OtherMm),
            Reach::Gone => return Err(Error::MmGone),
        }
        let left = dma.span.last().wrapping_sub(iova).saturating_add(1);
        let n = usize::try_from(left).map_or(len, |left| left.min(len));
        Ok((dma, n))
    }

    /// Marks `size` bytes from `iova` on as written, for a device or a thread
    /// that writes to guest memory by itself. Threads may mark at the same time.
    ///
    /// Call it *after* the write, and before anybody is told that the write is
    /// done (by a completion, an interrupt or a device that is stopped), because
    /// on that somebody makes the last report. The lock around the backend
    /// orders this call (`&self`) with each report (`&mut self`). So a copy of
    /// the page that is made after the report with the mark has the write too,
    /// and a mark that comes too late for one report is in the next.
    ///
    /// # Errors
    ///
    /// `ZeroSize`; `Wraps`; `Unmapped` if a part of the range lies in no
    /// mapping. The rest is marked then, but no report has that part, nor had
    /// the report of an unmap that came between the write and the mark. So stop
    /// writers before you unmap what they write to.
    #[inline]
    pub fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
        self.mark_span(Span::new(iova, size)?)
    }

    /// Marks the pages whose bits are set in `words`, which `extent` describes,
    /// at its own page size: takes in the report of another tracker. As with
    /// [`mark`](Type1::mark), call it after the writes.
    ///
    /// # Errors
    ///
    /// `Misaligned`, `BitmapSize` or `Wraps` if `extent` does not describe
    /// `words`; nothing is marked then. `Unmapped` if a dirty page lies in no
    /// mapping; the rest is marked then.
    pub fn mark_bitmap(&self, words: &[u64], extent: Extent) -> Result<(), Error> {
        let mut result = Ok(());
        for (first, last) in extent.ranges(words)? {
            let run = Span::between(first, last);
            result = result.and(run.map_or(Ok(()), |run| self.mark_span(run)));
        }
        result
    }

    #[inline]
    fn mark_span(&self, span: Span) -> Result<(), Error> {
        // A mark seldom spans mappings, and one needs no walk.
        match self.dmas.find(span.first()) {
            Some(dma) if span.last() <= dma.span.last() => {
                dma.mark(span, self.dirty_page());
                Ok(())
            }
            _ => self.mark_across(span),
        }
    }

    /// As `mark_span`, where the span may be in several mappings, or in none.
    #[cold]
    #[inline(never)]
    fn mark_across(&self, span: Span) -> Result<(), Error> {
        let pgsize = self.dirty_page();
        let mut covered = true;
        let mut at = Some(span.first());
        for dma in self.dmas.range(span) {
            let Some(part) = dma.span.intersect(span) else {
                continue; // unreachable: it overlaps
            };
            covered &= at == Some(part.first());
            dma.mark(part, pgsize);
            at = part.last().checked_add(1);
        }
        if covered && at == span.last().checked_add(1) {
            Ok(())
        } else {
            Err(Error::Unmapped)
        }
    }
}

/// How many of `n` bytes a copy has copied.
fn copied(result: Result<(), Fault>, n: usize) -> usize {
    result.map_or_else(|Fault { done }| done.min(n), |()| n)
}

impl<M: Memory> Dma<M> {
    /// Pins the page behind `iova` for a device. A bitmap has pinned bits.
    fn pin_page(
        &mut self,
        host: &mut dyn Host,
        iova: u64,
        pays: bool,
        pgsize: PageSize,
    ) -> Result<u64, Error> {
        let pfn = self.first_pin(host, iova, pays)?;
        let bit = self.bit(iova, pgsize);
        if let Some(bitmap) = &mut self.bitmap {
            bitmap.set_pinned(bit);
        }
        Ok(pfn)
    }

    /// Pins the page behind `iova` for a device, and records the pin.
    fn first_pin(&mut self, host: &mut dyn Host, iova: u64, pays: bool) -> Result<u64, Error> {
        let mut run = [Run::EMPTY];
        self.pin(host, iova, 1, &mut run)?;
        let [Run { pfn, kind, .. }] = run;
        let cost = u64::from(pays && kind == PageKind::Normal);
        let recorded = self.charge(host, cost).and_then(|()| {
            let inserted = match kind {
                PageKind::NoPage => Err(Error::NoStructPage),
                _ => self.pins.insert(iova, pfn).map_err(Error::from),
            };
            if inserted.is_err() {
                self.uncharge(host, cost);
            }
            inserted
        });
        if recorded.is_err() {
            host.unpin(pfn, 1, self.prot);
        }
        recorded.map(|()| pfn)
    }

    fn unpin_page(&mut self, host: &mut dyn Host, iova: u64, pays: bool, pgsize: PageSize) {
        // The page's bits arrive while its pin is looked for: 0.7 x the time
        // among 1e5 pins. (A pin gains nothing from it.)
        let bit = self.bit(iova, pgsize);
        if let Some(bitmap) = &mut self.bitmap {
            bitmap.prefetch(bit);
        }
        let Unpinned::Last(pfn) = self.pins.remove(iova) else {
            return;
        };
        let normal = host.unpin(pfn, 1, self.prot);
        if pays {
            self.uncharge(host, normal);
        }
        // A granule stays pinned as long as any page in it is.
        let start = self.span.first().wrapping_add(bit << pgsize.shift());
        if let Some(bitmap) = &mut self.bitmap {
            if !self.pins.any_beside(iova, start, start | pgsize.mask()) {
                bitmap.unpin(bit);
            }
        }
    }
}
