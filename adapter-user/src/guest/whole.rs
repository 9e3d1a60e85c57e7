// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that is told as dirty as a whole, because nobody knows which of its pages
//! were written: how often, how much, and why.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};

use crate::trace;

/// How often some memory was told as dirty as a whole for one cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Whole {
    /// How often it happened.
    pub times: u64,
    /// The bytes of memory of all these times together. Memory that is mapped twice
    /// counts twice.
    pub bytes: u64,
}

/// What a tracker has told as dirty as a whole since it was created, by cause. All of
/// it but `new_memory` is more than what was written, and costs a larger round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct WhollyDirty {
    /// A take asked a tracker that is off: all memory.
    pub off: Whole,
    /// A source by guest address failed: all memory.
    pub source_failed: Whole,
    /// A log by IOVA failed: all memory behind its view.
    pub log_failed: Whole,
    /// A source panicked in the take before, so what the other sources had told is
    /// lost: all memory.
    pub source_panicked: Whole,
    /// A guest had stacked so many mappings at the same IOVAs that it would have taken
    /// too long to mark them one by one: all memory behind the view.
    pub stacked_mappings: Whole,
    /// A view remembered as many mappings as it can, and one more went: the memory
    /// behind that one.
    pub forgotten_mappings: Whole,
    /// The tracker remembered as many moved and removed slots as it can, and one more
    /// moved or went: that slot.
    pub forgotten_slots: Whole,
    /// A slot was added, or grew, while the tracker was on: the new memory, whose
    /// content was never copied.
    pub new_memory: Whole,
    /// A saved tracker could not be restored: all memory.
    pub restore_failed: Whole,
}

/// Why memory is told as dirty as a whole.
#[derive(Clone, Copy)]
pub(super) enum Why {
    Off,
    SourceFailed,
    LogFailed,
    SourcePanicked,
    StackedMappings,
    ForgottenMapping,
    ForgottenSlot,
    NewMemory,
    RestoreFailed,
}

/// Counts what is told as dirty as a whole.
#[derive(Default)]
pub(super) struct Wholes {
    /// Nothing else is locked while this is.
    sum: Mutex<WhollyDirty>,
}

impl Wholes {
    /// Counts `bytes` of memory. `what` is for whoever traces.
    pub(super) fn add(&self, why: Why, bytes: u64, what: &dyn Display) {
        let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
        let (whole, name) = match why {
            Why::Off => (&mut sum.off, "off"),
            Why::SourceFailed => (&mut sum.source_failed, "source_failed"),
            Why::LogFailed => (&mut sum.log_failed, "log_failed"),
            Why::SourcePanicked => (&mut sum.source_panicked, "source_panicked"),
            Why::StackedMappings => (&mut sum.stacked_mappings, "stacked_mappings"),
            Why::ForgottenMapping => (&mut sum.forgotten_mappings, "forgotten_mappings"),
            Why::ForgottenSlot => (&mut sum.forgotten_slots, "forgotten_slots"),
            Why::NewMemory => (&mut sum.new_memory, "new_memory"),
            Why::RestoreFailed => (&mut sum.restore_failed, "restore_failed"),
        };
        whole.times += 1;
        whole.bytes = whole.bytes.saturating_add(bytes);
        drop(sum);
        trace::wholly_dirty(name, bytes, what);
    }

    pub(super) fn sum(&self) -> WhollyDirty {
        *self.sum.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
