// SPDX-License-Identifier: MIT OR Apache-2.0
//! The boundary: what the core asks of its host.
//!
//! The core decides everything; a host only does what it is told. A host is
//! passed to each call that needs one, as `&mut dyn Host`; the core keeps
//! nothing of it but the [`Memory`] handle it was created with.

use core::alloc::Layout;
use core::ptr::NonNull;

use crate::error::Errno;

/// Where the core's memory comes from. There is no global allocator.
///
/// # Safety
///
/// [`alloc_zeroed`](Memory::alloc_zeroed) must return memory that is zeroed,
/// valid for reads and writes of `layout.size()` bytes, aligned to
/// `layout.align()` and not used by anybody else until it is given to
/// [`free`](Memory::free) of this handle or of a clone of it.
#[allow(unsafe_code)] // the core's memory safety rests on it
pub unsafe trait Memory: Clone {
    /// Allocates zeroed memory, or `None`. `layout.size()` is never 0.
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>>;

    /// Gives memory back.
    ///
    /// # Safety
    ///
    /// `ptr` came from `alloc_zeroed(layout)` of this handle or of a clone of
    /// it, and nobody uses it any more.
    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout);
}

/// An address space that a mapping points into; what it stands for is the
/// host's business (a process, or memory that the host owns).
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

/// What a device may do with memory: the low two flag bits of `MAP_DMA`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prot(pub u32);

impl Prot {
    /// The device may read.
    pub const READ: Prot = Prot(1);
    /// The device may write.
    pub const WRITE: Prot = Prot(2);
    /// Both.
    pub const READ_WRITE: Prot = Prot(3);

    /// True if every right in `other` is in `self`.
    #[must_use]
    pub const fn contains(self, other: Prot) -> bool {
        self.0 & other.0 == other.0
    }
}

/// A copy stopped at a bad address. The first `done` bytes may have been
/// copied, no byte after them was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Bytes that may have been copied.
    pub done: usize,
}

/// What stands behind a pfn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// Ordinary memory: counts as locked while it is pinned.
    Normal,
    /// Reserved: never counts as locked.
    Reserved,
    /// No `struct page` (device memory): never counts, and a device may not
    /// pin it by `pin_pages`.
    NoPage,
}

/// Pinning of pages.
pub trait Pinning {
    /// Pins up to `pfns.len()` pages of `mm` from the page that holds `vaddr`
    /// on, for writing too if `prot` has [`Prot::WRITE`]. Stores their pfns
    /// and returns how many were pinned: at least one, or else why the first
    /// could not be.
    ///
    /// # Errors
    ///
    /// The errno of the first page: EFAULT for a bad address, ENOMEM, ENODEV
    /// if `mm` is gone.
    fn pin(&mut self, mm: Mm, vaddr: u64, prot: Prot, pfns: &mut [u64]) -> Result<usize, Errno>;

    /// Drops one pin of each of `npages` pages from `pfn` on. Cannot fail.
    fn unpin(&mut self, pfn: u64, npages: u64, prot: Prot);

    /// What stands behind `pfn`.
    fn page_kind(&self, pfn: u64) -> PageKind;
}

/// Whether the caller of the core may touch an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// It is the caller's own, or the caller is a kernel thread that adopts it.
    Own,
    /// It belongs to somebody else.
    Other,
    /// It has ended.
    Gone,
}

/// Address spaces and the locked memory that they pay for.
pub trait Accounting {
    /// Takes a reference to the address space that a mapping made now points
    /// into.
    ///
    /// # Errors
    ///
    /// The host's errno if there is none.
    fn grab(&mut self) -> Result<Mm, Errno>;

    /// Gives such a reference back.
    fn release(&mut self, mm: Mm);

    /// Whether the caller may touch `mm` now.
    fn reach(&self, mm: Mm) -> Reach;

    /// Whether the caller may lock memory beyond its limit (`CAP_IPC_LOCK`).
    fn lock_cap(&self) -> bool;

    /// Counts `npages` more locked pages of `mm`.
    ///
    /// # Errors
    ///
    /// ENOMEM beyond `RLIMIT_MEMLOCK` unless `lock_cap`; EINTR; ESRCH if `mm`
    /// is gone.
    fn charge(&mut self, mm: Mm, npages: u64, lock_cap: bool) -> Result<(), Errno>;

    /// Counts `npages` fewer locked pages of `mm`.
    fn uncharge(&mut self, mm: Mm, npages: u64);
}

/// Copies from and to the memory of users.
pub trait UserMemory {
    /// Whether `[addr, addr + len)` lies in the range of user addresses; says
    /// nothing of what is mapped there.
    fn is_user_range(&self, addr: u64, len: u64) -> bool;

    /// Copies `buf.len()` bytes from `addr` of the calling process.
    ///
    /// # Errors
    ///
    /// A [`Fault`] at a bad address.
    fn copy_from_user(&mut self, addr: u64, buf: &mut [u8]) -> Result<(), Fault>;

    /// Copies `buf` to `addr` of the calling process.
    ///
    /// # Errors
    ///
    /// A [`Fault`] at a bad address.
    fn copy_to_user(&mut self, addr: u64, buf: &[u8]) -> Result<(), Fault>;

    /// Copies from `vaddr` of `mm`, which the core knows to be in reach.
    ///
    /// # Errors
    ///
    /// A [`Fault`] at a bad address.
    fn read_mm(&mut self, mm: Mm, vaddr: u64, buf: &mut [u8]) -> Result<(), Fault>;

    /// Copies to `vaddr` of `mm`, which the core knows to be in reach.
    ///
    /// # Errors
    ///
    /// A [`Fault`] at a bad address.
    fn write_mm(&mut self, mm: Mm, vaddr: u64, buf: &[u8]) -> Result<(), Fault>;
}

/// What an IOMMU domain can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainInfo {
    /// Supported page sizes: bit k stands for 2^k bytes.
    pub pgsize_bitmap: u64,
    /// First and last address that the domain translates.
    pub aperture: (u64, u64),
    /// Whether DMA is cache-coherent, whatever the device asks for.
    pub coherent: bool,
    /// Whether the group's interrupts are isolated from other groups'.
    pub isolated_msi: bool,
    /// Groups whose domains are of one kind may share a domain.
    pub kind: u64,
}

/// The IOMMU behind groups that have one. Emulated groups never get here.
pub trait Iommu {
    /// Creates a domain and attaches `group` to it.
    ///
    /// # Errors
    ///
    /// The driver's errno.
    fn attach(&mut self, group: GroupId) -> Result<(DomainId, DomainInfo), Errno>;

    /// Attaches `group` to `domain` instead, if it can; its old domain `old`
    /// is then free again and gone. False: nothing changed.
    fn join(&mut self, group: GroupId, old: DomainId, domain: DomainId) -> bool;

    /// Detaches `group` from `domain`; `last` says that no group is left in
    /// it, so that the domain goes too.
    fn detach(&mut self, group: GroupId, domain: DomainId, last: bool);

    /// The `index`-th reserved region of `group`: first and last address. No
    /// mapping may lie there.
    fn reserved(&self, group: GroupId, index: usize) -> Option<(u64, u64)>;

    /// Maps `npages` pages from `iova` on to the pages from `pfn` on. On an
    /// error nothing of it stays mapped.
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

    /// Unmaps `npages` pages, never 0, from `iova` on. Cannot fail.
    fn unmap(&mut self, domain: DomainId, iova: u64, npages: u64);

    /// The pfn that `iova` is mapped to.
    fn translate(&self, domain: DomainId, iova: u64) -> Option<u64>;
}

/// Everything the core asks for, in one object.
pub trait Host: Pinning + Accounting + UserMemory + Iommu {}

impl<T: Pinning + Accounting + UserMemory + Iommu> Host for T {}
