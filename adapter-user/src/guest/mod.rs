// SPDX-License-Identifier: MIT OR Apache-2.0
//! One tracker for everything that writes a guest's memory, by guest address.
//!
//! Data flows one way:
//!
//! - Whoever writes guest memory marks the [`DirtyBits`](crate::DirtyBits) of a
//!   [`Slot`], without a lock. The VMM marks through vm-memory, and a device marks
//!   through the [`Mapping`] of its [`IovaView`].
//! - [`Tracker::take`] asks every source that has a log of its own. KVM and the
//!   kernel's page tables put guest addresses into the report. A [`DirtyLog`] has
//!   IOVAs, which become marks through the mappings of its view.
//! - Then it takes the marks. All of it ends in a [`Report`], which gives ranges,
//!   and a bitmap per slot, at any page size.

#[cfg(feature = "bitvec")]
mod bits;
mod handles;
mod harvest;
mod index;
mod log;
mod mapping;
mod maps;
mod pages;
mod ranges;
mod report;
mod saved;
mod slots;
mod sources;
mod stats;
mod taken;
mod tracker;
mod view;
#[cfg(feature = "vm-memory")]
pub(crate) mod vm_memory;
mod whole;
mod words;

pub use self::handles::{Source, SourceError, TakeError, WeakTracker};
pub use self::log::{DirtyIovas, DirtyLog, IovaRange};
pub use self::mapping::Mapping;
pub use self::pages::SlotInfo;
pub use self::ranges::Range;
pub use self::report::Report;
pub use self::saved::{RestoreError, Restored, RestoredSource};
pub use self::slots::Slot;
pub use self::stats::TrackerStats;
pub use self::taken::{SlotStats, SourceStats, TakeStats};
pub use self::tracker::Tracker;
pub use self::view::IovaView;
pub use self::whole::{Whole, WhollyDirty};
