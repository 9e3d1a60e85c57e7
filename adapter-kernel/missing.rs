// SPDX-License-Identifier: GPL-2.0-only
//! User memory that a copy under the container's lock did not find.
//!
//! Such a copy does not wait for a page, because everybody else would wait too: the
//! page may be on a disk, or somebody with a userfaultfd may bring it, or never. The
//! call ends, and is made again when the page is there.

use crate::sys;

/// How often a call is made again for a missing page. After that its copies wait
/// under the lock, as those of the real driver do: else a call would not end where
/// pages go as soon as they come.
const TRIES: u32 = 16;

/// The tries of one call.
#[derive(Default)]
pub(crate) struct Tries(u32);

impl Tries {
    /// Whether the copies of the next try wait for pages.
    pub(crate) fn wait(&self) -> bool {
        self.0 >= TRIES
    }

    /// Waits, without a lock, for a page that a try did not find, and for the rest of
    /// the bitmap that it is in. Returns whether another try makes sense: not if
    /// nothing was missing, or if the page cannot be had.
    pub(crate) fn again(&mut self, missing: Option<Missing>, bitmap: Option<(u64, u64)>) -> bool {
        self.0 = self.0.saturating_add(1);
        missing.is_some_and(|missing| missing.fault_in(bitmap))
    }
}

pub(crate) struct Missing {
    /// INVARIANT: held by mmgrab.
    mm: *mut sys::MmStruct,
    addr: u64,
    len: usize,
    write: bool,
}

impl Missing {
    /// The `len` bytes at `addr` of `mm`, which were to be written if `write`.
    ///
    /// # Safety
    ///
    /// `mm` is valid.
    pub(crate) unsafe fn new(mm: *mut sys::MmStruct, addr: u64, len: usize, write: bool) -> Self {
        // SAFETY: by contract.
        unsafe { sys::dirty_hold_mm(mm) };
        Missing {
            mm,
            addr,
            len,
            write,
        }
    }

    /// Faults the memory in, as far as it can be, up to the end of `bitmap` if it is
    /// in there. Returns whether the first byte is there.
    fn fault_in(&self, bitmap: Option<(u64, u64)>) -> bool {
        let rest = bitmap.and_then(|(start, size)| {
            let before = self.addr.checked_sub(start)?;
            usize::try_from(size.checked_sub(before)?).ok()
        });
        let len = rest.map_or(self.len, |rest| rest.max(self.len));
        // SAFETY: the mm is held. C checks the address.
        let left = unsafe { sys::dirty_fault_in(self.mm, self.addr, len, self.write) };
        left < len
    }
}

impl Drop for Missing {
    fn drop(&mut self) {
        // SAFETY: held by `new`.
        unsafe { sys::dirty_drop_mm(self.mm) };
    }
}
