// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty-page tracking for a VMM: which pages of a guest may have been written
//! since the last time you asked?
//!
//! # Which one when
//!
//! | you have | use | it speaks |
//! |---|---|---|
//! | a guest to migrate, whose memory is written by CPUs, by the VMM and by devices | [`guest::Tracker`] | guest-physical addresses |
//! | an emulated, vfio-user or vDPA device that must answer VFIO's DMA logging or iommufd's dirty tracking | [`device_log::DeviceLog`] | IOVAs |
//! | devices that expect a VFIO type1 container: they pin, they read and write by IOVA, or their driver makes the ioctls | [`Container`] | IOVAs |
//! | a piece of memory that threads write while another looks for dirty pages | [`DirtyBits`] | bytes from its start |
//!
//! # How they go together
//!
//! The tracker is the place where everything meets: [`Tracker::take`] returns one
//! [`Report`] of all that was written. A writer in this process marks the tracker's
//! bits. A log that somebody else keeps becomes a source: KVM's, the kernel's page
//! tables', a `DeviceLog`'s, a `Container`'s. Each `take` asks the sources, and each
//! ORs its log into the report.
//!
//! A `DeviceLog` and a `Container` report IOVAs. An [`IovaView`] keeps the mappings of
//! the devices behind one IOMMU domain. A [`DirtyLog`] that is added with the view is
//! translated, also for mappings that are gone. A [`Domain`] keeps a view, a log and a
//! container in step: one map, one unmap and one mark reach all of them.
//!
//! Here a container and a tracker share the guest memory of vm-memory.
//!
//! ```
//! use adapter_user::guest::{Report, Tracker};
//! use adapter_user::{host_options, Container, DirtyBits, Domain, Group, GroupId, IommuType, Prot};
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
//!
//! let ram = [(GuestAddress(0), 64 << 20)];
//! let memory = GuestMemoryMmap::<DirtyBits>::from_ranges(&ram)?;
//! let tracker = Tracker::new(None);
//! tracker.add_memory(memory.iter())?; // every write through `memory` is tracked
//!
//! // A container for emulated devices maps the same memory. There is no virtual
//! // IOMMU here, so an IOVA is a guest-physical address.
//! let container = Container::new(host_options());
//! container.add_group(Group::emulated(GroupId(1)))?;
//! container.set_iommu(IommuType::Type1v2)?;
//! let domain = Domain::new(tracker.iova_view());
//! // SAFETY: the slots are guest memory, which lives longer than the container.
//! let domain = unsafe { domain.with_container(container.clone()) };
//! for slot in tracker.slots() {
//!     domain.map(slot.gpa, slot.gpa, slot.size, Prot::READ_WRITE)?;
//! }
//! let device = container.open_device(GroupId(1), None)?;
//!
//! // The device's writes do not go through vm-memory, so the container is a log.
//! tracker.add_log("container", domain.view(), 0, container.clone())?;
//!
//! container.start()?;
//! tracker.start()?; // now copy all memory
//! memory.write_obj(1u8, GuestAddress(0x1000))?; // the VMM writes
//! device.write(0x5fff, &[1, 2])?; // the device writes pages 5 and 6
//!
//! let mut report = Report::new();
//! tracker.take(&mut report)?; // now copy the pages of the report
//! assert_eq!(report.slot(0).unwrap()[0], 1 << 1 | 1 << 5 | 1 << 6);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Page sizes
//!
//! The tracker and device logs have one bit for each 4 KiB on every host, and report pages
//! of any size. What the kernel counts in pages of the host, as KVM's logs, is taken by
//! the host's page size. A `Container` has pages of the host's size, or larger ones if its
//! [`Options`] say so: [`host_options`] has the host's.
//!
//! # Threads
//!
//! Every handle ([`Tracker`], [`IovaView`], [`Mapping`], [`Domain`], `DirtyBits`,
//! `DeviceLog`, [`LogRange`], `Container`, [`Device`], [`PinGuard`]) may be used by any
//! number of threads at once. Marks through `DirtyBits`, `Mapping` and `LogRange` take no lock. A [`Report`]
//! belongs to one thread.
//!
//! No write is lost if everybody keeps this order:
//!
//! 1. A writer writes, then marks, then says that the write is done.
//! 2. Whoever migrates takes the report, then copies the pages.
//! 3. All memory is copied once after `start`.
//!
//! # Errors
//!
//! [`Error`] and [`TrackError`] name the cause, and their `errno` is what Linux
//! answers. If a report fails, every page that it was to cover counts as dirty. A
//! failed call changes nothing, unless its documentation says so.
//!
//! # Features
//!
//! - `container`, which is on by default: `Container` and its devices. A VMM that only
//!   needs the tracker and device logs switches it off, and links neither nix nor caps.
//! - `bitvec`: `Report::slot_bits` gives a slot's pages as a `BitSlice`.
//! - `vfio-user`: devices in another process, and their clients, by the vfio-user protocol.
//! - `vm-memory`: `DirtyBits` is a bitmap for the guest memory of vm-memory 0.17 and
//!   0.18, and `Tracker::add_memory` takes all of a guest's memory at once. Without the feature,
//!   [`Tracker::add_slot`] returns the bits to mark.
//! - `tracing`: a span of the crate tracing for each take and each source, and an event
//!   for what is told as dirty as a whole, with the cause. A subscriber must not call the
//!   tracker, whose locks may be held. [`Tracker::stats`] counts the same without it.
//!
//! [`Tracker`]: guest::Tracker
//! [`Tracker::take`]: guest::Tracker::take
//! [`Tracker::stats`]: guest::Tracker::stats
//! [`Tracker::add_slot`]: guest::Tracker::add_slot
//! [`Report`]: guest::Report
//! [`IovaView`]: guest::IovaView
//! [`Mapping`]: guest::Mapping
//! [`DirtyLog`]: guest::DirtyLog
//! [`LogRange`]: device_log::LogRange

#![cfg_attr(docsrs, feature(doc_cfg))]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("adapter-user makes system calls of Linux and keeps addresses of 64 bits: build it for 64-bit Linux");

/// The atomics of `dirty_bits`, which the loom tests replace.
mod atomic {
    pub(crate) use crate::barrier::{available, heavy, light};
    pub(crate) use std::sync::atomic::{fence, AtomicU64, Ordering};
}
mod barrier;
#[cfg(feature = "container")]
mod container;
#[cfg(feature = "container")]
mod descriptor;
pub mod device_log;
mod dirty_bits;
mod dirty_rate;
mod domain;
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub mod emulated;
mod error;
pub mod guest;
mod host_page;
mod process_memory;
mod ranges;
mod trace;
#[cfg(feature = "vfio-user")]
#[cfg_attr(docsrs, doc(cfg(feature = "vfio-user")))]
pub mod vfio_user;

#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use container::charge::charged_pages;
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use container::device::{Device, OnUnmap};
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use container::group::Group;
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use container::guard::PinGuard;
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use container::iommu::IommuSpec;
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use container::memory::{GuestMemory, OutOfBounds};
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use container::pinned::OnMark;
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use container::stats::ContainerStats;
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use container::{Container, WeakContainer};
pub use dirty_bits::DirtyBits;
pub use dirty_core::host::{GroupId, Prot};
pub use dirty_core::{
    normalise, pages, runs, uapi, Errno, Error, Extent, IommuType, Options, PageSize,
};
pub use dirty_rate::{DirtyRate, Estimate};
pub use domain::Domain;
pub use error::TrackError;
#[cfg(feature = "vm-memory")]
#[cfg_attr(docsrs, doc(cfg(feature = "vm-memory")))]
pub use guest::vm_memory::BitsSlice;
#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
pub use host_page::host_options;
