// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an operator sees of a device's log.

use dirty_core::PageSize;

use super::log::DeviceLog;

/// What a [`DeviceLog`] has. [`DeviceLog::stats`] returns it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceLogStats {
    /// The page size of the log in bytes, or `None` while it is off. The numbers below
    /// `ranges` are 0 then.
    pub pgsize: Option<u64>,
    /// How many ranges are mapped.
    pub ranges: usize,
    /// How many pieces of them are logged. A range that START named in two parts is two
    /// pieces.
    pub logged: usize,
    /// The bytes that the bitmaps of what is logged take.
    pub bitmap_bytes: u64,
    /// The most bytes that they may take, as the options have it.
    pub budget: Option<u64>,
    /// How many ranges of IOVAs were removed and are still to be reported. Ranges that
    /// touch are one.
    pub removed_ranges: usize,
    /// About how many bytes the log keeps for removed ranges.
    pub removed_bytes: u64,
    /// About how many bytes it may keep for them, as the options have it.
    pub removed_limit: u64,
    /// How often that limit was reached since the log was switched on. The log became
    /// coarser then: pages may count as dirty that are not.
    pub coarser: u64,
}

impl DeviceLog {
    /// Returns what the log has. It shares the log's lock with marks.
    #[must_use]
    pub fn stats(&self) -> DeviceLogStats {
        let state = self.read();
        let options = state.options();
        let mut stats = DeviceLogStats {
            ranges: state.ranges(),
            budget: options.budget,
            removed_limit: options.removed,
            ..DeviceLogStats::default()
        };
        if let Some(on) = &state.on {
            stats.pgsize = Some(PageSize::bytes(on.pgsize));
            stats.logged = on.pieces();
            stats.bitmap_bytes = on.bytes();
            stats.removed_ranges = on.removed.ranges();
            stats.removed_bytes = on.removed.bytes();
            stats.coarser = on.removed.coarser();
        }
        stats
    }
}
