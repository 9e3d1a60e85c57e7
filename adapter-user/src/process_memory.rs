// SPDX-License-Identifier: MIT OR Apache-2.0
//! Copies from and to this process's memory at addresses that may be bad.
//!
//! The kernel makes the copies, so a bad address is an error and not a signal.

use dirty_core::host::Fault;
use libc::{c_ulong, c_void, iovec, pid_t, process_vm_readv, process_vm_writev, ssize_t};

/// process_vm_readv(2) or process_vm_writev(2).
type Copy =
    unsafe extern "C" fn(pid_t, *const iovec, c_ulong, *const iovec, c_ulong, c_ulong) -> ssize_t;

/// Copies `buf.len()` bytes at `addr` into `buf`.
pub(crate) fn read_process(addr: u64, buf: &mut [u8]) -> Result<(), Fault> {
    // SAFETY: process_vm_readv writes to its local bytes, which are those of `buf`.
    unsafe { copy(process_vm_readv, buf.as_mut_ptr(), buf.len(), addr) }
}

/// Copies `buf` to `addr`.
pub(crate) fn write_process(addr: u64, buf: &[u8]) -> Result<(), Fault> {
    // SAFETY: process_vm_writev only reads its local bytes, which are those of `buf`.
    unsafe { copy(process_vm_writev, buf.as_ptr().cast_mut(), buf.len(), addr) }
}

/// Copies between the `len` bytes at `local` and those at `addr`.
///
/// # Safety
///
/// `call` may do with the bytes at `local` what it does to its local bytes.
unsafe fn copy(call: Copy, local: *mut u8, len: usize, addr: u64) -> Result<(), Fault> {
    let part = |base: *mut c_void| iovec {
        iov_base: base,
        iov_len: len,
    };
    let (local, remote) = (part(local.cast()), part(addr as usize as *mut c_void));
    // SAFETY: getpid(2) accesses no memory.
    let this = unsafe { libc::getpid() };
    // SAFETY: each list has one part. The caller promises that the call may access the
    // local bytes; the kernel checks the other ones.
    match unsafe { call(this, &local, 1, &remote, 1, 0) } {
        done if done < 0 => Err(Fault { done: 0 }),
        done if done as usize == len => Ok(()),
        done => Err(Fault {
            done: done as usize,
        }),
    }
}
