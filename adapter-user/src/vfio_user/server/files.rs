// SPDX-License-Identifier: MIT OR Apache-2.0
//! The files that a client has passed, each mapped into this process once.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use dirty_core::Errno;
use nix::fcntl::{fcntl, FcntlArg, OFlag, SealFlag};
use nix::sys::stat::{fstat, SFlag};
use nix::sys::statfs::{fstatfs, HUGETLBFS_MAGIC};

use super::view::{Backing, View};
use crate::container::memory::GuestMemory;

/// A file, with its length when it was mapped. A file that has grown since is mapped once more.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dev: u64,
    ino: u64,
    len: u64,
    writable: bool,
}

/// A file in this process, while a mapping of the client keeps it.
enum Kept {
    Direct(Weak<GuestMemory>),
    Checked(Weak<View>),
}

impl Kept {
    fn get(&self) -> Option<Backing> {
        match self {
            Kept::Direct(memory) => memory.upgrade().map(Backing::Direct),
            Kept::Checked(view) => view.upgrade().map(Backing::Checked),
        }
    }
}

/// The files of a client that are mapped into this process.
#[derive(Default)]
pub(super) struct Files {
    files: HashMap<Key, Kept>,
    /// How many there may be before those that have gone are forgotten.
    most: usize,
}

impl Files {
    /// Returns the memory of the `size` bytes at `offset` of a file: the whole file, or only
    /// these bytes if there is no room for it. `write` says whether they are written.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - EINVAL unless it is a regular file.
    /// - EINVAL if the bytes are not all in the file.
    /// - EACCES if the descriptor does not allow the accesses, EPERM if the file is sealed
    ///   against writes.
    /// - Those of mmap(2).
    pub(super) fn get(
        &mut self,
        file: &OwnedFd,
        offset: u64,
        size: u64,
        write: bool,
    ) -> Result<Backing, Errno> {
        let stat = fstat(file).map_err(errno)?;
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
            return Err(Errno::EINVAL);
        }
        let len = u64::try_from(stat.st_size).map_err(|_| Errno::EINVAL)?;
        match offset.checked_add(size) {
            Some(end) if end <= len => {}
            _ => return Err(Errno::EINVAL),
        }
        let seals = seals(file.as_fd());
        let sealed = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_FUTURE_WRITE;
        let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL).map_err(errno)?);
        let writable = match flags & OFlag::O_ACCMODE {
            OFlag::O_RDWR => !seals.intersects(sealed),
            OFlag::O_RDONLY => false,
            _ => return Err(Errno::EACCES),
        };
        if write && !writable {
            return Err(match seals.intersects(sealed) {
                true => Errno::EPERM,
                false => Errno::EACCES,
            });
        }
        let key = Key {
            dev: stat.st_dev,
            ino: stat.st_ino,
            len,
            writable,
        };
        if let Some(backing) = self.files.get(&key).and_then(Kept::get) {
            return Ok(backing);
        }
        // A page of a file that cannot shrink is there or can be allocated. Huge pages can be
        // used up, even so.
        let direct = writable && seals.contains(SealFlag::F_SEAL_SHRINK) && !is_huge(file.as_fd());
        let all = match direct {
            true => whole(file).map(|memory| {
                let kept = Kept::Direct(Arc::downgrade(&memory));
                (kept, Backing::Direct(memory))
            }),
            false => View::new(file.as_fd(), 0, len, writable).map(|view| {
                let view = Arc::new(view);
                (Kept::Checked(Arc::downgrade(&view)), Backing::Checked(view))
            }),
        };
        match all {
            Ok((kept, backing)) => {
                self.keep(key, kept);
                Ok(backing)
            }
            Err(_) => {
                let part = View::new(file.as_fd(), offset, size, writable)?;
                Ok(Backing::Checked(Arc::new(part)))
            }
        }
    }

    fn keep(&mut self, key: Key, kept: Kept) {
        if self.files.len() >= self.most {
            self.files.retain(|_, kept| kept.get().is_some());
            self.most = 2 * self.files.len() + 16;
        }
        self.files.insert(key, kept);
    }
}

fn whole(file: &OwnedFd) -> Result<Arc<GuestMemory>, Errno> {
    let file = file.try_clone().map_err(|_| Errno(libc::EMFILE))?;
    let memory = GuestMemory::from_fd(file).map_err(|_| Errno::ENOMEM)?;
    Ok(Arc::new(memory))
}

/// The file's seals. A file that cannot have any has none.
fn seals(file: BorrowedFd<'_>) -> SealFlag {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).unwrap_or(0);
    SealFlag::from_bits_truncate(seals)
}

/// Whether the file consists of huge pages. Yes if that cannot be told.
fn is_huge(file: BorrowedFd<'_>) -> bool {
    fstatfs(file).map_or(true, |fs| fs.filesystem_type() == HUGETLBFS_MAGIC)
}

fn errno(errno: nix::errno::Errno) -> Errno {
    Errno(errno as i32)
}
