// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the device may reach.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dirty_core::host::Prot;
use vfio_user_wire::wire::{DmaMap, DmaUnmap, DMA_READABLE, DMA_WRITABLE, UNMAP_ALL};
use vfio_user_wire::Request;

use super::{Client, ClientError};

/// The mappings that the server has, by their first IOVA, with their last.
#[derive(Default)]
pub(super) struct Maps(Mutex<BTreeMap<u64, u64>>);

impl Maps {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The IOVAs from `first` to `last` in pieces that each are one whole mapping, which may
    /// reach beyond them, or in none.
    pub(super) fn split(&self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let maps = self.lock();
        let before = maps.range(..first).next_back();
        let before = before.filter(|(_, end)| **end >= first);
        let mut pieces = Vec::new();
        let mut next = Some(first);
        for (start, end) in before.into_iter().chain(maps.range(first..=last)) {
            match next {
                Some(hole) if hole < *start => pieces.push((hole, *start - 1)),
                _ => {}
            }
            pieces.push((*start, *end));
            next = end.checked_add(1);
        }
        match next {
            Some(hole) if hole <= last => pieces.push((hole, last)),
            _ => {}
        }
        pieces
    }
}

impl Client {
    /// Lets the device reach `size` bytes of memory from `iova` on. With a `file`, the server
    /// may map that from its offset in bytes on, and reaches the memory there. Without, it
    /// sends messages, which the [`DmaMemory`](super::DmaMemory) answers.
    ///
    /// In a migration, map the [`IovaView`](crate::guest::IovaView) before.
    ///
    /// # Errors
    ///
    /// [`ClientError::Argument`] if the IOVAs wrap, or there are none. Then as every call of
    /// a [`Client`].
    pub fn map(
        &self,
        iova: u64,
        size: u64,
        prot: Prot,
        file: Option<(BorrowedFd<'_>, u64)>,
    ) -> Result<(), ClientError> {
        let last = last(iova, size)?;
        let mut flags = 0;
        for (right, flag) in [(Prot::READ, DMA_READABLE), (Prot::WRITE, DMA_WRITABLE)] {
            flags |= if prot.contains(right) { flag } else { 0 };
        }
        let request = Request::DmaMap(DmaMap {
            argsz: DmaMap::SIZE as u32,
            flags,
            offset: file.map_or(0, |(_, offset)| offset),
            iova,
            size,
        });
        let fd = file.map(|(fd, _)| fd);
        self.link().call(&request, fd.as_slice(), |_, _| Some(()))?;
        self.inner.maps.lock().insert(iova, last);
        Ok(())
    }

    /// Takes a mapping away: `iova` and `size` are those of [`map`](Client::map). When this
    /// returns, the device can no longer write there.
    ///
    /// In a migration, unmap the [`IovaView`](crate::guest::IovaView) after. What the device
    /// wrote is in its log until that is read.
    ///
    /// # Errors
    ///
    /// [`ClientError::Argument`] if the IOVAs wrap, or there are none. Then as every call of
    /// a [`Client`].
    pub fn unmap(&self, iova: u64, size: u64) -> Result<(), ClientError> {
        let last = last(iova, size)?;
        self.send_unmap(0, iova, size)?;
        let mut maps = self.inner.maps.lock();
        let within = maps.range(iova..=last).filter(|(_, end)| **end <= last);
        let gone: Vec<u64> = within.map(|(first, _)| *first).collect();
        for first in gone {
            maps.remove(&first);
        }
        Ok(())
    }

    /// Takes all mappings away, as [`unmap`](Client::unmap).
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`].
    pub fn unmap_all(&self) -> Result<(), ClientError> {
        self.send_unmap(UNMAP_ALL, 0, 0)?;
        self.inner.maps.lock().clear();
        Ok(())
    }

    fn send_unmap(&self, flags: u32, iova: u64, size: u64) -> Result<(), ClientError> {
        let unmap = DmaUnmap {
            argsz: DmaUnmap::SIZE as u32,
            flags,
            iova,
            size,
        };
        let request = Request::DmaUnmap(unmap, None);
        self.link().call(&request, &[], |_, _| Some(()))
    }
}

/// The last of `size` IOVAs.
pub(super) fn last(iova: u64, size: u64) -> Result<u64, ClientError> {
    let last = size.checked_sub(1).and_then(|more| iova.checked_add(more));
    last.ok_or(ClientError::Argument("the IOVAs wrap, or there are none"))
}
