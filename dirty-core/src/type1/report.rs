// SPDX-License-Identifier: MIT OR Apache-2.0
//! How dirty pages reach whoever asked for them.
//!
//! A report writes whole each word that overlaps a mapping, leaves every other
//! word alone and never reads what was there (D1). One to a user may fault; it
//! clears nothing, so that a retry tells the same (D2). One to a caller of the
//! core cannot fail, and clears what it takes in the same pass.

use crate::bitmap::copy::copy_full;
use crate::bits;
use crate::error::Error;
use crate::host::{Host, Memory};
use crate::pgsize::{normalise, Extent, PageSize};
use crate::type1::dma::Dma;
use crate::type1::groups::may_be_written;
use crate::type1::user_report::{UserReport, STAGING_WORDS};
use crate::type1::Type1;

/// Where a report goes: bit k for the page at `iova + k * pgsize`.
#[derive(Debug)]
pub enum Dest<'a> {
    /// Words of any content: each that overlaps a mapping is overwritten.
    Words(&'a mut [u64]),
    /// Words that are zero: only those with dirty pages are written.
    Zeroed(&'a mut [u64]),
}

impl Dest<'_> {
    /// Bytes of its words.
    pub(crate) fn bytes(&self) -> u64 {
        let (Dest::Words(words) | Dest::Zeroed(words)) = self;
        (words.len() as u64).saturating_mul(8)
    }
}

/// A range of pages to report, checked: it bisects no mapping, and `pgsize`
/// divides its ends.
#[derive(Clone, Copy)]
pub(crate) struct Range {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) pgsize: PageSize,
}

/// Where the pages of one mapping are among the words of a report.
pub(crate) struct Place {
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Bit of the first page in word `start`.
    pub(crate) shift: u32,
}

impl Range {
    fn place<M: Memory>(self, dma: &Dma<M>) -> Place {
        let first = self.pgsize.pages(dma.iova.wrapping_sub(self.first));
        let last = self.pgsize.pages(dma.last.wrapping_sub(self.first));
        Place {
            start: bits::word(first),
            end: bits::word(last).saturating_add(1),
            shift: (first & 63) as u32,
        }
    }
}

impl<M: Memory> Type1<M> {
    /// Whether every page of a mapping counts as dirty (A8).
    fn all_dirty(&self) -> impl Fn(&Dma<M>) -> bool {
        let unseen = self.writes_unseen();
        let skip_read_only = self.options.skip_read_only;
        move |dma| unseen && dma.iommu_mapped && may_be_written(dma, skip_read_only)
    }

    /// Copies the dirty pages of `range` to the user's bitmap at `data`. Says
    /// whether there are any.
    pub(crate) fn copy_out(
        &mut self,
        host: &mut dyn Host,
        range: Range,
        data: u64,
    ) -> Result<bool, Error> {
        let all_dirty = self.all_dirty();
        let Some(tracking) = &mut self.tracking else {
            return Err(Error::NotTracking);
        };
        let mut out = UserReport::new(host, data, tracking.staging.exclusive());
        for dma in self.dmas.range_mut(range.first, range.last) {
            let all = all_dirty(dma);
            out.add(range.place(dma), dma, all)?;
        }
        out.finish()
    }

    /// Writes the dirty pages of `range` to `report`, and clears them.
    pub(crate) fn take(&mut self, range: Range, report: Dest<'_>) -> Result<(), Error> {
        if range.pgsize != self.dirty_page() {
            return self.take_rescaled(range, report);
        }
        let all_dirty = self.all_dirty();
        let zeroed = matches!(report, Dest::Zeroed(_));
        let (Dest::Words(words) | Dest::Zeroed(words)) = report;
        let mut written = 0; // words before it hold bits of this report
        for dma in self.dmas.range_mut(range.first, range.last) {
            let all = all_dirty(dma);
            let place = range.place(dma);
            let Some(out) = words.get_mut(place.start..place.end) else {
                return Err(Error::BitmapSize); // the callers checked: never
            };
            let Some(bitmap) = &mut dma.bitmap else {
                return Err(Error::NotTracking); // likewise
            };
            let shared = place.start < written;
            let before = out.first().copied().filter(|_| shared).unwrap_or(0);
            written = place.end;
            if all {
                copy_full(bitmap.npages(), place.shift, 0, out);
                bitmap.clear();
            } else if zeroed {
                bitmap.take_sparse(place.shift, out)?;
            } else {
                bitmap.take(place.shift, out)?;
            }
            if let Some(w) = out.first_mut() {
                *w |= before;
            }
        }
        Ok(())
    }

    /// Likewise at a page size that is not the bitmaps' own.
    fn take_rescaled(&mut self, range: Range, report: Dest<'_>) -> Result<(), Error> {
        let all_dirty = self.all_dirty();
        let zeroed = matches!(report, Dest::Zeroed(_));
        let (Dest::Words(words) | Dest::Zeroed(words)) = report;
        let Some(tracking) = &mut self.tracking else {
            return Err(Error::NotTracking);
        };
        let more = range.pgsize.pages(range.last.wrapping_sub(range.first));
        let to = Extent {
            bit: 0,
            iova: range.first,
            npages: more.saturating_add(1),
            pgsize: range.pgsize,
        };
        let staging = tracking.staging.exclusive();
        let mut written = 0;
        for dma in self.dmas.range_mut(range.first, range.last) {
            let all = all_dirty(dma);
            let place = range.place(dma);
            if !zeroed {
                let start = place.start.max(written);
                words.get_mut(start..place.end).unwrap_or_default().fill(0);
                written = place.end;
            }
            let mut done: u64 = 0;
            while done < dma.npages(tracking.pgsize) {
                let from = dma.pages_from(done, STAGING_WORDS, tracking.pgsize);
                let pages = staging.get_mut(..bits::word(from.npages.saturating_add(63)));
                let pages = pages.unwrap_or_default();
                match &mut dma.bitmap {
                    Some(bitmap) if !all => bitmap.copy(0, bits::word(done), pages),
                    _ => pages.fill(!0),
                }
                let normalised = normalise(pages, from, words, to);
                pages.fill(0); // as `UserReport` wants it
                normalised?;
                done = done.saturating_add(from.npages);
            }
        }
        self.clear(range);
        Ok(())
    }
}
