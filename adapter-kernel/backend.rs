// SPDX-License-Identifier: GPL-2.0-only
//! VFIO's operations on a backend: the core's [`Type1`], the kernel as its host,
//! and the lock around both.

use core::ffi::c_void;
use core::slice;
use core::sync::atomic::{AtomicBool, Ordering};

use dirty_core::host::{GroupId, Prot};
use dirty_core::uapi::VFIO_CHECK_EXTENSION;
use dirty_core::{Command, Errno, Error, IommuType, Options, Outcome, PageSize, Partial, Type1};
use kernel::alloc::flags::{GFP_KERNEL, GFP_KERNEL_ACCOUNT};
use kernel::page::{PAGE_SHIFT, PAGE_SIZE};
use kernel::prelude::*;

use crate::host::{copy_from_user, KernelHost};
use crate::lock::Lock;
use crate::memory::KernelMemory;
use crate::missing::Tries;
use crate::sys;

/// The kernel's page size, as the core has it. The build fails unless both agree.
const PAGE: PageSize = match PageSize::new(PAGE_SIZE as u64) {
    Some(page) => page,
    None => panic!("PAGE_SIZE is not a power of two"),
};
const _: () = assert!(PAGE.bytes() == 1 << PAGE_SHIFT);

/// Pages whose pfns are on the stack when a device pins them.
const FEW: usize = 16;

struct State {
    type1: Type1<KernelMemory>,
    host: KernelHost,
}

pub(crate) struct Backend {
    state: Lock<State>,
    iommu: IommuType,
    /// The devices whose drivers can be told to unpin. INVARIANT: valid until the
    /// backend is dropped.
    devices: *mut sys::Devices,
}

impl Drop for Backend {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        let State { type1, host } = &mut *state;
        type1.close(host);
        // SAFETY: allocated by `open`, and freed once.
        unsafe { sys::dirty_devices_free(self.devices) };
    }
}

impl Backend {
    fn open(kind: u64) -> Result<KBox<Self>> {
        let budget = sys::dirty_bitmap_budget();
        let mut options = Options::default();
        options.page_size = PAGE;
        options.dma_entry_limit = sys::dirty_dma_entry_limit();
        options.bitmap_budget = (budget != 0).then_some(budget);
        options.skip_read_only = sys::dirty_skip_read_only();
        options.iommu_dirty_tracking = sys::dirty_iommu_dirty_tracking();
        let type1 = Type1::open(KernelMemory, options, kind);
        let type1 = type1.map_err(|_| EINVAL)?;
        let iommu = type1.iommu_type();
        let state = Lock::new(State {
            type1,
            host: KernelHost::new(options.iommu_dirty_tracking),
        });
        let state = state.ok_or(ENOMEM)?;
        let devices = sys::dirty_devices_new();
        if devices.is_null() {
            return Err(ENOMEM);
        }
        let backend = Backend {
            state,
            iommu,
            devices,
        };
        Ok(KBox::new(backend, GFP_KERNEL_ACCOUNT)?)
    }

    fn attach_group(&self, group: GroupId, emulated: bool) -> Result<(), Error> {
        let mut state = self.state.lock();
        let State { type1, host } = &mut *state;
        type1.attach_group(host, group, emulated)
    }

    fn detach_group(&self, group: GroupId) {
        let mut state = self.state.lock();
        let State { type1, host } = &mut *state;
        type1.detach_group(host, group);
    }

    /// An ioctl. User memory is waited for without the lock, and who waits for the
    /// lock can be killed.
    fn ioctl(&self, nr: u32, arg: u64) -> Result<u32, Errno> {
        let command = Command::read(Some(self.iommu), nr, arg, copy_from_user);
        let mut command = command.map_err(Error::errno)?;
        let mut tries = Tries::default();
        loop {
            let (result, missing) = {
                let mut state = self.state.lock_killable().ok_or(Errno::EINTR)?;
                let State { type1, host } = &mut *state;
                host.copies(tries.wait(), |host| type1.run(host, &mut command))
            };
            match result {
                Ok(Outcome::Done(value)) => return Ok(value),
                // SAFETY: valid, see `devices`; no lock is held.
                Ok(Outcome::Notify { iova, size }) => unsafe {
                    sys::dirty_devices_unmap(self.devices, iova, size);
                },
                Err(Error::BadAddress) if tries.again(missing, command.bitmap()) => {}
                Err(e) => {
                    if e == Error::StillPinned {
                        warn_still_pinned();
                    }
                    return Err(e.errno());
                }
            }
        }
    }

    fn pin_pages(
        &self,
        group: GroupId,
        iova: u64,
        prot: u32,
        pages: &mut [*mut sys::Page],
    ) -> Result<(), Error> {
        // SAFETY: valid, see `devices`; no lock is held.
        let may_pin = unsafe { sys::dirty_devices_may_pin(self.devices) };
        if !may_pin && self.iommu == IommuType::Type1v2 {
            return Err(Error::UnknownDevice);
        }
        let mut few = [0; FEW];
        let mut many = KVec::new();
        let pfns = match few.get_mut(..pages.len()) {
            Some(few) => few,
            None => {
                let grown = many.resize(pages.len(), 0, GFP_KERNEL);
                grown.map_err(|_| Error::NoMemory)?;
                &mut many[..]
            }
        };
        let mut state = self.state.lock();
        let State { type1, host } = &mut *state;
        type1.pin_pages(host, group, iova, Prot(prot), pfns)?;
        for (page, pfn) in pages.iter_mut().zip(pfns) {
            *page = sys::dirty_page(*pfn);
        }
        Ok(())
    }

    fn unpin_pages(&self, iova: u64, npages: u64) {
        let mut state = self.state.lock();
        let State { type1, host } = &mut *state;
        type1.unpin_pages(host, iova, npages);
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        self.access(|type1, host, done| {
            let rest = data.get(done..).unwrap_or_default();
            type1.write(host, iova.wrapping_add(done as u64), rest)
        })
    }

    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        self.access(|type1, host, done| {
            let rest = data.get_mut(done..).unwrap_or_default();
            type1.read(host, iova.wrapping_add(done as u64), rest)
        })
    }

    /// A device's read or write. Guest memory is waited for without the lock; then
    /// `copy` goes on after the bytes that are done.
    fn access(
        &self,
        mut copy: impl FnMut(&Type1<KernelMemory>, &mut KernelHost, usize) -> Result<(), Partial>,
    ) -> Result<(), Error> {
        let mut tries = Tries::default();
        let mut done: usize = 0;
        loop {
            let (result, missing) = {
                let mut state = self.state.lock();
                let State { type1, host } = &mut *state;
                host.copies(tries.wait(), |host| copy(type1, host, done))
            };
            let Err(stopped) = result else {
                return Ok(());
            };
            if stopped.done != 0 {
                tries = Tries::default();
            }
            done = done.saturating_add(stopped.done);
            if stopped.error != Error::BadAddress || !tries.again(missing, None) {
                return Err(stopped.error);
            }
        }
    }
}

/// The negative errno that a C caller gets for an error.
fn errno(e: Error) -> i32 {
    e.errno().0.wrapping_neg()
}

/// The backend that VFIO's `data` points to.
///
/// # Safety
///
/// `data` is live.
unsafe fn backend<'a>(data: *mut c_void) -> &'a Backend {
    // SAFETY: by contract; nobody has the backend exclusively.
    unsafe { &*data.cast::<Backend>() }
}

fn group_id(group: *mut sys::Group) -> GroupId {
    GroupId(group as u64)
}

// C calls what follows; `glue.h` declares it. A `data` is live from when
// `dirty_backend_open` returns it until `dirty_backend_release` gets it.

/// A new backend of the IOMMU type `kind`, for `dirty_backend_release` to free; or an
/// `ERR_PTR`.
#[no_mangle]
extern "C" fn dirty_backend_open(kind: usize) -> *mut c_void {
    match Backend::open(kind as u64) {
        Ok(backend) => KBox::into_raw(backend).cast(),
        Err(e) => e.to_ptr(),
    }
}

/// Frees a backend, its mappings and its pins.
///
/// # Safety
///
/// `data` is live, and is not used any more.
#[no_mangle]
unsafe extern "C" fn dirty_backend_release(data: *mut c_void) {
    // SAFETY: made by `dirty_backend_open`, and released once.
    drop(unsafe { KBox::<Backend>::from_raw(data.cast()) });
}

/// An ioctl on the container; its value, or a negative errno.
///
/// # Safety
///
/// `data` is null or live.
#[no_mangle]
unsafe extern "C" fn dirty_backend_ioctl(data: *mut c_void, nr: u32, arg: usize) -> isize {
    if data.is_null() {
        // VFIO asks what a backend would offer, before it opens one.
        let offered = Type1::<KernelMemory>::offers(arg as u64);
        return isize::from(nr == VFIO_CHECK_EXTENSION && offered);
    }
    // SAFETY: by contract.
    match unsafe { backend(data) }.ioctl(nr, arg as u64) {
        Ok(value) => value as isize,
        Err(Errno(e)) => e.wrapping_neg() as isize,
    }
}

/// Warns once of a driver that does not unpin. The real backend calls BUG() then.
fn warn_still_pinned() {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if !WARNED.swap(true, Ordering::Relaxed) {
        pr_warn!("a device does not unpin pages that are being unmapped: EBUSY\n");
    }
}

/// Attaches a group; 0, or a negative errno.
///
/// # Safety
///
/// `data` is live. `group` is valid until it is detached.
#[no_mangle]
unsafe extern "C" fn dirty_backend_attach_group(
    data: *mut c_void,
    group: *mut sys::Group,
    emulated: bool,
) -> i32 {
    // SAFETY: by contract.
    let attached = unsafe { backend(data) }.attach_group(group_id(group), emulated);
    if attached == Err(Error::UnsafeInterrupts) {
        pr_warn!(
            "No interrupt remapping support.  Use the module param \"allow_unsafe_interrupts\" \
             to enable VFIO IOMMU support on this platform\n"
        );
    }
    attached.map_or_else(errno, |()| 0)
}

/// Detaches a group.
///
/// # Safety
///
/// `data` is live.
#[no_mangle]
unsafe extern "C" fn dirty_backend_detach_group(data: *mut c_void, group: *mut sys::Group) {
    // SAFETY: by contract.
    unsafe { backend(data) }.detach_group(group_id(group));
}

/// Pins `npage` pages from `iova` on for a device of `group`; `npage`, or a negative
/// errno.
///
/// # Safety
///
/// `data` is live. `pages` has room for `npage` pointers, if that is positive.
#[no_mangle]
unsafe extern "C" fn dirty_backend_pin_pages(
    data: *mut c_void,
    group: *mut sys::Group,
    iova: u64,
    npage: i32,
    prot: i32,
    pages: *mut *mut sys::Page,
) -> i32 {
    let Ok(n @ 1..) = usize::try_from(npage) else {
        return errno(Error::NoPages);
    };
    // SAFETY: by contract there is room for so many.
    let pages = unsafe { slice::from_raw_parts_mut(pages, n) };
    // SAFETY: by contract.
    let pinned = unsafe { backend(data) }.pin_pages(group_id(group), iova, prot as u32, pages);
    pinned.map_or_else(errno, |()| npage)
}

/// Drops a pin of each of `npage` pages from `iova` on.
///
/// # Safety
///
/// `data` is live. The caller does not use the pages any more.
#[no_mangle]
unsafe extern "C" fn dirty_backend_unpin_pages(data: *mut c_void, iova: u64, npage: i32) {
    let npages = u64::try_from(npage).unwrap_or(0);
    // SAFETY: by contract.
    unsafe { backend(data) }.unpin_pages(iova, npages);
}

/// Notes an open device, which is told when a range is unmapped.
///
/// # Safety
///
/// `data` is live. `vdev` is valid until it is unregistered, and is not registered now.
#[no_mangle]
unsafe extern "C" fn dirty_backend_register_device(data: *mut c_void, vdev: *mut sys::VfioDevice) {
    // SAFETY: by contract.
    let devices = unsafe { backend(data) }.devices;
    // SAFETY: both are valid, and the device is in no list.
    unsafe { sys::dirty_devices_add(devices, vdev) };
}

/// Forgets a device.
///
/// # Safety
///
/// `data` is live. `vdev` is registered there.
#[no_mangle]
unsafe extern "C" fn dirty_backend_unregister_device(
    data: *mut c_void,
    vdev: *mut sys::VfioDevice,
) {
    // SAFETY: by contract.
    let devices = unsafe { backend(data) }.devices;
    // SAFETY: both are valid, and the device is in this list.
    unsafe { sys::dirty_devices_remove(devices, vdev) };
}

/// Copies `len` bytes between `buf` and the memory at `iova`; 0, or a negative errno.
///
/// # Safety
///
/// `data` is live. `buf` has `len` bytes, initialised if `write`, and nobody else uses
/// them meanwhile.
#[no_mangle]
unsafe extern "C" fn dirty_backend_dma_rw(
    data: *mut c_void,
    iova: u64,
    buf: *mut u8,
    len: usize,
    write: bool,
) -> i32 {
    // SAFETY: by contract.
    let backend = unsafe { backend(data) };
    let done = if write {
        // SAFETY: by contract `buf` has so many bytes.
        backend.write(iova, unsafe { slice::from_raw_parts(buf, len) })
    } else {
        // SAFETY: by contract `buf` has so many bytes.
        backend.read(iova, unsafe { slice::from_raw_parts_mut(buf, len) })
    };
    done.map_or_else(errno, |()| 0)
}

/// The IOMMU domain that `group` is in, or an `ERR_PTR`.
///
/// # Safety
///
/// `data` is null or live.
#[no_mangle]
unsafe extern "C" fn dirty_backend_group_domain(
    data: *mut c_void,
    group: *mut sys::Group,
) -> *mut sys::Domain {
    if data.is_null() || group.is_null() {
        return EINVAL.to_ptr();
    }
    // SAFETY: by contract.
    let state = unsafe { backend(data) }.state.lock();
    state
        .host
        .domain(group_id(group))
        .unwrap_or_else(|| ENODEV.to_ptr())
}
