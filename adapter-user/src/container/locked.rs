// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pins that lock memory, in few large blocks.
//!
//! `mlock` belongs to an address range and does not nest: whoever unlocks a range drops
//! everybody's lock of it, and nobody can tell who else had one. A page, though, stays
//! in memory as long as *any* mapping of it is locked. So a [`LockedView`] maps the
//! memory once more, at addresses that nobody else has, and locks there. It can neither
//! drop a lock that the owner of the memory has, nor lose its own to the owner.

use std::ffi::c_void;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_core::host::{Prot, Run};
use dirty_core::{Errno, PageSize};
use nix::libc;
use nix::sys::mman::munlock;
use std::ptr::NonNull;

use super::memory::GuestMemory;
use super::resident;

/// The most blocks of a view. Blocks that are locked and blocks that are not lie in
/// different VMAs, so a view has at most so many of them.
const BLOCKS: u64 = 64;
/// Blocks are multiples of this, the size of a huge page.
const LEAST: u64 = 2 << 20;

/// A mapping of a guest's memory in which the blocks that have pins are locked.
pub(super) struct LockedView {
    view: Arc<GuestMemory>,
    /// The size of the pages that are pinned.
    page: PageSize,
    /// The bytes of a block.
    block: u64,
    /// How many pins each block has. INVARIANT: the blocks that have pins are locked.
    pins: Mutex<Vec<u64>>,
}

impl LockedView {
    pub(super) fn new(memory: &GuestMemory, page: PageSize) -> io::Result<Self> {
        let view = Arc::new(memory.second_view()?);
        let block = view.len().div_ceil(BLOCKS).next_multiple_of(LEAST);
        let blocks = view.len().div_ceil(block);
        Ok(LockedView {
            view,
            page,
            block,
            pins: Mutex::new(vec![0; blocks as usize]),
        })
    }

    /// The memory, at the addresses of the view.
    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.view
    }

    fn pins(&self) -> MutexGuard<'_, Vec<u64>> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The addresses of block `k`.
    fn addresses(&self, k: u64) -> Range<u64> {
        let (start, len) = (self.view.addr(), self.view.len());
        start + k * self.block..start + len.min((k + 1) * self.block)
    }

    /// The number of the block that holds byte `offset`.
    fn block_of(&self, offset: u64) -> u64 {
        offset / self.block
    }

    /// Locks up to `npages` pages from the one at byte `offset` on, and makes them
    /// resident. It stops at the end of a block. Returns the pages, by their numbers in
    /// the address space of this process: at least one, or the errno of the first.
    pub(super) fn pin(&self, offset: u64, npages: u64, prot: Prot) -> Result<Run, Errno> {
        let k = self.block_of(offset);
        let block = self.addresses(k);
        let vaddr = self.view.addr() + offset;
        let here = self.page.pages(block.end - vaddr);
        let mut pins = self.pins();
        let count = pins.get_mut(k as usize).ok_or(Errno::EFAULT)?;
        if *count == 0 {
            lock(&block)?;
        }
        let pinned = resident::pin(self.page, vaddr, here.min(npages), prot);
        *count += pinned.as_ref().map_or(0, |run| run.npages);
        if *count == 0 {
            unlock(&block);
        }
        pinned
    }

    /// Drops one pin of each of the `npages` pages from page number `pfn` on, as far as
    /// they are pages of this view.
    pub(super) fn unpin(&self, pfn: u64, npages: u64) {
        let start = self.view.addr();
        let end = start + self.view.len();
        let mut at = (pfn << self.page.shift()).max(start);
        let last = ((pfn + npages) << self.page.shift()).min(end);
        let mut pins = self.pins();
        while at < last {
            let k = self.block_of(at - start);
            let block = self.addresses(k);
            let upto = last.min(block.end);
            if let Some(count) = pins.get_mut(k as usize) {
                let before = *count;
                *count = before.saturating_sub(self.page.pages(upto - at));
                if *count == 0 && before != 0 {
                    unlock(&block);
                }
            }
            at = upto;
        }
    }
}

/// Locks what is resident in a range, and what becomes resident there.
fn lock(range: &Range<u64>) -> Result<(), Errno> {
    let (start, len) = (range.start as *const c_void, range.end - range.start);
    // SAFETY: locking changes no byte of memory, and a bad address is an error.
    let done = unsafe { libc::mlock2(start, len as usize, libc::MLOCK_ONFAULT as libc::c_uint) };
    if done == 0 {
        Ok(())
    } else {
        Err(Errno::ENOMEM) // RLIMIT_MEMLOCK, or no room for another VMA
    }
}

fn unlock(range: &Range<u64>) {
    if let Some(start) = NonNull::new(range.start as *mut c_void) {
        // SAFETY: unlocking changes no byte of memory. The range is of a view, so no
        // lock of anybody else is dropped. It cannot fail: the range is mapped, and the
        // VMAs that are split by it are few.
        let _ = unsafe { munlock(start, (range.end - range.start) as usize) };
    }
}
