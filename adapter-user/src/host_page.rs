// SPDX-License-Identifier: MIT OR Apache-2.0
//! The size of this host's pages, in which KVM and the kernel's page tables count.

use std::sync::OnceLock;

#[cfg(feature = "container")]
use dirty_core::Options;
use dirty_core::PageSize;

use crate::dirty_bits::BASE_PAGE;

/// Returns the size of this host's pages.
pub(crate) fn host_page() -> PageSize {
    static SIZE: OnceLock<PageSize> = OnceLock::new();
    *SIZE.get_or_init(|| {
        // SAFETY: sysconf(3) takes a number and accesses no memory of ours.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        let size = u64::try_from(size).ok().and_then(PageSize::new);
        size.unwrap_or(BASE_PAGE) // unreachable: every system has one, a power of two
    })
}

/// Returns the default options of a [`Container`](crate::Container) on this host: those of
/// [`Options::default`], but with this host's page size, which need not be 4 KiB. A
/// container with smaller pages than the host has is refused.
///
/// ```
/// use adapter_user::{host_options, Container};
///
/// let mut options = host_options();
/// options.bitmap_budget = Some(64 << 20);
/// let container = Container::new(options);
/// ```
#[cfg(feature = "container")]
#[must_use]
pub fn host_options() -> Options {
    let mut options = Options::default();
    options.page_size = host_page();
    options
}
