// SPDX-License-Identifier: MIT OR Apache-2.0
//! How dirty pages reach a caller of the core.
//!
//! A report overwrites each word that overlaps a mapping, leaves every other
//! word alone, and never reads what was there (D1). This one cannot fail once
//! it has begun, so it cleans the pages in the same pass. A report to a user
//! may fault: `user_report` has it.

use crate::bitmap::copy::copy_full;
use crate::bits;
use crate::error::Error;
use crate::host::Memory;
use crate::pgsize::PageSize;
use crate::rescale::{normalise, Extent};
use crate::span::Span;
use crate::type1::dma::Dma;
use crate::type1::{Type1, STAGING_WORDS};

/// Where a report goes: bit k is the page at `iova + k * pgsize`, bit k % 64 of
/// word k / 64.
#[derive(Debug)]
pub enum Dest<'a> {
    /// Words of any content: each word that overlaps a mapping is overwritten.
    Words(&'a mut [u64]),
    /// Words that are zero: only words with dirty pages are written, which is
    /// faster where few pages are dirty.
    Zeroed(&'a mut [u64]),
}

impl Dest<'_> {
    /// Bytes of its words.
    pub(super) fn bytes(&self) -> u64 {
        let (Dest::Words(words) | Dest::Zeroed(words)) = self;
        (words.len() as u64).saturating_mul(8)
    }
}

/// Pages to report. They are checked: the span bisects no mapping, and starts
/// and ends where pages of `pgsize` do.
#[derive(Clone, Copy)]
pub(super) struct Range {
    pub(super) span: Span,
    pub(super) pgsize: PageSize,
}

/// Where the pages of one mapping are among the words of a report.
pub(super) struct Place {
    /// First word.
    pub(super) start: usize,
    /// The word after the last.
    pub(super) end: usize,
    /// Bit of the mapping's first page in word `start`.
    pub(super) shift: u32,
}

impl Range {
    pub(super) fn place<M: Memory>(self, dma: &Dma<M>) -> Place {
        let page = |iova: u64| self.pgsize.pages(iova.wrapping_sub(self.span.first()));
        let (first, last) = (page(dma.span.first()), page(dma.span.last()));
        Place {
            start: bits::word(first),
            end: bits::word(last).saturating_add(1),
            shift: (first & 63) as u32,
        }
    }
}

impl<M: Memory> Type1<M> {
    /// Writes the dirty pages of `range` to `dest`, and cleans them.
    pub(super) fn take(&mut self, range: Range, dest: Dest<'_>) -> Result<(), Error> {
        if range.pgsize != self.dirty_page() {
            return self.take_rescaled(range, dest);
        }
        let all_dirty = self.all_dirty();
        let zeroed = matches!(dest, Dest::Zeroed(_));
        let (Dest::Words(words) | Dest::Zeroed(words)) = dest;
        let mut written = 0; // the words before it hold bits of this report
        for dma in self.dmas.range_mut(range.span) {
            let all = all_dirty(dma);
            let place = range.place(dma);
            let Some(out) = words.get_mut(place.start..place.end) else {
                return Err(Error::BitmapSize); // unreachable: the callers checked
            };
            let Some(bitmap) = &mut dma.bitmap else {
                return Err(Error::NotTracking); // unreachable: the callers checked
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

    /// As [`take`](Type1::take), at a page size that is not the bitmaps' own.
    fn take_rescaled(&mut self, range: Range, dest: Dest<'_>) -> Result<(), Error> {
        let all_dirty = self.all_dirty();
        let zeroed = matches!(dest, Dest::Zeroed(_));
        let (Dest::Words(words) | Dest::Zeroed(words)) = dest;
        let Some(tracking) = &mut self.tracking else {
            return Err(Error::NotTracking);
        };
        let last_page = range.pgsize.pages(range.span.size().wrapping_sub(1));
        let to = Extent {
            bit: 0,
            iova: range.span.first(),
            npages: last_page.saturating_add(1),
            pgsize: range.pgsize,
        };
        let staging = tracking.staging.exclusive();
        let mut written = 0;
        for dma in self.dmas.range_mut(range.span) {
            let all = all_dirty(dma);
            let place = range.place(dma);
            if !zeroed {
                let start = place.start.max(written);
                words.get_mut(start..place.end).unwrap_or_default().fill(0);
                written = place.end;
            }
            let mut done: u64 = 0;
            while done < dma.npages(tracking.pgsize) {
                let from = pages_from(dma, done, tracking.pgsize);
                let pages = staging.get_mut(..bits::word(from.npages.saturating_add(63)));
                let pages = pages.unwrap_or_default();
                match &mut dma.bitmap {
                    Some(bitmap) if !all => bitmap.copy(0, bits::word(done), pages),
                    _ => pages.fill(!0),
                }
                let normalised = normalise(pages, from, words, to);
                pages.fill(0); // staging words are zero in between
                normalised?;
                done = done.saturating_add(from.npages);
            }
        }
        self.clear(range);
        Ok(())
    }
}

/// Pages `done..` of a mapping, as many as the staging words hold.
fn pages_from<M: Memory>(dma: &Dma<M>, done: u64, pgsize: PageSize) -> Extent {
    let left = dma.npages(pgsize).saturating_sub(done);
    Extent {
        bit: 0,
        iova: dma.span.first().wrapping_add(done << pgsize.shift()),
        npages: left.min((STAGING_WORDS as u64).saturating_mul(64)),
        pgsize,
    }
}
