// SPDX-License-Identifier: MIT OR Apache-2.0
//! This process as the host of the core.

use std::collections::HashMap;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use dirty_core::host::{
    Accounting, DomainId, DomainInfo, Fault, GroupId, Iommu, Mm, PageKind, Pinning, Prot, Reach,
    UserMemory,
};
use dirty_core::Errno;

use super::charge;
use super::iommu::Iommus;
use super::locked;
use super::memory::GuestMemory;
use crate::process_memory::{read_process, write_process};

/// The first address that is not a user address with five-level page tables, which
/// the machine had where Linux was recorded. With four levels the limit is lower,
/// and an access to an address in between is EFAULT.
const USER_END: u64 = (1 << 56) - (1 << locked::PAGE_SHIFT);

/// The bit that tells the `Mm` of a [`GuestMemory`] from a process id.
const OWNED: u64 = 1 << 63;

/// The memory that mappings keep alive, and how many mappings each has, by `Mm`.
type Owned = HashMap<u64, (Arc<GuestMemory>, usize)>;

/// What the host of a container remembers between calls.
#[derive(Default)]
pub(super) struct State {
    iommus: Mutex<Iommus>,
    owned: RwLock<Owned>,
}

impl State {
    pub(super) fn iommus(&self) -> MutexGuard<'_, Iommus> {
        self.iommus.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn owned(&self, mm: Mm) -> Option<Arc<GuestMemory>> {
        let owned = self.owned.read().unwrap_or_else(PoisonError::into_inner);
        owned.get(&mm.0).map(|(memory, _)| Arc::clone(memory))
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
pub(super) struct Call<'a> {
    state: &'a State,
    caller: Caller,
    /// The memory that a mapping made by this call points into; `None` is the
    /// process.
    backing: Option<&'a Arc<GuestMemory>>,
}

impl<'a> Call<'a> {
    pub(super) fn new(state: &'a State, caller: Caller) -> Self {
        Call {
            state,
            caller,
            backing: None,
        }
    }

    pub(super) fn with_backing(state: &'a State, memory: &'a Arc<GuestMemory>) -> Self {
        Call {
            state,
            caller: Caller::Process,
            backing: Some(memory),
        }
    }
}

fn own_mm() -> Mm {
    Mm(u64::from(process::id()))
}

impl Pinning for Call<'_> {
    fn pin(&mut self, mm: Mm, vaddr: u64, prot: Prot, pfns: &mut [u64]) -> Result<usize, Errno> {
        if mm.0 & OWNED == 0 && mm != own_mm() {
            return Err(Errno::ENODEV); // this is a fork of the process that mapped it
        }
        locked::pin(vaddr, prot, pfns)
    }

    fn unpin(&mut self, pfn: u64, npages: u64, _prot: Prot) {
        locked::unpin(pfn, npages);
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
        let mm = Mm(OWNED | Arc::as_ptr(memory) as u64);
        let mut owned = self.state.owned.write();
        let owned = owned.as_mut().map_err(|_| Errno::EIO)?;
        owned.entry(mm.0).or_insert((Arc::clone(memory), 0)).1 += 1;
        Ok(mm)
    }

    fn release(&mut self, mm: Mm) {
        let mut owned = self.state.owned.write();
        let owned = match &mut owned {
            Ok(owned) => owned,
            Err(poisoned) => poisoned.get_mut(),
        };
        if let Some((_, mappings)) = owned.get_mut(&mm.0) {
            *mappings -= 1;
            if *mappings == 0 {
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
        charge::charge(npages, lock_cap)
    }

    fn uncharge(&mut self, _mm: Mm, npages: u64) {
        charge::uncharge(npages);
    }
}

impl UserMemory for Call<'_> {
    fn is_user_range(&self, addr: u64, len: u64) -> bool {
        addr.checked_add(len).is_some_and(|end| end <= USER_END)
    }

    fn copy_from_user(&mut self, addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        read_process(addr, buf)
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
