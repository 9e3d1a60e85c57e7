// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty pages by IOVA, translated to guest addresses.

use dirty_core::Extent;

use super::view::IovaView;
use crate::error::TrackError;
use crate::ranges::check_covered;

/// One pass over the logs of a view's devices, which report dirty pages by IOVA.
///
/// Such a log is a [`DeviceLog`](crate::device_log::DeviceLog), a
/// [`Container`](crate::Container), the kernel's log of a real device, or an
/// IOMMU's dirty bits.
///
/// A log says which IOVA was written, and not through which mapping. So each dirty
/// page counts for every mapping that was there since the harvest before: for the
/// live ones, and for the gone ones that the view remembers.
///
/// Begin the harvest, read every log of the view's devices, OR each into the
/// harvest, and [`finish`](Harvest::finish) it.
///
/// ```
/// use adapter_user::guest::{Report, Tracker};
/// use adapter_user::{Extent, PageSize};
///
/// let tracker = Tracker::new(None);
/// tracker.add_slot(0, 0, None, 1 << 20)?;
/// let view = tracker.iova_view();
/// view.map(0x8000, 0x1000, 0x1000)?;
/// view.unmap(0x8000, 0x1000)?;
/// view.map(0x8000, 0x2000, 0x1000)?;
///
/// // The device's log has page 0x8000. Either mapping may have been written.
/// let harvest = view.harvest();
/// let pgsize = PageSize::new(4096).unwrap();
/// harvest.or(&[1], Extent { bit: 0, iova: 0x8000, npages: 1, pgsize })?;
/// harvest.finish(); // every log of this view was read
///
/// let mut report = Report::new();
/// tracker.take(&mut report)?;
/// assert_eq!(report.slot(0).unwrap()[0], 0b110);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Harvest<'a> {
    view: &'a IovaView,
    /// How many unmaps were done when the harvest began.
    before: u64,
}

impl IovaView {
    /// Begins to harvest the logs of this view's devices. Begin before you read
    /// the first log.
    #[must_use = "a harvest that is not finished forgets nothing"]
    pub fn harvest(&self) -> Harvest<'_> {
        Harvest {
            before: self.read().unmaps,
            view: self,
        }
    }
}

impl Harvest<'_> {
    /// Marks the pages that a device's log has: bit `extent.bit + k` of `words` is
    /// the page at IOVA `extent.iova + k * extent.pgsize`. Any page size will do.
    ///
    /// # Errors
    ///
    /// If `extent` does not describe `words`, nothing is marked:
    ///
    /// - [`Error::Misaligned`](crate::Error::Misaligned) if its IOVA is not a
    ///   multiple of its page size.
    /// - [`Error::BitmapSize`](crate::Error::BitmapSize) if it has more bits than
    ///   `words`.
    /// - [`Error::Wraps`](crate::Error::Wraps) if it goes beyond the last address.
    ///
    /// After these the other pages are marked all the same; the first error is
    /// returned:
    ///
    /// - [`Error::NotTracking`](crate::Error::NotTracking) if the slot behind a
    ///   live mapping was removed.
    /// - [`TrackError::Unmapped`] if a dirty page was in no mapping.
    pub fn or(&self, words: &[u64], extent: Extent) -> Result<(), TrackError> {
        let ranges = extent.ranges(words)?;
        let maps = self.view.read();
        let inside = extent.pgsize.bytes() - 1;
        let mut result = Ok(());
        for (first, last) in ranges {
            // The pages of the log that each mapping has a byte of.
            let mut seen = Vec::new();
            for part in maps
                .overlapping(first, last)
                .filter_map(|m| m.cut(first, last))
            {
                result = result.and(part.mark(part.iova(), part.size()));
                seen.push((part.iova() & !inside, part.last() | inside));
            }
            for part in maps.gone(first, last).filter_map(|m| m.cut(first, last)) {
                part.mark_all();
                seen.push((part.iova() & !inside, part.last() | inside));
            }
            // A mapping that is not remembered was marked when it went, so the
            // page may have been in that one.
            if !maps.forgot_some() {
                result = result.and(check_covered(seen, first, last));
            }
        }
        result
    }

    /// Ends the harvest: you have read every log of the view's devices since it
    /// began. The view forgets the mappings that were gone by then.
    pub fn finish(self) {
        self.view.write().forget(self.before);
    }
}
