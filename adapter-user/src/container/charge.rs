// SPDX-License-Identifier: MIT OR Apache-2.0
//! What all containers of this process charge against RLIMIT_MEMLOCK.

use std::sync::{Mutex, MutexGuard, PoisonError};

use dirty_core::Errno;
use nix::sys::resource::{getrlimit, Resource};

use super::locked::PAGE_SHIFT;

/// How many pages all containers are charged with.
static CHARGED: Mutex<u64> = Mutex::new(0);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns how many pages of 4 KiB the containers of this process are charged with,
/// against RLIMIT_MEMLOCK.
#[must_use]
pub fn charged_pages() -> u64 {
    *lock(&CHARGED)
}

/// Whether this process may lock memory beyond its limit.
pub(super) fn has_lock_cap() -> bool {
    let cap = caps::Capability::CAP_IPC_LOCK;
    caps::has_cap(None, caps::CapSet::Effective, cap).unwrap_or(false)
}

pub(super) fn charge(npages: u64, lock_cap: bool) -> Result<(), Errno> {
    let mut charged = lock(&CHARGED);
    let total = charged.checked_add(npages).ok_or(Errno::ENOMEM)?;
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft >> PAGE_SHIFT);
    if total > limit && !lock_cap {
        return Err(Errno::ENOMEM);
    }
    *charged = total;
    Ok(())
}

pub(super) fn uncharge(npages: u64) {
    let mut charged = lock(&CHARGED);
    *charged = charged.saturating_sub(npages);
}
