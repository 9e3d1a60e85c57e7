// SPDX-License-Identifier: MIT OR Apache-2.0
//! The boundary: what the core asks of its host.
//!
//! The core decides everything, and a host only does what it is told. A host is
//! passed to each call that needs one, as `&mut dyn Host`. The core keeps
//! nothing of it but the [`Memory`] handle that it was created with.

use core::alloc::Layout;
use core::ptr::NonNull;

use crate::error::Errno;

/// Where the core's memory comes from; it uses no global allocator.
///
/// # Safety
///
/// [`alloc_zeroed`](Memory::alloc_zeroed) must return memory that is zeroed,
/// valid for reads and writes of `layout.size()` bytes, aligned to
/// `layout.align()` and not used by anybody else until it is given to
/// [`free`](Memory::free) of this handle or of a clone of it.
#[allow(unsafe_code)] // the core's memory safety rests on it
pub unsafe trait Memory: Clone {
    /// Allocates zeroed memory; `None` if there is none. `layout.size()` is never
    /// 0.
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>>;

    /// Frees memory.
    ///
    /// # Safety
    ///
    /// `ptr` came from `alloc_zeroed(layout)` of this handle or of a clone of
    /// it, and nobody uses it any more.
    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout);
}

/// An address space that a mapping points into. The host decides what it stands
/// for: a process, or memory that the host owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mm(pub u64);

/// A group of devices, as the host numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupId(pub u64);

/// An IOMMU domain, as the host numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainId(pub u64);

/// An open device, as the host numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId(pub u64);

/// What a device may do with memory: the low two flag bits of MAP_DMA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prot(pub u32);

impl Prot {
    /// The device may read.
    pub const READ: Prot = Prot(1);
    /// The device may write.
    pub const WRITE: Prot = Prot(2);
    /// Both.
    pub const READ_WRITE: Prot = Prot(3);

    /// Whether every right in `other` is in `self`.
    #[must_use]
    pub const fn contains(self, other: Prot) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A copy stopped. The first `done` bytes were copied; no byte after them was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Bytes that were copied.
    pub done: usize,
}

/// What stands behind a pfn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)] // so that C can store one
pub enum PageKind {
    /// Ordinary memory, which counts as locked while it is pinned.
    Normal,
    /// A reserved page, which never counts as locked.
    Reserved,
    /// Device memory without a `struct page`, which never counts as locked.
    /// `pin_pages` refuses it.
    NoPage,
}

/// Pages of one kind that follow each other in user memory and have consecutive
/// pfns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)] // so that C can store one
pub struct Run {
    /// The pfn of the first page.
    pub pfn: u64,
    /// The number of pages.
    pub npages: u64,
    /// What stands behind each of the pfns.
    pub kind: PageKind,
}

impl Run {
    /// No pages: what an array of runs is filled with before a host stores some.
    pub const EMPTY: Run = Run {
        pfn: 0,
        npages: 0,
        kind: PageKind::Normal,
    };
}

/// Pinning of pages.
pub trait Pinning {
    /// Pins pages of `mm`, from the page that holds `vaddr` on, for writing too if
    /// `prot` has [`Prot::WRITE`]. Stores them in `runs`, in the order of their
    /// addresses, and returns how many runs it stored: at least one, and none of
    /// them empty. Together they have at most `npages` pages.
    ///
    /// The host chooses how many pages it pins at a time, and asks for no more
    /// locks and look-ups than a run needs. A run may continue the one before it.
    ///
    /// # Errors
    ///
    /// Why the first page could not be pinned: EFAULT for a bad address, ENOMEM,
    /// ENODEV if `mm` is gone.
    fn pin(
        &mut self,
        mm: Mm,
        vaddr: u64,
        npages: u64,
        prot: Prot,
        runs: &mut [Run],
    ) -> Result<usize, Errno>;

    /// Drops one pin of each of `npages` pages from `pfn` on. Returns how many of
    /// them are [`PageKind::Normal`]. Cannot fail.
    fn unpin(&mut self, pfn: u64, npages: u64, prot: Prot) -> u64;

    /// What stands behind `pfn`.
    fn page_kind(&self, pfn: u64) -> PageKind;
}

/// Whether the caller of the core may access an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It may: the address space is its own, or it is a kernel thread that can
    /// adopt it.
    Own,
    /// It may not: the address space belongs to another process.
    Other,
    /// The address space has ended.
    Gone,
}

/// Address spaces and the locked memory that they pay for.
pub trait Accounting {
    /// Takes a reference to the address space of the caller, into which a mapping
    /// made now points.
    ///
    /// # Errors
    ///
    /// The host's errno if the caller has none.
    fn grab(&mut self) -> Result<Mm, Errno>;

    /// Drops a reference that [`grab`](Accounting::grab) took.
    fn release(&mut self, mm: Mm);

    /// Whether the caller may access `mm` now.
    fn reach(&self, mm: Mm) -> Reach;

    /// Whether the caller may lock memory beyond its limit (`CAP_IPC_LOCK`).
    fn lock_cap(&self) -> bool;

    /// Counts `npages` more locked pages of `mm`.
    ///
    /// # Errors
    ///
    /// ENOMEM beyond `RLIMIT_MEMLOCK` unless `lock_cap` is set; EINTR; ESRCH if
    /// `mm` is gone.
    fn charge(&mut self, mm: Mm, npages: u64, lock_cap: bool) -> Result<(), Errno>;

    /// Counts `npages` fewer locked pages of `mm`.
    fn uncharge(&mut self, mm: Mm, npages: u64);
}

/// Copies from and to user memory.
///
/// The core makes these copies under the container's lock, so they should not
/// wait. A host whose copies could wait for a page, as for one that a userfaultfd
/// handler brings, makes copies that fault where a page is missing. A call that
/// faulted fails with `BadAddress`, and the host remembers which page it was. It
/// releases the lock, waits for the page, and makes the call again:
///
/// - a [`Command`](crate::Command) from the start, since nothing has changed;
/// - a read or write of a device from the byte on that
///   [`Partial`](crate::Partial) tells.
///
/// If the page never comes, `BadAddress` is the answer.
pub trait UserMemory {
    /// Whether the `len` bytes at `addr` lie in the range of user addresses. They
    /// need not be mapped.
    fn is_user_range(&self, addr: u64, len: u64) -> bool;

    /// Copies `buf` to `addr` of the calling process.
    ///
    /// # Errors
    ///
    /// A [`Fault`] at a bad address, or where a page is missing.
    fn copy_to_user(&mut self, addr: u64, buf: &[u8]) -> Result<(), Fault>;

    /// Fills `buf` from `vaddr` of `mm`, for which [`reach`](Accounting::reach)
    /// was [`Reach::Own`].
    ///
    /// # Errors
    ///
    /// A [`Fault`] at a bad address, or where a page is missing.
    fn read_mm(&mut self, mm: Mm, vaddr: u64, buf: &mut [u8]) -> Result<(), Fault>;

    /// Copies `buf` to `vaddr` of `mm`, for which [`reach`](Accounting::reach)
    /// was [`Reach::Own`].
    ///
    /// # Errors
    ///
    /// A [`Fault`] at a bad address, or where a page is missing.
    fn write_mm(&mut self, mm: Mm, vaddr: u64, buf: &[u8]) -> Result<(), Fault>;
}

/// What an IOMMU domain can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// The page sizes that it supports: bit k stands for 2^k bytes.
    pub pgsize_bitmap: u64,
    /// The first and the last address that it translates.
    pub aperture: (u64, u64),
    /// Whether DMA is cache-coherent, whatever the device asks for.
    pub coherent: bool,
    /// Whether the group's interrupts are isolated from those of other groups, or
    /// may be treated as if they were.
    pub isolated_msi: bool,
    /// Groups whose domains have the same kind may share a domain.
    pub kind: u64,
    /// Whether the domain can tell which pages devices have written.
    pub dirty_tracking: bool,
}

/// The IOMMU behind groups that have one. Nothing here is called for emulated
/// groups.
pub trait Iommu {
    /// Creates a domain and attaches `group` to it.
    ///
    /// # Errors
    ///
    /// The driver's errno.
    fn attach(&mut self, group: GroupId) -> Result<(DomainId, DomainInfo), Errno>;

    /// Moves `group` from its domain `old` to `domain`, and frees `old`. Returns
    /// false, and changes nothing, if the group cannot share that domain.
    fn join(&mut self, group: GroupId, old: DomainId, domain: DomainId) -> bool;

    /// Detaches `group` from `domain`. If `last` is set, no group is left in the
    /// domain, and the domain goes too.
    fn detach(&mut self, group: GroupId, domain: DomainId, last: bool);

    /// The first and the last address of reserved region `index` of `group`,
    /// where no mapping may lie; `None` after the last region.
    fn reserved(&self, group: GroupId, index: usize) -> Option<(u64, u64)>;

    /// Maps `npages` pages from `iova` on to the pages from `pfn` on. On an error
    /// none of them stays mapped.
    ///
    /// # Errors
    ///
    /// The driver's errno.
    fn map(
        &mut self,
        domain: DomainId,
        iova: u64,
        pfn: u64,
        npages: u64,
        prot: Prot,
    ) -> Result<(), Errno>;

    /// Unmaps `npages` pages from `iova` on, at least one: those of one or more calls of
    /// [`map`](Iommu::map). When it returns, no device reaches them any more. Cannot
    /// fail.
    fn unmap(&mut self, domain: DomainId, iova: u64, npages: u64);

    /// Switches dirty tracking of `domain` on or off. The core ignores an error of
    /// switching it off. Only called for domains with
    /// [`DomainInfo::dirty_tracking`].
    ///
    /// # Errors
    ///
    /// The driver's errno.
    fn set_dirty_tracking(&mut self, _domain: DomainId, _on: bool) -> Result<(), Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    /// Calls `mark(first iova, pages)` for what devices have written of `npages`
    /// pages from `iova` on, and clears it in the IOMMU. Where one entry of the
    /// IOMMU stands for several pages, a write marks all of them; what is marked
    /// outside of the range is ignored. Only called while tracking is on.
    ///
    /// When this returns, each write whose page was marked is in memory, so the
    /// host ends with an IOTLB sync. Otherwise a page could be copied before a
    /// write that was under way when its bit was read, and the next report would
    /// not have it.
    ///
    /// It cannot fail: a host that cannot tell marks the whole range.
    ///
    /// An unmap that reports calls it immediately before [`unmap`](Iommu::unmap) and
    /// once more after it. An IOMMU that keeps dirty bits over the unmap then tells
    /// what devices wrote in between. One that does not marks nothing.
    fn read_and_clear_dirty(
        &mut self,
        _domain: DomainId,
        iova: u64,
        npages: u64,
        mark: &mut dyn FnMut(u64, u64),
    ) {
        mark(iova, npages);
    }

    /// The pfn that `iova` is mapped to, if it is mapped.
    fn translate(&self, domain: DomainId, iova: u64) -> Option<u64>;
}

/// Everything that the core asks for, in one object.
pub trait Host: Pinning + Accounting + UserMemory + Iommu {}

impl<T: Pinning + Accounting + UserMemory + Iommu> Host for T {}
