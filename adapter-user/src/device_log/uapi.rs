// SPDX-License-Identifier: MIT OR Apache-2.0
//! The structures and numbers of `linux/vfio.h` and `linux/iommufd.h` that
//! [`DeviceLog::ioctl`](super::DeviceLog::ioctl) takes, under their C names. A test
//! compares them with the crates vfio-bindings and iommufd-bindings.

#![allow(non_camel_case_types)]

pub use dirty_core::migration::uapi::{
    vfio_device_feature, vfio_device_feature_dma_logging_control,
    vfio_device_feature_dma_logging_range, vfio_device_feature_dma_logging_report,
    VFIO_DEVICE_FEATURE, VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    VFIO_DEVICE_FEATURE_DMA_LOGGING_START, VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
    VFIO_DEVICE_FEATURE_GET, VFIO_DEVICE_FEATURE_MASK, VFIO_DEVICE_FEATURE_PROBE,
    VFIO_DEVICE_FEATURE_SET,
};

/// The ioctl `_IO(';', 0x8b)` of an iommufd; it takes an
/// [`iommu_hwpt_set_dirty_tracking`].
pub const IOMMU_HWPT_SET_DIRTY_TRACKING: u32 = 0x3b8b;
/// The ioctl `_IO(';', 0x8c)` of an iommufd; it takes an
/// [`iommu_hwpt_get_dirty_bitmap`].
pub const IOMMU_HWPT_GET_DIRTY_BITMAP: u32 = 0x3b8c;
/// A flag: switch tracking on. Without it tracking is switched off.
pub const IOMMU_HWPT_DIRTY_TRACKING_ENABLE: u32 = 1;
/// A flag: leave the pages dirty.
pub const IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR: u32 = 1;

/// Switches dirty tracking of a page table on or off.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct iommu_hwpt_set_dirty_tracking {
    /// The size of this structure, in bytes.
    pub size: u32,
    /// [`IOMMU_HWPT_DIRTY_TRACKING_ENABLE`] or 0.
    pub flags: u32,
    /// The page table's number.
    pub hwpt_id: u32,
    /// Must be 0.
    pub __reserved: u32,
}

/// Reads the dirty pages of a page table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct iommu_hwpt_get_dirty_bitmap {
    /// The size of this structure, in bytes.
    pub size: u32,
    /// The page table's number.
    pub hwpt_id: u32,
    /// [`IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR`] or 0.
    pub flags: u32,
    /// Must be 0.
    pub __reserved: u32,
    /// The first IOVA.
    pub iova: u64,
    /// The length in bytes.
    pub length: u64,
    /// The size of the page that one bit stands for, in bytes.
    pub page_size: u64,
    /// The address of the bitmap.
    pub data: u64,
}
