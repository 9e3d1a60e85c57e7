// SPDX-License-Identifier: GPL-2.0-only
//! The C half, as `glue.h` declares it.
//!
//! # Safety
//!
//! The contract of every `unsafe fn` here: each pointer leads to a live object of its
//! type that the caller holds, and a buffer has the length that is passed with it. A
//! function that asks for more says so.

use dirty_core::host::{PageKind, Run};
use kernel::ffi::{c_int, c_long, c_ulong, c_void};

/// Declares types whose fields only C knows.
macro_rules! opaque {
    ($($name:ident),*) => { $(
        #[repr(C)]
        pub(crate) struct $name {
            _private: [u8; 0],
        }
    )* };
}

opaque!(Devices, Domain, Group, MmStruct, Mutex, Page, Task, VfioDevice);

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct DomainInfo {
    pub(crate) pgsize_bitmap: u64,
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) kind: u64,
    pub(crate) coherent: bool,
    pub(crate) isolated_msi: bool,
    pub(crate) dirty_tracking: bool,
}

/// First and last address.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Range {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

unsafe extern "C" {
    /// The caller unregisters before the module goes.
    pub(crate) unsafe fn dirty_register() -> c_int;
    /// The backend is registered.
    pub(crate) unsafe fn dirty_unregister();
    pub(crate) safe fn dirty_dma_entry_limit() -> u32;
    pub(crate) safe fn dirty_bitmap_budget() -> u64;
    pub(crate) safe fn dirty_skip_read_only() -> bool;
    pub(crate) safe fn dirty_iommu_dirty_tracking() -> bool;

    pub(crate) safe fn dirty_alloc(size: usize) -> *mut c_void;
    /// `memory` came from `dirty_alloc`, and nobody uses it any more.
    pub(crate) unsafe fn dirty_free(memory: *mut c_void);

    pub(crate) safe fn dirty_mutex_new() -> *mut Mutex;
    /// Nobody uses it any more.
    pub(crate) unsafe fn dirty_mutex_free(mutex: *mut Mutex);
    /// This thread does not have it.
    pub(crate) unsafe fn dirty_mutex_lock(mutex: *mut Mutex);
    /// This thread does not have it.
    pub(crate) unsafe fn dirty_mutex_lock_killable(mutex: *mut Mutex) -> bool;
    /// This thread has it.
    pub(crate) unsafe fn dirty_mutex_unlock(mutex: *mut Mutex);

    pub(crate) safe fn dirty_devices_new() -> *mut Devices;
    /// `devices` is empty, and nobody uses it any more.
    pub(crate) unsafe fn dirty_devices_free(devices: *mut Devices);
    /// `vdev` is in no list.
    pub(crate) unsafe fn dirty_devices_add(devices: *mut Devices, vdev: *mut VfioDevice);
    /// `vdev` is in `devices`.
    pub(crate) unsafe fn dirty_devices_remove(devices: *mut Devices, vdev: *mut VfioDevice);
    /// The caller does not hold the container's lock.
    pub(crate) unsafe fn dirty_devices_may_pin(devices: *mut Devices) -> bool;
    /// The caller does not hold the container's lock.
    pub(crate) unsafe fn dirty_devices_unmap(devices: *mut Devices, iova: u64, size: u64);

    pub(crate) unsafe fn dirty_pin(
        mm: *mut MmStruct,
        vaddr: c_ulong,
        npages: u64,
        write: bool,
        runs: *mut Run,
        max: c_ulong,
    ) -> c_long;
    /// The caller gives up a pin of each page, which `dirty_pin` took.
    pub(crate) unsafe fn dirty_unpin(pfn: u64, npages: u64, write: bool) -> u64;
    pub(crate) safe fn dirty_page_kind(pfn: u64) -> PageKind;
    pub(crate) safe fn dirty_page(pfn: u64) -> *mut Page;

    pub(crate) unsafe fn dirty_grab(mm: *mut *mut MmStruct, task: *mut *mut Task) -> c_int;
    /// The caller gives up what `dirty_grab` took.
    pub(crate) unsafe fn dirty_release(mm: *mut MmStruct, task: *mut Task);
    pub(crate) safe fn dirty_current_mm() -> *mut MmStruct;
    pub(crate) unsafe fn dirty_mm_alive(mm: *mut MmStruct) -> bool;
    pub(crate) safe fn dirty_lock_cap() -> bool;
    pub(crate) unsafe fn dirty_charge(
        mm: *mut MmStruct,
        task: *mut Task,
        npages: u64,
        lock_cap: bool,
    ) -> c_int;
    pub(crate) unsafe fn dirty_uncharge(mm: *mut MmStruct, task: *mut Task, npages: u64);

    pub(crate) safe fn dirty_is_user_range(addr: u64, len: u64) -> bool;
    pub(crate) unsafe fn dirty_copy_from_user(to: *mut c_void, from: u64, len: usize) -> usize;
    pub(crate) unsafe fn dirty_hold_mm(mm: *mut MmStruct);
    /// The caller gives up what `dirty_hold_mm` took.
    pub(crate) unsafe fn dirty_drop_mm(mm: *mut MmStruct);
    pub(crate) unsafe fn dirty_fault_in(
        mm: *mut MmStruct,
        addr: u64,
        len: usize,
        write: bool,
    ) -> usize;
    pub(crate) unsafe fn dirty_read_mm(
        mm: *mut MmStruct,
        to: *mut c_void,
        from: u64,
        len: usize,
        wait: bool,
    ) -> usize;
    pub(crate) unsafe fn dirty_write_mm(
        mm: *mut MmStruct,
        to: u64,
        from: *const c_void,
        len: usize,
        wait: bool,
    ) -> usize;

    pub(crate) unsafe fn dirty_domain_attach(
        group: *mut Group,
        dirty_tracking: bool,
        domain: *mut *mut Domain,
        info: *mut DomainInfo,
    ) -> c_int;
    /// `group` is in `old`, which is freed if this returns true.
    pub(crate) unsafe fn dirty_domain_join(
        group: *mut Group,
        old: *mut Domain,
        domain: *mut Domain,
    ) -> bool;
    /// `group` is in `domain`, as its last group if `last`: then the domain is freed.
    pub(crate) unsafe fn dirty_domain_detach(group: *mut Group, domain: *mut Domain, last: bool);
    pub(crate) unsafe fn dirty_reserved(group: *mut Group, ranges: *mut Range, max: c_int)
        -> c_int;
    /// The pages stay pinned while they are mapped.
    pub(crate) unsafe fn dirty_map(
        domain: *mut Domain,
        iova: u64,
        pfn: u64,
        npages: u64,
        prot: u32,
    ) -> c_int;
    pub(crate) unsafe fn dirty_unmap(domain: *mut Domain, iova: u64, npages: u64);
    /// `dirty_domain_attach` has said that the domain tracks.
    pub(crate) unsafe fn dirty_set_tracking(domain: *mut Domain, on: bool) -> c_int;
    /// As above. `context` is what `mark` takes.
    pub(crate) unsafe fn dirty_read_and_clear(
        domain: *mut Domain,
        iova: u64,
        npages: u64,
        mark: unsafe extern "C" fn(context: *mut c_void, first: u64, last: u64),
        context: *mut c_void,
    );
    pub(crate) unsafe fn dirty_iova_to_phys(domain: *mut Domain, iova: u64) -> u64;
}
