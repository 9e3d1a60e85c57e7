// SPDX-License-Identifier: MIT OR Apache-2.0
//! The structures and numbers of `linux/vfio.h` for groups and devices, under their C
//! names. A test compares them with the crate vfio-bindings.

#![allow(non_camel_case_types)]

/// Of a group's file; takes a [`vfio_group_status`].
pub const VFIO_GROUP_GET_STATUS: u32 = 0x3b67;
/// Of a group's file; takes the address of a container's descriptor.
pub const VFIO_GROUP_SET_CONTAINER: u32 = 0x3b68;
/// Of a group's file; takes nothing.
pub const VFIO_GROUP_UNSET_CONTAINER: u32 = 0x3b69;
/// Of a group's file; takes the name of a device, answers its descriptor.
pub const VFIO_GROUP_GET_DEVICE_FD: u32 = 0x3b6a;
/// Of a device's file; takes a [`vfio_device_info`].
pub const VFIO_DEVICE_GET_INFO: u32 = 0x3b6b;
/// Of a device's file; takes a [`vfio_region_info`].
pub const VFIO_DEVICE_GET_REGION_INFO: u32 = 0x3b6c;
/// Of a device's file; takes a [`vfio_irq_info`].
pub const VFIO_DEVICE_GET_IRQ_INFO: u32 = 0x3b6d;
/// Of a device's file; takes a [`vfio_irq_set`].
pub const VFIO_DEVICE_SET_IRQS: u32 = 0x3b6e;
/// Of a device's file; takes nothing.
pub const VFIO_DEVICE_RESET: u32 = 0x3b6f;

/// A flag of a group: all its devices may be used.
pub const VFIO_GROUP_FLAGS_VIABLE: u32 = 1;
/// A flag of a group: it is in a container.
pub const VFIO_GROUP_FLAGS_CONTAINER_SET: u32 = 2;

/// A flag of a device: it takes VFIO_DEVICE_RESET.
pub const VFIO_DEVICE_FLAGS_RESET: u32 = 1;
/// A flag of a device: it is a PCI device.
pub const VFIO_DEVICE_FLAGS_PCI: u32 = 2;

/// A flag of a region: it can be read.
pub const VFIO_REGION_INFO_FLAG_READ: u32 = 1;
/// A flag of a region: it can be written.
pub const VFIO_REGION_INFO_FLAG_WRITE: u32 = 2;
/// A flag of a region: `cap_offset` is that of its first capability.
pub const VFIO_REGION_INFO_FLAG_CAPS: u32 = 8;
/// The capability that says what a region beyond those of PCI is for.
pub const VFIO_REGION_INFO_CAP_TYPE: u16 = 2;
/// The index of the region of PCI's first BAR. The others follow it.
pub const VFIO_PCI_BAR0_REGION_INDEX: u32 = 0;
/// The index of the region of PCI's configuration space.
pub const VFIO_PCI_CONFIG_REGION_INDEX: u32 = 7;
/// How many regions a PCI device has.
pub const VFIO_PCI_NUM_REGIONS: u32 = 9;

/// The index of MSI interrupts.
pub const VFIO_PCI_MSI_IRQ_INDEX: u32 = 1;
/// The index of MSI-X interrupts.
pub const VFIO_PCI_MSIX_IRQ_INDEX: u32 = 2;
/// How many kinds of interrupts a PCI device has.
pub const VFIO_PCI_NUM_IRQS: u32 = 5;

/// A flag of an interrupt: it is signalled by an eventfd.
pub const VFIO_IRQ_INFO_EVENTFD: u32 = 1;
/// A flag of an interrupt: all of its index are set at once.
pub const VFIO_IRQ_INFO_NORESIZE: u32 = 8;

/// A flag of SET_IRQS: there are no data.
pub const VFIO_IRQ_SET_DATA_NONE: u32 = 1;
/// A flag of SET_IRQS: the data are a byte for each interrupt.
pub const VFIO_IRQ_SET_DATA_BOOL: u32 = 2;
/// A flag of SET_IRQS: the data are a descriptor for each interrupt, or -1.
pub const VFIO_IRQ_SET_DATA_EVENTFD: u32 = 4;
/// A flag of SET_IRQS: mask the interrupts.
pub const VFIO_IRQ_SET_ACTION_MASK: u32 = 8;
/// A flag of SET_IRQS: unmask the interrupts.
pub const VFIO_IRQ_SET_ACTION_UNMASK: u32 = 16;
/// A flag of SET_IRQS: set what signals the interrupts, or signal them.
pub const VFIO_IRQ_SET_ACTION_TRIGGER: u32 = 32;

/// A group's status.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_group_status {
    /// The size of this structure, in bytes.
    pub argsz: u32,
    /// Out: VFIO_GROUP_FLAGS_.
    pub flags: u32,
}

/// What a device has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_info {
    /// The size of this structure, in bytes. Linux takes one without the last two.
    pub argsz: u32,
    /// Out: VFIO_DEVICE_FLAGS_.
    pub flags: u32,
    /// Out: how many regions.
    pub num_regions: u32,
    /// Out: how many kinds of interrupts.
    pub num_irqs: u32,
    /// Out: 0, because there are no capabilities.
    pub cap_offset: u32,
    /// Padding.
    pub pad: u32,
}

/// A region.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_region_info {
    /// In: the size of the structure. Out: the size that its capabilities need.
    pub argsz: u32,
    /// Out: VFIO_REGION_INFO_FLAG_.
    pub flags: u32,
    /// In: the index.
    pub index: u32,
    /// Out: where the first capability is, counted from this structure.
    pub cap_offset: u32,
    /// Out: the size in bytes, 0 if there is no such region.
    pub size: u64,
    /// Out: where the region is in the device's file.
    pub offset: u64,
}

/// What a region is for.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_region_info_cap_type {
    /// The capability's number, [`VFIO_REGION_INFO_CAP_TYPE`].
    pub id: u16,
    /// The capability's version, 1.
    pub version: u16,
    /// Where the next capability is, or 0.
    pub next: u32,
    /// The type.
    pub r#type: u32,
    /// The subtype.
    pub subtype: u32,
}

/// A kind of interrupts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_irq_info {
    /// The size of this structure, in bytes.
    pub argsz: u32,
    /// Out: VFIO_IRQ_INFO_.
    pub flags: u32,
    /// In: the index.
    pub index: u32,
    /// Out: how many interrupts the index has.
    pub count: u32,
}

/// The head of VFIO_DEVICE_SET_IRQS; data follow it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_irq_set {
    /// The size of this structure and the data, in bytes.
    pub argsz: u32,
    /// VFIO_IRQ_SET_: one of DATA, one of ACTION.
    pub flags: u32,
    /// The index.
    pub index: u32,
    /// The first interrupt.
    pub start: u32,
    /// How many interrupts.
    pub count: u32,
}
