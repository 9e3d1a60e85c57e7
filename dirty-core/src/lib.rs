// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty-page tracking of a VFIO type1 container.
//!
//! Which pages of a guest may a device have written since I last asked? This
//! crate answers as Linux's `vfio_iommu_type1` does, to the errno and the bit,
//! but for the differences D1 to D11 that the README lists. It is `no_std`,
//! needs no allocator and holds no lock: memory, pinning, user copies, IOMMUs
//! and accounting are asked of a [`Host`](host::Host), which a kernel module
//! or a VMM brings.
//!
//! Data flows one way: bytes ([`Container::ioctl`]), typed command ([`Map`], [`Unmap`],
//! ...), [`Container`], mapping, [`Bitmap`], report.
//!
//! Rules are cited as in the project's specification: A2 to A10 for what Linux
//! does, D1 to D11 for what is different on purpose.
#![no_std]
#![deny(unsafe_code)]
#![deny(
    clippy::arithmetic_side_effects,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::string_slice,
    clippy::todo,
    clippy::unimplemented,
    clippy::unreachable,
    clippy::unwrap_used
)]

mod bitmap;
mod bits;
mod container;
mod error;
pub mod host;
mod mem;
mod pgsize;
mod pins;
mod rescale;
mod span;
mod type1;
pub mod uapi;

#[cfg(test)]
extern crate self as dirty_core;
#[cfg(test)]
extern crate std;
#[cfg(test)]
mod unit_tests;

pub use bitmap::Bitmap;
pub use bits::runs::{pages, runs};
pub use container::Container;
pub use error::{Errno, Error};
pub use pgsize::PageSize;
pub use rescale::{normalise, Extent};
pub use type1::ioctl::{Outcome, Pending};
pub use type1::map::Map;
pub use type1::report::Dest;
pub use type1::unmap::{Progress, Target, Unmap};
pub use type1::{Options, Type1};
