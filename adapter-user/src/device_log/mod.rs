// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's own log of what it wrote, by IOVA: what VFIO calls DMA logging,
//! and iommufd dirty tracking of a page table.
//!
//! An emulated, vfio-user or vDPA device marks, and whoever migrates it asks as
//! it would ask the kernel: by typed calls, or by [`DeviceLog::ioctl`].

mod ioctl;
mod log;
mod range;
mod report;
pub mod uapi;

pub use self::log::DeviceLog;
pub use self::range::LogRange;
