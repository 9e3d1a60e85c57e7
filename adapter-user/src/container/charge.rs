// SPDX-License-Identifier: MIT OR Apache-2.0
//! What all containers of this process charge against RLIMIT_MEMLOCK.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use dirty_core::Errno;
use nix::sys::resource::{getrlimit, Resource};

use crate::dirty_bits::BASE_PAGE;

/// How many bytes all containers are charged with. They may have pages of different sizes.
static CHARGED: AtomicU64 = AtomicU64::new(0);

/// Returns how many pages of 4 KiB the containers of this process are charged with,
/// against RLIMIT_MEMLOCK.
#[must_use]
pub fn charged_pages() -> u64 {
    BASE_PAGE.pages(CHARGED.load(Relaxed))
}

/// Whether this process may lock memory beyond its limit.
pub(super) fn has_lock_cap() -> bool {
    let cap = caps::Capability::CAP_IPC_LOCK;
    caps::has_cap(None, caps::CapSet::Effective, cap).unwrap_or(false)
}

pub(super) fn charge(bytes: u64, lock_cap: bool) -> Result<(), Errno> {
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    let more = |charged: u64| {
        let total = charged.checked_add(bytes)?;
        (lock_cap || total <= limit).then_some(total)
    };
    let charged = CHARGED.fetch_update(Relaxed, Relaxed, more);
    charged.map(|_| ()).map_err(|_| Errno::ENOMEM)
}

pub(super) fn uncharge(bytes: u64) {
    let less = |charged: u64| Some(charged.saturating_sub(bytes));
    let _ = CHARGED.fetch_update(Relaxed, Relaxed, less); // `less` never refuses
}
