// SPDX-License-Identifier: MIT OR Apache-2.0
//! VFIO_DEVICE_SET_IRQS.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use adapter_user::emulated::{uapi::*, IrqData};
use adapter_user::vfio_user::Client;
use adapter_user::Errno;

use super::{field, said};
use crate::user;

const DATA: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD;
const ACTION: u32 =
    VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_ACTION_TRIGGER;
/// The bytes before the data.
const HEAD: u32 = size_of::<vfio_irq_set>() as u32;

/// Returns another descriptor of a file of the program.
pub(crate) type Duplicate = dyn Fn(i32) -> Result<OwnedFd, Errno>;

/// Passes the ioctl's structure at `arg` on. `kinds` is how many kinds of interrupts there are.
pub(super) fn set(
    client: &Client,
    kinds: u32,
    arg: u64,
    duplicate: &Duplicate,
) -> Result<(), Errno> {
    let [argsz, flags, index, start, count] = user::structure(arg)?;
    if index >= kinds || start.checked_add(count).is_none() || flags & !(DATA | ACTION) != 0 {
        return Err(Errno::EINVAL);
    }
    let action = flags & ACTION;
    let data = |size: u32| {
        let len = count.checked_mul(size).filter(|len| *len <= argsz - HEAD);
        user::bytes(field(arg, HEAD.into())?, len.ok_or(Errno::EINVAL)? as usize)
    };
    let set = |data: IrqData<'_>| {
        let done = client.set_irqs(action, index, start, count, data);
        done.map_err(said)
    };
    match flags & DATA {
        VFIO_IRQ_SET_DATA_NONE => set(IrqData::None),
        VFIO_IRQ_SET_DATA_BOOL => set(IrqData::Bool(&data(1)?)),
        VFIO_IRQ_SET_DATA_EVENTFD => {
            let mut fds: Vec<Option<OwnedFd>> = Vec::new();
            for fd in data(4)?.chunks_exact(4) {
                let fd = i32::from_ne_bytes(fd.try_into().unwrap_or_default());
                fds.push(if fd < 0 { None } else { Some(duplicate(fd)?) });
            }
            let fds: Vec<Option<BorrowedFd<'_>>> =
                fds.iter().map(|fd| fd.as_ref().map(AsFd::as_fd)).collect();
            set(IrqData::Eventfds(&fds))
        }
        _ => Err(Errno::EINVAL),
    }
}
