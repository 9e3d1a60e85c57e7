// SPDX-License-Identifier: MIT OR Apache-2.0
//! The structures and numbers of `linux/vfio.h` and `linux/iommufd.h` that
//! [`DeviceLog::ioctl`](super::DeviceLog::ioctl) takes, under their C names. A test
//! compares them with the crates vfio-bindings and iommufd-bindings.

#![allow(non_camel_case_types)]

/// The ioctl `_IO(';', 117)` of a device's file; it takes a
/// [`vfio_device_feature`].
pub const VFIO_DEVICE_FEATURE: u32 = 0x3b75;
/// The bits of `flags` that have the number of the feature.
pub const VFIO_DEVICE_FEATURE_MASK: u32 = 0xffff;
/// A flag: get the feature's data.
pub const VFIO_DEVICE_FEATURE_GET: u32 = 1 << 16;
/// A flag: set the feature's data.
pub const VFIO_DEVICE_FEATURE_SET: u32 = 1 << 17;
/// A flag: ask whether the feature exists, and takes GET or SET.
pub const VFIO_DEVICE_FEATURE_PROBE: u32 = 1 << 18;
/// The feature that starts a log. SET takes a
/// [`vfio_device_feature_dma_logging_control`].
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_START: u32 = 6;
/// The feature that stops a log. SET takes no data.
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: u32 = 7;
/// The feature that reports dirty pages. GET takes a
/// [`vfio_device_feature_dma_logging_report`].
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: u32 = 8;

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

/// The head of the argument of [`VFIO_DEVICE_FEATURE`]; the feature's data follow
/// it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature {
    /// The size of this structure and the data, in bytes.
    pub argsz: u32,
    /// The number of the feature, and the flags GET, SET and PROBE.
    pub flags: u32,
}

/// The ranges to log.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature_dma_logging_control {
    /// In: a hint for the page size, in bytes. Out: the page size of the log.
    pub page_size: u64,
    /// The number of ranges.
    pub num_ranges: u32,
    /// Padding.
    pub __reserved: u32,
    /// The address of an array of [`vfio_device_feature_dma_logging_range`].
    pub ranges: u64,
}

/// A range to log.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature_dma_logging_range {
    /// The first IOVA.
    pub iova: u64,
    /// The length in bytes.
    pub length: u64,
}

/// A range to report.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature_dma_logging_report {
    /// The first IOVA.
    pub iova: u64,
    /// The length in bytes.
    pub length: u64,
    /// The size of the page that one bit stands for, in bytes.
    pub page_size: u64,
    /// The address of the bitmap.
    pub bitmap: u64,
}

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
