// SPDX-License-Identifier: MIT OR Apache-2.0
//! What devices do: pin, unpin, read and write.

use crate::error::Error;
use crate::host::{Fault, GroupId, Host, Memory, PageKind, Prot, Reach};
use crate::pgsize::{Extent, PageSize};
use crate::pins::window::{NotRepinned, Unpinned};
use crate::type1::dma::Dma;
use crate::type1::map::last_of;
use crate::type1::Type1;

impl<M: Memory> Type1<M> {
    /// pin_pages of a device of `group`: pins the page at `iova` and the pages
    /// that follow, one for each entry of `pfns`, and stores their pfns there. A
    /// pinned page is dirty in every report; from now on the group's devices
    /// count as writing through pins only.
    ///
    /// # Errors
    ///
    /// In this order: `NotV2`; `ZeroSize` if `pfns` is empty; `Wraps`;
    /// `VaddrInvalid` while the vaddr of a mapping is invalid. Then for each
    /// page: `Unmapped`; `Denied` if its mapping has not all rights of `prot`;
    /// `PinCount`; `Pin`; `Charge`; `NoStructPage`; `NoMemory`. No page stays
    /// pinned then, though pages that were pinned for a moment are dirty.
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
        let page = self.options.page_size;
        let size = (pfns.len() as u64).checked_mul(page.bytes());
        last_of(iova, size.ok_or(Error::Wraps)?)?;
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
                Err(e)
            }
        }
    }

    /// Pins pages until one cannot be: after how many, and why.
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
                Some(dma) if iova <= dma.last => dma,
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
    /// mapped, and passes over a page that is not pinned. A page whose last pin
    /// goes is dirty once more, so call it after the last write.
    pub fn unpin_pages(&mut self, host: &mut dyn Host, iova: u64, npages: u64) {
        let pays = self.domains.is_empty();
        let pgsize = self.dirty_page();
        let page = self.options.page_size;
        for k in 0..npages {
            let Some(iova) = (k << page.shift()).checked_add(iova) else {
                break;
            };
            if let Some(dma) = self.dmas.find_mut(iova) {
                dma.unpin_page(host, iova, pays, pgsize);
            } else if !self.dmas.overlaps(iova, iova.saturating_add(page.mask())) {
                break;
            }
        }
    }

    /// dma_rw: writes `data` to the memory behind `iova`, and marks every page
    /// that may have been written, also when the write fails half-way (D4).
    /// Threads may write at the same time.
    ///
    /// # Errors
    ///
    /// In this order: `ZeroSize`; `VaddrInvalid` while the vaddr of a mapping is
    /// invalid. Then for each mapping: `Unmapped`; `Denied` unless it allows
    /// reading and writing; `OtherMm` or `MmGone`; `BadAddress`. What was
    /// written before stays.
    pub fn write(&self, host: &mut dyn Host, iova: u64, data: &[u8]) -> Result<(), Error> {
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

    /// dma_rw: fills `data` from the memory behind `iova`.
    ///
    /// # Errors
    ///
    /// As [`write`](Type1::write), but reading needs READ only.
    pub fn read(&self, host: &mut dyn Host, iova: u64, data: &mut [u8]) -> Result<(), Error> {
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

    /// Marks `size` bytes from `iova` on as written, for a device or a thread
    /// that writes to guest memory by itself. Threads may mark at the same time.
    ///
    /// Call it *after* the write, and before anybody is told that the write is
    /// done (by a completion, an interrupt, or a device that is stopped), since
    /// that is when somebody makes the last report. The lock around the
    /// container orders this call (`&self`) with each report (`&mut self`). So a
    /// copy of the page made after the report that has the mark has the write
    /// too, and a mark that comes too late for one report is in the next.
    ///
    /// # Errors
    ///
    /// `ZeroSize`, `Wraps`. `Unmapped` if a part of the range lies in no
    /// mapping: the rest is marked, but no report has that part, nor had one of
    /// an unmap that came between the write and the mark. So stop writers before
    /// a range is unmapped.
    pub fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
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

impl<M: Memory> Type1<M> {
    /// Marks the pages whose bits are set in `words`, at the page size of
    /// `extent`: takes in the report of another tracker. As with
    /// [`mark`](Type1::mark), call it after the writes.
    ///
    /// # Errors
    ///
    /// `Misaligned`, `BitmapSize` or `Wraps` if `extent` does not describe
    /// `words`; nothing is marked then. `Unmapped` if a dirty page lies in no
    /// mapping; the rest is marked.
    pub fn mark_bitmap(&self, words: &[u64], extent: Extent) -> Result<(), Error> {
        let mut result = Ok(());
        for (first, last) in extent.ranges(words)? {
            let size = last.wrapping_sub(first).wrapping_add(1);
            result = result.and(self.mark(first, size));
        }
        result
    }
}

impl<M: Memory> Dma<M> {
    fn pin_page(
        &mut self,
        host: &mut dyn Host,
        iova: u64,
        pays: bool,
        pgsize: PageSize,
    ) -> Result<u64, Error> {
        let pfn = first_pin(host, self, iova, pays)?;
        let bit = self.bit(iova, pgsize);
        if let Some(bitmap) = &mut self.bitmap {
            bitmap.pin(bit);
        }
        Ok(pfn)
    }

    fn unpin_page(&mut self, host: &mut dyn Host, iova: u64, pays: bool, pgsize: PageSize) {
        // While its pin is looked for: 0.7 x the time among 1e5 pins. (To pin a
        // page gains nothing.)
        let bit = self.bit(iova, pgsize);
        if let Some(bitmap) = &mut self.bitmap {
            bitmap.prefetch(bit);
        }
        let Unpinned::Last(pfn) = self.pins.remove(iova) else {
            return;
        };
        host.unpin(pfn, 1, self.prot);
        if pays && host.page_kind(pfn) == PageKind::Normal {
            self.uncharge(host, 1);
        }
        // A granule stays pinned as long as any page in it is.
        let start = self.iova.wrapping_add(bit << pgsize.shift());
        if let Some(bitmap) = &mut self.bitmap {
            if !self.pins.any_beside(iova, start, start | pgsize.mask()) {
                bitmap.unpin(bit);
            }
        }
    }

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
                dma.pins.insert(iova, pfn).map_err(Error::from)
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
