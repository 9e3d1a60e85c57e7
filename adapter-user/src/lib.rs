// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty-page tracking for a VMM: a VFIO type1 container in this process.
//!
//! A [`Container`] maps guest memory for devices, which pin, read and write it;
//! between [`start`](Container::start) and [`stop`](Container::stop) it knows
//! which pages they may have written. All rules are those of `dirty-core`; this
//! crate brings the memory: [`GuestMemory`] that mappings keep alive, or any
//! memory of the process, pages that are really resident and locked while they
//! are pinned, and a simulated IOMMU. The README has an example.

mod atomic {
    pub(crate) use std::sync::atomic::{fence, AtomicBool, AtomicU64, Ordering};
}
mod container;
pub mod device_log;
mod dirty_bits;
mod error;
pub mod guest;
mod process_memory;
mod ranges;

pub use container::device::Device;
pub use container::heap::Heap;
pub use container::iommu::IommuSpec;
pub use container::locked::charged_pages;
pub use container::memory::{GuestMemory, OutOfBounds};
pub use container::{Container, Group, IommuType, OnUnmap, WeakContainer};
pub use dirty_bits::DirtyBits;
pub use dirty_core::host::{GroupId, Prot};
pub use dirty_core::{normalise, pages, runs, uapi, Errno, Error, Extent, Options, PageSize};
pub use error::TrackError;
#[cfg(feature = "vm-memory")]
pub use guest::vm_memory::BitsSlice;

#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
