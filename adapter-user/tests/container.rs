// SPDX-License-Identifier: MIT OR Apache-2.0
//! The container as a VMM uses it: from threads, with memory that mappings keep alive,
//! and with bad addresses.

use std::sync::Arc;
use std::thread;

use adapter_user::uapi::*;
use adapter_user::{
    Container, Device, Error, Group, GroupId, GuestMemory, IommuSpec, IommuType, Prot,
};

#[path = "support/page.rs"]
mod page;

use page::PAGE;

const GROUP: GroupId = GroupId(1);

fn container(group: Group) -> Container {
    let container = Container::new(page::options());
    container.add_group(group).expect("group");
    container.set_iommu(IommuType::Type1v2).expect("type1v2");
    container
}

fn emulated() -> Container {
    container(Group::emulated(GROUP))
}

fn device(container: &Container) -> Arc<Device> {
    let on_unmap = |device: &Device, iova, size| device.unpin_range(iova, size);
    let device = container.open_device(GROUP, Some(Box::new(on_unmap)));
    device.expect("device")
}

fn memory(pages: u64) -> Arc<GuestMemory> {
    Arc::new(GuestMemory::new(pages * PAGE).expect("memory"))
}

#[test]
fn handles_are_shared_by_threads() {
    fn shared<T: Clone + Send + Sync + 'static>() {}
    fn device<T: Send + Sync + 'static>() {}
    shared::<Container>();
    device::<Device>();
}

#[test]
fn a_mapping_keeps_its_memory_alive() {
    let (container, memory) = (emulated(), memory(4));
    container
        .map(0, &memory, PAGE, 2 * PAGE, Prot::READ_WRITE)
        .expect("map");
    let weak = Arc::downgrade(&memory);
    drop(memory);
    let device = device(&container);
    device.write(PAGE - 8, &[7; 16]).expect("write");
    let mut back = [0; 16];
    device.read(PAGE - 8, &mut back).expect("read");
    assert_eq!(back, [7; 16]);
    let kept = weak.upgrade().expect("the mapping holds the memory");
    let mut same = [0; 16];
    kept.read(2 * PAGE - 8, &mut same).expect("in bounds");
    assert_eq!(same, back);
    drop(kept);
    container.unmap(0, 2 * PAGE).expect("unmap");
    assert!(weak.upgrade().is_none(), "an unmap releases the memory");
}

#[test]
fn a_mapping_must_lie_in_its_memory() {
    let (container, memory) = (emulated(), memory(4));
    let rw = Prot::READ_WRITE;
    for (offset, size) in [
        (0, 5 * PAGE),
        (4 * PAGE, PAGE),
        (u64::MAX, PAGE),
        (PAGE, 4 * PAGE),
    ] {
        let mapped = container.map(0, &memory, offset, size, rw);
        assert_eq!(mapped, Err(Error::Wraps), "{offset:#x} {size:#x}");
    }
    assert_eq!(container.map(0, &memory, 0, 0, rw), Err(Error::ZeroSize));
}

#[test]
fn bad_addresses_are_efault_and_no_signal() {
    let container = emulated();
    let device = device(&container);
    // SAFETY: there is no memory at address 0.
    unsafe { container.map_process(0, 0, PAGE, Prot::READ_WRITE) }
        .expect("MAP does not look at the address");
    assert_eq!(device.write(0, &[1]), Err(Error::BadAddress));
    assert_eq!(device.read(0, &mut [1]), Err(Error::BadAddress));
    let pinned = device.pin_pages(0, Prot::READ, &mut [0]);
    assert_eq!(pinned.map_err(|e| e.errno().0), Err(14));
    for nr in [
        VFIO_IOMMU_GET_INFO,
        VFIO_IOMMU_MAP_DMA,
        VFIO_IOMMU_UNMAP_DMA,
        VFIO_IOMMU_DIRTY_PAGES,
    ] {
        for arg in [0, 8, 0x1000, u64::MAX, u64::MAX - 7] {
            // SAFETY: there is no memory at these addresses.
            let answer = unsafe { container.ioctl(nr, arg) };
            assert_eq!(answer, Err(Error::BadAddress), "{nr:#x}");
        }
    }
}

#[test]
fn the_raw_interface_takes_c_structures() {
    let (container, mut memory) = (emulated(), vec![0u8; 3 * PAGE as usize]);
    let start = memory.as_mut_ptr() as u64;
    let mut map = vfio_iommu_type1_dma_map {
        argsz: 32,
        flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: start.next_multiple_of(PAGE),
        iova: 0x10000,
        size: 2 * PAGE,
    };
    let map_arg = &raw mut map as u64;
    // SAFETY: `memory` is only looked at when the devices are done.
    let ioctl = |nr, arg| unsafe { container.ioctl(nr, arg) };
    assert_eq!(ioctl(VFIO_IOMMU_MAP_DMA, map_arg), Ok(0));
    let mut start = vfio_iommu_type1_dirty_bitmap {
        argsz: 8,
        flags: VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
    };
    let start_arg = &raw mut start as u64;
    assert_eq!(ioctl(VFIO_IOMMU_DIRTY_PAGES, start_arg), Ok(0));
    device(&container)
        .write(0x10000 + PAGE, b"x")
        .expect("write");
    let mut bitmap = [!0u64; 2];
    let mut get = (
        vfio_iommu_type1_dirty_bitmap {
            argsz: 48,
            flags: VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
        },
        vfio_iommu_type1_dirty_bitmap_get {
            iova: 0x10000,
            size: 2 * PAGE,
            bitmap: vfio_bitmap {
                pgsize: PAGE,
                size: 8,
                data: bitmap.as_mut_ptr() as u64,
            },
        },
    );
    let get_arg = &raw mut get as u64;
    assert_eq!(ioctl(VFIO_IOMMU_DIRTY_PAGES, get_arg), Ok(0));
    assert_eq!(bitmap, [2, !0]);
    assert_eq!(memory.iter().filter(|b| **b == b'x').count(), 1);
}

/// The callback runs without the container's lock, so that it can call the container,
/// even from another thread.
#[test]
fn a_dma_unmap_callback_may_call_the_container() {
    let (container, memory) = (emulated(), memory(8));
    container
        .map(0, &memory, 0, 8 * PAGE, Prot::READ_WRITE)
        .expect("map");
    container.start().expect("start");
    let inner = container.clone();
    let on_unmap = move |device: &Device, iova, size| {
        let other = inner.clone();
        let asked = thread::spawn(move || other.dirty_bitmap(iova, size, PAGE, &mut [0]));
        asked.join().expect("no deadlock").expect("report");
        device.unpin_range(iova, size);
    };
    let device = container.open_device(GROUP, Some(Box::new(on_unmap)));
    let device = device.expect("device");
    device
        .pin_pages(PAGE, Prot::READ, &mut [0; 2])
        .expect("pin");
    let mut dirty = [0];
    let freed = container.unmap_dirty(0, 8 * PAGE, PAGE, &mut dirty);
    assert_eq!((freed, dirty), (Ok(8 * PAGE), [6]));
}

#[test]
fn unpinning_no_bytes_unpins_nothing() {
    let (container, memory) = (emulated(), memory(8));
    container
        .map(0, &memory, 0, 8 * PAGE, Prot::READ_WRITE)
        .expect("map");
    let device = device(&container);
    device
        .pin_pages(PAGE, Prot::READ, &mut [0; 2])
        .expect("pin");
    device.unpin_range(0, 0);
    assert_eq!(device.pinned(), 2);
    device.unpin_range(0, 8 * PAGE);
    assert_eq!(device.pinned(), 0);
}

#[test]
fn tracking_that_stops_in_a_callback_fails_the_unmap() {
    let (container, memory) = (emulated(), memory(8));
    container
        .map(0, &memory, 0, 8 * PAGE, Prot::READ_WRITE)
        .expect("map");
    container.start().expect("start");
    let inner = container.clone();
    let on_unmap = move |device: &Device, iova, size| {
        inner.stop().expect("stop");
        device.unpin_range(iova, size);
    };
    let device = container.open_device(GROUP, Some(Box::new(on_unmap)));
    let device = device.expect("device");
    device.pin_pages(0, Prot::READ, &mut [0]).expect("pin");
    let freed = container.unmap_dirty(0, 8 * PAGE, PAGE, &mut [0]);
    assert_eq!(freed, Err(Error::NotTracking));
    assert_eq!(
        container.unmap(0, 8 * PAGE),
        Ok(8 * PAGE),
        "the mapping was still there"
    );
}

#[test]
fn a_group_behind_an_iommu_makes_everything_dirty() {
    let container = container(Group::iommu(GROUP, IommuSpec::default()));
    let memory = memory(100);
    container
        .map(0, &memory, 0, 100 * PAGE, Prot::READ)
        .expect("map");
    container.start().expect("start");
    for _ in 0..2 {
        let mut dirty = [0; 2];
        container
            .dirty_bitmap(0, 100 * PAGE, PAGE, &mut dirty)
            .expect("report");
        assert_eq!(dirty, [!0, (1 << 36) - 1]);
    }
    let window = container.map(0xfee0_0000, &memory, 0, PAGE, Prot::READ);
    assert_eq!(window, Err(Error::ForbiddenIova));
}

/// What an operator sees of a container, and of its pins.
#[test]
fn stats_have_mappings_bitmaps_and_pins() {
    let container = Container::new(page::options());
    assert_eq!(container.stats(), Err(Error::NoIommu));
    let mut options = page::options();
    options.bitmap_budget = Some(1 << 20);
    let container = Container::new(options);
    container.add_group(Group::emulated(GroupId(1))).unwrap();
    container.set_iommu(IommuType::Type1v2).unwrap();
    let memory = Arc::new(GuestMemory::new(64 * PAGE).unwrap());
    for iova in [0, 1 << 30] {
        let size = memory.len();
        container
            .map(iova, &memory, 0, size, Prot::READ_WRITE)
            .unwrap();
    }
    let stats = container.stats().unwrap();
    assert_eq!((stats.mappings, stats.mapped_bytes), (2, 128 * PAGE));
    assert_eq!((stats.pgsize, stats.bitmap_bytes), (None, 0));
    assert_eq!((stats.pinned_pages, stats.wholly_dirty_groups), (0, 0));

    container.start().unwrap();
    let device = container
        .open_device(GroupId(1), Some(Box::new(|_, _, _| {})))
        .unwrap();
    let mut pfns = [0; 3];
    device
        .pin_pages(2 * PAGE, Prot::READ_WRITE, &mut pfns)
        .unwrap();
    device
        .pin_pages(2 * PAGE, Prot::READ_WRITE, &mut pfns[..1])
        .unwrap();
    device
        .pin_pages((1 << 30) + 0x10, Prot::READ_WRITE, &mut pfns[..1])
        .unwrap();
    let stats = container.stats().unwrap();
    assert_eq!((stats.pgsize, stats.budget), (Some(PAGE), Some(1 << 20)));
    assert_eq!(stats.pinned_pages, 4); // one of them twice, one inside a page
    assert!(stats.bitmap_bytes > 0 && stats.bitmap_bytes <= 1 << 20);
    device.close();
    container.stop().unwrap();
    let stats = container.stats().unwrap();
    assert_eq!((stats.pinned_pages, stats.bitmap_bytes), (0, 0));

    let spec = IommuSpec::default();
    container.add_group(Group::iommu(GroupId(2), spec)).unwrap();
    assert_eq!(container.stats().unwrap().wholly_dirty_groups, 1);
}
