// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty-page tracking of a container: start and stop, reports and marks.

use dirty_core::{Dest, Error, Extent, PageSize};

use super::Container;

impl Container {
    /// Starts dirty-page tracking; it has no effect if tracking is on. Copy all memory
    /// after this call: reports have what is written from now on. Pages that are
    /// pinned now are dirty.
    ///
    /// # Errors
    ///
    /// In this order; tracking stays off then:
    ///
    /// - [`Error::NoIommu`].
    /// - [`Error::NotV2`] if the IOMMU type is version 1.
    /// - For the first mapping that fails: [`Error::BitmapBudget`] beyond
    ///   [`Options::bitmap_budget`], [`Error::TooManyPages`] for more than 2^31 - 1
    ///   pages, [`Error::NoMemory`].
    ///
    /// [`Options::bitmap_budget`]: dirty_core::Options::bitmap_budget
    pub fn start(&self) -> Result<(), Error> {
        let mut call = self.call();
        self.shared.write().backend_mut()?.start(&mut call)
    }

    /// Stops dirty-page tracking and forgets what was dirty. It has no effect if
    /// tracking is off.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::NoIommu`], [`Error::NotV2`].
    pub fn stop(&self) -> Result<(), Error> {
        let mut call = self.call();
        self.shared.write().backend_mut()?.stop(&mut call)
    }

    /// Reports the dirty pages of the `size` bytes of IOVAs from `iova` on, and makes
    /// them clean; pinned pages stay dirty. Copy the pages *after* this call.
    ///
    /// Bit k % 64 of `bitmap[k / 64]` is the page of `pgsize` bytes at
    /// `iova + k * pgsize`; `pgsize` may be any power of two. A word that overlaps a
    /// mapping is overwritten, and the other words are left alone.
    ///
    /// # Errors
    ///
    /// In this order; nothing is cleared then:
    ///
    /// - [`Error::WrongPageSize`] unless `pgsize` is a power of two.
    /// - [`Error::NoIommu`], [`Error::NotV2`].
    /// - [`Error::ZeroSize`], [`Error::Wraps`].
    /// - [`Error::BitmapSize`] if `bitmap` is too short, or longer than 2^28 bytes, or
    ///   `size` is less than one page.
    /// - [`Error::Misaligned`] unless `iova` and `size` are multiples of `pgsize` and
    ///   of the page size that tracking has.
    /// - [`Error::NotTracking`].
    /// - [`Error::Bisects`] if the range starts or ends inside a mapping.
    pub fn dirty_bitmap(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &mut [u64],
    ) -> Result<(), Error> {
        self.report(iova, size, pgsize, Dest::Words(bitmap))
    }

    /// As [`dirty_bitmap`](Container::dirty_bitmap), for a `bitmap` that is all zero.
    /// It writes only the words that have dirty pages, which is faster when few have.
    ///
    /// # Errors
    ///
    /// As [`dirty_bitmap`](Container::dirty_bitmap).
    pub fn dirty_bitmap_zeroed(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &mut [u64],
    ) -> Result<(), Error> {
        self.report(iova, size, pgsize, Dest::Zeroed(bitmap))
    }

    fn report(&self, iova: u64, size: u64, pgsize: u64, to: Dest<'_>) -> Result<(), Error> {
        let pgsize = PageSize::new(pgsize).ok_or(Error::WrongPageSize)?;
        let mut call = self.call();
        let mut core = self.shared.write();
        core.backend_mut()?
            .get_bitmap(&mut call, iova, size, pgsize, to)
    }

    /// Marks as dirty every page that the `size` bytes at IOVA `iova` touch. It does
    /// nothing while tracking is off.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is done:
    /// see [`Device::mark`](crate::Device::mark).
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::NoIommu`], [`Error::ZeroSize`], [`Error::Wraps`]; nothing is marked
    ///   then.
    /// - [`Error::Unmapped`] if some of the bytes are in no mapping, so that no report
    ///   has them; the others are marked all the same.
    pub fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
        self.shared.read(|core| core.backend()?.mark(iova, size))
    }

    /// Marks the pages that another tracker reports: bit `extent.bit + k` of `words`
    /// is the page at `extent.iova + k * extent.pgsize`. Any page size will do. Call
    /// it after the writes, as [`mark`](Container::mark).
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::NoIommu`].
    /// - [`Error::Misaligned`], [`Error::BitmapSize`] and [`Error::Wraps`] if `extent`
    ///   does not describe `words`; nothing is marked then.
    /// - [`Error::Unmapped`] if a dirty page is in no mapping; the others are marked
    ///   all the same.
    pub fn mark_bitmap(&self, words: &[u64], extent: Extent) -> Result<(), Error> {
        let shared = &self.shared;
        shared.read(|core| core.backend()?.mark_bitmap(words, extent))
    }
}
