// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pinned pages are locked in memory. There is one test, because it counts the locked
//! memory of the whole process.

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

fn container(group: Group) -> Container {
    let container = Container::new(Options::default());
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
fn pinned_pages_are_locked_and_counted() {
    let memory = Arc::new(GuestMemory::new(1 << 20).expect("memory"));
    let emulated = container(Group::emulated(GroupId(1)));
    emulated
        .map(0, &memory, 0, 1 << 20, Prot::READ_WRITE)
        .expect("map");
    assert_eq!(
        (locked_kib(), charged_pages()),
        (0, 0),
        "mapping locks nothing"
    );

    let (first, second) = (device(&emulated), device(&emulated));
    let mut pfns = [0; 3];
    first.pin(0x2000, Prot::READ_WRITE, &mut pfns).expect("pin");
    assert_eq!((locked_kib(), charged_pages()), (12, 3));
    assert_eq!(pfns[0] << 12, memory.addr() + 0x2000);
    assert_eq!(pfns[2], pfns[0] + 2);

    // When another device pins a pinned page, no more memory is locked. The page stays
    // locked when the first device unpins it.
    second.pin(0x4000, Prot::READ, &mut pfns[..2]).expect("pin");
    assert_eq!((locked_kib(), charged_pages()), (16, 4));
    first.unpin(0x2000, 3);
    assert_eq!((locked_kib(), charged_pages()), (8, 2));
    drop(second); // a device unpins everything when it closes
    assert_eq!((locked_kib(), charged_pages()), (0, 0));

    // An unmap tells devices to unpin.
    first.pin(0x2000, Prot::READ_WRITE, &mut pfns).expect("pin");
    assert_eq!(emulated.unmap(0, 1 << 20), Ok(1 << 20));
    assert_eq!((locked_kib(), first.pinned()), (0, 0));

    // Behind an IOMMU all of the mapping is pinned.
    let iommu = container(Group::iommu(GroupId(1), IommuSpec::default()));
    iommu
        .map(0, &memory, 0x4000, 0x10000, Prot::READ_WRITE)
        .expect("map");
    assert_eq!((locked_kib(), charged_pages()), (64, 16));
    iommu
        .map(0x10000, &memory, 0x4000, 0x1000, Prot::READ)
        .expect("the same page at another iova");
    assert_eq!(
        (locked_kib(), charged_pages()),
        (64, 17),
        "charged twice, locked once"
    );
    assert_eq!(iommu.unmap(0, 0x10000), Ok(0x10000));
    assert_eq!((locked_kib(), charged_pages()), (4, 1));
    drop(iommu);
    assert_eq!(
        (locked_kib(), charged_pages()),
        (0, 0),
        "closing the container unpins everything"
    );
}
