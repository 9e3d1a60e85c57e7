// SPDX-License-Identifier: MIT OR Apache-2.0
//! The file that a device's state goes through.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dirty_core::migration::{Migration, Precopy, PrecopyInfo};
use dirty_core::{Errno, Error};

use super::model::DeviceModel;
use crate::process_memory::{read_process, write_process};

/// How many bytes of state may be on their way.
const MAX_BYTES: usize = 1 << 30;
/// A piece that `save_early` wrote.
const EARLY: u64 = 1;
/// The piece that `save` wrote.
const STATE: u64 = 2;
/// The piece that follows `save`'s, if the device's memory has a part in its state.
const MEMORY: u64 = 3;
/// The head of a piece: its kind and its length in bytes.
const HEAD: usize = 16;

/// The file that a program reads a device's state from, or writes it to: the `data_fd` of
/// VFIO's migration.
///
/// A clone is the same file. It is usable until the device leaves the states in which its
/// state is transferred.
#[derive(Clone)]
pub struct DataFile {
    stream: Arc<Mutex<Stream>>,
    model: Arc<dyn DeviceModel>,
    /// Locked before the stream.
    machine: Arc<Mutex<Migration>>,
}

/// What is between the device and the program.
struct Stream {
    phase: Phase,
    bytes: Vec<u8>,
    /// How many of `bytes` were read.
    done: usize,
    /// How many of the bytes that were there at first are still to be read.
    initial: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The program reads while the device runs.
    PreCopy,
    /// The program reads, and the device has stopped.
    StopCopy,
    /// The program writes.
    Resuming,
    /// The device has left these states.
    Over,
}

impl fmt::Debug for DataFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataFile").finish_non_exhaustive()
    }
}

impl DataFile {
    fn new(model: &Arc<dyn DeviceModel>, machine: &Arc<Mutex<Migration>>, phase: Phase) -> Self {
        let stream = Stream {
            phase,
            bytes: Vec::new(),
            done: 0,
            initial: 0,
        };
        DataFile {
            stream: Arc::new(Mutex::new(stream)),
            model: Arc::clone(model),
            machine: Arc::clone(machine),
        }
    }

    fn stream(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A file to read from while the device runs.
    pub(super) fn pre_copy(
        model: &Arc<dyn DeviceModel>,
        machine: &Arc<Mutex<Migration>>,
    ) -> Result<Self, Errno> {
        let file = DataFile::new(model, machine, Phase::PreCopy);
        let mut stream = file.stream();
        stream.append(EARLY, |to| model.save_early(to))?;
        stream.initial = stream.bytes.len();
        drop(stream);
        Ok(file)
    }

    /// A file to read the state of a device from that has stopped.
    pub(super) fn stop_copy(
        model: &Arc<dyn DeviceModel>,
        machine: &Arc<Mutex<Migration>>,
        memory: Option<Vec<u8>>,
    ) -> Result<Self, Errno> {
        let file = DataFile::new(model, machine, Phase::PreCopy);
        file.device_stopped(memory)?;
        Ok(file)
    }

    /// A file to write to.
    pub(super) fn resuming(model: &Arc<dyn DeviceModel>, machine: &Arc<Mutex<Migration>>) -> Self {
        DataFile::new(model, machine, Phase::Resuming)
    }

    /// The device has stopped: the rest of its state follows what there is to read, with the
    /// part that its memory has in it. On an error nothing follows.
    pub(super) fn device_stopped(&self, memory: Option<Vec<u8>>) -> Result<(), Errno> {
        let mut stream = self.stream();
        let before = stream.bytes.len();
        stream.append(STATE, |to| self.model.save(to))?;
        if let Some(memory) = memory {
            let appended = stream.append(MEMORY, |to| to.write_all(&memory));
            appended.inspect_err(|_| stream.bytes.truncate(before))?;
        }
        stream.phase = Phase::StopCopy;
        Ok(())
    }

    /// Ends the transfer.
    pub(super) fn end(&self) {
        let mut stream = self.stream();
        stream.phase = Phase::Over;
        stream.bytes = Vec::new();
        stream.done = 0;
    }

    /// Ends the transfer, and gives the device what the program has written. `memory` takes the
    /// part that the device's memory has in its state.
    pub(super) fn load(
        &self,
        memory: impl FnOnce(&[u8]) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let bytes = std::mem::take(&mut self.stream().bytes);
        self.end();
        match load(&*self.model, &bytes)? {
            Some(piece) => memory(piece),
            None => Ok(()),
        }
    }

    /// Reads into `data`, and returns how many bytes: 0 at the end of the state.
    ///
    /// # Errors
    ///
    /// In this order: EBADF for a file to write to; ENODEV when the transfer is over; ENOMSG
    /// in the pre-copy phase, if the device has nothing more at present; the errno of
    /// [`DeviceModel::save_early`].
    pub fn read(&self, data: &mut [u8]) -> Result<usize, Errno> {
        let mut stream = self.stream();
        match stream.phase {
            Phase::Resuming => return Err(Errno(libc::EBADF)),
            Phase::Over => return Err(Errno::ENODEV),
            Phase::PreCopy if stream.rest().is_empty() => {
                if self.model.early_size() == 0 {
                    return Err(Errno(libc::ENOMSG));
                }
                stream.append(EARLY, |to| self.model.save_early(to))?;
            }
            Phase::PreCopy | Phase::StopCopy => {}
        }
        Ok(stream.take(data))
    }

    /// Writes `data`, all of it.
    ///
    /// # Errors
    ///
    /// In this order: EBADF for a file to read from; ENODEV when the transfer is over; ENOSPC
    /// beyond 1 GiB.
    pub fn write(&self, data: &[u8]) -> Result<usize, Errno> {
        let mut stream = self.stream();
        match stream.phase {
            Phase::PreCopy | Phase::StopCopy => return Err(Errno(libc::EBADF)),
            Phase::Over => return Err(Errno::ENODEV),
            Phase::Resuming => {}
        }
        stream.make_room(data.len())?;
        stream.bytes.extend_from_slice(data);
        Ok(data.len())
    }

    /// Returns how much is left to read in the pre-copy phase.
    ///
    /// # Errors
    ///
    /// EINVAL if the device is not in that phase.
    pub fn left(&self) -> Result<Precopy, Errno> {
        let stream = self.stream();
        if stream.phase != Phase::PreCopy {
            return Err(Errno::EINVAL);
        }
        let others = (stream.rest().len() - stream.initial) as u64;
        Ok(Precopy {
            initial_bytes: stream.initial as u64,
            dirty_bytes: others.saturating_add(self.model.early_size()),
            reinit: false,
        })
    }

    /// How many bytes are left to read at present.
    pub(super) fn unread(&self) -> u64 {
        let stream = self.stream();
        let rest = stream.rest().len() as u64;
        match stream.phase {
            Phase::PreCopy => rest.saturating_add(self.model.early_size()),
            _ => rest,
        }
    }

    /// Answers an ioctl of the file. `nr` is its number, and `arg` the address of its
    /// structure in this process. There is one: VFIO_MIG_GET_PRECOPY_INFO.
    ///
    /// # Errors
    ///
    /// In this order: ENOTTY for another one; EFAULT if the structure cannot be read; EINVAL
    /// for an argsz below 24, and if the device is not in the pre-copy phase; ENODEV when the
    /// transfer is over; EFAULT if the answer cannot be written.
    ///
    /// # Safety
    ///
    /// It writes to the structure as the system call would: nobody else may use it meanwhile.
    pub unsafe fn ioctl(&self, nr: u32, arg: u64) -> Result<i32, Errno> {
        let info = PrecopyInfo::read(nr, arg, read_process).map_err(Error::errno)?;
        let machine = self.machine.lock();
        let machine = machine.unwrap_or_else(PoisonError::into_inner);
        let over = self.stream().phase == Phase::Over;
        let estimate = || match over {
            true => Err(Errno::ENODEV),
            false => self.left(),
        };
        let answered = machine.precopy_info(info, estimate, write_process);
        answered.map(|()| 0).map_err(Error::errno)
    }
}

impl Stream {
    /// What is still to be read.
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.done..).unwrap_or_default()
    }

    fn take(&mut self, data: &mut [u8]) -> usize {
        let rest = self.bytes.get(self.done..).unwrap_or_default();
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
        self.done += n;
        self.initial = self.initial.saturating_sub(n);
        if self.done == self.bytes.len() {
            self.bytes.clear();
            self.done = 0;
        }
        n
    }

    /// Appends a piece that `save` writes. On an error nothing is appended.
    fn append(
        &mut self,
        kind: u64,
        save: impl FnOnce(&mut Vec<u8>) -> io::Result<()>,
    ) -> Result<(), Errno> {
        let mut piece = Vec::from(kind.to_le_bytes());
        piece.resize(HEAD, 0);
        save(&mut piece).map_err(|error| errno(&error))?;
        let len = (piece.len() - HEAD) as u64;
        piece[8..HEAD].copy_from_slice(&len.to_le_bytes());
        self.make_room(piece.len())?;
        self.bytes.append(&mut piece);
        Ok(())
    }

    fn make_room(&self, more: usize) -> Result<(), Errno> {
        match self.bytes.len().checked_add(more) {
            Some(len) if len <= MAX_BYTES => Ok(()),
            _ => Err(Errno::ENOSPC),
        }
    }
}

/// How many bytes `save` makes, about.
pub(super) fn size(model: &dyn DeviceModel) -> u64 {
    model.state_size().saturating_add(HEAD as u64)
}

/// Gives the device the pieces in `bytes`: any number of early ones, and the state. Returns what
/// the piece after that has, if there is one.
pub(super) fn load<'a>(
    model: &dyn DeviceModel,
    bytes: &'a [u8],
) -> Result<Option<&'a [u8]>, Errno> {
    let mut rest = bytes;
    loop {
        let (kind, piece, tail) = split(rest)?;
        if kind == EARLY {
            give(piece, |from| model.load_early(from))?;
            rest = tail;
            continue;
        }
        if kind != STATE {
            return Err(Errno::EINVAL);
        }
        let memory = match tail {
            [] => None,
            _ => match split(tail)? {
                (MEMORY, memory, []) => Some(memory),
                _ => return Err(Errno::EINVAL),
            },
        };
        give(piece, |from| model.load(from))?;
        return Ok(memory);
    }
}

/// The first piece of `bytes`, with its kind, and what follows it.
fn split(bytes: &[u8]) -> Result<(u64, &[u8], &[u8]), Errno> {
    let (kind, rest) = bytes.split_first_chunk().ok_or(Errno::EINVAL)?;
    let (len, rest) = rest.split_first_chunk().ok_or(Errno::EINVAL)?;
    let len = usize::try_from(u64::from_le_bytes(*len)).map_err(|_| Errno::EINVAL)?;
    let (piece, tail) = rest.split_at_checked(len).ok_or(Errno::EINVAL)?;
    Ok((u64::from_le_bytes(*kind), piece, tail))
}

/// Calls `load` with a piece, of which it must read all.
fn give(mut piece: &[u8], load: impl FnOnce(&mut dyn Read) -> io::Result<()>) -> Result<(), Errno> {
    load(&mut piece).map_err(|error| errno(&error))?;
    match piece {
        [] => Ok(()),
        _ => Err(Errno::EINVAL),
    }
}

/// The errno that a program gets for what a model's `save` or `load` failed with.
fn errno(error: &io::Error) -> Errno {
    if let Some(errno) = error.raw_os_error() {
        return Errno(errno);
    }
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Errno::EINVAL,
        io::ErrorKind::OutOfMemory => Errno::ENOMEM,
        _ => Errno::EIO,
    }
}
