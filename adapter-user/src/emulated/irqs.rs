// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's interrupts.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{read_link, File};
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};
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

/// The data of VFIO_DEVICE_SET_IRQS.
#[derive(Clone, Copy, Debug)]
pub enum IrqData<'a> {
    /// All interrupts of the call. A call without any disables the index.
    None,
    /// Each interrupt whose byte is not zero.
    Bool(&'a [u8]),
    /// What signals each interrupt, or `None` to disable it.
    Eventfds(&'a [Option<BorrowedFd<'a>>]),
}

/// Some interrupts of an index.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) index: u32,
    pub(super) start: u32,
    pub(super) count: u32,
}

impl Span {
    /// EINVAL unless they are among the `there` interrupts of the index.
    fn check(self, there: u32) -> Result<(), Errno> {
        let end = self.start.checked_add(self.count);
        match end.is_some_and(|end| self.start < there && end <= there) {
            true => Ok(()),
            false => Err(Errno::EINVAL),
        }
    }
}

/// Messages are not masked here.
fn check_action(action: u32) -> Result<(), Errno> {
    match action {
        VFIO_IRQ_SET_ACTION_TRIGGER => Ok(()),
        _ => Err(Errno::ENOTTY),
    }
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
        let span = Span {
            index,
            start,
            count,
        };
        if index >= VFIO_PCI_NUM_IRQS || flags & !(DATA | ACTION) != 0 {
            return Err(Errno::EINVAL);
        }
        span.check(count_of(index))?;
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
        check_action(flags & ACTION)?;
        match flags & DATA {
            VFIO_IRQ_SET_DATA_EVENTFD => {
                let mut new = Vec::new();
                for fd in data.chunks_exact(4) {
                    let fd = i32::from_ne_bytes(fd.try_into().map_err(|_| Errno::EINVAL)?); // unreachable
                    new.push(if fd < 0 { None } else { Some(eventfd(fd)?) });
                }
                self.enable(span, new);
                Ok(())
            }
            VFIO_IRQ_SET_DATA_BOOL => self.signal(span, Some(&data)),
            _ => self.signal(span, None),
        }
    }

    /// As [`set`](Self::set), with the data in this process. `there` is how many interrupts the
    /// index has.
    pub(super) fn set_to(
        &self,
        action: u32,
        span: Span,
        data: IrqData<'_>,
        there: u32,
    ) -> Result<(), Errno> {
        span.check(there)?;
        let len = match data {
            IrqData::None => None,
            IrqData::Bool(signals) => Some(signals.len()),
            IrqData::Eventfds(fds) => Some(fds.len()),
        };
        if len.is_some_and(|len| len != span.count as usize) {
            return Err(Errno::EINVAL);
        }
        check_action(action)?;
        match data {
            IrqData::None => self.signal(span, None),
            IrqData::Bool(signals) => self.signal(span, Some(signals)),
            IrqData::Eventfds(fds) => {
                let fds = fds.iter().map(|fd| match fd {
                    Some(fd) => eventfd(fd.as_raw_fd()).map(Some),
                    None => Ok(None),
                });
                self.enable(span, fds.collect::<Result<_, _>>()?);
                Ok(())
            }
        }
    }

    /// Raises those interrupts whose byte in `which` is not zero, or all. Without any it
    /// disables the index.
    fn signal(&self, span: Span, which: Option<&[u8]>) -> Result<(), Errno> {
        if span.count == 0 && which.is_none() {
            self.eventfds().retain(|(at, _), _| *at != span.index);
            return Ok(());
        }
        if !self.eventfds().keys().any(|(at, _)| *at == span.index) {
            return Err(Errno::EINVAL); // none is enabled
        }
        for k in 0..span.count {
            if which.is_none_or(|which| which.get(k as usize) != Some(&0)) {
                self.trigger(span.index, span.start + k);
            }
        }
        Ok(())
    }

    /// Sets what signals the interrupts.
    fn enable(&self, span: Span, new: Vec<Option<File>>) {
        let mut eventfds = self.eventfds();
        for (number, eventfd) in (span.start..).zip(new) {
            match eventfd {
                Some(eventfd) => eventfds.insert((span.index, number), eventfd),
                None => eventfds.remove(&(span.index, number)),
            };
        }
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
