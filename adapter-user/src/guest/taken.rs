// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a take found: numbers that it counts, and a mark never does.

use std::sync::Arc;
use std::time::Duration;

/// What one take found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TakeStats {
    /// How long the take was, sources included.
    pub time: Duration,
    /// The sources, in the order in which they were asked.
    pub sources: Vec<SourceStats>,
    /// The slots, sorted by address.
    pub slots: Vec<SlotStats>,
}

/// What one source told in a take.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SourceStats {
    /// The source's name.
    pub name: String,
    /// How long it was asked. For a log by IOVA that includes the translation.
    pub time: Duration,
    /// The bytes that it told, in whole pages of its own page size. What it told twice
    /// counts twice, and what two sources told counts for both. A source that failed
    /// has what it told before it failed.
    pub bytes: u64,
    /// Whether it failed.
    pub failed: bool,
}

/// What one take found in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SlotStats {
    /// The slot's number.
    pub id: u32,
    /// The bytes that were marked since the take before, in whole pages: by the VMM, by
    /// devices through mappings, and by logs by IOVA, whose dirty pages are marks too.
    /// Each page counts once.
    pub marked: u64,
    /// The bytes that sources by guest address told, as in [`SourceStats::bytes`].
    pub told: u64,
}

/// The last take, as the tracker keeps it. Its lists are used again in each take.
#[derive(Default)]
pub(super) struct LastTake {
    pub(super) takes: u64,
    pub(super) time: Duration,
    pub(super) sources: Vec<Asked>,
    pub(super) slots: Vec<SlotStats>,
}

/// A source that was asked.
#[derive(Clone)]
pub(super) struct Asked {
    pub(super) name: Arc<str>,
    pub(super) time: Duration,
    pub(super) bytes: u64,
    pub(super) failed: bool,
}

impl LastTake {
    pub(super) fn stats(&self) -> TakeStats {
        let sources = self.sources.iter().map(|asked| SourceStats {
            name: asked.name.to_string(),
            time: asked.time,
            bytes: asked.bytes,
            failed: asked.failed,
        });
        TakeStats {
            time: self.time,
            sources: sources.collect(),
            slots: self.slots.clone(),
        }
    }
}
