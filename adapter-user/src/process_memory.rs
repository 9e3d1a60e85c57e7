// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies from and to this process's memory at addresses that may be bad.
//!
//! The kernel makes the copies, so a bad address is an error and not a signal.

use std::io::{IoSlice, IoSliceMut};

use dirty_core::host::Fault;
use nix::sys::uio::{process_vm_readv, process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;

/// Copies `buf.len()` bytes at `addr` into `buf`.
pub(crate) fn read_process(addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
    let remote = RemoteIoVec {
        base: addr as usize,
        len: buf.len(),
    };
    let len = buf.len();
    let local = &mut [IoSliceMut::new(buf)];
    copied(process_vm_readv(Pid::this(), local, &[remote]), len)
}

/// Copies `buf` to `addr`.
pub(crate) fn write_process(addr: u64, buf: &[u8]) -> Result<(), Fault> {
    let remote = RemoteIoVec {
        base: addr as usize,
        len: buf.len(),
    };
    let local = [IoSlice::new(buf)];
    copied(process_vm_writev(Pid::this(), &local, &[remote]), buf.len())
}

/// Turns the result of a system call that should copy `len` bytes into a fault
/// unless it copied all of them.
fn copied(done: nix::Result<usize>, len: usize) -> Result<(), Fault> {
    match done {
        Ok(done) if done == len => Ok(()),
        Ok(done) => Err(Fault { done }),
        Err(_) => Err(Fault { done: 0 }),
    }
}
