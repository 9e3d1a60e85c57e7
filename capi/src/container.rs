// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VFIO container with type1 semantics, in this process, and its devices.

use std::sync::Arc;

use adapter_user::{host_options, Group, GroupId};
use libc::{c_int, c_ulong, c_void};

use crate::border::border;
use crate::failure::Failure;
use crate::pointer::Pointers;
use crate::range::argument;

/// A VFIO container with type1 semantics, in this process: it maps memory for devices,
/// and knows which pages they may have written. Any thread may call it.
pub struct Container {
    pub(crate) inner: adapter_user::Container,
}

/// An open device of a container, which reads, writes and marks by IOVA. Any thread may
/// call it. It keeps its container open.
pub struct Device {
    inner: Arc<adapter_user::Device>,
}

/// Creates a container without groups and without an IOMMU type. Its bitmaps may take
/// `budget` bytes in all, or any amount if that is 0.
///
/// # Safety
///
/// There is room for a pointer at `container`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_container_new(
    budget: u64,
    container: *mut *mut Container,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let out = c.out(container, "container")?;
            let mut options = host_options();
            options.bitmap_budget = (budget != 0).then_some(budget);
            let inner = adapter_user::Container::new(options);
            c.give(out, Container { inner });
            Ok(0)
        })
    }
}

/// Frees the handle to a container. Devices and sources that have the container keep it.
/// NULL is ignored.
///
/// # Safety
///
/// Nobody uses the handle any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_container_free(container: *mut Container) {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            drop(c.take_back(container, "container")?);
            Ok(0)
        })
    };
}

/// Adds group `id` of emulated devices: there is no IOMMU behind it, and its devices read
/// and write through the container. Add one before VFIO_SET_IOMMU.
///
/// -EINVAL if the container has the group already. -EBUSY while the vaddr of a mapping is
/// invalid. -ENOMEM.
///
/// # Safety
///
/// `container` is a container.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_container_add_emulated_group(
    container: *const Container,
    id: u32,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let container = c.handle(container, "container")?;
            container
                .inner
                .add_group(Group::emulated(GroupId(id.into())))?;
            Ok(0)
        })
    }
}

/// Answers an ioctl of the container's file as Linux does. `arg` is a value for
/// VFIO_CHECK_EXTENSION and VFIO_SET_IOMMU, and otherwise the address of a structure of
/// linux/vfio.h.
///
/// Returns what the ioctl returns: VFIO_API_VERSION, whether there is the extension, or 0.
/// A bad address is -EFAULT and no signal. The other errors are those of the ioctl in
/// Linux; nothing is cleared or unmapped then. Pages have the host's size, which
/// VFIO_IOMMU_GET_INFO tells.
///
/// # Safety
///
/// - The structure at `arg` and the bitmap that it names are memory that nobody else uses
///   meanwhile, or addresses without memory.
/// - VFIO_IOMMU_MAP_DMA lets devices use the memory at its vaddr, from any thread, until
///   it is unmapped. If it goes before, devices get -EFAULT; it must not be used for
///   anything else then.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_container_ioctl(
    container: *const Container,
    nr: u32,
    arg: c_ulong,
) -> c_int {
    let answer = |c: &Pointers| {
        let container = c.handle(container, "container")?;
        // SAFETY: the caller keeps the contract, which is that of this call.
        let answer = unsafe { container.inner.ioctl(nr, argument(arg)) }?;
        c_int::try_from(answer)
            .map_err(|_| Failure::new(libc::EOVERFLOW, "the ioctl's answer is no int"))
    };
    // SAFETY: the caller keeps the contract.
    unsafe { border(answer) }
}

/// Opens a device of group `group`. The group may have any number of them.
///
/// -EINVAL if no IOMMU type is set, or if the container does not have the group. -ENOMEM.
///
/// # Safety
///
/// There is room for a pointer at `device`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_container_open_device(
    container: *const Container,
    group: u32,
    device: *mut *mut Device,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let container = c.handle(container, "container")?;
            let out = c.out(device, "device")?;
            let inner = container.inner.open_device(GroupId(group.into()), None)?;
            c.give(out, Device { inner });
            Ok(0)
        })
    }
}

/// Closes a device and frees its handle. NULL is ignored.
///
/// # Safety
///
/// Nobody uses the device any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_close(device: *mut Device) {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            if let Some(device) = c.take_back(device, "device")? {
                device.inner.close();
            }
            Ok(0)
        })
    };
}

/// Reads `len` bytes at IOVA `iova` into `data`, as the device would.
///
/// -EINVAL if `len` is 0. -EBUSY while the vaddr of a mapping is invalid. For the first
/// mapping that fails: -EINVAL if there is none, -EPERM unless it allows reads, -EFAULT if
/// its memory has gone or its process has forked.
///
/// # Safety
///
/// `data` has room for `len` bytes.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_read(
    device: *const Device,
    iova: u64,
    data: *mut c_void,
    len: usize,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let device = c.handle(device, "device")?;
            let data = c.slice_mut(data.cast::<u8>(), len, "data")?;
            device.inner.read(iova, data)?;
            Ok(0)
        })
    }
}

/// Writes `len` bytes from `data` at IOVA `iova`, as the device would, and marks the
/// pages.
///
/// Errors as `vfio_dirty_device_read`, but -EPERM unless the mapping allows reads and
/// writes, as in Linux. The bytes before the error are written and marked.
///
/// # Safety
///
/// `data` has `len` bytes.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_write(
    device: *const Device,
    iova: u64,
    data: *const c_void,
    len: usize,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let device = c.handle(device, "device")?;
            let data = c.slice(data.cast::<u8>(), len, "data")?;
            device.inner.write(iova, data)?;
            Ok(0)
        })
    }
}

/// Marks as dirty every page that the `size` bytes at IOVA `iova` touch, which the device
/// has written by itself. While tracking is off, nothing is marked. Call it after the
/// write, and before you tell anybody that the write is done.
///
/// Errors, in this order:
///
/// - -EINVAL if `size` is 0. -EOVERFLOW if the IOVAs wrap. Nothing is marked then.
/// - -EINVAL if the container has no group any more, or if some of the bytes are in no
///   mapping; the others are marked all the same.
///
/// # Safety
///
/// `device` is a device.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_mark(
    device: *const Device,
    iova: u64,
    size: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            c.handle(device, "device")?.inner.mark(iova, size)?;
            Ok(0)
        })
    }
}
