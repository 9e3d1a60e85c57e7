// SPDX-License-Identifier: MIT OR Apache-2.0
//! The simulated IOMMU: the end of the address space, and odd specs.

use adapter_user::{Container, Group, GroupId, IommuSpec, IommuType};

use super::{memory, page::options, GROUP, PAGE, RW};

/// A second MAP after the last page of the address space was refused.
#[test]
fn the_last_page_can_be_mapped_again() {
    let container = Container::new(options());
    let mut spec = IommuSpec::default();
    spec.aperture = (0, u64::MAX);
    spec.reserved = vec![];
    let group = Group::iommu(GROUP, spec);
    container.add_group(group).expect("group");
    container.set_iommu(IommuType::Type1v2).expect("type1v2");
    let memory = memory(4);
    let top = 0u64.wrapping_sub(2 * PAGE);
    for round in 0..3 {
        let mapped = container.map(top, &memory, 0, 2 * PAGE, RW);
        assert_eq!(mapped, Ok(()), "round {round}");
        assert_eq!(container.unmap(top, 2 * PAGE), Ok(2 * PAGE));
    }
}

#[test]
fn odd_specs_do_not_panic() {
    let memory = memory(64);
    let apertures = [
        (0, 0),
        (0, u64::MAX),
        (u64::MAX, 0),
        (5, 4),
        (1 << 63, 1 << 63),
        (0x1000, 0x3fff),
    ];
    let reserved = [
        vec![],
        vec![(0, u64::MAX)],
        vec![(10, 5)],
        vec![(0, 0), (u64::MAX, u64::MAX)],
        vec![(0x1000, 0x1fff), (0x1800, 0x2800)],
    ];
    let pgsizes = [
        0,
        1,
        1 << 11,
        1 << 12,
        1 << 13,
        1 << 63,
        !0,
        1 << 12 | 1 << 63,
    ];
    for pgsize_bitmap in pgsizes {
        for aperture in apertures {
            for reserved in &reserved {
                for emulated_too in [false, true] {
                    let container = Container::new(options());
                    let mut spec = IommuSpec::default();
                    spec.pgsize_bitmap = pgsize_bitmap;
                    spec.aperture = aperture;
                    spec.reserved = reserved.clone();
                    spec.coherent = false;
                    spec.isolated_msi = true;
                    if emulated_too {
                        let group = Group::emulated(GroupId(2));
                        container.add_group(group).expect("group");
                    }
                    let _ = container.add_group(Group::iommu(GROUP, spec));
                    let _ = container.set_iommu(IommuType::Type1v2);
                    use_it(&container, &memory);
                    let _ = container.remove_group(GROUP);
                }
            }
        }
    }
}

/// Calls that may fail, but not panic.
fn use_it(container: &Container, memory: &std::sync::Arc<adapter_user::GuestMemory>) {
    for iova in [0, 0x1000, 0x2000, 0u64.wrapping_sub(4 * PAGE), 1 << 63] {
        let _ = container.map(iova, memory, 0, 2 * PAGE, RW);
        let _ = container.start();
        let _ = container.add_group(Group::iommu(GroupId(3), IommuSpec::default()));
        let _ = container.dirty_bitmap(iova, 2 * PAGE, PAGE, &mut [0; 8]);
        let _ = container.remove_group(GroupId(3));
        let _ = container.unmap(iova, 2 * PAGE);
        let _ = container.stop();
    }
}
