// SPDX-License-Identifier: MIT OR Apache-2.0
//! The part of `linux/vfio.h` that a type1 container uses, under its C names. The
//! compiler checks layouts and numbers, for LP64.

#![allow(non_camel_case_types, non_upper_case_globals)]

use static_assertions::{assert_eq_size, const_assert, const_assert_eq};

/// First ioctl number: `_IO(';', 100)`.
const VFIO_BASE: u32 = 0x3b64;

/// No argument; answers the version of the interface, 0.
pub const VFIO_GET_API_VERSION: u32 = VFIO_BASE;
/// Argument: an extension's number; answers 1 if it is there.
pub const VFIO_CHECK_EXTENSION: u32 = VFIO_BASE + 1;
/// Argument: an IOMMU type.
pub const VFIO_SET_IOMMU: u32 = VFIO_BASE + 2;
/// Argument: a [`vfio_iommu_type1_info`].
pub const VFIO_IOMMU_GET_INFO: u32 = VFIO_BASE + 12;
/// Argument: a [`vfio_iommu_type1_dma_map`].
pub const VFIO_IOMMU_MAP_DMA: u32 = VFIO_BASE + 13;
/// Argument: a [`vfio_iommu_type1_dma_unmap`], perhaps with a [`vfio_bitmap`].
pub const VFIO_IOMMU_UNMAP_DMA: u32 = VFIO_BASE + 14;
/// Argument: a [`vfio_iommu_type1_dirty_bitmap`], perhaps with a
/// [`vfio_iommu_type1_dirty_bitmap_get`].
pub const VFIO_IOMMU_DIRTY_PAGES: u32 = VFIO_BASE + 17;

/// IOMMU type and extension: type1 version 1.
pub const VFIO_TYPE1_IOMMU: u64 = 1;
/// IOMMU type and extension: type1 version 2.
pub const VFIO_TYPE1v2_IOMMU: u64 = 3;
/// Extension: DMA is cache-coherent.
pub const VFIO_DMA_CC_IOMMU: u64 = 4;
/// Extension: `UNMAP_DMA` knows [`VFIO_DMA_UNMAP_FLAG_ALL`].
pub const VFIO_UNMAP_ALL: u64 = 9;
/// Extension: a mapping's vaddr can be replaced.
pub const VFIO_UPDATE_VADDR: u64 = 10;

/// `iova_pgsizes` is valid.
pub const VFIO_IOMMU_INFO_PGSIZES: u32 = 1;
/// `cap_offset` is valid.
pub const VFIO_IOMMU_INFO_CAPS: u32 = 2;

/// Capability: valid iova ranges.
pub const VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE: u16 = 1;
/// Capability: dirty-page tracking.
pub const VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION: u16 = 2;
/// Capability: how many more mappings are possible.
pub const VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: u16 = 3;

/// The device may read.
pub const VFIO_DMA_MAP_FLAG_READ: u32 = 1;
/// The device may write.
pub const VFIO_DMA_MAP_FLAG_WRITE: u32 = 2;
/// Give an existing mapping a new vaddr.
pub const VFIO_DMA_MAP_FLAG_VADDR: u32 = 4;

/// Harvest the dirty bits of what is unmapped.
pub const VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP: u32 = 1;
/// Unmap everything.
pub const VFIO_DMA_UNMAP_FLAG_ALL: u32 = 2;
/// Invalidate the vaddr instead of unmapping.
pub const VFIO_DMA_UNMAP_FLAG_VADDR: u32 = 4;

/// Start tracking.
pub const VFIO_IOMMU_DIRTY_PAGES_FLAG_START: u32 = 1;
/// Stop tracking.
pub const VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP: u32 = 2;
/// Report and clear dirty bits.
pub const VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP: u32 = 4;

/// Most bits in the bitmap of one mapping.
pub const DIRTY_BITMAP_PAGES_MAX: u64 = i32::MAX as u64;
/// Most bytes of a user's bitmap.
pub const DIRTY_BITMAP_SIZE_MAX: u64 = 1 << 28;

/// Bytes of a bitmap for `npages` pages: whole 64-bit words.
#[must_use]
pub const fn dirty_bitmap_bytes(npages: u64) -> u64 {
    npages.div_ceil(64).saturating_mul(8)
}

/// Argument of [`VFIO_IOMMU_GET_INFO`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_iommu_type1_info {
    /// Bytes of this structure and what follows it.
    pub argsz: u32,
    /// `VFIO_IOMMU_INFO_*`.
    pub flags: u32,
    /// Supported page sizes: bit k stands for 2^k bytes.
    pub iova_pgsizes: u64,
    /// Offset of the first capability from here, 0 for none.
    pub cap_offset: u32,
    /// Padding.
    pub pad: u32,
}

/// Head of a capability.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_info_cap_header {
    /// Which capability.
    pub id: u16,
    /// Its version.
    pub version: u16,
    /// Offset of the next one from the start of the info structure, 0 at the end.
    pub next: u32,
}

/// A range of valid iovas.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_iova_range {
    /// First address.
    pub start: u64,
    /// Last address.
    pub end: u64,
}

/// Capability 1; `nr_iovas` ranges follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_iommu_type1_info_cap_iova_range {
    /// Id 1, version 1.
    pub header: vfio_info_cap_header,
    /// Number of ranges.
    pub nr_iovas: u32,
    /// Zero.
    pub reserved: u32,
}

/// Capability 2.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_iommu_type1_info_cap_migration {
    /// Id 2, version 1.
    pub header: vfio_info_cap_header,
    /// Zero.
    pub flags: u32,
    /// Page sizes of dirty bitmaps: bit k stands for 2^k bytes.
    pub pgsize_bitmap: u64,
    /// Most bytes of a bitmap.
    pub max_dirty_bitmap_size: u64,
}

/// Capability 3.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_iommu_type1_info_dma_avail {
    /// Id 3, version 1.
    pub header: vfio_info_cap_header,
    /// How many more mappings are possible.
    pub avail: u32,
}

/// Argument of [`VFIO_IOMMU_MAP_DMA`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_iommu_type1_dma_map {
    /// Bytes of this structure.
    pub argsz: u32,
    /// `VFIO_DMA_MAP_FLAG_*`.
    pub flags: u32,
    /// Address in the process.
    pub vaddr: u64,
    /// Address for the device.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
}

/// Argument of [`VFIO_IOMMU_UNMAP_DMA`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_iommu_type1_dma_unmap {
    /// Bytes of this structure and what follows it.
    pub argsz: u32,
    /// `VFIO_DMA_UNMAP_FLAG_*`.
    pub flags: u32,
    /// First address.
    pub iova: u64,
    /// Bytes; on return, bytes that were unmapped.
    pub size: u64,
}

/// A user's bitmap.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_bitmap {
    /// Bytes of the page that a bit stands for.
    pub pgsize: u64,
    /// Bytes of the bitmap.
    pub size: u64,
    /// Address of the bitmap.
    pub data: u64,
}

/// Argument of [`VFIO_IOMMU_DIRTY_PAGES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_iommu_type1_dirty_bitmap {
    /// Bytes of this structure and what follows it.
    pub argsz: u32,
    /// `VFIO_IOMMU_DIRTY_PAGES_FLAG_*`.
    pub flags: u32,
}

/// What follows [`vfio_iommu_type1_dirty_bitmap`] for GET_BITMAP.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct vfio_iommu_type1_dirty_bitmap_get {
    /// First address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// Where the bits go.
    pub bitmap: vfio_bitmap,
}

/// Reads fields one after another; zero beyond the end.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    pub(crate) fn u32(&mut self) -> u32 {
        let (head, tail) = self.0.split_first_chunk().unwrap_or((&[0; 4], &[]));
        self.0 = tail;
        u32::from_ne_bytes(*head)
    }

    pub(crate) fn u64(&mut self) -> u64 {
        let (head, tail) = self.0.split_first_chunk().unwrap_or((&[0; 8], &[]));
        self.0 = tail;
        u64::from_ne_bytes(*head)
    }
}

/// Collects fields one after another; what does not fit is dropped.
pub(crate) struct Bytes<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Bytes<N> {
    pub(crate) fn new() -> Self {
        Bytes {
            bytes: [0; N],
            len: 0,
        }
    }

    fn put(mut self, field: &[u8]) -> Self {
        let free = self.bytes.get_mut(self.len..).unwrap_or_default();
        if let Some((place, _)) = free.split_at_mut_checked(field.len()) {
            place.copy_from_slice(field);
            self.len = self.len.saturating_add(field.len());
        }
        self
    }

    pub(crate) fn u16(self, v: u16) -> Self {
        self.put(&v.to_ne_bytes())
    }

    pub(crate) fn u32(self, v: u32) -> Self {
        self.put(&v.to_ne_bytes())
    }

    pub(crate) fn u64(self, v: u64) -> Self {
        self.put(&v.to_ne_bytes())
    }

    pub(crate) fn done(self) -> [u8; N] {
        self.bytes
    }
}

impl vfio_iommu_type1_info {
    /// The bytes of the structure.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 24] {
        let b = Bytes::new().u32(self.argsz).u32(self.flags);
        let b = b.u64(self.iova_pgsizes).u32(self.cap_offset);
        b.u32(self.pad).done()
    }
}

impl vfio_iommu_type1_dma_map {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        let mut f = Fields(bytes);
        vfio_iommu_type1_dma_map {
            argsz: f.u32(),
            flags: f.u32(),
            vaddr: f.u64(),
            iova: f.u64(),
            size: f.u64(),
        }
    }
}

impl vfio_iommu_type1_dma_unmap {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 24]) -> Self {
        let mut f = Fields(bytes);
        vfio_iommu_type1_dma_unmap {
            argsz: f.u32(),
            flags: f.u32(),
            iova: f.u64(),
            size: f.u64(),
        }
    }

    /// The bytes of the structure.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 24] {
        let b = Bytes::new().u32(self.argsz).u32(self.flags);
        b.u64(self.iova).u64(self.size).done()
    }
}

impl vfio_bitmap {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 24]) -> Self {
        let mut f = Fields(bytes);
        vfio_bitmap {
            pgsize: f.u64(),
            size: f.u64(),
            data: f.u64(),
        }
    }
}

impl vfio_iommu_type1_dirty_bitmap {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 8]) -> Self {
        let mut f = Fields(bytes);
        vfio_iommu_type1_dirty_bitmap {
            argsz: f.u32(),
            flags: f.u32(),
        }
    }
}

impl vfio_iommu_type1_dirty_bitmap_get {
    /// From the bytes of the structure.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 40]) -> Self {
        let mut f = Fields(bytes);
        vfio_iommu_type1_dirty_bitmap_get {
            iova: f.u64(),
            size: f.u64(),
            bitmap: vfio_bitmap {
                pgsize: f.u64(),
                size: f.u64(),
                data: f.u64(),
            },
        }
    }
}

macro_rules! layout {
    ($($name:ident, $size:literal, align $align:literal { $($field:ident @ $offset:literal),* })*) => {$(
        static_assertions::const_assert_eq!(core::mem::size_of::<$name>(), $size);
        static_assertions::const_assert_eq!(core::mem::align_of::<$name>(), $align);
        $(static_assertions::const_assert_eq!(core::mem::offset_of!($name, $field), $offset);)*
    )*};
}
pub(crate) use layout;

// Table A0.
layout! {
    vfio_iommu_type1_info, 24, align 8 { argsz @ 0, flags @ 4, iova_pgsizes @ 8, cap_offset @ 16, pad @ 20 }
    vfio_info_cap_header, 8, align 4 { id @ 0, version @ 2, next @ 4 }
    vfio_iova_range, 16, align 8 { start @ 0, end @ 8 }
    vfio_iommu_type1_info_cap_iova_range, 16, align 4 { header @ 0, nr_iovas @ 8, reserved @ 12 }
    vfio_iommu_type1_info_cap_migration, 32, align 8 { header @ 0, flags @ 8, pgsize_bitmap @ 16, max_dirty_bitmap_size @ 24 }
    vfio_iommu_type1_info_dma_avail, 12, align 4 { header @ 0, avail @ 8 }
    vfio_iommu_type1_dma_map, 32, align 8 { argsz @ 0, flags @ 4, vaddr @ 8, iova @ 16, size @ 24 }
    vfio_iommu_type1_dma_unmap, 24, align 8 { argsz @ 0, flags @ 4, iova @ 8, size @ 16 }
    vfio_bitmap, 24, align 8 { pgsize @ 0, size @ 8, data @ 16 }
    vfio_iommu_type1_dirty_bitmap, 8, align 4 { argsz @ 0, flags @ 4 }
    vfio_iommu_type1_dirty_bitmap_get, 40, align 8 { iova @ 0, size @ 8, bitmap @ 16 }
}
const_assert_eq!(VFIO_GET_API_VERSION, 0x3b64);
const_assert_eq!(VFIO_CHECK_EXTENSION, 0x3b65);
const_assert_eq!(VFIO_SET_IOMMU, 0x3b66);
const_assert_eq!(VFIO_IOMMU_GET_INFO, 0x3b70);
const_assert_eq!(VFIO_IOMMU_MAP_DMA, 0x3b71);
const_assert_eq!(VFIO_IOMMU_UNMAP_DMA, 0x3b72);
const_assert_eq!(VFIO_IOMMU_DIRTY_PAGES, 0x3b75);
const_assert_eq!(
    DIRTY_BITMAP_SIZE_MAX,
    dirty_bitmap_bytes(DIRTY_BITMAP_PAGES_MAX)
);
const_assert!(cfg!(target_endian = "little"));
assert_eq_size!(usize, u64);
