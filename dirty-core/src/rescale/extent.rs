// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which pages the bits of a bitmap stand for, and bitmaps taken from one page
//! size to another.

use crate::bits::runs::runs_among;
use crate::error::Error;
use crate::pgsize::PageSize;
use crate::rescale::words::{coarsen, refine, Overlap};

/// Which pages some bits of a bitmap stand for: bit `bit + k` for the page at
/// `iova + k * pgsize`, for k from 0 to `npages - 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First bit in the words.
    pub bit: u64,
    /// Its page; a multiple of the page size.
    pub iova: u64,
    /// Number of pages.
    pub npages: u64,
    /// Their size.
    pub pgsize: PageSize,
}

impl Extent {
    fn check(&self, words: &[u64]) -> Result<(), Error> {
        if !self.pgsize.aligns(self.iova) {
            return Err(Error::Misaligned);
        }
        let bits = (words.len() as u64).saturating_mul(64);
        match self.bit.checked_add(self.npages) {
            Some(end) if end <= bits => {}
            _ => return Err(Error::BitmapSize),
        }
        self.last().map(|_| ())
    }

    /// Last address, if there is one.
    fn last(&self) -> Result<Option<u64>, Error> {
        let Some(last_page) = self.npages.checked_sub(1) else {
            return Ok(None);
        };
        let shift = self.pgsize.shift();
        let offset = last_page << shift;
        if offset >> shift != last_page {
            return Err(Error::Wraps);
        }
        let start = self.iova.checked_add(offset).ok_or(Error::Wraps)?;
        Ok(Some(start | self.pgsize.mask()))
    }

    /// The runs of pages whose bits are set in `words`, ascending: first and last
    /// address of each.
    ///
    /// ```
    /// use dirty_core::{Extent, PageSize};
    ///
    /// let pgsize = PageSize::new(4096).unwrap();
    /// let extent = Extent { bit: 0, iova: 0x8000, npages: 64, pgsize };
    /// assert!(extent.ranges(&[0b1110])?.eq([(0x9000, 0xbfff)]));
    /// # Ok::<(), dirty_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// `BitmapSize` if it is longer than `words`, `Misaligned` if it starts inside
    /// a page, `Wraps` if it leaves the address space.
    #[allow(clippy::arithmetic_side_effects)] // inside `self`, which `check` proved not to wrap
    pub fn ranges<'a>(
        &self,
        words: &'a [u64],
    ) -> Result<impl Iterator<Item = (u64, u64)> + 'a, Error> {
        self.check(words)?;
        let Extent {
            bit, iova, pgsize, ..
        } = *self;
        let address = move |at: u64| iova + ((at - bit) << pgsize.shift());
        let runs = runs_among(words, bit..bit + self.npages);
        Ok(runs.map(move |run| (address(run.start), address(run.end - 1) | pgsize.mask())))
    }
}

/// Takes dirty bits to another page size: sets each page of `to` that shares a
/// byte with a dirty page of `from`. A coarser page is dirty when any page in
/// it is; a dirty page makes all its finer pages dirty. Other bits of `dst`,
/// and dirty pages outside `to`, are left alone.
///
/// # Errors
///
/// `BitmapSize` if an extent is longer than its words, `Misaligned` if it
/// starts inside a page, `Wraps` if it leaves the address space. Nothing is
/// written then.
pub fn normalise(src: &[u64], from: Extent, dst: &mut [u64], to: Extent) -> Result<(), Error> {
    from.check(src)?;
    to.check(dst)?;
    let (Some(from_last), Some(to_last)) = (from.last()?, to.last()?) else {
        return Ok(()); // one has no pages
    };
    let both = (from.iova.max(to.iova), from_last.min(to_last));
    if both.0 > both.1 {
        return Ok(());
    }
    if from.pgsize <= to.pgsize {
        coarsen(src, dst, overlap(both, from, to));
    } else {
        refine(src, dst, overlap(both, to, from));
    }
    Ok(())
}

/// Where both extents have the addresses from `first` to `last`.
fn overlap((first, last): (u64, u64), fine: Extent, coarse: Extent) -> Overlap {
    let pages = |extent: Extent| extent.pgsize.pages(first.wrapping_sub(extent.iova));
    Overlap {
        fine: fine.bit.wrapping_add(pages(fine)),
        coarse: coarse.bit.wrapping_add(pages(coarse)),
        // At most as many as `fine` has.
        n: fine.pgsize.pages(last.wrapping_sub(first)).wrapping_add(1),
        skip: fine.pgsize.pages(first & coarse.pgsize.mask()),
        shift: coarse.pgsize.shift().wrapping_sub(fine.pgsize.shift()),
    }
}
