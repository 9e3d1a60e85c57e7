// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an operator sees of a container.

use dirty_core::{Error, PageSize};

use super::Container;

/// What a [`Container`] has. [`Container::stats`] returns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ContainerStats {
    /// The page size of the dirty bitmaps in bytes, or `None` while tracking is off.
    pub pgsize: Option<u64>,
    /// How many mappings there are.
    pub mappings: u64,
    /// The bytes of memory that they have together.
    pub mapped_bytes: u64,
    /// At how many IOVAs devices have pinned a page. Each of these pages is dirty in
    /// every report, because a device may write it at any time.
    pub pinned_pages: u64,
    /// The bytes that the dirty bitmaps take.
    pub bitmap_bytes: u64,
    /// The most bytes that they may take, as [`Options::bitmap_budget`] has it.
    ///
    /// [`Options::bitmap_budget`]: crate::Options::bitmap_budget
    pub budget: Option<u64>,
    /// How many groups make all memory dirty in every report, because they are behind an
    /// IOMMU that does not track, and have not pinned what they write (rule A8 in
    /// docs/rules.md).
    pub wholly_dirty_groups: u32,
}

impl Container {
    /// Returns what the container has. It walks over the mappings, and shares the
    /// container's lock with marks.
    ///
    /// # Errors
    ///
    /// [`Error::NoIommu`].
    pub fn stats(&self) -> Result<ContainerStats, Error> {
        self.shared.read(|core| {
            let type1 = core.backend()?;
            let mut stats = ContainerStats {
                pgsize: type1.tracking().map(PageSize::bytes),
                pinned_pages: type1.pinned_pages(),
                bitmap_bytes: type1.bitmap_bytes(),
                budget: self.shared.bitmap_budget,
                wholly_dirty_groups: type1.wholly_dirty_groups(),
                ..ContainerStats::default()
            };
            for (_, size) in type1.mappings(0, u64::MAX) {
                stats.mappings += 1;
                stats.mapped_bytes = stats.mapped_bytes.saturating_add(size);
            }
            Ok(stats)
        })
    }
}
