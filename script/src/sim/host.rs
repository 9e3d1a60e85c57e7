// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core's host, simulated. It keeps accounts of user memory, pins, locked
//! memory and IOMMUs.

use std::alloc::{alloc_zeroed, dealloc, Layout};
use std::cell::Cell;
use std::collections::HashSet;
use std::ptr::NonNull;
use std::rc::Rc;

use super::faults::Faults;
use super::iommu::{self, Iommus};
use super::pages::Pages;
use super::user::User;
use crate::op::{Caller, PAGE, USER_END};
use dirty_core::host::*;
use dirty_core::Errno;

/// An allocator that counts the allocations that are alive.
#[derive(Clone, Debug, Default)]
pub(crate) struct CountingMemory {
    pub(crate) faults: Rc<Faults>,
    live: Rc<Cell<usize>>,
}

impl CountingMemory {
    /// The number of allocations that were not freed.
    pub(crate) fn live(&self) -> usize {
        self.live.get()
    }
}

// SAFETY: the memory comes from the global allocator, and only `free` below
// gives it back.
unsafe impl Memory for CountingMemory {
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        if self.faults.alloc.strikes(1).is_some() {
            return None;
        }
        // SAFETY: the size is not 0, see `Memory::alloc_zeroed`.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        self.live.set(self.live.get() + 1);
        Some(ptr)
    }

    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout) {
        self.live.set(self.live.get() - 1);
        // SAFETY: the caller promises that `ptr` was allocated above with this
        // layout.
        unsafe { dealloc(ptr.as_ptr(), layout) }
    }
}

/// User memory whose pages are absent until the host has waited for them.
#[derive(Debug, Default)]
pub(crate) struct Absent {
    present: HashSet<u64>,
    /// The page at which the last copy stopped.
    missing: Option<u64>,
    /// How many pages came so far.
    came: u64,
}

/// The simulated host. It panics if the core gives back what it has not taken.
#[derive(Debug)]
pub(crate) struct SimHost {
    pub(crate) user: User,
    pub(crate) faults: Rc<Faults>,
    pub(crate) caller: Caller,
    /// Whether the script's process has CAP_IPC_LOCK.
    pub(crate) lock_cap: bool,
    /// RLIMIT_MEMLOCK in pages.
    pub(crate) limit: u64,
    /// Pages charged as locked.
    pub(crate) charged: u64,
    /// Bytes that copies to user memory have written.
    pub(crate) written: u64,
    /// Whether copies under the container's lock find pages absent.
    pub(crate) absent: Option<Absent>,
    /// The number of pins of each pfn.
    pins: Pages,
    /// The sum of `pins`.
    pub(crate) pinned: u64,
    /// References to the address space.
    grabbed: u64,
    pub(crate) iommus: Iommus,
}

impl SimHost {
    pub(crate) fn new(faults: Rc<Faults>) -> Self {
        SimHost {
            user: User::default(),
            faults,
            caller: Caller::Process,
            lock_cap: true,
            limit: u64::MAX,
            charged: 0,
            written: 0,
            absent: None,
            pins: Pages::default(),
            pinned: 0,
            grabbed: 0,
            iommus: Iommus::default(),
        }
    }

    /// Whether the core has given back everything it took.
    pub(crate) fn is_settled(&self) -> bool {
        self.pinned == 0 && self.charged == 0 && self.grabbed == 0 && self.iommus.is_empty()
    }

    /// Makes every page absent again, in a host that has absent pages.
    pub(crate) fn evict(&mut self) {
        self.absent = self.absent.take().map(|_| Absent::default());
    }

    /// Waits for the page at which a copy stopped, and for as many after it as came
    /// so far. Returns whether a copy did stop.
    pub(crate) fn page_came(&mut self) -> bool {
        let Some(absent) = &mut self.absent else {
            return false;
        };
        let missing = absent.missing.take();
        if let Some(page) = missing {
            absent.present.extend(page..=page + absent.came);
            absent.came = 2 * absent.came + 1;
        }
        missing.is_some()
    }

    /// How many of `len` bytes at `addr` come before an absent page.
    fn present(&mut self, addr: u64, len: usize, write: bool) -> usize {
        let Some(absent) = &mut self.absent else {
            return len;
        };
        absent.missing = None;
        let len = self.user.accessible(addr, len, write);
        let pages = addr / PAGE..=(addr + len as u64).saturating_sub(1) / PAGE;
        match pages
            .into_iter()
            .find(|page| !absent.present.contains(page))
        {
            Some(page) if len != 0 => {
                absent.missing = Some(page);
                (page * PAGE).saturating_sub(addr) as usize
            }
            _ => len,
        }
    }

    fn write(&mut self, addr: u64, buf: &[u8]) -> Result<(), Fault> {
        let present = self.present(addr, buf.len(), true);
        let fault = self.faults.copy.strikes(present as u64);
        if fault.is_some() {
            self.page_came(); // this fault is one for good
        }
        let n = fault.map_or(present, |at| at as usize);
        let done = self.user.write(addr, &buf[..n]);
        self.written += done as u64;
        if done < buf.len() {
            return Err(Fault { done });
        }
        Ok(())
    }

    pub(crate) fn copy_from_user(&self, addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let done = self.user.read(addr, buf);
        if done < buf.len() {
            return Err(Fault { done });
        }
        Ok(())
    }
}

impl Pinning for SimHost {
    fn pin(
        &mut self,
        _: Mm,
        vaddr: u64,
        npages: u64,
        prot: Prot,
        runs: &mut [Run],
    ) -> Result<usize, Errno> {
        let first = vaddr / PAGE;
        let write = prot.contains(Prot::WRITE);
        let mut n = 0;
        while n < npages {
            let addr = (first + n).saturating_mul(PAGE);
            let left = (npages - n) * PAGE;
            match self.user.accessible(addr, left as usize, write) {
                0 => break,
                bytes => n += bytes.div_ceil(PAGE as usize) as u64,
            }
        }
        let attempts = n + u64::from(n < npages);
        let n = match self.faults.pin.strikes(attempts) {
            Some(at) => {
                // `pin` reports an errno for the first page of a call only, so
                // a fault at a later page waits for the next call.
                if at != 0 {
                    self.faults.pin.postpone();
                }
                at
            }
            None => n,
        };
        if n == 0 {
            return Err(Errno::EFAULT);
        }
        self.pins.update(first, n, |_, counts| {
            counts.iter_mut().for_each(|count| *count += 1);
        });
        self.pinned += n;
        runs[0] = Run {
            pfn: first,
            npages: n,
            kind: PageKind::Normal,
        };
        Ok(1)
    }

    fn unpin(&mut self, pfn: u64, npages: u64, _: Prot) -> u64 {
        self.pins.update(pfn, npages, |pfn, counts| {
            let fewest = counts.iter().min();
            assert_ne!(
                fewest,
                Some(&0),
                "a page from pfn {pfn:#x} on is not pinned"
            );
            counts.iter_mut().for_each(|count| *count -= 1);
        });
        self.pinned -= npages;
        npages
    }

    fn page_kind(&self, _: u64) -> PageKind {
        PageKind::Normal
    }
}

impl Accounting for SimHost {
    fn grab(&mut self) -> Result<Mm, Errno> {
        self.grabbed += 1;
        Ok(Mm(1))
    }

    fn release(&mut self, _: Mm) {
        self.grabbed -= 1;
    }

    fn reach(&self, _: Mm) -> Reach {
        match self.caller {
            Caller::Child => Reach::Other,
            _ => Reach::Own,
        }
    }

    fn lock_cap(&self) -> bool {
        self.lock_cap
    }

    fn charge(&mut self, _: Mm, npages: u64, lock_cap: bool) -> Result<(), Errno> {
        if self.faults.charge.strikes(1).is_some() {
            return Err(Errno::EINTR);
        }
        if !lock_cap && self.charged + npages > self.limit {
            return Err(Errno::ENOMEM);
        }
        self.charged += npages;
        Ok(())
    }

    fn uncharge(&mut self, _: Mm, npages: u64) {
        let left = self.charged.checked_sub(npages);
        self.charged = left.expect("pages that were charged");
    }
}

impl UserMemory for SimHost {
    fn is_user_range(&self, addr: u64, len: u64) -> bool {
        addr.checked_add(len).is_some_and(|end| end <= USER_END)
    }

    fn copy_to_user(&mut self, addr: u64, buf: &[u8]) -> Result<(), Fault> {
        self.write(addr, buf)
    }

    fn read_mm(&mut self, _: Mm, vaddr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let n = self.present(vaddr, buf.len(), false);
        self.copy_from_user(vaddr, &mut buf[..n])?;
        match n == buf.len() {
            true => Ok(()),
            false => Err(Fault { done: n }),
        }
    }

    fn write_mm(&mut self, _: Mm, vaddr: u64, buf: &[u8]) -> Result<(), Fault> {
        self.write(vaddr, buf)
    }
}

impl Iommu for SimHost {
    fn attach(&mut self, group: GroupId) -> Result<(DomainId, DomainInfo), Errno> {
        self.iommus.attach(group)
    }

    fn join(&mut self, group: GroupId, old: DomainId, domain: DomainId) -> bool {
        self.iommus.join(group, old, domain)
    }

    fn detach(&mut self, group: GroupId, domain: DomainId, last: bool) {
        self.iommus.detach(group, domain, last);
    }

    fn reserved(&self, group: GroupId, index: usize) -> Option<(u64, u64)> {
        iommu::spec(group).reserved.get(index).copied()
    }

    fn map(
        &mut self,
        domain: DomainId,
        iova: u64,
        pfn: u64,
        npages: u64,
        prot: Prot,
    ) -> Result<(), Errno> {
        if self.faults.map.strikes(1).is_some() {
            return Err(Errno::EIO);
        }
        self.iommus.map(domain, iova, pfn, npages, prot)
    }

    fn unmap(&mut self, domain: DomainId, iova: u64, npages: u64) {
        self.iommus.unmap(domain, iova, npages);
    }

    fn set_dirty_tracking(&mut self, domain: DomainId, on: bool) -> Result<(), Errno> {
        if on && self.faults.track.strikes(1).is_some() {
            return Err(Errno::EIO);
        }
        self.iommus.set_dirty_tracking(domain, on);
        Ok(())
    }

    fn read_and_clear_dirty(
        &mut self,
        domain: DomainId,
        iova: u64,
        npages: u64,
        mark: &mut dyn FnMut(u64, u64),
    ) {
        self.iommus.read_and_clear_dirty(domain, iova, npages, mark);
    }

    fn translate(&self, domain: DomainId, iova: u64) -> Option<u64> {
        self.iommus.translate(domain, iova)
    }
}
