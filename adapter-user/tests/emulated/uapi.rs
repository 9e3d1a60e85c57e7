// SPDX-License-Identifier: MIT OR Apache-2.0
//! Our structures and numbers are those of vfio-bindings.

use std::mem::{offset_of, size_of};

use adapter_user::emulated::uapi as ours;
use vfio_bindings::bindings::vfio as theirs;

macro_rules! same {
    ($($name:ident { $($field:ident),* })*) => {$(
        assert_eq!(size_of::<ours::$name>(), size_of::<theirs::$name>(), stringify!($name));
        $(assert_eq!(
            offset_of!(ours::$name, $field),
            offset_of!(theirs::$name, $field),
            concat!(stringify!($name), ".", stringify!($field))
        );)*
    )*};
}

macro_rules! equal {
    ($($name:ident)*) => {
        $(assert_eq!(ours::$name as u64, theirs::$name as u64, stringify!($name));)*
    };
}

#[test]
fn structures_and_numbers_are_those_of_vfio_bindings() {
    same! {
        vfio_group_status { argsz, flags }
        vfio_device_info { argsz, flags, num_regions, num_irqs, cap_offset }
        vfio_region_info { argsz, flags, index, cap_offset, size, offset }
        vfio_irq_info { argsz, flags, index, count }
        vfio_irq_set { argsz, flags, index, start, count }
    }
    assert_eq!(
        size_of::<ours::vfio_region_info_cap_type>(),
        size_of::<theirs::vfio_region_info_cap_type>()
    );
    equal! {
        VFIO_GROUP_FLAGS_VIABLE VFIO_GROUP_FLAGS_CONTAINER_SET
        VFIO_DEVICE_FLAGS_RESET VFIO_DEVICE_FLAGS_PCI
        VFIO_REGION_INFO_FLAG_READ VFIO_REGION_INFO_FLAG_WRITE VFIO_REGION_INFO_FLAG_CAPS
        VFIO_REGION_INFO_CAP_TYPE VFIO_PCI_BAR0_REGION_INDEX VFIO_PCI_CONFIG_REGION_INDEX
        VFIO_PCI_NUM_REGIONS VFIO_PCI_MSI_IRQ_INDEX VFIO_PCI_MSIX_IRQ_INDEX VFIO_PCI_NUM_IRQS
        VFIO_IRQ_INFO_EVENTFD VFIO_IRQ_INFO_NORESIZE VFIO_IRQ_SET_DATA_NONE VFIO_IRQ_SET_DATA_BOOL
        VFIO_IRQ_SET_DATA_EVENTFD VFIO_IRQ_SET_ACTION_MASK VFIO_IRQ_SET_ACTION_UNMASK
        VFIO_IRQ_SET_ACTION_TRIGGER
    }
    // The crate has no names for these: _IO(';', 103) and on.
    let base = u32::from(b';') << 8 | 103;
    let ioctls = [
        ours::VFIO_GROUP_GET_STATUS,
        ours::VFIO_GROUP_SET_CONTAINER,
        ours::VFIO_GROUP_UNSET_CONTAINER,
        ours::VFIO_GROUP_GET_DEVICE_FD,
        ours::VFIO_DEVICE_GET_INFO,
        ours::VFIO_DEVICE_GET_REGION_INFO,
        ours::VFIO_DEVICE_GET_IRQ_INFO,
        ours::VFIO_DEVICE_SET_IRQS,
        ours::VFIO_DEVICE_RESET,
    ];
    assert_eq!(ioctls.to_vec(), (base..base + 9).collect::<Vec<_>>());
}
