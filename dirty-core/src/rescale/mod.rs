// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bitmaps taken from one page size to another.

mod extent;
pub(crate) mod lanes;
#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
mod sse2;
mod words;

pub use extent::{normalise, Extent};
