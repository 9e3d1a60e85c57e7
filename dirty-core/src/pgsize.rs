// SPDX-License-Identifier: MIT OR Apache-2.0
//! Page sizes.

/// A page size: a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageSize {
    /// INVARIANT: at most 63.
    shift: u32,
}

impl PageSize {
    /// `bytes` must be a power of two.
    #[must_use]
    pub const fn new(bytes: u64) -> Option<PageSize> {
        if bytes.is_power_of_two() {
            PageSize::smallest(bytes)
        } else {
            None
        }
    }

    /// The smallest of a `pgsize_bitmap`, where bit k stands for 2^k bytes.
    #[must_use]
    pub const fn smallest(pgsize_bitmap: u64) -> Option<PageSize> {
        if pgsize_bitmap == 0 {
            return None;
        }
        Some(PageSize {
            shift: pgsize_bitmap.trailing_zeros(),
        })
    }

    /// Bytes of a page.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// log2 of [`bytes`](PageSize::bytes): the pgshift.
    #[must_use]
    pub const fn shift(self) -> u32 {
        self.shift
    }

    /// Whether `value` is a multiple.
    #[must_use]
    pub const fn aligns(self, value: u64) -> bool {
        value & self.mask() == 0
    }

    /// Whole pages in `size` bytes.
    #[must_use]
    pub const fn pages(self, size: u64) -> u64 {
        size >> self.shift
    }

    /// The bits of an address inside a page.
    pub(crate) const fn mask(self) -> u64 {
        self.bytes().wrapping_sub(1)
    }
}
