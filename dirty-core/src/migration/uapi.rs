// SPDX-License-Identifier: MIT OR Apache-2.0
//! The part of `linux/vfio.h` that migrates a device and logs its DMA, under its C
//! names. The compiler checks layouts and numbers.

#![allow(non_camel_case_types, non_upper_case_globals)]

use static_assertions::const_assert_eq;

use crate::uapi::{Bytes, Fields};

/// Argument: a [`vfio_device_feature`], and the feature's data after it. It is an
/// ioctl of a device's file.
pub const VFIO_DEVICE_FEATURE: u32 = 0x3b75;
/// Argument: a [`vfio_precopy_info`]. It is an ioctl of a data file.
pub const VFIO_MIG_GET_PRECOPY_INFO: u32 = 0x3b79;

/// The bits of `flags` that have the number of the feature.
pub const VFIO_DEVICE_FEATURE_MASK: u32 = 0xffff;
/// A flag: get the feature's data.
pub const VFIO_DEVICE_FEATURE_GET: u32 = 1 << 16;
/// A flag: set the feature's data.
pub const VFIO_DEVICE_FEATURE_SET: u32 = 1 << 17;
/// A flag: ask whether the feature exists, and takes GET or SET.
pub const VFIO_DEVICE_FEATURE_PROBE: u32 = 1 << 18;

/// The feature that says what a device can do. GET gives a
/// [`vfio_device_feature_migration`].
pub const VFIO_DEVICE_FEATURE_MIGRATION: u32 = 1;
/// The feature that is a device's state. GET and SET take a
/// [`vfio_device_feature_mig_state`].
pub const VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: u32 = 2;
/// The feature that starts a log. SET takes a
/// [`vfio_device_feature_dma_logging_control`].
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_START: u32 = 6;
/// The feature that stops a log. SET takes no data.
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: u32 = 7;
/// The feature that reports dirty pages. GET takes a
/// [`vfio_device_feature_dma_logging_report`].
pub const VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: u32 = 8;
/// The feature that says how much a device has to save. GET gives a
/// [`vfio_device_feature_mig_data_size`].
pub const VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: u32 = 9;
/// The feature that makes the flags of [`vfio_precopy_info`] valid. SET takes no
/// data.
pub const VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2: u32 = 12;

/// A device has STOP, STOP_COPY and RESUMING.
pub const VFIO_MIGRATION_STOP_COPY: u64 = 1;
/// A device has RUNNING_P2P.
pub const VFIO_MIGRATION_P2P: u64 = 2;
/// A device has PRE_COPY.
pub const VFIO_MIGRATION_PRE_COPY: u64 = 4;

/// The device failed.
pub const VFIO_DEVICE_STATE_ERROR: u32 = 0;
/// The device is stopped.
pub const VFIO_DEVICE_STATE_STOP: u32 = 1;
/// The device runs.
pub const VFIO_DEVICE_STATE_RUNNING: u32 = 2;
/// The device is stopped, and its state can be read.
pub const VFIO_DEVICE_STATE_STOP_COPY: u32 = 3;
/// The device is stopped, and its state is written.
pub const VFIO_DEVICE_STATE_RESUMING: u32 = 4;
/// The device runs, without DMA to other devices.
pub const VFIO_DEVICE_STATE_RUNNING_P2P: u32 = 5;
/// The device runs, and its state can be read.
pub const VFIO_DEVICE_STATE_PRE_COPY: u32 = 6;
/// The device runs, without DMA to other devices, and its state can be read.
pub const VFIO_DEVICE_STATE_PRE_COPY_P2P: u32 = 7;

/// `initial_bytes` has begun anew.
pub const VFIO_PRECOPY_INFO_REINIT: u32 = 1;

/// The head of the argument of [`VFIO_DEVICE_FEATURE`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature {
    /// The size of this structure and the data, in bytes.
    pub argsz: u32,
    /// The number of the feature, and the flags GET, SET and PROBE.
    pub flags: u32,
}

/// What a device can do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature_migration {
    /// `VFIO_MIGRATION_*`.
    pub flags: u64,
}

/// A state.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature_mig_state {
    /// `VFIO_DEVICE_STATE_*`.
    pub device_state: u32,
    /// Out: the data file of a transfer that has begun, or -1.
    pub data_fd: i32,
}

/// How much a device has to save.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_device_feature_mig_data_size {
    /// An estimate of the bytes that STOP_COPY gives.
    pub stop_copy_length: u64,
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

/// Argument of [`VFIO_MIG_GET_PRECOPY_INFO`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_precopy_info {
    /// Bytes of this structure.
    pub argsz: u32,
    /// Out, once version 2 was asked for: [`VFIO_PRECOPY_INFO_REINIT`] or 0.
    pub flags: u32,
    /// Bytes of the first pass that are left.
    pub initial_bytes: u64,
    /// Bytes that have changed since they were read.
    pub dirty_bytes: u64,
}

impl vfio_device_feature {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 8]) -> Self {
        let mut f = Fields(bytes);
        vfio_device_feature {
            argsz: f.u32(),
            flags: f.u32(),
        }
    }
}

impl vfio_device_feature_mig_state {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 8]) -> Self {
        let mut f = Fields(bytes);
        vfio_device_feature_mig_state {
            device_state: f.u32(),
            data_fd: f.u32() as i32,
        }
    }

    /// The bytes of the structure.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 8] {
        let b = Bytes::new().u32(self.device_state);
        b.u32(self.data_fd as u32).done()
    }
}

impl vfio_device_feature_dma_logging_control {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 24]) -> Self {
        let mut f = Fields(bytes);
        vfio_device_feature_dma_logging_control {
            page_size: f.u64(),
            num_ranges: f.u32(),
            __reserved: f.u32(),
            ranges: f.u64(),
        }
    }
}

impl vfio_device_feature_dma_logging_range {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 16]) -> Self {
        let mut f = Fields(bytes);
        vfio_device_feature_dma_logging_range {
            iova: f.u64(),
            length: f.u64(),
        }
    }
}

impl vfio_device_feature_dma_logging_report {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        let mut f = Fields(bytes);
        vfio_device_feature_dma_logging_report {
            iova: f.u64(),
            length: f.u64(),
            page_size: f.u64(),
            bitmap: f.u64(),
        }
    }
}

impl vfio_precopy_info {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 24]) -> Self {
        let mut f = Fields(bytes);
        vfio_precopy_info {
            argsz: f.u32(),
            flags: f.u32(),
            initial_bytes: f.u64(),
            dirty_bytes: f.u64(),
        }
    }

    /// The bytes of the structure.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 24] {
        let b = Bytes::new().u32(self.argsz).u32(self.flags);
        b.u64(self.initial_bytes).u64(self.dirty_bytes).done()
    }
}

crate::uapi::layout! {
    vfio_device_feature, 8, align 4 { argsz @ 0, flags @ 4 }
    vfio_device_feature_migration, 8, align 8 { flags @ 0 }
    vfio_device_feature_mig_state, 8, align 4 { device_state @ 0, data_fd @ 4 }
    vfio_device_feature_mig_data_size, 8, align 8 { stop_copy_length @ 0 }
    vfio_device_feature_dma_logging_control, 24, align 8 { page_size @ 0, num_ranges @ 8, __reserved @ 12, ranges @ 16 }
    vfio_device_feature_dma_logging_range, 16, align 8 { iova @ 0, length @ 8 }
    vfio_device_feature_dma_logging_report, 32, align 8 { iova @ 0, length @ 8, page_size @ 16, bitmap @ 24 }
    vfio_precopy_info, 24, align 8 { argsz @ 0, flags @ 4, initial_bytes @ 8, dirty_bytes @ 16 }
}
const_assert_eq!(VFIO_DEVICE_FEATURE, 0x3b64 + 17);
const_assert_eq!(VFIO_MIG_GET_PRECOPY_INFO, 0x3b64 + 21);
