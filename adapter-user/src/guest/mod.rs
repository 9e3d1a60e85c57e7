// SPDX-License-Identifier: MIT OR Apache-2.0
//! One tracker for everything that writes a guest's memory, by guest address.
//!
//! Data flows one way:
//!
//! - Whoever writes guest memory marks the [`DirtyBits`](crate::DirtyBits) of a
//!   [`Slot`], without a lock. The VMM marks through vm-memory, and a device marks
//!   through the [`Mapping`] of its [`IovaView`].
//! - [`Tracker::take`] calls every source that has a log of its own: KVM, the
//!   kernel's page tables, a device whose log has IOVAs (through a [`Harvest`]).
//!   Then it takes the marks.
//! - All of it ends in a [`Report`], which gives ranges, and a bitmap per slot, at
//!   any page size.

mod harvest;
mod mapping;
mod report;
mod slots;
mod tracker;
mod view;
#[cfg(feature = "vm-memory")]
pub(crate) mod vm_memory;
mod words;

pub use self::harvest::Harvest;
pub use self::mapping::Mapping;
pub use self::report::{Range, Report};
pub use self::slots::Slot;
pub use self::tracker::{SourceError, TakeError, Tracker};
pub use self::view::IovaView;
