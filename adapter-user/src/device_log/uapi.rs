// SPDX-License-Identifier: MIT OR Apache-2.0
//! The structures of `linux/vfio.h` and `linux/iommufd.h` that a device's log
//! speaks, under their C names. A test holds them against the crates
//! vfio-bindings and iommufd-bindings.

#![allow(non_camel_case_types)]

/// `_IO(';', 117)` on a device's file: a [`vfio_device_feature`].
pub const VFIO_DEVICE_FEATURE: u32 = 0x3b75;
/// Which feature, in `flags`.
pub const VFIO_DEVICE_FEATURE_MASK: u32 = 0xffff;
/// Get the feature's data.
pub const VFIO_DEVICE_FEATURE_GET: u32 = 1 << 16;
/// Set the feature's data.
pub const VFIO_DEVICE_FEATURE_SET: u32 = 1 << 17;
/// Ask whether the feature is there, and GET or SET of it.
pub const VFIO_DEVICE_FEATURE_PROBE: u32 = 1 << 18;
/// SET: a [`vfio_device_feature_dma_logging_control`].
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_START: u32 = 6;
/// SET: nothing.
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: u32 = 7;
/// GET: a [`vfio_device_feature_dma_logging_report`].
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: u32 = 8;

/// `_IO(';', 0x8b)` on an iommufd: a [`iommu_hwpt_set_dirty_tracking`].
pub const IOMMU_HWPT_SET_DIRTY_TRACKING: u32 = 0x3b8b;
/// `_IO(';', 0x8c)` on an iommufd: a [`iommu_hwpt_get_dirty_bitmap`].
pub const IOMMU_HWPT_GET_DIRTY_BITMAP: u32 = 0x3b8c;
/// Switch tracking on; without it off.
pub const IOMMU_HWPT_DIRTY_TRACKING_ENABLE: u32 = 1;
/// Leave the pages dirty.
pub const IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR: u32 = 1;

/// Head of [`VFIO_DEVICE_FEATURE`]; the feature's data follows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature {
    /// Bytes of this structure and the data.
    pub argsz: u32,
    /// The feature, and GET, SET, PROBE.
    pub flags: u32,
}

/// Ranges to log.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature_dma_logging_control {
    /// In: a hint. Out: the page size chosen.
    pub page_size: u64,
    /// Number of ranges.
    pub num_ranges: u32,
    /// Padding.
    pub __reserved: u32,
    /// Address of the ranges.
    pub ranges: u64,
}

/// A range to log.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature_dma_logging_range {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
}

/// A range to report.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature_dma_logging_report {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes of the page that a bit stands for.
    pub page_size: u64,
    /// Address of the bitmap.
    pub bitmap: u64,
}

/// Switches dirty tracking of a page table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct iommu_hwpt_set_dirty_tracking {
    /// Bytes of this structure.
    pub size: u32,
    /// [`IOMMU_HWPT_DIRTY_TRACKING_ENABLE`] or 0.
    pub flags: u32,
    /// The page table's number.
    pub hwpt_id: u32,
    /// 0.
    pub __reserved: u32,
}

/// Reads the dirty pages of a page table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct iommu_hwpt_get_dirty_bitmap {
    /// Bytes of this structure.
    pub size: u32,
    /// The page table's number.
    pub hwpt_id: u32,
    /// [`IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR`] or 0.
    pub flags: u32,
    /// 0.
    pub __reserved: u32,
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes of the page that a bit stands for.
    pub page_size: u64,
    /// Address of the bitmap.
    pub data: u64,
}
