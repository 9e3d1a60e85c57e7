// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's interrupts.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{read_link, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_core::Errno;

use super::uapi::*;
use super::user::{get_bytes, get_words, offset};
use crate::descriptor::duplicate;

const DATA: u32 = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_DATA_BOOL | VFIO_IRQ_SET_DATA_EVENTFD;
const ACTION: u32 =
    VFIO_IRQ_SET_ACTION_MASK | VFIO_IRQ_SET_ACTION_UNMASK | VFIO_IRQ_SET_ACTION_TRIGGER;

/// The interrupts of an emulated device: MSI and MSI-X, which a VMM takes by eventfds.
///
/// A clone is another handle, and any thread may use it. How many interrupts there are says
/// [`DeviceModel::irq_count`](super::DeviceModel::irq_count).
#[derive(Clone, Default)]
pub struct Irqs {
    /// By index and number.
    eventfds: Arc<Mutex<BTreeMap<(u32, u32), File>>>,
}

impl fmt::Debug for Irqs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let set = self.eventfds();
        f.debug_list().entries(set.keys()).finish()
    }
}

impl Irqs {
    fn eventfds(&self) -> MutexGuard<'_, BTreeMap<(u32, u32), File>> {
        self.eventfds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises interrupt `number` of `index`, which is 1 for MSI and 2 for MSI-X. Returns
    /// whether the VMM has enabled it.
    ///
    /// Raise it after the device's writes are marked: the guest may look at once.
    pub fn trigger(&self, index: u32, number: u32) -> bool {
        match self.eventfds().get(&(index, number)) {
            // An eventfd has room for more signals than there ever are.
            Some(mut eventfd) => eventfd.write(&1u64.to_ne_bytes()).is_ok(),
            None => false,
        }
    }

    /// Answers VFIO_DEVICE_SET_IRQS. `count_of` says how many interrupts an index has.
    pub(super) fn set(&self, arg: u64, count_of: impl Fn(u32) -> u32) -> Result<(), Errno> {
        let [argsz, flags, index, start, count] = get_words(arg)?;
        if index >= VFIO_PCI_NUM_IRQS || count >= u32::MAX - start || flags & !(DATA | ACTION) != 0
        {
            return Err(Errno::EINVAL);
        }
        let there = count_of(index);
        if start >= there || start + count > there {
            return Err(Errno::EINVAL);
        }
        let size: u32 = match flags & DATA {
            VFIO_IRQ_SET_DATA_NONE => 0,
            VFIO_IRQ_SET_DATA_BOOL => 1,
            VFIO_IRQ_SET_DATA_EVENTFD => 4,
            _ => return Err(Errno::EINVAL),
        };
        let head = size_of::<vfio_irq_set>() as u32;
        let len = count.checked_mul(size).filter(|len| *len <= argsz - head);
        let data = get_bytes(
            offset(arg, head.into())?,
            len.ok_or(Errno::EINVAL)? as usize,
        )?;
        if flags & ACTION != VFIO_IRQ_SET_ACTION_TRIGGER {
            return Err(Errno::ENOTTY); // messages are not masked here
        }
        match flags & DATA {
            VFIO_IRQ_SET_DATA_EVENTFD => return self.enable(index, start, &data),
            VFIO_IRQ_SET_DATA_NONE if count == 0 => {
                self.eventfds().retain(|(at, _), _| *at != index);
                return Ok(());
            }
            _ => {}
        }
        if !self.eventfds().keys().any(|(at, _)| *at == index) {
            return Err(Errno::EINVAL); // none is enabled
        }
        for k in 0..count {
            if data.get(k as usize) != Some(&0) {
                self.trigger(index, start + k);
            }
        }
        Ok(())
    }

    /// Sets what signals the interrupts from `start` on: a descriptor each, or -1. On an error
    /// nothing changes.
    fn enable(&self, index: u32, start: u32, data: &[u8]) -> Result<(), Errno> {
        let mut new = Vec::new();
        for fd in data.chunks_exact(4) {
            let fd = i32::from_ne_bytes(fd.try_into().map_err(|_| Errno::EINVAL)?); // unreachable
            new.push(if fd < 0 { None } else { Some(eventfd(fd)?) });
        }
        let mut eventfds = self.eventfds();
        for (number, eventfd) in (start..).zip(new) {
            match eventfd {
                Some(eventfd) => eventfds.insert((index, number), eventfd),
                None => eventfds.remove(&(index, number)),
            };
        }
        Ok(())
    }

    pub(super) fn disable_all(&self) {
        self.eventfds().clear();
    }
}

/// Another descriptor of the eventfd `fd`. EINVAL if it is none.
fn eventfd(fd: i32) -> Result<File, Errno> {
    let file = File::from(duplicate(fd)?);
    let is = read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    match is.is_ok_and(|is| is.to_string_lossy() == "anon_inode:[eventfd]") {
        true => Ok(file),
        false => Err(Errno::EINVAL),
    }
}
