// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pinned pages: they are resident and locked in this process.
//!
//! `mlock` does not nest: one `munlock` undoes any number of locks. So this file
//! counts the pins of each page, for the whole process.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use dirty_core::host::Prot;
use dirty_core::Errno;
use nix::sys::mman::{madvise, mlock, munlock, MmapAdvise};

/// log2 of the size of a page, in which everything here counts.
pub(super) const PAGE_SHIFT: u32 = 12;
const PAGE: u64 = 1 << PAGE_SHIFT;

/// How many pins each page has, by page number.
static PINS: LazyLock<Mutex<HashMap<u64, u32>>> = LazyLock::new(Mutex::default);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pointer(page: u64) -> Result<NonNull<c_void>, Errno> {
    NonNull::new((page << PAGE_SHIFT) as *mut c_void).ok_or(Errno::EFAULT)
}

/// Makes pages resident for the access in `prot`, and locks them unless they are
/// pinned already. A run of several pages fails with EAGAIN if one of them is: the
/// caller then goes on page by page.
fn lock_run(pins: &HashMap<u64, u32>, first: u64, npages: u64, prot: Prot) -> Result<(), Errno> {
    let advice = if prot.contains(Prot::WRITE) {
        MmapAdvise::MADV_POPULATE_WRITE
    } else {
        MmapAdvise::MADV_POPULATE_READ
    };
    let start = pointer(first)?;
    let len = (npages << PAGE_SHIFT) as usize;
    // SAFETY: populating changes no byte of memory, and a bad address is an error.
    unsafe { madvise(start, len, advice) }.map_err(|_| Errno::EFAULT)?;
    if (first..first + npages).any(|page| pins.contains_key(&page)) && npages != 1 {
        return Err(Errno::EAGAIN);
    }
    if npages == 1 && pins.contains_key(&first) {
        return Ok(());
    }
    // SAFETY: locking changes no byte of memory, and a bad address is an error.
    unsafe { mlock(start, len) }.map_err(|_| Errno::ENOMEM)
}

/// Pins up to `pfns.len()` pages from the one at `vaddr` on, and returns how many: at
/// least one, or the errno of the first. The pfn of a page is its number in the
/// address space of this process.
pub(super) fn pin(vaddr: u64, prot: Prot, pfns: &mut [u64]) -> Result<usize, Errno> {
    let first = vaddr >> PAGE_SHIFT;
    let in_space = (u64::MAX >> PAGE_SHIFT)
        .saturating_sub(first)
        .saturating_add(1);
    let want = (pfns.len() as u64).min(in_space);
    let mut pins = lock(&PINS);
    let got = match lock_run(&pins, first, want, prot) {
        Ok(()) => want,
        Err(e) if want == 1 => return Err(e),
        Err(_) => {
            let mut got = 0;
            while got < want {
                match lock_run(&pins, first + got, 1, prot) {
                    Ok(()) => got += 1,
                    Err(e) if got == 0 => return Err(e),
                    Err(_) => break,
                }
            }
            got
        }
    };
    for (page, pfn) in (first..first + got).zip(pfns) {
        *pins.entry(page).or_insert(0) += 1;
        *pfn = page;
    }
    Ok(got as usize)
}

/// Drops one pin of each page.
pub(super) fn unpin(pfn: u64, npages: u64) {
    let mut pins = lock(&PINS);
    for page in pfn..pfn.saturating_add(npages) {
        let Some(count) = pins.get_mut(&page) else {
            continue;
        };
        *count -= 1;
        if *count == 0 {
            pins.remove(&page);
            if let Ok(start) = pointer(page) {
                // SAFETY: unlocking changes no byte of memory. It fails if the owner
                // of the page has unmapped it, and then the page is unlocked too.
                let _ = unsafe { munlock(start, PAGE as usize) };
            }
        }
    }
}
