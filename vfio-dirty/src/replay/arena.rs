// SPDX-License-Identifier: MIT OR Apache-2.0
//! The user memory of a script's process, at the fixed addresses that scripts
//! use.
#![allow(unsafe_code)]

use std::io;
use std::num::NonZeroUsize;

use dirty_core::Errno;
use nix::sys::mman::{madvise, mmap_anonymous, MapFlags, MmapAdvise, ProtFlags};
use nix::sys::uio::{process_vm_readv, process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;

use dirty_script::op::{ARG, ARG_SIZE, BUF, BUF_SIZE, MEM, MEM_SIZE, RO, RO_SIZE};

/// Maps `size` bytes at `addr`. Fails if something is mapped there.
fn map(addr: u64, size: u64, prot: ProtFlags) -> nix::Result<()> {
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED_NOREPLACE;
    let at = NonZeroUsize::new(addr as usize);
    let len = NonZeroUsize::new(size as usize).ok_or(nix::Error::EINVAL)?;
    // SAFETY: this maps new private memory, and NOREPLACE leaves all other
    // memory as it is.
    unsafe { mmap_anonymous(at, len, prot, flags) }.map(|_| ())
}

/// Maps `size` bytes at `addr` that can be read, and written if `write`.
pub(crate) fn map_memory(addr: u64, size: u64, write: bool) -> Result<(), Errno> {
    let mut prot = ProtFlags::PROT_READ;
    prot.set(ProtFlags::PROT_WRITE, write);
    map(addr, size, prot).map_err(|e| Errno(e as i32))
}

/// Maps the memory that every script has.
pub(crate) fn map_all() -> Result<(), String> {
    let rw = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    for (addr, size, prot) in [
        (MEM, MEM_SIZE, rw),
        (BUF, BUF_SIZE, rw),
        (ARG, ARG_SIZE, rw),
        (RO, RO_SIZE, ProtFlags::PROT_READ),
    ] {
        map(addr, size, prot).map_err(|e| {
            format!(
                "scripts need their memory at {addr:#x}, which this process cannot map ({e}); \
                 run the program without a debugger or a limit on address space (ulimit -v)"
            )
        })?;
        let start = std::ptr::NonNull::new(addr as *mut std::ffi::c_void);
        if let Some(start) = start {
            // SAFETY: the range was mapped above, and the advice changes no
            // contents. It fails only on a kernel without huge pages, which
            // does not need it.
            let _ = unsafe { madvise(start, size as usize, MmapAdvise::MADV_NOHUGEPAGE) };
        }
    }
    Ok(())
}

/// Reads this process's memory. A bad address is an error.
pub(crate) fn read(addr: u64, buf: &mut [u8]) -> io::Result<()> {
    let len = buf.len();
    let base = addr as usize;
    let local = &mut [io::IoSliceMut::new(buf)];
    match process_vm_readv(Pid::this(), local, &[RemoteIoVec { base, len }])? {
        n if n == len => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Writes this process's memory. A bad address is an error.
pub(crate) fn write(addr: u64, buf: &[u8]) -> io::Result<()> {
    let len = buf.len();
    let base = addr as usize;
    let local = [io::IoSlice::new(buf)];
    match process_vm_writev(Pid::this(), &local, &[RemoteIoVec { base, len }])? {
        n if n == len => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
