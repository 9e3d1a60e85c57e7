// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages of this process that are made resident.

use std::ffi::c_void;
use std::ptr::NonNull;

use dirty_core::host::{PageKind, Prot, Run};
use dirty_core::{Errno, PageSize};
use nix::sys::mman::{madvise, MmapAdvise};

/// Makes the pages of `len` bytes resident for the access in `prot`. `vaddr` is where a
/// page of the host starts.
///
/// # Errors
///
/// EFAULT if one of them allows no such access.
pub(super) fn populate(vaddr: u64, len: u64, prot: Prot) -> Result<(), Errno> {
    let advice = if prot.contains(Prot::WRITE) {
        MmapAdvise::MADV_POPULATE_WRITE
    } else {
        MmapAdvise::MADV_POPULATE_READ
    };
    let start = NonNull::new(vaddr as *mut c_void).ok_or(Errno::EFAULT)?;
    let len = usize::try_from(len).map_err(|_| Errno::EFAULT)?;
    // SAFETY: populating changes no byte of memory, and a bad address is an error.
    unsafe { madvise(start, len, advice) }.map_err(|_| Errno::EFAULT)
}

/// Makes up to `npages` pages of size `page` resident, from the one at `vaddr` on.
/// Returns them: at least one, or the errno of the first. The pfn of a page is its number
/// in the address space of this process.
pub(super) fn pin(page: PageSize, vaddr: u64, npages: u64, prot: Prot) -> Result<Run, Errno> {
    let first = page.pages(vaddr);
    let in_space = page.pages(u64::MAX) - first + 1;
    let want = npages.min(in_space);
    let mut got = 0;
    match populate(first << page.shift(), want << page.shift(), prot) {
        Ok(()) => got = want,
        Err(e) if want == 1 => return Err(e),
        Err(_) => {
            while got < want {
                match populate((first + got) << page.shift(), page.bytes(), prot) {
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
