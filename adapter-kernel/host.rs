// SPDX-License-Identifier: GPL-2.0-only
//! The kernel as the core's host: pages, address spaces, user memory and IOMMUs.

use core::ffi::c_void;
use core::ptr;

use dirty_core::host::{
    Accounting, DomainId, DomainInfo, Fault, GroupId, Iommu, Mm, PageKind, Pinning, Prot, Reach,
    Run, UserMemory,
};
use dirty_core::Errno;
use kernel::alloc::flags::GFP_KERNEL_ACCOUNT;
use kernel::alloc::KVec;

use crate::missing::Missing;
use crate::sys;

/// log2 of the bytes of a page.
const PAGE_SHIFT: u32 = kernel::page::PAGE_SHIFT as u32;

/// An address space that mappings point into, and the task that pays for its
/// locked memory.
#[derive(Clone, Copy)]
struct Owner {
    /// INVARIANT: held by mmgrab while `refs` is not 0.
    mm: *mut sys::MmStruct,
    /// INVARIANT: held by get_task_struct while `refs` is not 0.
    task: *mut sys::Task,
    refs: usize,
}

/// A group behind an IOMMU.
struct Attached {
    group: *mut sys::Group,
    domain: *mut sys::Domain,
    reserved: KVec<sys::Range>,
}

/// The kernel as the host of one container.
#[derive(Default)]
pub(crate) struct KernelHost {
    /// One entry for each mm. There are few.
    owners: KVec<Owner>,
    groups: KVec<Attached>,
    /// Whether domains that can track dirty pages are asked for.
    dirty_tracking: bool,
    /// Whether copies to and from user memory wait for pages.
    wait: bool,
    /// Where a copy that does not wait has stopped.
    missing: Option<Missing>,
}

// SAFETY: the pointers lead to objects of the kernel, which have their own locks.
unsafe impl Send for KernelHost {}

/// The result of a C function that returns 0 or a negative errno.
fn checked(ret: i32) -> Result<(), Errno> {
    match ret {
        0 => Ok(()),
        e => Err(Errno(e.wrapping_neg())),
    }
}

/// The result of a copy that left so many bytes of `len`.
fn copied(left: usize, len: usize) -> Result<(), Fault> {
    match left {
        0 => Ok(()),
        left => Err(Fault {
            done: len.saturating_sub(left),
        }),
    }
}

fn mm_of(mm: Mm) -> *mut sys::MmStruct {
    mm.0 as *mut sys::MmStruct
}

fn domain_of(domain: DomainId) -> *mut sys::Domain {
    domain.0 as *mut sys::Domain
}

fn group_of(group: GroupId) -> *mut sys::Group {
    group.0 as *mut sys::Group
}

/// Copies an argument from the caller's memory, and waits for its pages.
pub(crate) fn copy_from_user(addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
    let to = buf.as_mut_ptr().cast::<c_void>();
    // SAFETY: `to` has room for so many bytes. C checks the user's address.
    let left = unsafe { sys::dirty_copy_from_user(to, addr, buf.len()) };
    copied(left, buf.len())
}

/// Receives pages of bytes, by first iova and number.
type Mark<'a> = &'a mut dyn FnMut(u64, u64);

/// Tells the core of bytes that were written.
///
/// # Safety
///
/// `context` points to a [`Mark`] that nobody else uses.
unsafe extern "C" fn mark(context: *mut c_void, first: u64, last: u64) {
    // SAFETY: by contract.
    let mark = unsafe { &mut *context.cast::<Mark<'_>>() };
    let (first, last) = (first >> PAGE_SHIFT, last >> PAGE_SHIFT);
    let npages = last.wrapping_sub(first).wrapping_add(1);
    mark(first << PAGE_SHIFT, npages);
}

impl KernelHost {
    pub(crate) fn new(dirty_tracking: bool) -> Self {
        KernelHost {
            dirty_tracking,
            ..KernelHost::default()
        }
    }

    /// Makes a call of the core. Its copies wait for user memory if `wait`; else
    /// this returns also where one has stopped.
    pub(crate) fn copies<T>(
        &mut self,
        wait: bool,
        call: impl FnOnce(&mut Self) -> T,
    ) -> (T, Option<Missing>) {
        self.wait = wait;
        self.missing = None;
        (call(self), self.missing.take())
    }

    /// The result of a copy that left so many bytes of `len` at `addr` of `mm`.
    ///
    /// # Safety
    ///
    /// `mm` is valid.
    unsafe fn stopped(
        &mut self,
        mm: *mut sys::MmStruct,
        addr: u64,
        (left, len): (usize, usize),
        write: bool,
    ) -> Result<(), Fault> {
        if left != 0 && !self.wait {
            let done = len.saturating_sub(left) as u64;
            // SAFETY: by contract.
            self.missing = Some(unsafe { Missing::new(mm, addr.wrapping_add(done), left, write) });
        }
        copied(left, len)
    }

    /// The task that pays for `mm`. Null if no mapping points there, but the core
    /// asks only about an mm that it has grabbed.
    fn task(&self, mm: Mm) -> *mut sys::Task {
        let owner = self.owners.iter().find(|o| o.mm == mm_of(mm));
        owner.map_or(ptr::null_mut(), |o| o.task)
    }

    fn attached(&self, group: GroupId) -> Option<&Attached> {
        self.groups.iter().find(|a| a.group == group_of(group))
    }

    /// The domain that `group` is in.
    pub(crate) fn domain(&self, group: GroupId) -> Option<*mut sys::Domain> {
        self.attached(group).map(|a| a.domain)
    }

    fn forget(&mut self, group: GroupId) {
        let at = self.groups.iter().position(|a| a.group == group_of(group));
        let _ = at.map(|at| self.groups.remove(at)); // not `retain`, which could panic
    }
}

impl Pinning for KernelHost {
    fn pin(
        &mut self,
        mm: Mm,
        vaddr: u64,
        npages: u64,
        prot: Prot,
        runs: &mut [Run],
    ) -> Result<usize, Errno> {
        let (mm, vaddr, write) = (mm_of(mm), vaddr as usize, prot.contains(Prot::WRITE));
        let (to, max) = (runs.as_mut_ptr(), runs.len());
        // SAFETY: the core passes an mm that it has grabbed. C stores at most as
        // many runs as there is room for.
        let ret = unsafe { sys::dirty_pin(mm, vaddr, npages, write, to, max) };
        usize::try_from(ret).map_err(|_| Errno(ret.wrapping_neg() as i32))
    }

    fn unpin(&mut self, pfn: u64, npages: u64, prot: Prot) -> u64 {
        // SAFETY: the core drops only pins that it has.
        unsafe { sys::dirty_unpin(pfn, npages, prot.contains(Prot::WRITE)) }
    }

    fn page_kind(&self, pfn: u64) -> PageKind {
        sys::dirty_page_kind(pfn)
    }
}

impl Accounting for KernelHost {
    fn grab(&mut self) -> Result<Mm, Errno> {
        let current = sys::dirty_current_mm();
        if let Some(owner) = self.owners.iter_mut().find(|o| o.mm == current) {
            owner.refs = owner.refs.saturating_add(1);
            return Ok(Mm(current as u64));
        }
        let room = self.owners.reserve(1, GFP_KERNEL_ACCOUNT);
        room.map_err(|_| Errno::ENOMEM)?;
        let (mut mm, mut task) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: both point to variables of this function.
        checked(unsafe { sys::dirty_grab(&mut mm, &mut task) })?;
        let owner = Owner { mm, task, refs: 1 };
        if self.owners.push(owner, GFP_KERNEL_ACCOUNT).is_err() {
            // SAFETY: taken above, and not kept.
            unsafe { sys::dirty_release(mm, task) };
            return Err(Errno::ENOMEM);
        }
        Ok(Mm(mm as u64))
    }

    fn release(&mut self, mm: Mm) {
        let Some(at) = self.owners.iter().position(|o| o.mm == mm_of(mm)) else {
            return;
        };
        let Some(owner) = self.owners.get_mut(at) else {
            return;
        };
        owner.refs = owner.refs.saturating_sub(1);
        if owner.refs != 0 {
            return;
        }
        if let Ok(owner) = self.owners.remove(at) {
            // SAFETY: this was the core's last reference.
            unsafe { sys::dirty_release(owner.mm, owner.task) };
        }
    }

    fn reach(&self, mm: Mm) -> Reach {
        let current = sys::dirty_current_mm();
        // SAFETY: the core asks about an mm that it has grabbed.
        if !unsafe { sys::dirty_mm_alive(mm_of(mm)) } {
            Reach::Gone
        } else if current.is_null() || current == mm_of(mm) {
            Reach::Own
        } else {
            Reach::Other
        }
    }

    fn lock_cap(&self) -> bool {
        sys::dirty_lock_cap()
    }

    fn charge(&mut self, mm: Mm, npages: u64, lock_cap: bool) -> Result<(), Errno> {
        let task = self.task(mm);
        // SAFETY: mm and task are held for the mapping that is charged.
        checked(unsafe { sys::dirty_charge(mm_of(mm), task, npages, lock_cap) })
    }

    fn uncharge(&mut self, mm: Mm, npages: u64) {
        let task = self.task(mm);
        // SAFETY: as `charge`.
        unsafe { sys::dirty_uncharge(mm_of(mm), task, npages) };
    }
}

impl UserMemory for KernelHost {
    fn is_user_range(&self, addr: u64, len: u64) -> bool {
        sys::dirty_is_user_range(addr, len)
    }

    fn copy_to_user(&mut self, addr: u64, buf: &[u8]) -> Result<(), Fault> {
        let mm = Mm(sys::dirty_current_mm() as u64); // an ioctl's caller has one
        self.write_mm(mm, addr, buf)
    }

    fn read_mm(&mut self, mm: Mm, vaddr: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let (mm, to) = (mm_of(mm), buf.as_mut_ptr().cast::<c_void>());
        // SAFETY: `to` has room for so many bytes, and the core has grabbed the mm.
        // C checks the user's address.
        let left = unsafe { sys::dirty_read_mm(mm, to, vaddr, buf.len(), self.wait) };
        // SAFETY: the core has grabbed the mm.
        unsafe { self.stopped(mm, vaddr, (left, buf.len()), false) }
    }

    fn write_mm(&mut self, mm: Mm, vaddr: u64, buf: &[u8]) -> Result<(), Fault> {
        let (mm, from) = (mm_of(mm), buf.as_ptr().cast::<c_void>());
        // SAFETY: as in `read_mm`; `from` has so many bytes.
        let left = unsafe { sys::dirty_write_mm(mm, vaddr, from, buf.len(), self.wait) };
        // SAFETY: the mm is the caller's, or the core has grabbed it.
        unsafe { self.stopped(mm, vaddr, (left, buf.len()), true) }
    }
}

/// The reserved regions of `group`, where nothing may be mapped.
fn reserved(group: GroupId) -> Result<KVec<sys::Range>, Errno> {
    let mut ranges = KVec::new();
    loop {
        let room = i32::try_from(ranges.len()).map_err(|_| Errno::ENOMEM)?;
        // SAFETY: `ranges` has room for so many.
        let n = unsafe { sys::dirty_reserved(group_of(group), ranges.as_mut_ptr(), room) };
        let n = usize::try_from(n).map_err(|_| Errno(n.wrapping_neg()))?;
        if n == ranges.len() {
            return Ok(ranges);
        }
        let fresh = KVec::from_elem(sys::Range::default(), n, GFP_KERNEL_ACCOUNT);
        ranges = fresh.map_err(|_| Errno::ENOMEM)?;
    }
}

impl Iommu for KernelHost {
    fn attach(&mut self, group: GroupId) -> Result<(DomainId, DomainInfo), Errno> {
        let reserved = reserved(group)?;
        let room = self.groups.reserve(1, GFP_KERNEL_ACCOUNT);
        room.map_err(|_| Errno::ENOMEM)?;
        let (mut domain, mut info) = (ptr::null_mut(), sys::DomainInfo::default());
        // SAFETY: VFIO holds the group that it passes. The other two point to
        // variables of this function.
        checked(unsafe {
            sys::dirty_domain_attach(group_of(group), self.dirty_tracking, &mut domain, &mut info)
        })?;
        let attached = Attached {
            group: group_of(group),
            domain,
            reserved,
        };
        if self.groups.push(attached, GFP_KERNEL_ACCOUNT).is_err() {
            // SAFETY: attached above, and not kept.
            unsafe { sys::dirty_domain_detach(group_of(group), domain, true) };
            return Err(Errno::ENOMEM);
        }
        let info = DomainInfo {
            pgsize_bitmap: info.pgsize_bitmap,
            aperture: (info.first, info.last),
            coherent: info.coherent,
            isolated_msi: info.isolated_msi,
            kind: info.kind,
            dirty_tracking: info.dirty_tracking,
        };
        Ok((DomainId(domain as u64), info))
    }

    fn join(&mut self, group: GroupId, old: DomainId, domain: DomainId) -> bool {
        let (from, to) = (domain_of(old), domain_of(domain));
        // SAFETY: the core passes the group's domain and another that it has.
        let joined = unsafe { sys::dirty_domain_join(group_of(group), from, to) };
        for attached in self.groups.iter_mut().filter(|_| joined) {
            if attached.group == group_of(group) {
                attached.domain = to;
            }
        }
        joined
    }

    fn detach(&mut self, group: GroupId, domain: DomainId, last: bool) {
        // SAFETY: the group is in the domain, and is forgotten below.
        unsafe { sys::dirty_domain_detach(group_of(group), domain_of(domain), last) };
        self.forget(group);
    }

    fn reserved(&self, group: GroupId, index: usize) -> Option<(u64, u64)> {
        let range = self.attached(group)?.reserved.get(index)?;
        Some((range.first, range.last))
    }

    fn map(
        &mut self,
        domain: DomainId,
        iova: u64,
        pfn: u64,
        npages: u64,
        prot: Prot,
    ) -> Result<(), Errno> {
        // SAFETY: the domain is one of the core's, and the core has pinned the
        // pages.
        checked(unsafe { sys::dirty_map(domain_of(domain), iova, pfn, npages, prot.0) })
    }

    fn unmap(&mut self, domain: DomainId, iova: u64, npages: u64) {
        // SAFETY: the domain is one of the core's.
        unsafe { sys::dirty_unmap(domain_of(domain), iova, npages) };
    }

    fn set_dirty_tracking(&mut self, domain: DomainId, on: bool) -> Result<(), Errno> {
        // SAFETY: the core asks only domains that track.
        checked(unsafe { sys::dirty_set_tracking(domain_of(domain), on) })
    }

    fn read_and_clear_dirty(&mut self, domain: DomainId, iova: u64, npages: u64, mut to: Mark<'_>) {
        let context = ptr::from_mut(&mut to).cast::<c_void>();
        // SAFETY: the core asks only domains that track. `context` is a `Mark` that is
        // not used otherwise meanwhile.
        unsafe { sys::dirty_read_and_clear(domain_of(domain), iova, npages, mark, context) };
    }

    fn translate(&self, domain: DomainId, iova: u64) -> Option<u64> {
        // SAFETY: the domain is one of the core's.
        let phys = unsafe { sys::dirty_iova_to_phys(domain_of(domain), iova) };
        (phys != 0).then_some(phys >> PAGE_SHIFT)
    }
}
