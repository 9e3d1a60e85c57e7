// SPDX-License-Identifier: MIT OR Apache-2.0
//! The dirty-page tracking of a VFIO type1 container: which pages of a guest
//! may a device have written since somebody asked last?
//!
//! The answers are those of Linux's `vfio_iommu_type1`, to the errno and the
//! bit, but for thirteen differences on purpose (D1 to D13). The rules that
//! comments cite (A2 to A10, D1 to D13, M1 to M9) are in `docs/rules.md` of the
//! repository. The crate is `no_std`, allocates only through its [`host`], holds
//! no lock and cannot panic.
//!
//! # Layers
//!
//! Data flows one way: bytes, typed command, container, mapping, bitmap, copy.
//!
//! - [`Container`] is VFIO's generic layer: groups, open devices, and which
//!   backend. It answers GET_API_VERSION and SET_IOMMU, and hands out its
//!   backend.
//! - [`Command`] is an ioctl whose argument was read, which needs no lock.
//! - [`Type1`] is the backend. It runs commands ([`Type1::run`]), maps and unmaps
//!   ([`Map`], [`Unmap`]), pins and unpins, and reports what is dirty
//!   ([`Type1::get_bitmap`]).
//! - Each mapping has its pinned pages and, while tracking is on, a [`Bitmap`].
//!   Threads mark pages beside each other through `&self`; reports take `&mut
//!   self`.
//! - [`normalise`] takes bits from one page size to another; [`pages`] and
//!   [`runs`] walk over the bits of a report.
//! - [`migration`] is the other half of a device's migration: its own state. It
//!   needs no container.
//! - [`host`] has the traits by which the core asks for memory, pins, copies to
//!   users, IOMMU mappings and accounting. A host is passed to each call that
//!   needs it.
//!
//! # Example
//!
//! The smallest host, a mapping, a mark and a report:
//!
//! ```
//! use core::{alloc::Layout, ptr::NonNull};
//! use dirty_core::{host::*, uapi, Container, Dest, Errno, Map, Options, PageSize};
//!
//! #[derive(Clone)]
//! struct Heap;
//! // SAFETY: std's allocator keeps the contract of `Memory`.
//! unsafe impl Memory for Heap {
//!     fn alloc_zeroed(&self, l: Layout) -> Option<NonNull<u8>> { NonNull::new(unsafe { std::alloc::alloc_zeroed(l) }) }
//!     unsafe fn free(&self, ptr: NonNull<u8>, l: Layout) { unsafe { std::alloc::dealloc(ptr.as_ptr(), l) } }
//! }
//! struct Vmm; // one process, no IOMMU, no limit of locked memory
//! impl Pinning for Vmm {
//!     fn pin(&mut self, _: Mm, vaddr: u64, npages: u64, _: Prot, runs: &mut [Run]) -> Result<usize, Errno> {
//!         runs[0] = Run { pfn: vaddr >> 12, npages, kind: PageKind::Normal };
//!         Ok(1)
//!     }
//!     fn unpin(&mut self, _pfn: u64, npages: u64, _: Prot) -> u64 { npages }
//!     fn page_kind(&self, _pfn: u64) -> PageKind { PageKind::Normal }
//! }
//! impl Accounting for Vmm {
//!     fn grab(&mut self) -> Result<Mm, Errno> { Ok(Mm(0)) }
//!     fn release(&mut self, _: Mm) {}
//!     fn reach(&self, _: Mm) -> Reach { Reach::Own }
//!     fn lock_cap(&self) -> bool { true }
//!     fn charge(&mut self, _: Mm, _npages: u64, _: bool) -> Result<(), Errno> { Ok(()) }
//!     fn uncharge(&mut self, _: Mm, _npages: u64) {}
//! }
//! impl UserMemory for Vmm { // for ioctls and dma_rw, which are not used here
//!     fn is_user_range(&self, _: u64, _: u64) -> bool { false }
//!     fn copy_to_user(&mut self, _: u64, _: &[u8]) -> Result<(), Fault> { Err(Fault { done: 0 }) }
//!     fn read_mm(&mut self, _: Mm, _: u64, _: &mut [u8]) -> Result<(), Fault> { Err(Fault { done: 0 }) }
//!     fn write_mm(&mut self, _: Mm, _: u64, _: &[u8]) -> Result<(), Fault> { Err(Fault { done: 0 }) }
//! }
//! impl Iommu for Vmm { // emulated groups have none
//!     fn attach(&mut self, _: GroupId) -> Result<(DomainId, DomainInfo), Errno> { Err(Errno::ENODEV) }
//!     fn join(&mut self, _: GroupId, _: DomainId, _: DomainId) -> bool { false }
//!     fn detach(&mut self, _: GroupId, _: DomainId, _: bool) {}
//!     fn reserved(&self, _: GroupId, _: usize) -> Option<(u64, u64)> { None }
//!     fn map(&mut self, _: DomainId, _: u64, _: u64, _: u64, _: Prot) -> Result<(), Errno> { Err(Errno::ENODEV) }
//!     fn unmap(&mut self, _: DomainId, _: u64, _: u64) {}
//!     fn translate(&self, _: DomainId, _: u64) -> Option<u64> { None }
//! }
//! let (mut vmm, mut container) = (Vmm, Container::new(Heap, Options::default()));
//! container.attach_group(&mut vmm, GroupId(1), true)?;
//! container.set_iommu(&mut vmm, uapi::VFIO_TYPE1v2_IOMMU)?;
//! let type1 = container.backend_mut()?;
//! let (iova, vaddr, size, prot) = (0x10_0000, 0x7000_0000, 64 << 12, Some(Prot::READ_WRITE));
//! type1.map(&mut vmm, &Map { iova, vaddr, size, prot })?;
//! type1.start(&mut vmm)?;
//! type1.mark(iova + 0x3ffe, 4)?; // 4 bytes were written, over the end of page 3
//! let mut words = [0; 1];
//! let pgsize = PageSize::new(4096).unwrap();
//! type1.get_bitmap(&mut vmm, iova, size, pgsize, Dest::Words(&mut words))?;
//! assert_eq!(words, [1 << 3 | 1 << 4]);
//! container.close(&mut vmm);
//! # Ok::<(), dirty_core::Error>(())
//! ```
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
pub mod migration;
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
pub use type1::access::Partial;
pub use type1::command::Command;
pub use type1::ioctl::Outcome;
pub use type1::map::Map;
pub use type1::report::Dest;
pub use type1::unmap::{Progress, Target, Unmap};
pub use type1::{IommuType, Options, Type1};
