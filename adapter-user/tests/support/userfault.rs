// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory whose pages come when a test gives them, by userfaultfd(2). The program of
//! the kernel module's virtual machine includes this file too.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::libc;

const PAGE: u64 = 4096;

/// The ioctls of a userfaultfd, their arguments, and a field of the first.
const API: u32 = 0xc018_aa3f;
const REGISTER: u32 = 0xc020_aa00;
const COPY: u32 = 0xc028_aa03;
const POISON: u32 = 0xc020_aa08;
const VERSION: u64 = 0xaa;
const FEATURE_POISON: u64 = 1 << 14;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Poison {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

#[repr(C)]
#[derive(Default)]
struct Event {
    kind: u8,
    reserved: [u8; 7],
    flags: u64,
    addr: u64,
    thread: u64,
}

/// A page as 64-bit words.
pub(crate) type Words = [u64; PAGE as usize / 8];

/// A page that starts with `words`.
pub(crate) fn page(words: &[u64]) -> Words {
    let mut page = [0; PAGE as usize / 8];
    page[..words.len()].copy_from_slice(words);
    page
}

/// Memory whose pages are missing until they are given.
pub(crate) struct Userfault {
    fd: OwnedFd,
}

impl Userfault {
    /// Takes over anonymous memory of this process of which no page was touched.
    ///
    /// # Errors
    ///
    /// EPERM unless the process is privileged or vm.unprivileged_userfaultfd is 1: else
    /// the kernel does not hold back its own copies for a userfaultfd.
    pub(crate) fn new(addr: u64, len: u64) -> io::Result<Userfault> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: the call takes only flags.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0);
        let fd = fd.ok_or_else(io::Error::last_os_error)?;
        // SAFETY: the kernel has just opened it, and nobody else has it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let new = Userfault { fd };
        new.call(
            API,
            &mut Api {
                version: VERSION,
                features: FEATURE_POISON,
                ioctls: 0,
            },
        )?;
        new.call(
            REGISTER,
            &mut Register {
                start: addr,
                len,
                mode: MODE_MISSING,
                ioctls: 0,
            },
        )?;
        Ok(new)
    }

    /// The page that somebody waits for now, if there is one that was not told yet.
    pub(crate) fn asked(&self) -> io::Result<Option<u64>> {
        let mut event = Event::default();
        let (to, len) = (std::ptr::from_mut(&mut event).cast(), size_of::<Event>());
        // SAFETY: the event has so many bytes, all of which may have any value.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), to, len) };
        match usize::try_from(read) {
            Ok(read) if read == len && event.kind == EVENT_PAGEFAULT => {
                Ok(Some(event.addr & !(PAGE - 1)))
            }
            Ok(_) => Err(io::Error::other("an unknown event of userfaultfd")),
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                e => Err(e),
            },
        }
    }

    /// Gives a page, and wakes who waits for it.
    pub(crate) fn give(&self, addr: u64, page: &Words) -> io::Result<()> {
        self.call(
            COPY,
            &mut Copy {
                dst: addr,
                src: page.as_ptr() as u64,
                len: PAGE,
                mode: 0,
                copied: 0,
            },
        )
    }

    /// Says that a page cannot be had, and wakes who waits for it.
    pub(crate) fn refuse(&self, addr: u64) -> io::Result<()> {
        self.call(
            POISON,
            &mut Poison {
                start: addr,
                len: PAGE,
                mode: 0,
                updated: 0,
            },
        )
    }

    fn call<T>(&self, nr: u32, arg: &mut T) -> io::Result<()> {
        // SAFETY: `arg` is what the ioctl takes. The memory that it changes is the
        // test's, of which the program keeps no reference.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), nr.into(), arg) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}
