// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a log may take, and what it answers for IOVAs that are not mapped.

/// The options of a [`DeviceLog`](super::DeviceLog). The default has no budget,
/// 16 MiB for removed ranges, and [`Holes::Refused`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// How many bytes the bitmaps of mapped ranges may take in all. `None` is no
    /// limit.
    pub budget: Option<u64>,
    /// About how many bytes the log may keep for removed ranges that were not
    /// reported yet.
    ///
    /// Beyond it the log becomes coarser and not larger: pages between the dirty
    /// pages of removed ranges count as dirty too, wherever they are reported. A
    /// dirty page is never forgotten.
    pub removed: u64,
    /// The answer to a report that asks for IOVAs that are not mapped.
    pub holes: Holes,
}

/// What a report answers for an IOVA that the log was started for, but that is in no
/// range and in no removed range that is still to be reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Holes {
    /// The report fails with [`TrackError::Unmapped`](crate::TrackError::Unmapped).
    /// A vfio-user server answers ENOENT then.
    #[default]
    Refused,
    /// The page is clean, because the device could not reach it. Linux's drivers
    /// answer this for all that START named.
    Clean,
}

impl Default for LogOptions {
    fn default() -> Self {
        LogOptions {
            budget: None,
            removed: 16 << 20,
            holes: Holes::default(),
        }
    }
}
