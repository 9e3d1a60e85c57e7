// SPDX-License-Identifier: GPL-2.0-only
//! A container's backend: the core, the kernel as its host, and their lock.
//!
//! The core's container chooses its backend itself; here VFIO has done so
//! already. So the backend opens on the type that VFIO gives, and the core's is
//! set when the first group comes.

use core::ffi::c_void;
use core::slice;
use core::sync::atomic::{AtomicBool, Ordering};

use dirty_core::host::{DeviceId, GroupId, Prot};
use dirty_core::ioctl::Outcome;
use dirty_core::uapi::{self, VFIO_CHECK_EXTENSION};
use dirty_core::{Container, Error, Options};
use kernel::alloc::flags::{GFP_KERNEL, GFP_KERNEL_ACCOUNT};
use kernel::prelude::*;
use kernel::sync::{new_mutex, Mutex};

use crate::host::KernelHost;
use crate::memory::KernelMemory;
use crate::sys;

/// Pages whose pfns are on the stack when a device pins them.
const FEW: usize = 16;

struct State {
    /// IOMMU type.
    kind: u64,
    container: Container<KernelMemory>,
    host: KernelHost,
    /// What is attached.
    groups: KVec<GroupId>,
}

impl State {
    /// The core's device for what VFIO does not say of whom it is; any will do.
    fn any_device(&self) -> Result<DeviceId, Error> {
        let group = self.groups.first().ok_or(Error::UnknownDevice)?;
        Ok(device(*group))
    }

    /// Brings a group into the core's container, whose type the first one sets.
    fn enter(&mut self, group: GroupId, emulated: bool) -> Result<(), Error> {
        let (container, host) = (&mut self.container, &mut self.host);
        container.attach_group(host, group, emulated)?;
        let set = match container.set_iommu(host, self.kind) {
            Err(Error::IommuAlreadySet) => Ok(()),
            set => set,
        };
        let opened = set.and_then(|()| container.open_device(device(group), group, true));
        if opened.is_err() {
            self.leave(group);
        }
        opened
    }

    fn leave(&mut self, group: GroupId) {
        self.container.close_device(device(group));
        // VFIO detaches what it attached, and the device is closed.
        let _ = self.container.detach_group(&mut self.host, group);
    }

    fn forget(&mut self, group: GroupId) {
        let at = self.groups.iter().position(|g| *g == group);
        let _ = at.map(|at| self.groups.remove(at));
    }
}

#[pin_data(PinnedDrop)]
pub(crate) struct Backend {
    #[pin]
    state: Mutex<State>,
    /// INVARIANT: valid until the backend is dropped.
    devices: *mut sys::Devices,
}

#[pinned_drop]
impl PinnedDrop for Backend {
    fn drop(self: Pin<&mut Self>) {
        let mut state = self.state.lock();
        let State {
            container, host, ..
        } = &mut *state;
        container.close(host);
        // SAFETY: allocated at open, and freed once.
        unsafe { sys::dirty_devices_free(self.devices) };
    }
}

/// The core's container knows a device for each group: VFIO has checked the
/// real one.
fn device(group: GroupId) -> DeviceId {
    DeviceId(group.0)
}

impl Backend {
    fn new(kind: u64) -> Result<Pin<KBox<Self>>> {
        let budget = sys::dirty_bitmap_budget();
        let options = Options {
            dma_entry_limit: sys::dirty_dma_entry_limit(),
            bitmap_budget: (budget != 0).then_some(budget),
            skip_read_only: sys::dirty_skip_read_only(),
            ..Options::default()
        };
        let devices = sys::dirty_devices_new();
        if devices.is_null() {
            return Err(ENOMEM);
        }
        let state = State {
            kind,
            container: Container::new(KernelMemory, options),
            host: KernelHost::default(),
            groups: KVec::new(),
        };
        let made = KBox::pin_init(
            pin_init!(Backend {
                state <- new_mutex!(state),
                devices,
            }),
            GFP_KERNEL_ACCOUNT,
        );
        if made.is_err() {
            // SAFETY: allocated above, and nobody has it.
            unsafe { sys::dirty_devices_free(devices) };
        }
        made
    }

    fn attach_group(&self, group: GroupId, emulated: bool) -> Result<(), Error> {
        let mut state = self.state.lock();
        let kept = state.groups.push(group, GFP_KERNEL_ACCOUNT);
        kept.map_err(|_| Error::NoMemory)?;
        let entered = state.enter(group, emulated);
        if entered.is_err() {
            state.forget(group);
        }
        entered
    }

    fn detach_group(&self, group: GroupId) {
        let mut state = self.state.lock();
        state.leave(group);
        state.forget(group);
    }

    fn ioctl(&self, nr: u32, arg: u64) -> Result<u32, Error> {
        let mut outcome = {
            let mut state = self.state.lock();
            let State {
                container, host, ..
            } = &mut *state;
            container.ioctl(host, nr, arg)?
        };
        loop {
            match outcome {
                Outcome::Done(value) => return Ok(value),
                Outcome::Notify(pending) => {
                    // SAFETY: valid, see `devices`; no lock is held.
                    unsafe { sys::dirty_devices_unmap(self.devices, pending.iova, pending.size) };
                    let mut state = self.state.lock();
                    let State {
                        container, host, ..
                    } = &mut *state;
                    outcome = container.resume(host, pending)?;
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
        let State {
            container, host, ..
        } = &mut *state;
        container.pin_pages(host, device(group), iova, Prot(prot), pfns)?;
        for (page, pfn) in pages.iter_mut().zip(pfns) {
            *page = sys::dirty_page(*pfn);
        }
        Ok(())
    }

    fn unpin_pages(&self, iova: u64, npages: u64) {
        let mut state = self.state.lock();
        let Ok(any) = state.any_device() else {
            return; // a group is there
        };
        let State {
            container, host, ..
        } = &mut *state;
        let _ = container.unpin_pages(host, any, iova, npages); // and its device
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        let mut state = self.state.lock();
        let any = state.any_device()?;
        let State {
            container, host, ..
        } = &mut *state;
        container.write(host, any, iova, data)
    }

    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        let mut state = self.state.lock();
        let any = state.any_device()?;
        let State {
            container, host, ..
        } = &mut *state;
        container.read(host, any, iova, data)
    }
}

/// What a C caller gets for an error.
fn errno(e: Error) -> i32 {
    e.errno().0.wrapping_neg()
}

/// The backend behind what VFIO kept.
///
/// # Safety
///
/// `data` came from `dirty_backend_open`, and is not released yet.
unsafe fn backend<'a>(data: *mut c_void) -> &'a Backend {
    // SAFETY: by contract, and it is only ever shared.
    unsafe { &*data.cast::<Backend>() }
}

fn group_id(group: *mut sys::Group) -> GroupId {
    GroupId(group as u64)
}

// What follows is called by C, as `glue.h` declares it. VFIO passes a `data`
// that `dirty_backend_open` returned and that it has not released, which is the
// contract of `backend`.

#[no_mangle]
extern "C" fn dirty_backend_open(kind: usize) -> *mut c_void {
    let kind = kind as u64;
    let known = [uapi::VFIO_TYPE1_IOMMU, uapi::VFIO_TYPE1v2_IOMMU].contains(&kind);
    let made = match known {
        true => Backend::new(kind),
        false => Err(EINVAL),
    };
    match made {
        // SAFETY: it stays where it is until `dirty_backend_release`.
        Ok(made) => KBox::into_raw(unsafe { Pin::into_inner_unchecked(made) }).cast(),
        Err(e) => e.to_ptr(),
    }
}

#[no_mangle]
unsafe extern "C" fn dirty_backend_release(data: *mut c_void) {
    // SAFETY: made by `dirty_backend_open`, and released once.
    drop(unsafe { KBox::<Backend>::from_raw(data.cast()) });
}

#[no_mangle]
unsafe extern "C" fn dirty_backend_ioctl(data: *mut c_void, nr: u32, arg: usize) -> isize {
    if data.is_null() {
        // VFIO asks what a backend would offer.
        let offers = Container::new(KernelMemory, Options::default());
        let yes = nr == VFIO_CHECK_EXTENSION && offers.check_extension(arg as u64);
        return isize::from(yes);
    }
    // SAFETY: see above.
    match unsafe { backend(data) }.ioctl(nr, arg as u64) {
        Ok(value) => value as isize,
        Err(e) => {
            if e == Error::StillPinned {
                warn_still_pinned();
            }
            errno(e) as isize
        }
    }
}

/// A driver with a defect, which the real backend answers with BUG().
fn warn_still_pinned() {
    static WARNED: AtomicBool = AtomicBool::new(false);
    if !WARNED.swap(true, Ordering::Relaxed) {
        pr_warn!("a device does not unpin what is to be unmapped: EBUSY\n");
    }
}

#[no_mangle]
unsafe extern "C" fn dirty_backend_attach_group(
    data: *mut c_void,
    group: *mut sys::Group,
    emulated: bool,
) -> i32 {
    // SAFETY: see above.
    let attached = unsafe { backend(data) }.attach_group(group_id(group), emulated);
    attached.map_or_else(errno, |()| 0)
}

#[no_mangle]
unsafe extern "C" fn dirty_backend_detach_group(data: *mut c_void, group: *mut sys::Group) {
    // SAFETY: see above.
    unsafe { backend(data) }.detach_group(group_id(group));
}

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
    // SAFETY: VFIO's callers give room for so many pages.
    let pages = unsafe { slice::from_raw_parts_mut(pages, n) };
    // SAFETY: see above.
    let pinned = unsafe { backend(data) }.pin_pages(group_id(group), iova, prot as u32, pages);
    pinned.map_or_else(errno, |()| npage)
}

#[no_mangle]
unsafe extern "C" fn dirty_backend_unpin_pages(data: *mut c_void, iova: u64, npage: i32) {
    let npages = u64::try_from(npage).unwrap_or(0);
    // SAFETY: see above.
    unsafe { backend(data) }.unpin_pages(iova, npages);
}

#[no_mangle]
unsafe extern "C" fn dirty_backend_register_device(data: *mut c_void, vdev: *mut sys::VfioDevice) {
    // SAFETY: see above.
    let devices = unsafe { backend(data) }.devices;
    // SAFETY: both are valid, and the device is not in a list.
    unsafe { sys::dirty_devices_add(devices, vdev) };
}

#[no_mangle]
unsafe extern "C" fn dirty_backend_unregister_device(
    data: *mut c_void,
    vdev: *mut sys::VfioDevice,
) {
    // SAFETY: see above.
    let devices = unsafe { backend(data) }.devices;
    // SAFETY: both are valid, and the device is in this list.
    unsafe { sys::dirty_devices_remove(devices, vdev) };
}

#[no_mangle]
unsafe extern "C" fn dirty_backend_dma_rw(
    data: *mut c_void,
    iova: u64,
    buf: *mut u8,
    len: usize,
    write: bool,
) -> i32 {
    // SAFETY: see above.
    let backend = unsafe { backend(data) };
    let done = if write {
        // SAFETY: VFIO's callers give so many bytes.
        backend.write(iova, unsafe { slice::from_raw_parts(buf, len) })
    } else {
        // SAFETY: VFIO's callers give room for so many bytes.
        backend.read(iova, unsafe { slice::from_raw_parts_mut(buf, len) })
    };
    done.map_or_else(errno, |()| 0)
}

#[no_mangle]
unsafe extern "C" fn dirty_backend_group_domain(
    data: *mut c_void,
    group: *mut sys::Group,
) -> *mut sys::Domain {
    if data.is_null() || group.is_null() {
        return EINVAL.to_ptr();
    }
    // SAFETY: see above.
    let state = unsafe { backend(data) }.state.lock();
    state
        .host
        .domain(group_id(group))
        .unwrap_or_else(|| ENODEV.to_ptr())
}
