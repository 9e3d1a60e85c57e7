// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reports as slices of bits, for callers who use bitvec.

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;

use super::report::Report;

#[cfg_attr(docsrs, doc(cfg(feature = "bitvec")))]
impl Report {
    /// Returns the bitmap of slot `id` as bits, or `None` if the report has no such
    /// slot. Bit k is page k of the slot, in pages of
    /// [`DirtyBits::pgsize`](crate::DirtyBits::pgsize), and there are exactly as many
    /// bits as the slot has pages. Nothing is copied: these are the words of
    /// [`Report::slot`].
    ///
    /// ```
    /// use adapter_user::guest::{Report, Tracker};
    ///
    /// let tracker = Tracker::new(None);
    /// let bits = tracker.add_slot(0, 0, None, 10 << 12)?;
    /// tracker.start()?;
    /// bits.mark(0x3000, 0x2000)?;
    /// let mut report = Report::new();
    /// tracker.take(&mut report)?;
    /// let dirty = report.slot_bits(0).unwrap();
    /// assert_eq!(dirty.len(), 10);
    /// assert!(dirty.iter_ones().eq([3, 4]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn slot_bits(&self, id: u32) -> Option<&BitSlice<u64, Lsb0>> {
        let pages = self.pages_of(id)?;
        let npages = usize::try_from(pages.extent().npages).ok()?;
        BitSlice::from_slice(&pages.words).get(..npages)
    }
}
