// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's own log of what it wrote, by IOVA.
//!
//! VFIO calls this DMA logging, and iommufd calls it dirty tracking of a page table.
//! An emulated, vfio-user or vDPA device marks what it writes. Whoever migrates the
//! device asks as it would ask the kernel: by typed calls, or by
//! [`DeviceLog::ioctl`] with the structures in [`uapi`].
//!
//! A [`Tracker`](crate::guest::Tracker) reads the log in each take, and translates its
//! IOVAs through the view of the device's mappings:
//!
//! ```
//! use adapter_user::device_log::DeviceLog;
//! use adapter_user::guest::{Report, Tracker};
//!
//! let tracker = Tracker::new(None);
//! tracker.add_slot(0, 0, None, 16 << 20)?;
//! let iommu = tracker.iova_view();
//! iommu.map(0xf000_0000, 0x20_0000, 0x10_0000)?; // IOVA, guest address, bytes
//! let log = DeviceLog::new(None);
//! log.add_range(0xf000_0000, 0x10_0000)?;
//! log.start(&[(0, 1 << 40)], 4096)?;
//!
//! tracker.add_log("device", &iommu, 0, log.clone())?;
//! tracker.start()?;
//!
//! log.mark(0xf000_3000, 1)?; // the device has written
//! let mut report = Report::new();
//! tracker.take(&mut report)?;
//! assert_eq!(report.ranges(4096)?.next().unwrap().gpa, 0x20_3000);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// Each file uses only files below it.
mod ioctl; // a device's log by ioctls
mod stats; // what an operator sees
mod tracked; // a device's log as a log of the tracker

mod report; // reports, and what is cleared

mod log; // the log: what is mapped, whether it is on, marks

mod range; // the handles that threads mark through

mod state; // what the lock protects

mod removed; // what is left to report of removed ranges

mod ask; // what a report is asked for
mod options;
mod piece; // a range with its bits
mod spans; // sets of numbers
pub mod uapi;
mod words; // bits in words
mod zeroed; // words that take no memory before they are used

pub use self::log::DeviceLog;
pub use self::options::{Holes, LogOptions};
pub use self::range::LogRange;
pub use self::stats::DeviceLogStats;
