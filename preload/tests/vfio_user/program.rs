// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the program does: memory, ioctls of the container, and of the device.

use std::ffi::c_ulong;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::thread;

use crate::support::ioctl;

pub(crate) const PAGE: u64 = 4096;
/// Where the tests map memory, and how much.
pub(crate) const IOVA: u64 = 0x10_0000;
pub(crate) const SIZE: u64 = 64 * PAGE;

/// Has the server end the connection, and waits until it has.
pub(crate) fn end_connection(device: RawFd) {
    UnixStream::connect(std::env::var_os("END").unwrap()).unwrap();
    while register(device, STATUS).is_ok() {
        thread::yield_now();
    }
}

// ---- the program's memory

/// Memory of the program, of `SIZE` bytes.
pub(crate) struct Memory(*mut u8);

impl Memory {
    /// `file`: of a file that another process can map.
    pub(crate) fn new(file: bool) -> Memory {
        let (fd, flags) = match file {
            true => {
                // SAFETY: the name ends with a zero.
                let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), libc::MFD_ALLOW_SEALING) };
                // SAFETY: it accesses no memory.
                assert_eq!(unsafe { libc::ftruncate(fd, SIZE as i64) }, 0);
                (fd, libc::MAP_SHARED)
            }
            false => (-1, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS),
        };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: it maps new memory.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), SIZE as usize, prot, flags, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Memory(at.cast())
    }

    pub(crate) fn word(&self, page: u64) -> u32 {
        // SAFETY: the page is in the memory.
        let at = unsafe { self.0.add((page * PAGE) as usize) };
        // SAFETY: as above; the device writes it too.
        unsafe { at.cast::<u32>().read_volatile() }
    }

    pub(crate) fn map(&self, container: &File, iova: u64) -> Result<i32, i32> {
        let map = [32 | 3 << 32, self.0 as u64, iova, SIZE];
        ioctl(container.as_raw_fd(), 0x3b71, map.as_ptr() as c_ulong)
    }
}

pub(crate) fn unmap(container: &File, iova: u64) -> Result<i32, i32> {
    let mut unmap = [24, iova, SIZE];
    ioctl(container.as_raw_fd(), 0x3b72, unmap.as_mut_ptr() as c_ulong)
}

pub(crate) fn unmap_dirty(container: &File, iova: u64) -> Result<u64, i32> {
    let mut bitmap = 0u64;
    let mut unmap = [48 | 1 << 32, iova, SIZE, PAGE, 8, &raw mut bitmap as u64];
    ioctl(container.as_raw_fd(), 0x3b72, unmap.as_mut_ptr() as c_ulong).map(|_| bitmap)
}

/// START (1) or STOP (2) of the container's tracking.
pub(crate) fn track(container: &File, flags: u64) -> Result<i32, i32> {
    let track = [8 | flags << 32];
    ioctl(container.as_raw_fd(), 0x3b75, track.as_ptr() as c_ulong)
}

pub(crate) fn get_bitmap(container: &File, iova: u64) -> Result<u64, i32> {
    let mut bitmap = 0u64;
    let mut get = [48 | 4 << 32, iova, SIZE, PAGE, 8, &raw mut bitmap as u64];
    ioctl(container.as_raw_fd(), 0x3b75, get.as_mut_ptr() as c_ulong).map(|_| bitmap)
}

// ---- the device

pub(crate) const STATUS: u64 = 0x1c;
pub(crate) const MAILBOX: u64 = 0x28;

pub(crate) fn pread(fd: RawFd, offset: u64) -> Result<u32, i32> {
    let mut word = 0u32;
    // SAFETY: the word has 4 bytes.
    match unsafe { libc::pread64(fd, (&raw mut word).cast(), 4, offset as i64) } {
        4 => Ok(word),
        _ => Err(io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

pub(crate) fn pwrite(fd: RawFd, offset: u64, word: u32) -> Result<(), i32> {
    // SAFETY: the word has 4 bytes.
    match unsafe { libc::pwrite64(fd, (&raw const word).cast(), 4, offset as i64) } {
        4 => Ok(()),
        _ => Err(io::Error::last_os_error().raw_os_error().unwrap()),
    }
}

pub(crate) fn register(device: RawFd, at: u64) -> Result<u32, i32> {
    pread(device, at)
}

/// Lets the device do DMA.
pub(crate) fn bus_master(device: RawFd) {
    pwrite(device, (7 << 40) + 4, 6).unwrap();
}

/// Has the engine write `value` to the first word of a page: whether it could.
pub(crate) fn dma_write(device: RawFd, iova: u64, value: u32) -> bool {
    for (at, value) in [iova as u32, 0, 4, 1, 0, value, 1].into_iter().enumerate() {
        pwrite(device, 4 * at as u64, value).unwrap();
    }
    register(device, STATUS) == Ok(1)
}

/// VFIO_DEVICE_FEATURE: `feature` has the flags too, and `data` comes back.
pub(crate) fn feature<const N: usize>(
    device: RawFd,
    feature: u64,
    data: [u64; N],
) -> Result<[u64; N], i32> {
    let mut arg = vec![(8 + 8 * N as u64) | feature << 32];
    arg.extend(data);
    ioctl(device, 0x3b75, arg.as_mut_ptr() as c_ulong)?;
    Ok(arg[1..].try_into().unwrap())
}

pub(crate) const GET: u64 = 1 << 16;
pub(crate) const SET: u64 = 1 << 17;

/// Changes the migration state. A data file comes back if a transfer begins.
pub(crate) fn set_state(device: RawFd, state: u64) -> Result<Option<File>, i32> {
    let [answer] = feature(device, SET | 2, [state])?;
    let fd = (answer >> 32) as i32;
    // SAFETY: the descriptor is new, and nobody else has it.
    Ok((fd >= 0).then(|| unsafe { File::from_raw_fd(fd) }))
}

pub(crate) fn state(device: RawFd) -> u64 {
    feature(device, GET | 2, [0]).unwrap()[0] & 0xffff_ffff
}
