// SPDX-License-Identifier: MIT OR Apache-2.0
//! The size of this host's pages, in which KVM and the kernel's page tables count.

use std::sync::OnceLock;

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
