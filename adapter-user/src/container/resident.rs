// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages of this process that are made resident.

use std::ffi::c_void;
use std::ptr::NonNull;

use dirty_core::host::{PageKind, Prot, Run};
use dirty_core::Errno;
use nix::sys::mman::{madvise, MmapAdvise};
use nix::unistd::{sysconf, SysconfVar};

/// log2 of the size of a page, in which everything in this folder counts.
pub(super) const PAGE_SHIFT: u32 = 12;
/// The size of a page.
pub(super) const PAGE: u64 = 1 << PAGE_SHIFT;

/// Whether `size` is the size of this host's pages, and of those in this folder.
pub(super) fn is_host_page(size: u64) -> bool {
    let host = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    size == PAGE && host.is_some_and(|host| u64::try_from(host) == Ok(size))
}

/// Makes pages resident for the access in `prot`: the page at `vaddr` and those after
/// it, `npages` in all.
///
/// # Errors
///
/// EFAULT if one of them allows no such access.
pub(super) fn populate(vaddr: u64, npages: u64, prot: Prot) -> Result<(), Errno> {
    let advice = if prot.contains(Prot::WRITE) {
        MmapAdvise::MADV_POPULATE_WRITE
    } else {
        MmapAdvise::MADV_POPULATE_READ
    };
    let start = NonNull::new(vaddr as *mut c_void).ok_or(Errno::EFAULT)?;
    let len = npages.checked_mul(PAGE).ok_or(Errno::EFAULT)? as usize;
    // SAFETY: populating changes no byte of memory, and a bad address is an error.
    unsafe { madvise(start, len, advice) }.map_err(|_| Errno::EFAULT)
}

/// Makes up to `npages` pages resident, from the one at `vaddr` on. Returns them: at
/// least one, or the errno of the first. The pfn of a page is its number in the address
/// space of this process.
pub(super) fn pin(vaddr: u64, npages: u64, prot: Prot) -> Result<Run, Errno> {
    let first = vaddr >> PAGE_SHIFT;
    let in_space = (1 << (u64::BITS - PAGE_SHIFT)) - first;
    let want = npages.min(in_space);
    let mut got = 0;
    match populate(first << PAGE_SHIFT, want, prot) {
        Ok(()) => got = want,
        Err(e) if want == 1 => return Err(e),
        Err(_) => {
            while got < want {
                match populate((first + got) << PAGE_SHIFT, 1, prot) {
                    Ok(()) => got += 1,
                    Err(e) if got == 0 => return Err(e),
                    Err(_) => break,
                }
            }
        }
    }
    Ok(Run {
        pfn: first,
        npages: got,
        kind: PageKind::Normal,
    })
}
