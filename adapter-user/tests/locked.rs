// SPDX-License-Identifier: MIT OR Apache-2.0
//! What pins lock and charge. There is one test, because it counts the locked memory of
//! the whole process.

use std::fs;
use std::sync::Arc;

use adapter_user::{
    charged_pages, Container, Device, Group, GroupId, GuestMemory, IommuSpec, IommuType, Options,
    Prot,
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

fn container(new: New, group: Group) -> Container {
    let container = new(Options::default());
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

#[test]
fn pinned_pages_are_counted_and_locked_if_asked() {
    let memory = Arc::new(GuestMemory::new(1 << 20).expect("memory"));
    // The memory is one block, so all of it is locked, or nothing.
    pins(Container::new, &memory, 0);
    pins(Container::with_locked_pins, &memory, 1024);
    owners_lock(Container::new, &memory);
    owners_lock(Container::with_locked_pins, &memory);
    scattered_blocks();
    a_file_that_shrank();
}

/// A page that cannot be made resident leaves its block unlocked.
fn a_file_that_shrank() {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(1 << 20).expect("room");
    let memory = GuestMemory::from_fd(file.try_clone().expect("a file").into());
    let memory = Arc::new(memory.expect("memory"));
    let emulated = container(Container::with_locked_pins, Group::emulated(GroupId(1)));
    emulated
        .map(0, &memory, 0, 1 << 20, Prot::READ_WRITE)
        .expect("map");
    let device = device(&emulated);
    file.set_len(0x2000).expect("less room");
    for iova in [0x1000, 0x2000] {
        let pinned = device.pin(iova, 0x2000, Prot::READ_WRITE);
        assert_eq!(pinned.map(drop).map_err(|e| e.errno().0), Err(libc::EFAULT));
        assert_eq!((locked_kib(), charged_pages(), device.pinned()), (0, 0, 0));
    }
}

/// `block` is what locked memory grows by while there are pins.
fn pins(new: New, memory: &Arc<GuestMemory>, block: u64) {
    let emulated = container(new, Group::emulated(GroupId(1)));
    emulated
        .map(0, memory, 0, 1 << 20, Prot::READ_WRITE)
        .expect("map");
    assert_eq!(
        (locked_kib(), charged_pages()),
        (0, 0),
        "mapping locks nothing"
    );

    let (first, second) = (device(&emulated), device(&emulated));
    let mut pfns = [0; 3];
    first
        .pin_pages(0x2000, Prot::READ_WRITE, &mut pfns)
        .expect("pin");
    assert_eq!((locked_kib(), charged_pages()), (block, 3));
    if block == 0 {
        assert_eq!(pfns[0] << 12, memory.addr() + 0x2000);
    }
    assert_eq!(pfns[2], pfns[0] + 2);

    // When another device pins a pinned page, no more memory is charged. The page stays
    // charged when the first device unpins it.
    second
        .pin_pages(0x4000, Prot::READ, &mut pfns[..2])
        .expect("pin");
    assert_eq!((locked_kib(), charged_pages()), (block, 4));
    first.unpin_pages(0x2000, 3);
    assert_eq!((locked_kib(), charged_pages()), (block, 2));
    drop(second); // a device unpins everything when it closes
    assert_eq!((locked_kib(), charged_pages()), (0, 0));

    // A guard reaches the memory, also where it is locked.
    let guard = first.pin(0x8ff8, 16, Prot::READ_WRITE).expect("pin");
    guard.write(0, &[7; 16]).expect("write");
    let mut bytes = [0; 18];
    memory.read(0x8ff7, &mut bytes).expect("in bounds");
    assert_eq!((bytes[0], bytes[17], &bytes[1..17]), (0, 0, &[7; 16][..]));
    assert_eq!((locked_kib(), charged_pages()), (block, 2));
    drop(guard);
    memory.write(0x8ff8, &[0; 16]).expect("in bounds");
    assert_eq!((locked_kib(), charged_pages()), (0, 0));

    // An unmap tells devices to unpin.
    first
        .pin_pages(0x2000, Prot::READ_WRITE, &mut pfns)
        .expect("pin");
    assert_eq!(emulated.unmap(0, 1 << 20), Ok(1 << 20));
    assert_eq!((locked_kib(), first.pinned()), (0, 0));

    // Behind an IOMMU all of the mapping is pinned.
    let iommu = container(new, Group::iommu(GroupId(1), IommuSpec::default()));
    iommu
        .map(0, memory, 0x4000, 0x10000, Prot::READ_WRITE)
        .expect("map");
    assert_eq!((locked_kib(), charged_pages()), (block, 16));
    iommu
        .map(0x10000, memory, 0x4000, 0x1000, Prot::READ)
        .expect("the same page at another iova");
    assert_eq!(
        (locked_kib(), charged_pages()),
        (block, 17),
        "charged twice, locked once"
    );
    assert_eq!(iommu.unmap(0, 0x10000), Ok(0x10000));
    assert_eq!((locked_kib(), charged_pages()), (block, 1));
    drop(iommu);
    assert_eq!(
        (locked_kib(), charged_pages()),
        (0, 0),
        "closing the container unpins everything"
    );
}

/// An unpin dropped the lock that the VMM had on its own memory.
fn owners_lock(new: New, memory: &Arc<GuestMemory>) {
    let (start, len) = (memory.addr() as *const libc::c_void, memory.len() as usize);
    // SAFETY: locking changes no byte.
    assert_eq!(unsafe { libc::mlock(start, len) }, 0);
    assert_eq!(locked_kib(), 1024);
    let container = container(new, Group::emulated(GroupId(1)));
    container
        .map(0, memory, 0, 1 << 20, Prot::READ_WRITE)
        .expect("map");
    let device = device(&container);
    drop(device.pin(0, 64 << 12, Prot::READ_WRITE).expect("pin"));
    assert_eq!(locked_kib(), 1024);
    drop(container);
    assert_eq!(locked_kib(), 1024);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlock(start, len) }, 0);
    assert_eq!(locked_kib(), 0);
}

/// Locked blocks are few, wherever the pins are.
fn scattered_blocks() {
    const SIZE: u64 = 400 << 20;
    let memory = Arc::new(GuestMemory::new(SIZE).expect("memory"));
    let emulated = container(Container::with_locked_pins, Group::emulated(GroupId(1)));
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
    assert_eq!(memory_resident(&memory), 25, "only pages with pins");
    device.unpin_range(0, SIZE);
    assert_eq!(locked_kib(), 0);
    for k in 0..2000 {
        device
            .pin_pages(k * 0x2000, Prot::READ_WRITE, &mut [0])
            .expect("pin");
    }
    assert!(vmas() <= before + 64);
    assert_eq!(emulated.unmap(0, SIZE), Ok(SIZE));
    assert_eq!((locked_kib(), charged_pages()), (0, 0));
}

/// How many pages of a memory exist.
fn memory_resident(memory: &GuestMemory) -> u64 {
    let file = fs::File::from(memory.as_fd().try_clone_to_owned().expect("a file"));
    let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().expect("metadata"));
    blocks * 512 / 4096
}
