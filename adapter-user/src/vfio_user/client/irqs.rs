// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's interrupts.

use std::os::fd::BorrowedFd;

use vfio_user_wire::wire::*;
use vfio_user_wire::{Reply, Request};

use super::{Client, ClientError};

/// What is done with interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqAction {
    /// Mask them.
    Mask,
    /// Unmask them.
    Unmask,
    /// Raise them, or set what raises them.
    Trigger,
}

/// Which interrupts, and by what.
#[derive(Clone, Copy, Debug)]
pub enum IrqData<'a> {
    /// So many interrupts. None of them, with [`IrqAction::Trigger`], switches the kind off.
    None(u32),
    /// The action is for those with `true`.
    Bools(&'a [bool]),
    /// One eventfd for each.
    Eventfds(&'a [BorrowedFd<'a>]),
    /// So many interrupts get no eventfd any more.
    NoEventfds(u32),
}

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

    /// Masks, unmasks or triggers interrupts of the kind `index`, from number `start` on, or
    /// sets the eventfds that they raise. More eventfds than the server takes with one message
    /// go with several, one after another.
    ///
    /// # Errors
    ///
    /// [`ClientError::Argument`] if the numbers wrap, there are more interrupts than a
    /// message has room for, or the server takes no descriptors. Then as every call of a
    /// [`Client`].
    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        action: IrqAction,
        data: IrqData<'_>,
    ) -> Result<(), ClientError> {
        let action = match action {
            IrqAction::Mask => IRQ_ACTION_MASK,
            IrqAction::Unmask => IRQ_ACTION_UNMASK,
            IrqAction::Trigger => IRQ_ACTION_TRIGGER,
        };
        let send = |start: u32, count: usize, kind: u32, bytes: &[u8], fds: &[BorrowedFd<'_>]| {
            let count = u32::try_from(count).map_err(|_| WRAPS)?;
            start.checked_add(count).ok_or(WRAPS)?;
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
        match data {
            IrqData::None(count) => send(start, count as usize, IRQ_DATA_NONE, &[], &[]),
            IrqData::NoEventfds(count) => send(start, count as usize, IRQ_DATA_EVENTFD, &[], &[]),
            IrqData::Bools(bools) if bools.len() > self.max_data() => Err(WRAPS),
            IrqData::Bools(bools) => {
                let bytes: Vec<u8> = bools.iter().map(|set| u8::from(*set)).collect();
                send(start, bytes.len(), IRQ_DATA_BOOL, &bytes, &[])
            }
            IrqData::Eventfds(fds) => {
                let most = self.inner.agreed.max_send_fds.min(KERNEL_FDS) as usize;
                if most == 0 {
                    return Err(ClientError::Argument("the server takes no descriptors"));
                }
                let mut at = start;
                for fds in fds.chunks(most) {
                    send(at, fds.len(), IRQ_DATA_EVENTFD, &[], fds)?;
                    at = at.checked_add(fds.len() as u32).ok_or(WRAPS)?;
                }
                Ok(())
            }
        }
    }
}

/// The most descriptors that the kernel passes with a message.
const KERNEL_FDS: u32 = crate::vfio_user::socket::MOST_FDS as u32;

const WRAPS: ClientError =
    ClientError::Argument("there are too many interrupts, or their numbers wrap");
