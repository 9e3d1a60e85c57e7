// SPDX-License-Identifier: MIT OR Apache-2.0
//! The numbers and layouts of `linux/vfio.h` (rule A0), written down a second
//! time: the model shares nothing with the core but the errnos.

/// `_IO(';', 100 + n)`.
const fn io(n: u32) -> u32 {
    0x3b64 + n
}

pub(super) const GET_API_VERSION: u32 = io(0);
pub(super) const CHECK_EXTENSION: u32 = io(1);
pub(super) const SET_IOMMU: u32 = io(2);
pub(super) const GET_INFO: u32 = io(12);
pub(super) const MAP_DMA: u32 = io(13);
pub(super) const UNMAP_DMA: u32 = io(14);
pub(super) const DIRTY_PAGES: u32 = io(17);

pub(super) const MAP_READ_WRITE: u32 = 1 | 2;
pub(super) const MAP_VADDR: u32 = 4;
pub(super) const UNMAP_GET_BITMAP: u32 = 1;
pub(super) const UNMAP_ALL: u32 = 2;
pub(super) const UNMAP_VADDR: u32 = 4;
pub(super) const DIRTY_START: u32 = 1;
pub(super) const DIRTY_STOP: u32 = 2;
pub(super) const DIRTY_GET_BITMAP: u32 = 4;

/// Most bytes of a user's bitmap.
pub(super) const MAX_BITMAP: u64 = 256 << 20;
/// Most bits in the bitmap of one mapping.
pub(super) const MAX_PAGES: u64 = (1 << 31) - 1;

/// The bytes of a structure, whose fields are read by offset.
pub(super) struct Fields<const N: usize>(pub(super) [u8; N]);

impl<const N: usize> Fields<N> {
    pub(super) fn u32(&self, at: usize) -> u32 {
        let bytes = self.0[at..at + 4].try_into();
        u32::from_ne_bytes(bytes.expect("four bytes"))
    }

    pub(super) fn u64(&self, at: usize) -> u64 {
        let bytes = self.0[at..at + 8].try_into();
        u64::from_ne_bytes(bytes.expect("eight bytes"))
    }
}

/// `struct vfio_bitmap`.
#[derive(Clone, Copy)]
pub(super) struct Bitmap {
    pub(super) pgsize: u64,
    pub(super) size: u64,
    pub(super) data: u64,
}

impl Bitmap {
    /// Reads the structure at offset `at` of `fields`.
    pub(super) fn new<const N: usize>(fields: &Fields<N>, at: usize) -> Self {
        Bitmap {
            pgsize: fields.u64(at),
            size: fields.u64(at + 8),
            data: fields.u64(at + 16),
        }
    }
}
