// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host under the container: this process's memory, and otherwise as
//! little work as possible, so that what is timed is the core.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::cell::Cell;
use std::ptr::{self, NonNull};
use std::time::{Duration, Instant};

use dirty_core::host::*;
use dirty_core::ioctl::Outcome;
use dirty_core::uapi::*;
use dirty_core::{Container, Errno, Map, Options, PageSize, Report};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

const GROUP: GroupId = GroupId(1);
const DEVICE: DeviceId = DeviceId(1);

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static ALLOCATING: Cell<Duration> = const { Cell::new(Duration::ZERO) };
}

/// Bytes that the core holds in this thread.
pub(crate) fn live() -> usize {
    LIVE.get()
}

/// Time that allocations of more than a page have taken in this thread.
pub(crate) fn allocating() -> Duration {
    ALLOCATING.get()
}

/// The global allocator's memory, counted; and really there, as a kernel's is,
/// so that no page fault happens while something is timed.
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

struct Process;

impl Pinning for Process {
    fn pin(&mut self, _: Mm, vaddr: u64, _: Prot, pfns: &mut [u64]) -> Result<usize, Errno> {
        for (pfn, slot) in (vaddr / PAGE..).zip(&mut *pfns) {
            *slot = pfn;
        }
        Ok(pfns.len())
    }

    fn unpin(&mut self, _: u64, _: u64, _: Prot) {}

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

/// Addresses are those of this process, and not checked: the benches pass only
/// addresses of buffers that they hold.
impl UserMemory for Process {
    fn is_user_range(&self, addr: u64, len: u64) -> bool {
        addr.checked_add(len).is_some()
    }

    fn copy_from_user(&mut self, addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let from = ptr::with_exposed_provenance::<u8>(addr as usize);
        // SAFETY: an argument of `Guest::get_by_ioctl`, at least as long.
        unsafe { ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        Ok(())
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

/// A container with one device, and its host. Everything here is in pages.
pub(crate) struct Guest {
    pub(crate) container: Container<Heap>,
    host: Process,
}

impl Guest {
    /// No mappings, not tracking.
    pub(crate) fn new() -> Guest {
        let mut host = Process;
        let mut container = Container::new(Heap, Options::default());
        let group = container.attach_group(&mut host, GROUP, true);
        group.expect("an emulated group");
        let backend = container.set_iommu(&mut host, VFIO_TYPE1v2_IOMMU);
        backend.expect("type1 v2");
        let device = container.open_device(DEVICE, GROUP, true);
        device.expect("a device");
        Guest { container, host }
    }

    /// Mappings of so many pages, one after the other from page 0 on, tracking.
    pub(crate) fn tracking(mappings: &[u64]) -> Guest {
        let mut guest = Guest::new();
        let mut first = 0;
        for pages in mappings {
            guest.map(first, *pages);
            first += pages;
        }
        guest.start();
        guest
    }

    pub(crate) fn start(&mut self) {
        self.container.start().expect("memory for bitmaps");
    }

    pub(crate) fn stop(&mut self) {
        self.container.stop().expect("type1 v2");
    }

    pub(crate) fn map(&mut self, first: u64, pages: u64) {
        let map = Map {
            iova: first * PAGE,
            vaddr: first * PAGE, // nobody looks there
            size: pages * PAGE,
            prot: Some(Prot::READ_WRITE),
        };
        let mapped = self.container.map(&mut self.host, &map);
        mapped.expect("a free range");
    }

    pub(crate) fn unmap(&mut self, first: u64, pages: u64) {
        let mut unmap = dirty_core::Unmap::new(dirty_core::Target::Range {
            iova: first * PAGE,
            size: pages * PAGE,
        });
        let unmapped = self.container.unmap(&mut self.host, &mut unmap);
        unmapped.expect("a mapping without pins");
    }

    pub(crate) fn mark(&mut self, first: u64, pages: u64) {
        let marked = self.container.mark(first * PAGE, pages * PAGE);
        marked.expect("mapped pages");
    }

    /// GET_BITMAP by the typed call.
    pub(crate) fn get(&mut self, first: u64, pages: u64, report: Report<'_>) {
        let page = PageSize::new(PAGE).expect("a power of two");
        let got = self
            .container
            .get_bitmap(first * PAGE, pages * PAGE, page, report);
        got.expect("whole mappings");
    }

    /// GET_BITMAP by the ioctl, of pages 0 on.
    pub(crate) fn get_by_ioctl(&mut self, pages: u64, out: &mut [u64]) {
        #[repr(C)]
        struct Argument {
            head: vfio_iommu_type1_dirty_bitmap,
            get: vfio_iommu_type1_dirty_bitmap_get,
        }
        let argument = Argument {
            head: vfio_iommu_type1_dirty_bitmap {
                argsz: size_of::<Argument>() as u32,
                flags: VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
            },
            get: vfio_iommu_type1_dirty_bitmap_get {
                iova: 0,
                size: pages * PAGE,
                bitmap: vfio_bitmap {
                    pgsize: PAGE,
                    size: size_of_val(out) as u64,
                    data: out.as_mut_ptr().expose_provenance() as u64,
                },
            },
        };
        let address = (&raw const argument).expose_provenance() as u64;
        let done = self
            .container
            .ioctl(&mut self.host, VFIO_IOMMU_DIRTY_PAGES, address);
        assert!(matches!(done, Ok(Outcome::Done(0))), "{done:?}");
    }

    /// pin_pages of as many pages as `pfns` has room for.
    pub(crate) fn pin(&mut self, first: u64, pfns: &mut [u64]) {
        let prot = Prot::READ_WRITE;
        let pinned = self
            .container
            .pin_pages(&mut self.host, DEVICE, first * PAGE, prot, pfns);
        pinned.expect("mapped pages");
    }

    pub(crate) fn unpin(&mut self, first: u64, pages: u64) {
        let unpinned = self
            .container
            .unpin_pages(&mut self.host, DEVICE, first * PAGE, pages);
        unpinned.expect("an open device");
    }
}
