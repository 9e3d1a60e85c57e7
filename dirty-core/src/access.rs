// SPDX-License-Identifier: MIT OR Apache-2.0
//! What devices do: pin, unpin, read and write.

use crate::dma::Dma;
use crate::error::Error;
use crate::host::{Fault, GroupId, Host, Memory, PageKind, Prot, Reach};
use crate::map::last_of;
use crate::pfn::Unpinned;
use crate::pgsize::PageSize;
use crate::type1::Type1;

impl<M: Memory> Type1<M> {
    /// pin_pages of a device of `group`: one page at `iova` and at each
    /// following page, as many as `pfns` has room for.
    pub(crate) fn pin_pages(
        &mut self,
        host: &mut dyn Host,
        group: GroupId,
        iova: u64,
        prot: Prot,
        pfns: &mut [u64],
    ) -> Result<(), Error> {
        if self.vaddr_invalid != 0 {
            return Err(Error::VaddrInvalid);
        }
        let page = self.options.page_size;
        let iovas = (0..).map(|k: u64| iova.wrapping_add(k << page.shift()));
        let mut result = Ok(());
        let mut pinned: usize = 0;
        for (iova, pfn) in iovas.clone().zip(pfns) {
            match self.pin_page(host, iova, prot) {
                Ok(p) => *pfn = p,
                Err(e) => {
                    result = Err(e);
                    break;
                }
            }
            pinned = pinned.saturating_add(1);
        }
        if result.is_err() {
            for iova in iovas.take(pinned) {
                self.unpin_page(host, iova);
            }
            return result;
        }
        self.set_pinned_scope(group);
        Ok(())
    }

    fn pin_page(&mut self, host: &mut dyn Host, iova: u64, prot: Prot) -> Result<u64, Error> {
        let pays = self.domains.is_empty(); // else a domain's pin has paid
        let dirty_page = self.dirty_page();
        let dma = self.dmas.find_mut(iova).ok_or(Error::Unmapped)?;
        if !dma.prot.contains(prot) {
            return Err(Error::Denied);
        }
        if let Some(again) = dma.pins.again(iova) {
            return again;
        }
        let pfn = first_pin(host, dma, iova, pays)?;
        let bit = dma.bit(iova, dirty_page);
        if let Some(bitmap) = &mut dma.bitmap {
            bitmap.pin(bit);
        }
        Ok(pfn)
    }

    /// unpin_pages: stops at the first page that is not mapped.
    pub(crate) fn unpin_pages(&mut self, host: &mut dyn Host, iova: u64, npages: u64) {
        let page = self.options.page_size;
        for k in 0..npages {
            let Some(iova) = (k << page.shift()).checked_add(iova) else {
                break;
            };
            let last = iova.saturating_add(page.mask());
            if !self.dmas.overlaps(iova, last) {
                break;
            }
            self.unpin_page(host, iova);
        }
    }

    fn unpin_page(&mut self, host: &mut dyn Host, iova: u64) {
        let pays = self.domains.is_empty();
        let pgsize = self.dirty_page();
        let Some(dma) = self.dmas.find_mut(iova) else {
            return;
        };
        let Some(Unpinned::Last(pfn)) = dma.pins.remove(iova) else {
            return;
        };
        host.unpin(pfn, 1, dma.prot);
        if pays && host.page_kind(pfn) == PageKind::Normal {
            dma.uncharge(host, 1);
        }
        // A granule stays pinned as long as any page in it is.
        let bit = dma.bit(iova, pgsize);
        let start = dma.iova.wrapping_add(bit << pgsize.shift());
        let still = dma.pins.any_in(start, start | pgsize.mask());
        if let Some(bitmap) = dma.bitmap.as_mut().filter(|_| !still) {
            bitmap.unpin(bit);
        }
    }

    /// dma_rw to memory: every page that may have been written is marked, also
    /// when the write fails half-way (D4).
    pub(crate) fn write(&self, host: &mut dyn Host, iova: u64, data: &[u8]) -> Result<(), Error> {
        let pgsize = self.dirty_page();
        let mut at = iova;
        let mut rest = data;
        self.check_access(rest.len())?;
        while !rest.is_empty() {
            let (dma, n) = self.chunk(host, at, rest.len(), Prot::READ_WRITE)?;
            let (chunk, tail) = rest.split_at_checked(n).unwrap_or((rest, &[]));
            let written = host.write_mm(dma.mm, dma.vaddr_of(at), chunk);
            let touched = written.map_or_else(|Fault { done }| done.min(n), |()| n);
            dma.mark(at, touched as u64, pgsize);
            written.map_err(|_| Error::BadAddress)?;
            rest = tail;
            at = at.wrapping_add(n as u64); // past the end comes 0, as in Linux
        }
        Ok(())
    }

    /// dma_rw from memory.
    pub(crate) fn read(
        &self,
        host: &mut dyn Host,
        iova: u64,
        data: &mut [u8],
    ) -> Result<(), Error> {
        let mut at = iova;
        let mut rest = data;
        self.check_access(rest.len())?;
        while !rest.is_empty() {
            let (dma, n) = self.chunk(host, at, rest.len(), Prot::READ)?;
            let (chunk, tail) = rest.split_at_mut_checked(n).unwrap_or_default();
            let vaddr = dma.vaddr_of(at);
            let read = host.read_mm(dma.mm, vaddr, chunk);
            read.map_err(|_| Error::BadAddress)?;
            rest = tail;
            at = at.wrapping_add(n as u64);
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

    /// The mapping at `iova`, and how many of `len` bytes lie in it. READ is
    /// needed even to write, as in Linux.
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
        let left = dma.last.wrapping_sub(iova).saturating_add(1);
        let n = usize::try_from(left).map_or(len, |left| left.min(len));
        Ok((dma, n))
    }

    /// Marks `size` bytes from `iova` on as written by a device that writes by
    /// itself; holes in between have no bits to mark.
    pub(crate) fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
        let last = last_of(iova, size)?;
        let pgsize = self.dirty_page();
        let mut covered = true;
        let mut at = Some(iova);
        for dma in self.dmas.range(iova, last) {
            let first = iova.max(dma.iova);
            covered &= at == Some(first);
            let end = last.min(dma.last);
            dma.mark(first, end.wrapping_sub(first).wrapping_add(1), pgsize);
            at = end.checked_add(1);
        }
        if covered && at == last.checked_add(1) {
            Ok(())
        } else {
            Err(Error::Unmapped)
        }
    }
}

impl<M: Memory> Dma<M> {
    /// Marks the pages that `n` bytes at `iova`, inside the mapping, touch.
    fn mark(&self, iova: u64, n: u64, pgsize: PageSize) {
        if let (Some(bitmap), Ok(last)) = (&self.bitmap, last_of(iova, n)) {
            let first = self.bit(iova, pgsize);
            let pages = self.bit(last, pgsize).wrapping_sub(first).wrapping_add(1);
            bitmap.mark(first, pages);
        }
    }
}

/// Pins the page behind `iova` for a device, and keeps it in the mapping.
fn first_pin<M: Memory>(
    host: &mut dyn Host,
    dma: &mut Dma<M>,
    iova: u64,
    pays: bool,
) -> Result<u64, Error> {
    let mut pfn = [0];
    dma.pin(host, iova, &mut pfn)?;
    let [pfn] = pfn;
    let kind = host.page_kind(pfn);
    let cost = u64::from(pays && kind == PageKind::Normal);
    let kept = match dma.charge(host, cost) {
        Err(e) => Err(e),
        Ok(()) => {
            let inserted = if kind == PageKind::NoPage {
                Err(Error::NoStructPage)
            } else {
                dma.pins.insert(iova, pfn)
            };
            if inserted.is_err() {
                dma.uncharge(host, cost);
            }
            inserted
        }
    };
    match kept {
        Ok(()) => Ok(pfn),
        Err(e) => {
            host.unpin(pfn, 1, dma.prot);
            Err(e)
        }
    }
}
