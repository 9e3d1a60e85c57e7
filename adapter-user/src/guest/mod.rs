// SPDX-License-Identifier: MIT OR Apache-2.0
//! One tracker for everything that writes a guest's memory, by guest address.
//!
//! Data flows one way. Whoever writes marks [`DirtyBits`] of a memory [`Slot`],
//! without a lock: the VMM through vm-memory, a device through the [`Mapping`]
//! of its [`IovaView`]. [`Tracker::take`] asks every source that keeps a log of
//! its own (KVM, the kernel's page tables, VFIO devices), takes the marks, and
//! ORs all of it into a [`Report`], which gives ranges, and bitmaps per slot, at
//! the page size asked for.

mod report;
mod tracker;
mod view;
#[cfg(feature = "vm-memory")]
pub(crate) mod vm_memory;
mod words;

pub use self::report::{Range, Report};
pub(crate) use self::tracker::within;
pub use self::tracker::{Slot, SourceError, TakeError, Tracker};
pub(crate) use self::view::covered;
pub use self::view::{Harvest, IovaView, Mapping};
