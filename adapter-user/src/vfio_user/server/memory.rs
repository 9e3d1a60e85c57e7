// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client's memory as the device reaches it: one table of all that the client has mapped.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::host::Prot;
use dirty_core::{Errno, Error};
use vfio_user_wire::wire::{DmaMap, DMA_READABLE, DMA_WRITABLE};

use super::carry::{Carry, PAGE};
use super::files::Files;
use super::view::Mapped;
use crate::container::{device::Device, guard::PinGuard, Container};
use crate::device_log::DeviceLog;
use crate::emulated::bus::Bus;

/// Neither reads nor writes.
const NO_PROT: Prot = Prot(0);

/// The other end of a connection: a client that serves the server's commands.
///
/// The calls come from any thread of the device, also from several at once. They fail with
/// [`Error::BadAddress`] if the client answers with an error, or does not answer in time.
pub trait Remote: Send + Sync {
    /// Reads the client's memory at `iova`, by DMA_READ. `data` is at most as long as one
    /// transfer may be.
    ///
    /// # Errors
    ///
    /// [`Error::BadAddress`].
    fn dma_read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error>;

    /// Writes the client's memory at `iova`, by DMA_WRITE. `data` is at most as long as one
    /// transfer may be.
    ///
    /// # Errors
    ///
    /// [`Error::BadAddress`]. Some of the bytes may be written then.
    fn dma_write(&self, iova: u64, data: &[u8]) -> Result<(), Error>;

    /// Opens a second socket for the server's commands, and returns the client's end. `None` if
    /// there is none.
    fn open_twin(&self) -> Option<OwnedFd> {
        None
    }
}

/// What both sides have agreed on for mappings.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) maps: usize,
    /// Bytes of the smallest page.
    pub(super) page: u64,
}

/// The client's memory.
pub(super) struct Memory {
    /// Held shared by each access, so that who has it alone knows that none is under way.
    /// Locked before the container.
    table: RwLock<Table>,
    files: Mutex<Files>,
    remote: Arc<dyn Remote>,
    pub(super) carry: Option<Carry>,
}

struct Table {
    /// By the first IOVA. No two overlap.
    maps: BTreeMap<u64, Map>,
    /// The device may do DMA.
    master: bool,
    /// The device has closed.
    closed: bool,
    /// The most bytes of one message.
    transfer: usize,
}

struct Map {
    size: u64,
    prot: Prot,
    /// Where it is in the container. `None` if it is reached by messages.
    local: Option<Arc<Mapped>>,
}

/// A part of an access that is in one mapping.
struct Part<'a> {
    iova: u64,
    /// Which bytes of the access.
    bytes: std::ops::Range<usize>,
    map: &'a Map,
}

impl Table {
    /// The parts of an access to `len` bytes at `iova`, which end with the first that fails:
    /// `Unmapped`, or `Denied` if the mapping does not allow `prot`.
    fn parts(
        &self,
        iova: u64,
        len: usize,
        prot: Prot,
    ) -> impl Iterator<Item = Result<Part<'_>, Error>> {
        let mut done = 0;
        std::iter::from_fn(move || {
            if done >= len {
                return None;
            }
            let part = self.part(iova, done, len, prot);
            done = part.as_ref().map_or(len, |part| part.bytes.end);
            Some(part)
        })
    }

    fn part(&self, iova: u64, done: usize, len: usize, prot: Prot) -> Result<Part<'_>, Error> {
        let iova = iova.checked_add(done as u64).ok_or(Error::Unmapped)?;
        let below = self.maps.range(..=iova).next_back();
        let (start, map) = below.ok_or(Error::Unmapped)?;
        let skip = iova - start;
        let left = map.size.checked_sub(skip).filter(|left| *left != 0);
        let left = usize::try_from(left.ok_or(Error::Unmapped)?).unwrap_or(usize::MAX);
        if !map.prot.contains(prot) {
            return Err(Error::Denied);
        }
        Ok(Part {
            iova,
            bytes: done..done + left.min(len - done),
            map,
        })
    }

    /// Checks that the whole of an access is allowed.
    fn check(&self, iova: u64, len: usize, prot: Prot) -> Result<(), Error> {
        if self.closed {
            return Err(Error::UnknownDevice);
        }
        if len == 0 {
            return Err(Error::ZeroSize);
        }
        self.parts(iova, len, prot)
            .try_for_each(|part| part.map(drop))
    }

    fn check_master(&self) -> Result<(), Error> {
        match self.master {
            true => Ok(()),
            false => Err(Error::Denied),
        }
    }
}

impl Memory {
    pub(super) fn new(remote: Arc<dyn Remote>, carry: Option<Carry>) -> Self {
        let table = Table {
            maps: BTreeMap::new(),
            master: false,
            closed: false,
            transfer: 4096,
        };
        Memory {
            table: RwLock::new(table),
            files: Mutex::default(),
            remote,
            carry,
        }
    }

    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how many bytes one message may transfer.
    pub(super) fn set_transfer(&self, bytes: u32) {
        self.table_mut().transfer = (bytes as usize).max(1);
    }

    /// Maps what DMA_MAP says: the bytes of a file, or memory that only messages reach. The
    /// device's log has it from now on.
    ///
    /// # Errors
    ///
    /// In this order; nothing is mapped then:
    ///
    /// - EINVAL if the size is zero; if the IOVA, the size, or the offset in a file is no multiple
    ///   of the smallest page; if the IOVAs wrap; if neither reads nor writes are allowed.
    /// - EEXIST if it overlaps another mapping.
    /// - ENOSPC if there are as many mappings as may be.
    /// - Those of [`Files::get`].
    /// - ENOMEM.
    pub(super) fn map(
        &self,
        container: &Container,
        log: &DeviceLog,
        map: &DmaMap,
        file: Option<&OwnedFd>,
        limits: Limits,
    ) -> Result<(), Errno> {
        let (iova, size) = (map.iova, map.size);
        let offset = if file.is_some() { map.offset } else { 0 };
        let last = size.checked_sub(1).and_then(|more| iova.checked_add(more));
        let last = last.ok_or(Errno::EINVAL)?;
        if (iova | size | offset) & (limits.page - 1) != 0 {
            return Err(Errno::EINVAL);
        }
        let mut prot = NO_PROT;
        for (flag, allowed) in [(DMA_READABLE, Prot::READ), (DMA_WRITABLE, Prot::WRITE)] {
            if map.flags & flag != 0 {
                prot = Prot(prot.0 | allowed.0);
            }
        }
        if prot == NO_PROT {
            return Err(Errno::EINVAL);
        }
        {
            let table = self.table();
            let before = table.maps.range(..=last).next_back();
            if before.is_some_and(|(start, map)| *start >= iova || iova - start < map.size) {
                return Err(Errno::EEXIST);
            }
            if table.maps.len() >= limits.maps {
                return Err(Errno::ENOSPC);
            }
        }
        let write = prot.contains(Prot::WRITE);
        let backing = match file {
            None => None,
            Some(file) => {
                let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
                Some(files.get(file, offset, size, write)?)
            }
        };
        // Before the device can write there.
        if write {
            log.add_range(iova, size).map_err(|error| error.errno())?;
        }
        let local = backing.map(|backing| {
            // The container lets devices write only what they may read.
            let container_prot = if write { Prot::READ_WRITE } else { prot };
            Mapped::new(container, backing, (iova, size), offset, container_prot)
        });
        let local = local.transpose().map_err(|error| {
            let _ = log.remove_range(iova, size); // it fails only if it was not added
            error.errno()
        })?;
        let new = Map {
            size,
            prot,
            local: local.map(Arc::new),
        };
        self.table_mut().maps.insert(iova, new);
        Ok(())
    }

    /// Unmaps a mapping, which must have these bounds. Accesses have ended when it returns, and
    /// the log keeps what it had of it.
    ///
    /// # Errors
    ///
    /// ENOENT if there is no such mapping.
    pub(super) fn unmap(&self, log: &DeviceLog, iova: u64, size: u64) -> Result<(), Errno> {
        let local = match self.table().maps.get(&iova) {
            Some(map) if map.size == size => map.local.clone(),
            _ => return Err(Errno::ENOENT),
        };
        if let Some(local) = local {
            // The device is told while it still reaches the memory.
            local.unmap().map_err(Error::errno)?;
        }
        // The lock comes when the accesses by messages have ended.
        let gone = self.table_mut().maps.remove(&iova);
        if gone.is_some_and(|map| map.prot.contains(Prot::WRITE)) {
            let _ = log.remove_range(iova, size); // unreachable error: it was added
            if let Some(carry) = &self.carry {
                carry.unmapped(iova, iova + (size - 1));
            }
        }
        Ok(())
    }

    /// Whether there is a mapping with these bounds.
    pub(super) fn has(&self, iova: u64, size: u64) -> bool {
        let table = self.table();
        table.maps.get(&iova).is_some_and(|map| map.size == size)
    }

    /// Unmaps everything.
    ///
    /// # Errors
    ///
    /// EBUSY if a device keeps pages pinned. The mappings from there on stay.
    pub(super) fn unmap_all(&self, log: &DeviceLog) -> Result<(), Errno> {
        loop {
            let first = self.table().maps.iter().next().map(|(a, b)| (*a, b.size));
            match first {
                Some((iova, size)) => self.unmap(log, iova, size)?,
                None => return Ok(()),
            }
        }
    }

    /// The device has closed: all mappings go, and every access fails.
    pub(super) fn close(&self) {
        let mut table = self.table_mut();
        table.closed = true;
        let maps = std::mem::take(&mut table.maps);
        drop(table);
        drop(maps);
    }

    /// Reads. `prot` is what the mappings must allow, nothing or READ.
    fn read_parts(
        &self,
        (table, device): (&Table, &Device),
        iova: u64,
        data: &mut [u8],
        prot: Prot,
    ) -> Result<(), Error> {
        table.check(iova, data.len(), prot)?;
        for part in table.parts(iova, data.len(), prot) {
            let part = part?;
            let bytes = &mut data[part.bytes];
            if part.map.local.is_some() {
                device.read(part.iova, bytes)?;
                continue;
            }
            let mut at = part.iova;
            for bytes in bytes.chunks_mut(table.transfer) {
                self.remote.dma_read(at, bytes)?;
                at = at.wrapping_add(bytes.len() as u64);
            }
        }
        Ok(())
    }

    /// Writes, and marks what was written, or may have been.
    fn write_parts(
        &self,
        (table, device): (&Table, &Device),
        iova: u64,
        data: &[u8],
    ) -> Result<(), Error> {
        table.check(iova, data.len(), Prot::WRITE)?;
        for part in table.parts(iova, data.len(), Prot::WRITE) {
            let part = part?;
            let bytes = &data[part.bytes];
            if part.map.local.is_some() {
                device.write(part.iova, bytes)?;
                continue;
            }
            let mut at = part.iova;
            let written = bytes.chunks(table.transfer).try_for_each(|bytes| {
                let written = self.remote.dma_write(at, bytes);
                at = at.wrapping_add(bytes.len() as u64);
                written
            });
            written.and(device.tell(part.iova, bytes.len() as u64))?;
        }
        Ok(())
    }
}

impl Bus for Memory {
    fn read(&self, device: &Device, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        let table = self.table();
        table.check_master()?;
        self.read_parts((&table, device), iova, data, Prot::READ)
    }

    fn write(&self, device: &Device, iova: u64, data: &[u8]) -> Result<(), Error> {
        let table = self.table();
        table.check_master()?;
        self.write_parts((&table, device), iova, data)
    }

    fn pin(&self, device: &Device, iova: u64, size: u64, prot: Prot) -> Result<PinGuard, Error> {
        let table = self.table();
        table.check_master()?;
        let len = usize::try_from(size).map_err(|_| Error::Unmapped)?;
        table.check(iova, len, prot)?;
        for part in table.parts(iova, len, prot) {
            if part?.map.local.is_none() {
                return Err(Error::Unmapped);
            }
        }
        // The lock is kept, so that bus mastering does not end before the pin is there.
        device.pin(iova, size, prot)
    }

    fn wrote(&self, iova: u64, size: u64) {
        if let Some(carry) = &self.carry {
            carry.wrote(iova, size);
        }
    }

    fn is_master(&self) -> bool {
        self.table().master
    }

    fn set_master(&self, on: bool) {
        self.table_mut().master = on;
    }

    fn save(&self, device: &Device) -> Result<Option<Vec<u8>>, Errno> {
        let Some(carry) = &self.carry else {
            return Ok(None);
        };
        let table = self.table();
        let mut saved = Vec::new();
        for iova in carry.pages()? {
            let mut page = [0; PAGE as usize];
            let read = self.read_parts((&table, device), iova, &mut page, NO_PROT);
            read.map_err(Error::errno)?;
            saved.extend_from_slice(&iova.to_le_bytes());
            saved.extend_from_slice(&page);
        }
        Ok(Some(saved))
    }

    fn load(&self, device: &Device, bytes: &[u8]) -> Result<(), Errno> {
        const ENTRY: usize = 8 + PAGE as usize;
        if bytes.len() % ENTRY != 0 {
            return Err(Errno::EINVAL);
        }
        let table = self.table();
        for entry in bytes.chunks_exact(ENTRY) {
            let (iova, page) = entry.split_first_chunk().ok_or(Errno::EINVAL)?;
            let iova = u64::from_le_bytes(*iova);
            if iova % PAGE != 0 {
                return Err(Errno::EINVAL);
            }
            let written = self.write_parts((&table, device), iova, page);
            written.map_err(Error::errno)?;
        }
        Ok(())
    }
}
