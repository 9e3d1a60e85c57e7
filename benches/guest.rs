// SPDX-License-Identifier: MIT OR Apache-2.0
//! A container as a device's driver and a VMM use it.

use dirty_core::host::{DeviceId, GroupId, Prot};
use dirty_core::uapi::*;
use dirty_core::{Command, Container, Dest, Map, Options, Outcome, PageSize, Target, Type1, Unmap};

use crate::host::{copy_from_user, Heap, Process, PAGE};

const GROUP: GroupId = GroupId(1);
const DEVICE: DeviceId = DeviceId(1);

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

    /// The backend and its host.
    fn backend_mut(&mut self) -> (&mut Type1<Heap>, &mut Process) {
        let backend = self.container.backend_mut().expect("type1 v2");
        (backend, &mut self.host)
    }

    pub(crate) fn start(&mut self) {
        let (backend, host) = self.backend_mut();
        backend.start(host).expect("memory for bitmaps");
    }

    pub(crate) fn stop(&mut self) {
        let (backend, host) = self.backend_mut();
        backend.stop(host).expect("type1 v2");
    }

    pub(crate) fn map(&mut self, first: u64, pages: u64) {
        let map = Map {
            iova: first * PAGE,
            vaddr: first * PAGE, // nobody looks there
            size: pages * PAGE,
            prot: Some(Prot::READ_WRITE),
        };
        let (backend, host) = self.backend_mut();
        let mapped = backend.map(host, &map);
        mapped.expect("a free range");
    }

    pub(crate) fn unmap(&mut self, first: u64, pages: u64) {
        let mut unmap = Unmap::new(Target::Range {
            iova: first * PAGE,
            size: pages * PAGE,
        });
        let (backend, host) = self.backend_mut();
        let unmapped = backend.unmap(host, &mut unmap);
        unmapped.expect("a mapping without pins");
    }

    pub(crate) fn mark(&mut self, first: u64, pages: u64) {
        let backend = self.container.backend().expect("type1 v2");
        let marked = backend.mark(first * PAGE, pages * PAGE);
        marked.expect("mapped pages");
    }

    /// GET_BITMAP by the typed call.
    pub(crate) fn get(&mut self, first: u64, pages: u64, report: Dest<'_>) {
        let page = PageSize::new(PAGE).expect("a power of two");
        let (iova, size) = (first * PAGE, pages * PAGE);
        let (backend, host) = self.backend_mut();
        let got = backend.get_bitmap(host, iova, size, page, report);
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
        let iommu = self.container.iommu_type();
        let command = Command::read(iommu, VFIO_IOMMU_DIRTY_PAGES, address, copy_from_user);
        let done = self
            .container
            .run(&mut self.host, &mut command.expect("a whole argument"));
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
