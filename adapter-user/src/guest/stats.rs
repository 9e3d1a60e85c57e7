// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an operator sees of a tracker.

use super::taken::TakeStats;
use super::tracker::Tracker;
use super::view::{IovaView, WeakView};
use super::whole::WhollyDirty;

/// What a tracker has, and what its last take found.
/// [`Tracker::stats`](super::Tracker::stats) returns it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TrackerStats {
    /// Whether the tracker is on.
    pub on: bool,
    /// How many takes there were since the tracker was created.
    pub takes: u64,
    /// The last take. It is all zero and empty before the first.
    pub last_take: TakeStats,
    /// The bytes that the slots' bitmaps take.
    pub bitmap_bytes: u64,
    /// The most bytes that they may take, as [`Tracker::new`](super::Tracker::new) got
    /// it.
    pub budget: Option<u64>,
    /// How many slots there are.
    pub slots: usize,
    /// How many slots moved or went since the logs were read, and are remembered.
    pub remembered_slots: usize,
    /// How many views there are.
    pub views: usize,
    /// How many mappings all views have.
    pub mappings: usize,
    /// How many mappings that are gone all views remember, because a log may still
    /// report what was written through them.
    pub remembered_mappings: usize,
    /// What was told as dirty as a whole since the tracker was created.
    pub wholly_dirty: WhollyDirty,
}

impl Tracker {
    /// Returns what the tracker has, and what the last take found. It does not wait for
    /// a take that is going on.
    ///
    /// ```
    /// use adapter_user::guest::{Report, Tracker};
    ///
    /// let tracker = Tracker::new(None);
    /// let ram = tracker.add_slot(0, 0, None, 1 << 30)?;
    /// tracker.add_source("kvm", |report| Ok(report.or_ring([(0, 7), (0, 8)])?));
    /// tracker.start()?;
    /// ram.mark(0x1000, 1)?;
    /// tracker.take(&mut Report::new())?;
    ///
    /// let stats = tracker.stats();
    /// assert_eq!(stats.last_take.sources[0].bytes, 8192);
    /// assert_eq!(stats.last_take.slots[0].marked, 4096);
    /// assert_eq!(stats.bitmap_bytes, 32 << 10);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn stats(&self) -> TrackerStats {
        let mut stats = TrackerStats::default();
        {
            let last = self.inner.last();
            stats.takes = last.takes;
            stats.last_take = last.stats();
        }
        let views = self
            .inner
            .views()
            .iter()
            .filter_map(WeakView::upgrade)
            .collect::<Vec<_>>();
        stats.views = views.len();
        for (live, gone) in views.iter().map(IovaView::counts) {
            stats.mappings += live;
            stats.remembered_mappings += gone;
        }
        let slots = &self.inner.slots;
        stats.budget = slots.budget;
        stats.wholly_dirty = slots.wholes.sum();
        let state = slots.read();
        stats.on = state.on;
        stats.slots = state.list.len();
        stats.bitmap_bytes = state.used();
        stats.remembered_slots = state.departed();
        stats
    }
}
