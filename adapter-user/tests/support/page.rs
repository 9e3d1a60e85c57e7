// SPDX-License-Identifier: MIT OR Apache-2.0
//! The page size of a test's containers: 16 KiB in a test binary whose name ends with `_16k`,
//! 64 KiB in one that ends with `_64k`, and otherwise 4 KiB.

use adapter_user::{Options, PageSize};

pub(crate) const PAGE: u64 = match env!("CARGO_CRATE_NAME").as_bytes() {
    [.., b'_', b'1', b'6', b'k'] => 16 << 10,
    [.., b'_', b'6', b'4', b'k'] => 64 << 10,
    _ => 4 << 10,
};

pub(crate) fn options() -> Options {
    let mut options = Options::default();
    options.page_size = PageSize::new(PAGE).expect("a power of two");
    options
}
