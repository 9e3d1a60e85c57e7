// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty-page tracking: START, STOP and GET_BITMAP.

use crate::error::Error;
use crate::host::{Host, Memory};
use crate::mem::Words;
use crate::pgsize::PageSize;
use crate::type1::map::last_of;
use crate::type1::report::{Dest, Range};
use crate::type1::user_report::STAGING_WORDS;
use crate::type1::{Tracking, Type1};
use crate::uapi::{dirty_bitmap_bytes, vfio_bitmap, DIRTY_BITMAP_SIZE_MAX};

/// Test T of A5 and A6: whether a bitmap of `bytes` fits `size` bytes of pages
/// of the smallest size in `pgsize`.
fn check_bitmap(size: u64, pgsize: u64, bytes: u64) -> Result<PageSize, Error> {
    let pgsize_min = PageSize::smallest(pgsize).ok_or(Error::WrongPageSize)?;
    let npages = pgsize_min.pages(size);
    let fits = npages != 0
        && bytes != 0
        && bytes <= DIRTY_BITMAP_SIZE_MAX
        && bytes >= dirty_bitmap_bytes(npages);
    if fits {
        Ok(pgsize_min)
    } else {
        Err(Error::BitmapSize)
    }
}

/// The checks of a user's bitmap that need no container.
pub(crate) fn check_user_bitmap(
    host: &dyn Host,
    size: u64,
    bitmap: &vfio_bitmap,
) -> Result<(), Error> {
    if !host.is_user_range(bitmap.data, bitmap.size) {
        return Err(Error::NotUserRange);
    }
    check_bitmap(size, bitmap.pgsize, bitmap.size).map(|_| ())
}

/// Likewise for a report to a caller of the core.
pub(crate) fn check_report(size: u64, pgsize: PageSize, report: &Dest<'_>) -> Result<(), Error> {
    check_bitmap(size, pgsize.bytes(), report.bytes()).map(|_| ())
}

impl<M: Memory> Type1<M> {
    /// DIRTY_PAGES START: reports tell what is written from now on, so copy all
    /// memory after this call. No effect if tracking is on.
    ///
    /// # Errors
    ///
    /// In this order: `NotV2`; `TooManyPages` if a mapping has more than 2^31-1
    /// pages; `BitmapBudget`; `NoMemory`. Tracking stays off then.
    pub fn start(&mut self) -> Result<(), Error> {
        self.check_v2()?;
        if self.tracking.is_some() {
            return Ok(());
        }
        let pgsize = self.min_page();
        let budget = self.options.bitmap_budget;
        let mut result = Ok(());
        for dma in self.dmas.iter_mut() {
            result = dma.track(&self.mem, pgsize, budget, &mut self.bitmap_bytes);
            if result.is_err() {
                break;
            }
        }
        let staging = result.and_then(|()| Ok(Words::new(&self.mem, STAGING_WORDS)?));
        match staging {
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
    pub fn stop(&mut self) -> Result<(), Error> {
        self.check_v2()?;
        self.untrack();
        Ok(())
    }

    fn untrack(&mut self) {
        for dma in self.dmas.iter_mut() {
            dma.untrack(&mut self.bitmap_bytes);
        }
        self.tracking = None;
    }

    /// GET_BITMAP of the ioctl, from step 6 of A6 on.
    pub(crate) fn get_user_bitmap(
        &mut self,
        host: &mut dyn Host,
        iova: u64,
        size: u64,
        bitmap: &vfio_bitmap,
    ) -> Result<(), Error> {
        let last = last_of(iova, size)?;
        check_user_bitmap(host, size, bitmap)?;
        let latched = self.dirty_page();
        if bitmap.pgsize != latched.bytes() {
            return Err(Error::WrongPageSize);
        }
        let range = self.dirty_range(iova, size, last, latched)?;
        if self.copy_out(host, range, bitmap.data)? {
            self.clear(range); // only now (D2)
        }
        Ok(())
    }

    /// DIRTY_PAGES GET_BITMAP at any page size: bit k of `dest` is the page at
    /// `iova + k * pgsize`. Pages that are reported are clean afterwards, unless
    /// a device pins them.
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
        iova: u64,
        size: u64,
        pgsize: PageSize,
        dest: Dest<'_>,
    ) -> Result<(), Error> {
        self.check_v2()?;
        let last = last_of(iova, size)?;
        check_report(size, pgsize, &dest)?;
        let range = self.dirty_range(iova, size, last, pgsize)?;
        self.take(range, dest)
    }

    /// Steps 12 to 15 of A6.
    fn dirty_range(
        &self,
        iova: u64,
        size: u64,
        last: u64,
        pgsize: PageSize,
    ) -> Result<Range, Error> {
        if !pgsize.max(self.dirty_page()).aligns(iova | size) {
            return Err(Error::Misaligned);
        }
        if self.tracking.is_none() {
            return Err(Error::NotTracking);
        }
        if self.dmas.bisected(iova, last) {
            return Err(Error::Bisects);
        }
        Ok(Range {
            first: iova,
            last,
            pgsize,
        })
    }

    /// Clears the dirty pages of `range`; pins stay.
    pub(crate) fn clear(&mut self, range: Range) {
        for dma in self.dmas.range_mut(range.first, range.last) {
            dma.bitmap.iter_mut().for_each(|b| b.clear());
        }
    }
}
