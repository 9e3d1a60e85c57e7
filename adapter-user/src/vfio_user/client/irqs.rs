// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's interrupts.

use std::os::fd::BorrowedFd;

use vfio_user_wire::wire::{IrqInfo, IrqSet, IRQ_DATA_BOOL, IRQ_DATA_EVENTFD, IRQ_DATA_NONE};
use vfio_user_wire::{Reply, Request};

use super::{Client, ClientError};
use crate::emulated::IrqData;

impl Client {
    /// Returns how many interrupts of a kind there are, and what can be done with them.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`].
    pub fn irq_info(&self, index: u32) -> Result<IrqInfo, ClientError> {
        let request = Request::GetIrqInfo(IrqInfo {
            argsz: IrqInfo::SIZE as u32,
            index,
            ..IrqInfo::default()
        });
        self.link().call(&request, &[], |reply, _| match reply {
            Reply::GetIrqInfo(info) => Some(info),
            _ => None,
        })
    }

    /// Masks, unmasks or triggers the `count` interrupts of an index from `start` on, or sets
    /// what signals them, as [`DeviceFile::set_irqs`](crate::emulated::DeviceFile::set_irqs)
    /// does. `action` is one of `VFIO_IRQ_SET_ACTION_*`. More descriptors than the server takes
    /// with one message go with several, one after another.
    ///
    /// # Errors
    ///
    /// [`ClientError::Argument`] if the numbers wrap, the data are not for `count` interrupts or
    /// do not fit into a message, or the server takes no descriptors. Then as every call of a
    /// [`Client`].
    pub fn set_irqs(
        &self,
        action: u32,
        index: u32,
        start: u32,
        count: u32,
        data: IrqData<'_>,
    ) -> Result<(), ClientError> {
        let there = match data {
            IrqData::None => count as usize,
            IrqData::Bool(bytes) if bytes.len() <= self.max_data() => bytes.len(),
            IrqData::Bool(_) => return Err(WRAPS),
            IrqData::Eventfds(fds) => fds.len(),
        };
        if there != count as usize || start.checked_add(count).is_none() {
            return Err(WRAPS);
        }
        let set = |kind: u32, start: u32, count: u32, bytes: &[u8], fds: &[BorrowedFd<'_>]| {
            let set = IrqSet {
                argsz: (IrqSet::SIZE + bytes.len()) as u32, // it fits into a message
                flags: kind | action,
                index,
                start,
                count,
            };
            let request = Request::SetIrqs(set, bytes);
            self.link().call(&request, fds, |_, _| Some(()))
        };
        let fds = match data {
            IrqData::None => return set(IRQ_DATA_NONE, start, count, &[], &[]),
            IrqData::Bool(bytes) => return set(IRQ_DATA_BOOL, start, count, bytes, &[]),
            IrqData::Eventfds(fds) => fds,
        };
        // A message has one descriptor for each interrupt, or none at all.
        let most = self.inner.agreed.max_send_fds.min(KERNEL_FDS) as usize;
        let mut at = start;
        for run in fds.chunk_by(|one, next| one.is_some() == next.is_some()) {
            let some: Vec<_> = run.iter().flatten().copied().collect();
            if some.is_empty() {
                set(IRQ_DATA_EVENTFD, at, run.len() as u32, &[], &[])?;
            } else if most == 0 {
                return Err(ClientError::Argument("the server takes no descriptors"));
            }
            let mut first = at;
            for fds in some.chunks(most.max(1)) {
                set(IRQ_DATA_EVENTFD, first, fds.len() as u32, &[], fds)?;
                first += fds.len() as u32; // at most start + count
            }
            at += run.len() as u32;
        }
        Ok(())
    }
}

/// The most descriptors that the kernel passes with a message.
const KERNEL_FDS: u32 = crate::vfio_user::socket::MOST_FDS as u32;

const WRAPS: ClientError = ClientError::Argument(
    "the interrupts' numbers wrap, or the data are too large or for another number of them",
);
