// SPDX-License-Identifier: MIT OR Apache-2.0
//! The structures of the protocol. The compiler checks their layouts.

use crate::bytes::{Fields, Out};

/// Declares structures with the offset of each field, and how they become bytes.
macro_rules! structures {
    ($($(#[$doc:meta])* $name:ident, $size:literal {
        $($(#[$about:meta])* $field:ident: $type:ty, $offset:literal;)*
    })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct $name {
            $($(#[$about])* pub $field: $type,)*
        }

        impl $name {
            /// Bytes of the structure.
            pub const SIZE: usize = $size;

            /// From the bytes of the structure.
            #[must_use]
            pub fn from_bytes(bytes: &[u8; $size]) -> Self {
                let mut fields = Fields(bytes);
                $name { $($field: <$type>::from_ne_bytes(fields.take()),)* }
            }

            /// The bytes of the structure.
            #[must_use]
            pub fn to_bytes(&self) -> [u8; $size] {
                let mut bytes = [0; $size];
                let mut out = Out::new(&mut bytes);
                $(out.put(&self.$field.to_ne_bytes());)*
                bytes
            }

            /// The structure and what follows it, or `None` if `bytes` is too short.
            #[must_use]
            pub fn split(bytes: &[u8]) -> Option<(Self, &[u8])> {
                let (head, rest) = bytes.split_first_chunk()?;
                Some((Self::from_bytes(head), rest))
            }
        }

        static_assertions::const_assert_eq!(core::mem::size_of::<$name>(), $size);
        $(static_assertions::const_assert_eq!(core::mem::offset_of!($name, $field), $offset);)*
    )*};
}

structures! {
    /// The head of a VERSION message (`struct vfio_user_version`).
    VersionHead, 4 {
        /// The major version.
        major: u16, 0;
        /// The minor version.
        minor: u16, 2;
    }

    /// The payload of DMA_MAP (`struct vfio_user_dma_map`).
    DmaMap, 32 {
        /// Bytes of this structure.
        argsz: u32, 0;
        /// [`DMA_READABLE`], [`DMA_WRITABLE`], [`DMA_MMAP`], [`DMA_FILE_IO`].
        flags: u32, 4;
        /// The offset in the file, in bytes.
        offset: u64, 8;
        /// The first IOVA.
        iova: u64, 16;
        /// The length in bytes.
        size: u64, 24;
    }

    /// The head of DMA_UNMAP and of its reply (`struct vfio_user_dma_unmap`).
    DmaUnmap, 24 {
        /// Bytes that the reply's payload may have.
        argsz: u32, 0;
        /// 0, [`UNMAP_GET_DIRTY_BITMAP`] or [`UNMAP_ALL`].
        flags: u32, 4;
        /// The first IOVA.
        iova: u64, 8;
        /// The length in bytes.
        size: u64, 16;
    }

    /// What a dirty bitmap is like (`struct vfio_user_bitmap`).
    BitmapHead, 16 {
        /// Bytes of the page that one bit stands for.
        pgsize: u64, 0;
        /// Bytes of the bitmap.
        size: u64, 8;
    }

    /// The payload of DEVICE_GET_INFO and of its reply (`struct vfio_user_device_info`).
    DeviceInfo, 16 {
        /// Bytes that the reply's payload may have; in the reply, has.
        argsz: u32, 0;
        /// `VFIO_DEVICE_FLAGS_*` of `linux/vfio.h`.
        flags: u32, 4;
        /// The number of regions.
        num_regions: u32, 8;
        /// The number of interrupt types.
        num_irqs: u32, 12;
    }

    /// The head of DEVICE_GET_REGION_INFO and of its reply (`struct vfio_region_info`).
    RegionInfo, 32 {
        /// Bytes that the reply's payload may have; in the reply, would have.
        argsz: u32, 0;
        /// `VFIO_REGION_INFO_FLAG_*` of `linux/vfio.h`.
        flags: u32, 4;
        /// The region's number.
        index: u32, 8;
        /// The offset of the first capability in the payload, or 0.
        cap_offset: u32, 12;
        /// The length in bytes.
        size: u64, 16;
        /// The offset for mmap of the descriptor that comes with the reply.
        offset: u64, 24;
    }

    /// The head of DEVICE_GET_REGION_IO_FDS and of its reply.
    RegionIoFds, 16 {
        /// Bytes that the reply's payload may have; in the reply, would have.
        argsz: u32, 0;
        /// 0.
        flags: u32, 4;
        /// The region's number.
        index: u32, 8;
        /// 0; in the reply, the number of sub-regions.
        count: u32, 12;
    }

    /// A sub-region in the reply to DEVICE_GET_REGION_IO_FDS.
    SubRegion, 40 {
        /// The offset in the region, in bytes.
        offset: u64, 0;
        /// The length in bytes, or 0 if any.
        size: u64, 8;
        /// Which of the reply's descriptors.
        fd_index: u32, 16;
        /// 0: an ioeventfd. 1: an ioregionfd.
        kind: u32, 20;
        /// The flags of the kind.
        flags: u32, 24;
        /// 0.
        padding: u32, 28;
        /// An ioeventfd's value to match, or an ioregionfd's user data.
        value: u64, 32;
    }

    /// The payload of DEVICE_GET_IRQ_INFO and of its reply (`struct vfio_irq_info`).
    IrqInfo, 16 {
        /// Bytes that the reply's payload may have; in the reply, has.
        argsz: u32, 0;
        /// `VFIO_IRQ_INFO_*` of `linux/vfio.h`.
        flags: u32, 4;
        /// The interrupt type.
        index: u32, 8;
        /// How many interrupts of this type there are.
        count: u32, 12;
    }

    /// The head of DEVICE_SET_IRQS (`struct vfio_irq_set`).
    IrqSet, 20 {
        /// Bytes of this structure and its data.
        argsz: u32, 0;
        /// One of `IRQ_DATA_*` and one of `IRQ_ACTION_*`.
        flags: u32, 4;
        /// The interrupt type.
        index: u32, 8;
        /// The first interrupt.
        start: u32, 12;
        /// How many.
        count: u32, 16;
    }

    /// The head of REGION_READ, REGION_WRITE and their replies
    /// (`struct vfio_user_region_access`).
    RegionAccess, 16 {
        /// The offset in the region, in bytes.
        offset: u64, 0;
        /// The region's number.
        region: u32, 8;
        /// The length in bytes.
        count: u32, 12;
    }

    /// The head of DMA_READ, DMA_WRITE and their replies
    /// (`struct vfio_user_dma_region_access`).
    DmaAccess, 16 {
        /// The first IOVA.
        iova: u64, 0;
        /// The length in bytes.
        count: u64, 8;
    }

    /// The head of DEVICE_FEATURE and of its reply (`struct vfio_user_device_feature`).
    FeatureHead, 8 {
        /// Bytes that the reply's payload may have; in the reply, has.
        argsz: u32, 0;
        /// The feature's number, with GET, SET and PROBE.
        flags: u32, 4;
    }

    /// The data of MIG_DEVICE_STATE (`struct vfio_user_device_feature_mig_state`).
    MigState, 8 {
        /// `VFIO_DEVICE_STATE_*` of `linux/vfio.h`.
        device_state: u32, 0;
        /// Unused.
        data_fd: u32, 4;
    }

    /// The head of the data of DMA_LOGGING_START.
    LoggingControl, 16 {
        /// A hint for the page size; in the reply, the page size of the log.
        page_size: u64, 0;
        /// The number of ranges. 0 means everything.
        num_ranges: u32, 8;
        /// 0.
        reserved: u32, 12;
    }

    /// A range of DMA_LOGGING_START.
    LoggingRange, 16 {
        /// The first IOVA.
        iova: u64, 0;
        /// The length in bytes.
        length: u64, 8;
    }

    /// The data of DMA_LOGGING_REPORT. In the reply, the bitmap follows.
    LoggingReport, 24 {
        /// The first IOVA.
        iova: u64, 0;
        /// The length in bytes.
        length: u64, 8;
        /// Bytes of the page that one bit stands for.
        page_size: u64, 16;
    }

    /// The head of MIG_DATA_READ, MIG_DATA_WRITE and their replies
    /// (`struct vfio_user_mig_data`).
    MigData, 8 {
        /// Bytes of this structure and the data.
        argsz: u32, 0;
        /// Bytes of the data.
        size: u32, 4;
    }
}

/// A flag of DMA_MAP: the device may read.
pub const DMA_READABLE: u32 = 1;
/// A flag of DMA_MAP: the device may write.
pub const DMA_WRITABLE: u32 = 2;
/// A flag of DMA_MAP: the server shall mmap the descriptor.
pub const DMA_MMAP: u32 = 4;
/// A flag of DMA_MAP: the server shall read and write the descriptor.
pub const DMA_FILE_IO: u32 = 8;

/// A flag of DMA_UNMAP: report the dirty pages of what is unmapped.
pub const UNMAP_GET_DIRTY_BITMAP: u32 = 1;
/// A flag of DMA_UNMAP: unmap everything.
pub const UNMAP_ALL: u32 = 2;

/// A flag of the reply to DEVICE_GET_REGION_INFO: capabilities follow.
pub const REGION_CAPS: u32 = 8;

/// A flag of DEVICE_SET_IRQS: no data.
pub const IRQ_DATA_NONE: u32 = 1;
/// A flag of DEVICE_SET_IRQS: one byte for each interrupt.
pub const IRQ_DATA_BOOL: u32 = 2;
/// A flag of DEVICE_SET_IRQS: one descriptor for each interrupt, or none at all.
pub const IRQ_DATA_EVENTFD: u32 = 4;
/// A flag of DEVICE_SET_IRQS: mask.
pub const IRQ_ACTION_MASK: u32 = 8;
/// A flag of DEVICE_SET_IRQS: unmask.
pub const IRQ_ACTION_UNMASK: u32 = 16;
/// A flag of DEVICE_SET_IRQS: trigger.
pub const IRQ_ACTION_TRIGGER: u32 = 32;

/// The bits of a feature's flags that have its number.
pub const FEATURE_MASK: u32 = 0xffff;
/// A flag of DEVICE_FEATURE: get the feature's data.
pub const FEATURE_GET: u32 = 1 << 16;
/// A flag of DEVICE_FEATURE: set the feature's data.
pub const FEATURE_SET: u32 = 1 << 17;
/// A flag of DEVICE_FEATURE: ask whether the feature exists, and takes GET or SET.
pub const FEATURE_PROBE: u32 = 1 << 18;

/// The feature that says what a device can do.
pub const MIGRATION: u32 = 1;
/// The feature that is a device's state.
pub const MIG_DEVICE_STATE: u32 = 2;
/// The feature that starts a log.
pub const DMA_LOGGING_START: u32 = 6;
/// The feature that stops a log.
pub const DMA_LOGGING_STOP: u32 = 7;
/// The feature that reports dirty pages.
pub const DMA_LOGGING_REPORT: u32 = 8;

/// Bytes of a dirty bitmap of `length` bytes in pages of `page_size`: whole 64-bit
/// words. `None` if the page size is not a power of two.
#[must_use]
pub const fn bitmap_bytes(length: u64, page_size: u64) -> Option<u64> {
    if !page_size.is_power_of_two() {
        return None;
    }
    // At most 2^58 words, times 8.
    length.div_ceil(page_size).div_ceil(64).checked_mul(8)
}
