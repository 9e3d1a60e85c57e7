// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty-page tracking: START, STOP and GET_BITMAP.

use crate::error::Error;
use crate::host::{Host, Memory};
use crate::mem::Words;
use crate::pgsize::PageSize;
use crate::span::Span;
use crate::type1::report::{Dest, Range};
use crate::type1::{Tracking, Type1, STAGING_WORDS};
use crate::uapi::{dirty_bitmap_bytes, vfio_bitmap, DIRTY_BITMAP_SIZE_MAX};

/// Test T of A5 and A6: whether `bytes` of bitmap hold a bit for each page in
/// `size` bytes, at the smallest page size in `pgsizes`.
fn check_size(size: u64, pgsizes: u64, bytes: u64) -> Result<(), Error> {
    let smallest = PageSize::smallest(pgsizes).ok_or(Error::WrongPageSize)?;
    let npages = smallest.pages(size);
    let fits = npages != 0
        && bytes != 0
        && bytes <= DIRTY_BITMAP_SIZE_MAX
        && bytes >= dirty_bitmap_bytes(npages);
    if fits {
        Ok(())
    } else {
        Err(Error::BitmapSize)
    }
}

/// The checks of a user's bitmap that need no container.
pub(super) fn check_user_bitmap(
    host: &dyn Host,
    size: u64,
    bitmap: &vfio_bitmap,
) -> Result<(), Error> {
    if !host.is_user_range(bitmap.data, bitmap.size) {
        return Err(Error::NotUserRange);
    }
    check_size(size, bitmap.pgsize, bitmap.size)
}

/// As [`check_user_bitmap`], for a caller of the core.
pub(super) fn check_dest(span: Span, pgsize: PageSize, dest: &Dest<'_>) -> Result<(), Error> {
    check_size(span.size(), pgsize.bytes(), dest.bytes())
}

impl<M: Memory> Type1<M> {
    /// DIRTY_PAGES START: reports tell what is written from now on, so copy all
    /// memory after this call. No effect if tracking is on.
    ///
    /// # Errors
    ///
    /// `NotV2`; then for each mapping `BitmapBudget`, `TooManyPages` for more
    /// than 2^31-1 pages, or `NoMemory`; then `Iommu` if dirty tracking of an
    /// IOMMU cannot be switched on. Tracking stays off then.
    pub fn start(&mut self, host: &mut dyn Host) -> Result<(), Error> {
        self.check_v2()?;
        if self.tracking.is_some() {
            return Ok(());
        }
        let pgsize = self.min_page();
        let mut result = Ok(());
        for dma in self.dmas.iter_mut() {
            result = dma.track(pgsize, &mut self.budget);
            if result.is_err() {
                break;
            }
        }
        let staging = result.and_then(|()| Ok(Words::new(&self.mem, STAGING_WORDS)?));
        let started = staging.and_then(|staging| self.start_iommus(host).map(|()| staging));
        match started {
            Ok(staging) => {
                self.tracking = Some(Tracking { pgsize, staging });
                Ok(())
            }
            Err(e) => {
                self.untrack();
                Err(e)
            }
        }
    }

    /// DIRTY_PAGES STOP: forgets what was dirty. No effect if tracking is off.
    ///
    /// # Errors
    ///
    /// `NotV2`.
    pub fn stop(&mut self, host: &mut dyn Host) -> Result<(), Error> {
        self.check_v2()?;
        if self.tracking.is_some() {
            self.stop_iommus(host);
        }
        self.untrack();
        Ok(())
    }

    fn untrack(&mut self) {
        for dma in self.dmas.iter_mut() {
            dma.untrack(&mut self.budget);
        }
        self.tracking = None;
    }

    /// DIRTY_PAGES GET_BITMAP at any page size: bit k of `dest` is the page at
    /// `iova + k * pgsize`. The pages that are reported are clean afterwards,
    /// unless a device pins them.
    ///
    /// # Errors
    ///
    /// In this order: `NotV2`; `ZeroSize`; `Wraps`; `BitmapSize` if `dest` has
    /// too few words, or more than 2^28 bytes; `Misaligned` if `iova` or `size`
    /// is no multiple of `pgsize` and of the bitmaps' own page size;
    /// `NotTracking`; `Bisects` if the range starts or ends inside a mapping.
    /// Nothing is cleared then.
    pub fn get_bitmap(
        &mut self,
        host: &mut dyn Host,
        iova: u64,
        size: u64,
        pgsize: PageSize,
        dest: Dest<'_>,
    ) -> Result<(), Error> {
        self.check_v2()?;
        let span = Span::new(iova, size)?;
        check_dest(span, pgsize, &dest)?;
        let range = self.dirty_range(span, pgsize)?;
        self.harvest(host, span);
        self.take(range, dest)
    }

    /// GET_BITMAP of the ioctl, from step 6 of A6 on. It takes the bitmaps' own
    /// page size only.
    pub(super) fn get_user_bitmap(
        &mut self,
        host: &mut dyn Host,
        iova: u64,
        size: u64,
        bitmap: &vfio_bitmap,
    ) -> Result<(), Error> {
        self.check_v2()?;
        let span = Span::new(iova, size)?;
        check_user_bitmap(host, size, bitmap)?;
        let latched = self.dirty_page();
        if bitmap.pgsize != latched.bytes() {
            return Err(Error::WrongPageSize);
        }
        let range = self.dirty_range(span, latched)?;
        self.harvest(host, span);
        if self.copy_out(host, range, bitmap.data)? {
            self.clear(range); // only now, after the last copy (D2)
        }
        Ok(())
    }

    /// Steps 12 to 15 of A6.
    fn dirty_range(&mut self, span: Span, pgsize: PageSize) -> Result<Range, Error> {
        let aligned = span.first() | span.size();
        if !pgsize.max(self.dirty_page()).aligns(aligned) {
            return Err(Error::Misaligned);
        }
        if self.tracking.is_none() {
            return Err(Error::NotTracking);
        }
        self.dmas.seek(span.first());
        if self.dmas.bisects(span) {
            return Err(Error::Bisects);
        }
        Ok(Range { span, pgsize })
    }

    /// Cleans the pages of `range`; pins stay.
    pub(super) fn clear(&mut self, range: Range) {
        for dma in self.dmas.range_mut(range.span) {
            dma.bitmap.iter_mut().for_each(|b| b.clear());
        }
    }
}
