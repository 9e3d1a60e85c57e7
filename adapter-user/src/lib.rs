// SPDX-License-Identifier: MIT OR Apache-2.0
//! x

mod container;
mod device;
mod heap;
mod host;
mod iommu;
mod locked;
mod memory;

pub use container::{Container, Group, IommuType, OnUnmap};
pub use device::Device;
pub use dirty_core::host::{GroupId, Prot};
pub use dirty_core::{normalise, uapi, Errno, Error, Extent, Options, PageSize};
pub use heap::Heap;
pub use iommu::IommuSpec;
pub use locked::charged_pages;
pub use memory::{GuestMemory, OutOfBounds};
