// SPDX-License-Identifier: MIT OR Apache-2.0
//! What pins lock and charge. There is one test, because it counts the locked memory of
//! the whole process.

use std::fs;
use std::sync::Arc;

use adapter_user::{
    charged_pages, Container, Device, Group, GroupId, GuestMemory, IommuSpec, IommuType, Options,
    PageSize, Prot,
};

/// The locked memory of this process in KiB, as the kernel counts it.
fn locked_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|l| l.strip_prefix("VmLck:"));
    let value = line.and_then(|l| l.trim().strip_suffix(" kB"));
    value.and_then(|v| v.parse().ok()).expect("VmLck")
}

fn vmas() -> usize {
    let maps = fs::read_to_string("/proc/self/maps").expect("maps");
    maps.lines().count()
}

type New = fn(Options) -> Container;

fn container(new: New, page: u64, group: Group) -> Container {
    let mut options = Options::default();
    options.page_size = PageSize::new(page).expect("a power of two");
    let container = new(options);
    container.add_group(group).expect("group");
    container.set_iommu(IommuType::Type1v2).expect("type1v2");
    container
}

fn device(container: &Container) -> Arc<Device> {
    let on_unmap = |device: &Device, iova, size| device.unpin_range(iova, size);
    container
        .open_device(GroupId(1), Some(Box::new(on_unmap)))
        .expect("device")
}

/// The bytes of the memory, which is one block: all of it is locked, or nothing.
const SIZE: u64 = 2 << 20;

/// The page sizes of hosts; the larger ones are made of this host's.
#[test]
fn pinned_pages_are_counted_and_locked_if_asked() {
    for page in [4 << 10, 16 << 10, 64 << 10] {
        let memory = Arc::new(GuestMemory::new(SIZE).expect("memory"));
        pins(Container::new, page, &memory, 0);
        pins(Container::with_locked_pins, page, &memory, SIZE >> 10);
        owners_lock(Container::new, page, &memory);
        owners_lock(Container::with_locked_pins, page, &memory);
        scattered_blocks(page);
        a_file_that_shrank(page);
    }
}

/// A page that cannot be made resident leaves its block unlocked.
fn a_file_that_shrank(page: u64) {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(SIZE).expect("room");
    let memory = GuestMemory::from_fd(file.try_clone().expect("a file").into());
    let memory = Arc::new(memory.expect("memory"));
    let new = Container::with_locked_pins;
    let emulated = container(new, page, Group::emulated(GroupId(1)));
    emulated
        .map(0, &memory, 0, SIZE, Prot::READ_WRITE)
        .expect("map");
    let device = device(&emulated);
    file.set_len(2 * page).expect("less room");
    for iova in [page, 2 * page] {
        let pinned = device.pin(iova, 2 * page, Prot::READ_WRITE);
        assert_eq!(pinned.map(drop).map_err(|e| e.errno().0), Err(libc::EFAULT));
        assert_eq!((locked_kib(), charged_pages(), device.pinned()), (0, 0, 0));
    }
}

/// `block` is what locked memory grows by while there are pins.
fn pins(new: New, page: u64, memory: &Arc<GuestMemory>, block: u64) {
    let charged = || charged_pages() * 4096 / page;
    let emulated = container(new, page, Group::emulated(GroupId(1)));
    emulated
        .map(0, memory, 0, SIZE, Prot::READ_WRITE)
        .expect("map");
    assert_eq!((locked_kib(), charged()), (0, 0), "mapping locks nothing");

    let (first, second) = (device(&emulated), device(&emulated));
    let mut pfns = [0; 3];
    first
        .pin_pages(2 * page, Prot::READ_WRITE, &mut pfns)
        .expect("pin");
    assert_eq!((locked_kib(), charged()), (block, 3));
    if block == 0 {
        assert_eq!(pfns[0] * page, memory.addr() + 2 * page);
    }
    assert_eq!(pfns[2], pfns[0] + 2);

    // When another device pins a pinned page, no more memory is charged. The page stays
    // charged when the first device unpins it.
    second
        .pin_pages(4 * page, Prot::READ, &mut pfns[..2])
        .expect("pin");
    assert_eq!((locked_kib(), charged()), (block, 4));
    first.unpin_pages(2 * page, 3);
    assert_eq!((locked_kib(), charged()), (block, 2));
    drop(second); // a device unpins everything when it closes
    assert_eq!((locked_kib(), charged()), (0, 0));

    // A guard reaches the memory, also where it is locked.
    let guard = first.pin(9 * page - 8, 16, Prot::READ_WRITE).expect("pin");
    guard.write(0, &[7; 16]).expect("write");
    let mut bytes = [0; 18];
    memory.read(9 * page - 9, &mut bytes).expect("in bounds");
    assert_eq!((bytes[0], bytes[17], &bytes[1..17]), (0, 0, &[7; 16][..]));
    assert_eq!((locked_kib(), charged()), (block, 2));
    drop(guard);
    memory.write(9 * page - 8, &[0; 16]).expect("in bounds");
    assert_eq!((locked_kib(), charged()), (0, 0));

    // An unmap tells devices to unpin.
    first
        .pin_pages(2 * page, Prot::READ_WRITE, &mut pfns)
        .expect("pin");
    assert_eq!(emulated.unmap(0, SIZE), Ok(SIZE));
    assert_eq!((locked_kib(), first.pinned()), (0, 0));

    // Behind an IOMMU all of the mapping is pinned.
    let iommu = container(new, page, Group::iommu(GroupId(1), IommuSpec::default()));
    iommu
        .map(0, memory, 4 * page, 16 * page, Prot::READ_WRITE)
        .expect("map");
    assert_eq!((locked_kib(), charged()), (block, 16));
    iommu
        .map(16 * page, memory, 4 * page, page, Prot::READ)
        .expect("the same page at another iova");
    assert_eq!(
        (locked_kib(), charged()),
        (block, 17),
        "charged twice, locked once"
    );
    assert_eq!(iommu.unmap(0, 16 * page), Ok(16 * page));
    assert_eq!((locked_kib(), charged()), (block, 1));
    drop(iommu);
    assert_eq!(
        (locked_kib(), charged()),
        (0, 0),
        "closing the container unpins everything"
    );
}

/// An unpin dropped the lock that the VMM had on its own memory.
fn owners_lock(new: New, page: u64, memory: &Arc<GuestMemory>) {
    let (start, len) = (memory.addr() as *const libc::c_void, memory.len() as usize);
    // SAFETY: locking changes no byte.
    assert_eq!(unsafe { libc::mlock(start, len) }, 0);
    assert_eq!(locked_kib(), SIZE >> 10);
    let container = container(new, page, Group::emulated(GroupId(1)));
    container
        .map(0, memory, 0, SIZE, Prot::READ_WRITE)
        .expect("map");
    let device = device(&container);
    drop(device.pin(0, SIZE / 2, Prot::READ_WRITE).expect("pin"));
    assert_eq!(locked_kib(), SIZE >> 10);
    drop(container);
    assert_eq!(locked_kib(), SIZE >> 10);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlock(start, len) }, 0);
    assert_eq!(locked_kib(), 0);
}

/// Locked blocks are few, wherever the pins are.
fn scattered_blocks(page: u64) {
    const SIZE: u64 = 400 << 20;
    let memory = Arc::new(GuestMemory::new(SIZE).expect("memory"));
    let new = Container::with_locked_pins;
    let emulated = container(new, page, Group::emulated(GroupId(1)));
    emulated
        .map(0, &memory, 0, SIZE, Prot::READ_WRITE)
        .expect("map");
    let device = device(&emulated);
    let before = vmas();
    // 400 MiB are 50 blocks of 8 MiB, and 64 is the most.
    for k in 0..25 {
        device
            .pin_pages(k * (16 << 20), Prot::READ_WRITE, &mut [0])
            .expect("pin");
    }
    assert_eq!(locked_kib(), 25 * (8 << 10));
    assert!(vmas() <= before + 64, "{} of {before}", vmas());
    assert_eq!(memory_resident(&memory), 25 * page, "only pages with pins");
    device.unpin_range(0, SIZE);
    assert_eq!(locked_kib(), 0);
    for k in 0..2000 * 4096 / page {
        device
            .pin_pages(k * 2 * page, Prot::READ_WRITE, &mut [0])
            .expect("pin");
    }
    assert!(vmas() <= before + 64);
    assert_eq!(emulated.unmap(0, SIZE), Ok(SIZE));
    assert_eq!((locked_kib(), charged_pages()), (0, 0));
}

/// How many bytes of a memory exist.
fn memory_resident(memory: &GuestMemory) -> u64 {
    let file = fs::File::from(memory.as_fd().try_clone_to_owned().expect("a file"));
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("metadata"));
    blocks * 512
}
