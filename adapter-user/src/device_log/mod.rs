// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's own log of what it wrote, by IOVA.
//!
//! VFIO calls this DMA logging, and iommufd calls it dirty tracking of a page table.
//! An emulated, vfio-user or vDPA device marks what it writes. Whoever migrates the
//! device asks as it would ask the kernel: by typed calls, or by
//! [`DeviceLog::ioctl`] with the structures in [`uapi`].
//!
//! To put the log of such a device into a [`Tracker`](crate::guest::Tracker), read
//! it into a [`Harvest`](crate::guest::Harvest) of the device's
//! [`IovaView`](crate::guest::IovaView).

mod ask;
mod ioctl;
mod log;
mod range;
mod report;
pub mod uapi;

pub use self::log::DeviceLog;
pub use self::range::LogRange;
