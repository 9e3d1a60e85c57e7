// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host under the container. It allocates this process's memory and does as
//! little else as possible, so that what is timed is the core.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::cell::Cell;
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant};

use dirty_core::host::*;
use dirty_core::Errno;

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static ALLOCATING: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Bytes that the core holds in this thread.
pub(crate) fn live() -> usize {
    LIVE.get()
}

/// Bytes that the process has allocated, where the C library tells.
pub(crate) fn allocated() -> Option<usize> {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: it only reads counters.
        let info = unsafe { libc::mallinfo2() };
        Some(info.uordblks + info.hblkhd)
    }
    #[cfg(not(target_env = "gnu"))]
    None
}

/// Time that allocations of more than a page took in this thread.
pub(crate) fn allocating() -> Duration {
    ALLOCATING.get()
}

/// The global allocator's memory, counted, and touched so that no page fault happens
/// while something is timed: a kernel's memory has none.
#[derive(Clone)]
pub(crate) struct Heap;

// SAFETY: the global allocator's memory, and nobody else frees it.
unsafe impl Memory for Heap {
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        let big = layout.size() > PAGE as usize;
        let start = big.then(Instant::now);
        // SAFETY: the size is not 0, see `Memory::alloc_zeroed`.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        for at in (0..layout.size()).step_by(PAGE as usize) {
            // SAFETY: `at` is below the size of the allocation.
            let byte = unsafe { ptr.add(at) };
            // SAFETY: allocated above, and nobody else has it yet.
            unsafe { byte.write_volatile(0) };
        }
        if let Some(start) = start {
            ALLOCATING.set(ALLOCATING.get() + start.elapsed());
        }
        LIVE.set(LIVE.get() + layout.size());
        Some(ptr)
    }

    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout) {
        LIVE.set(LIVE.get() - layout.size());
        // SAFETY: the caller's promise: allocated above with this layout.
        unsafe { dealloc(ptr.as_ptr(), layout) }
    }
}

/// The host.
pub(crate) struct Process;

impl Pinning for Process {
    fn pin(
        &mut self,
        _: Mm,
        vaddr: u64,
        npages: u64,
        _: Prot,
        runs: &mut [Run],
    ) -> Result<usize, Errno> {
        runs[0] = Run {
            pfn: vaddr / PAGE,
            npages,
            kind: PageKind::Normal,
        };
        Ok(1)
    }

    fn unpin(&mut self, _: u64, npages: u64, _: Prot) -> u64 {
        npages
    }

    fn page_kind(&self, _: u64) -> PageKind {
        PageKind::Normal
    }
}

impl Accounting for Process {
    fn grab(&mut self) -> Result<Mm, Errno> {
        Ok(Mm(1))
    }

    fn release(&mut self, _: Mm) {}

    fn reach(&self, _: Mm) -> Reach {
        Reach::Own
    }

    fn lock_cap(&self) -> bool {
        true
    }

    fn charge(&mut self, _: Mm, _: u64, _: bool) -> Result<(), Errno> {
        Ok(())
    }

    fn uncharge(&mut self, _: Mm, _: u64) {}
}

/// Reads an argument of [`Guest::get_by_ioctl`](crate::guest::Guest::get_by_ioctl).
pub(crate) fn copy_from_user(addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
    let from = ptr::with_exposed_provenance::<u8>(addr as usize);
    // SAFETY: an argument of `Guest::get_by_ioctl`, at least as long.
    unsafe { ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
    Ok(())
}

/// Addresses are this process's and are not checked: the benches pass only those of
/// buffers that they hold.
impl UserMemory for Process {
    fn is_user_range(&self, addr: u64, len: u64) -> bool {
        addr.checked_add(len).is_some()
    }

    fn copy_to_user(&mut self, addr: u64, buf: &[u8]) -> Result<(), Fault> {
        let to = ptr::with_exposed_provenance_mut::<u8>(addr as usize);
        // SAFETY: a part of the bitmap that `Guest::get_by_ioctl` announced.
        unsafe { ptr::copy_nonoverlapping(buf.as_ptr(), to, buf.len()) };
        Ok(())
    }

    fn read_mm(&mut self, _: Mm, _: u64, _: &mut [u8]) -> Result<(), Fault> {
        Err(Fault { done: 0 }) // guests here have no memory
    }

    fn write_mm(&mut self, _: Mm, _: u64, _: &[u8]) -> Result<(), Fault> {
        Err(Fault { done: 0 })
    }
}

/// No group here has an IOMMU.
impl Iommu for Process {
    fn attach(&mut self, _: GroupId) -> Result<(DomainId, DomainInfo), Errno> {
        Err(Errno::ENODEV)
    }

    fn join(&mut self, _: GroupId, _: DomainId, _: DomainId) -> bool {
        false
    }

    fn detach(&mut self, _: GroupId, _: DomainId, _: bool) {}

    fn reserved(&self, _: GroupId, _: usize) -> Option<(u64, u64)> {
        None
    }

    fn map(&mut self, _: DomainId, _: u64, _: u64, _: u64, _: Prot) -> Result<(), Errno> {
        Err(Errno::ENODEV)
    }

    fn unmap(&mut self, _: DomainId, _: u64, _: u64) {}

    fn translate(&self, _: DomainId, _: u64) -> Option<u64> {
        None
    }
}
