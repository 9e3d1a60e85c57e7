// SPDX-License-Identifier: MIT OR Apache-2.0
//! This process as the host of the core.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::host::{
    Accounting, DomainId, DomainInfo, Fault, GroupId, Iommu, Mm, PageKind, Pinning, Prot, Reach,
    Run, UserMemory,
};
use dirty_core::{Errno, PageSize};

use super::charge;
use super::iommu::Iommus;
use super::locked::LockedView;
use super::memory::GuestMemory;
use super::place::{own_mm, Place};
use super::resident;
use crate::process_memory::{read_process, write_process};

/// The first address that is not a user address on x86-64 with five-level page tables,
/// which the machine had where Linux was recorded. With four levels, and on other
/// architectures, the limit is lower, and an access to an address in between is EFAULT.
const USER_END: u64 = (1 << 56) - 4096;

/// The bit that tells the `Mm` of a [`GuestMemory`] from a process id.
const OWNED: u64 = 1 << 63;

/// The most bytes that are made resident, or locked, at a time: how far a caller may
/// exceed its limit of locked memory until it is charged.
const MOST_PINNED: u64 = 16 << 20;

/// Memory that mappings keep alive.
struct Owned {
    memory: Arc<GuestMemory>,
    /// Where its pins are locked, if they are.
    locked: Option<Arc<LockedView>>,
    mappings: usize,
}

/// What the host of a container remembers between calls.
pub(super) struct State {
    /// The size of a page, which is what a pin covers and what a pfn counts.
    pub(super) page: PageSize,
    iommus: Mutex<Iommus>,
    /// By `Mm`, which is the address of the memory and `OWNED`.
    owned: RwLock<HashMap<u64, Owned>>,
    /// Whether pins lock guest memory.
    lock_pins: bool,
}

impl State {
    pub(super) fn new(page: PageSize, lock_pins: bool) -> Self {
        State {
            page,
            iommus: Mutex::new(Iommus::new(page)),
            owned: RwLock::default(),
            lock_pins,
        }
    }

    pub(super) fn iommus(&self) -> MutexGuard<'_, Iommus> {
        self.iommus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_owned(&self) -> RwLockReadGuard<'_, HashMap<u64, Owned>> {
        self.owned.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn all_owned_mut(&self) -> RwLockWriteGuard<'_, HashMap<u64, Owned>> {
        self.owned.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn owned(&self, mm: Mm) -> Option<Arc<GuestMemory>> {
        let owned = self.all_owned();
        owned.get(&mm.0).map(|o| Arc::clone(&o.memory))
    }

    fn locked(&self, mm: Mm) -> Option<Arc<LockedView>> {
        let owned = self.all_owned();
        owned.get(&mm.0).and_then(|o| o.locked.clone())
    }

    /// Where the memory of a pinned page is.
    pub(super) fn place(&self, pfn: u64) -> Place {
        let vaddr = pfn << self.page.shift();
        let holds = |memory: &Arc<GuestMemory>| {
            let offset = vaddr.checked_sub(memory.addr())?;
            (offset < memory.len()).then(|| Place::Memory(Arc::clone(memory), offset))
        };
        let owned = self.all_owned();
        let hit = owned.values().find_map(|owned| {
            let view = owned.locked.as_ref().and_then(|l| holds(l.memory()));
            view.or_else(|| holds(&owned.memory))
        });
        hit.unwrap_or(Place::Process(vaddr))
    }
}

/// Who calls the core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Caller {
    /// This process.
    Process,
    /// A kernel thread, which reaches every address space that has not ended.
    KernelThread,
}

/// The host during one call.
///
/// What is given back page by page is given back in one go: when this is dropped, or
/// before the host does something that depends on it.
pub(super) struct Call<'a> {
    state: &'a State,
    caller: Caller,
    /// The memory that a mapping made by this call points into; `None` is the
    /// process.
    backing: Option<&'a Arc<GuestMemory>>,
    /// Pages that are still to be unpinned: the first pfn, and how many.
    unpinned: (u64, u64),
    /// Pages that are still to be uncharged.
    uncharged: u64,
}

impl<'a> Call<'a> {
    pub(super) fn new(state: &'a State, caller: Caller) -> Self {
        Call {
            state,
            caller,
            backing: None,
            unpinned: (0, 0),
            uncharged: 0,
        }
    }

    pub(super) fn with_backing(state: &'a State, memory: &'a Arc<GuestMemory>) -> Self {
        Call {
            backing: Some(memory),
            ..Call::new(state, Caller::Process)
        }
    }

    fn give_back(&mut self) {
        let (pfn, npages) = mem::take(&mut self.unpinned);
        if npages != 0 {
            for owned in self.state.all_owned().values() {
                if let Some(view) = &owned.locked {
                    view.unpin(pfn, npages); // only one of the views has the pages
                }
            }
        }
        charge::uncharge(mem::take(&mut self.uncharged) << self.state.page.shift());
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if self.unpinned.1 != 0 || self.uncharged != 0 {
            self.give_back();
        }
    }
}

impl Pinning for Call<'_> {
    fn pin(
        &mut self,
        mm: Mm,
        vaddr: u64,
        npages: u64,
        prot: Prot,
        runs: &mut [Run],
    ) -> Result<usize, Errno> {
        if mm.0 & OWNED == 0 && mm != own_mm() {
            return Err(Errno::ENODEV); // this is a fork of the process that mapped it
        }
        let locked = self.state.lock_pins.then(|| self.state.locked(mm));
        let page = self.state.page;
        let npages = npages.min(page.pages(MOST_PINNED));
        let run = match locked.flatten() {
            Some(view) => view.pin(vaddr - (mm.0 & !OWNED), npages, prot)?,
            None => resident::pin(page, vaddr, npages, prot)?,
        };
        runs[0] = run;
        Ok(1)
    }

    fn unpin(&mut self, pfn: u64, npages: u64, _prot: Prot) -> u64 {
        if !self.state.lock_pins {
            return npages; // pages that are only resident hold nothing
        }
        let (first, n) = self.unpinned;
        if n != 0 && first + n == pfn {
            self.unpinned = (first, n + npages);
        } else {
            self.give_back();
            self.unpinned = (pfn, npages);
        }
        npages
    }

    fn page_kind(&self, _pfn: u64) -> PageKind {
        PageKind::Normal
    }
}

impl Accounting for Call<'_> {
    fn grab(&mut self) -> Result<Mm, Errno> {
        let Some(memory) = self.backing else {
            return Ok(own_mm());
        };
        let mm = Mm(OWNED | memory.addr());
        let mut owned = self.state.all_owned_mut();
        if let Some(owned) = owned.get_mut(&mm.0) {
            owned.mappings += 1;
        } else {
            let new = || LockedView::new(memory, self.state.page);
            let locked = self.state.lock_pins.then(new);
            let locked = locked.transpose().map_err(|_| Errno::ENOMEM)?;
            let new = Owned {
                memory: Arc::clone(memory),
                locked: locked.map(Arc::new),
                mappings: 1,
            };
            owned.insert(mm.0, new);
        }
        Ok(mm)
    }

    fn release(&mut self, mm: Mm) {
        self.give_back();
        let mut owned = self.state.all_owned_mut();
        if let Some(hit) = owned.get_mut(&mm.0) {
            hit.mappings -= 1;
            if hit.mappings == 0 {
                owned.remove(&mm.0);
            }
        }
    }

    fn reach(&self, mm: Mm) -> Reach {
        match (mm.0 & OWNED != 0, self.caller) {
            (true, _) => Reach::Own,
            _ if mm == own_mm() => Reach::Own,
            (false, Caller::Process) => Reach::Other,
            (false, Caller::KernelThread) => Reach::Gone,
        }
    }

    fn lock_cap(&self) -> bool {
        charge::has_lock_cap()
    }

    fn charge(&mut self, _mm: Mm, npages: u64, lock_cap: bool) -> Result<(), Errno> {
        self.give_back();
        let bytes = npages.checked_mul(self.state.page.bytes());
        charge::charge(bytes.ok_or(Errno::ENOMEM)?, lock_cap)
    }

    fn uncharge(&mut self, _mm: Mm, npages: u64) {
        self.uncharged += npages;
    }
}

impl UserMemory for Call<'_> {
    fn is_user_range(&self, addr: u64, len: u64) -> bool {
        addr.checked_add(len).is_some_and(|end| end <= USER_END)
    }

    fn copy_to_user(&mut self, addr: u64, buf: &[u8]) -> Result<(), Fault> {
        write_process(addr, buf)
    }

    fn read_mm(&mut self, mm: Mm, vaddr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let Some(memory) = self.state.owned(mm) else {
            return read_process(vaddr, buf);
        };
        let offset = vaddr.wrapping_sub(memory.addr());
        memory.read(offset, buf).map_err(|_| Fault { done: 0 })
    }

    fn write_mm(&mut self, mm: Mm, vaddr: u64, buf: &[u8]) -> Result<(), Fault> {
        let Some(memory) = self.state.owned(mm) else {
            return write_process(vaddr, buf);
        };
        let offset = vaddr.wrapping_sub(memory.addr());
        memory.write(offset, buf).map_err(|_| Fault { done: 0 })
    }
}

impl Iommu for Call<'_> {
    fn attach(&mut self, group: GroupId) -> Result<(DomainId, DomainInfo), Errno> {
        self.state.iommus().attach(group)
    }

    fn join(&mut self, _group: GroupId, old: DomainId, domain: DomainId) -> bool {
        self.state.iommus().join(old, domain)
    }

    fn detach(&mut self, _group: GroupId, domain: DomainId, last: bool) {
        self.state.iommus().detach(domain, last);
    }

    fn reserved(&self, group: GroupId, index: usize) -> Option<(u64, u64)> {
        self.state.iommus().reserved(group, index)
    }

    fn map(
        &mut self,
        domain: DomainId,
        iova: u64,
        pfn: u64,
        npages: u64,
        _prot: Prot,
    ) -> Result<(), Errno> {
        self.state.iommus().map(domain, iova, pfn, npages)
    }

    fn unmap(&mut self, domain: DomainId, iova: u64, npages: u64) {
        self.state.iommus().unmap(domain, iova, npages);
    }

    fn translate(&self, domain: DomainId, iova: u64) -> Option<u64> {
        self.state.iommus().translate(domain, iova)
    }
}
