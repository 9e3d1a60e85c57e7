// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program's memory, at addresses that may be bad.

use std::io::{IoSlice, IoSliceMut};

use adapter_user::Errno;
use dirty_core::host::Fault;
use nix::sys::uio::{process_vm_readv, process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;

/// Fills `bytes` from `addr` on, or fails with EFAULT.
pub(crate) fn read(addr: u64, bytes: &mut [u8]) -> Result<(), Errno> {
    let (base, len) = (addr as usize, bytes.len());
    let remote = [RemoteIoVec { base, len }];
    match process_vm_readv(Pid::this(), &mut [IoSliceMut::new(bytes)], &remote) {
        Ok(done) if done == len => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}

/// Writes `bytes` to `addr`, or fails with EFAULT.
pub(crate) fn write(addr: u64, bytes: &[u8]) -> Result<(), Errno> {
    let (base, len) = (addr as usize, bytes.len());
    let remote = [RemoteIoVec { base, len }];
    match process_vm_writev(Pid::this(), &[IoSlice::new(bytes)], &remote) {
        Ok(done) if done == len => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}

/// As `read`, for dirty-core.
pub(crate) fn fetch(addr: u64, bytes: &mut [u8]) -> Result<(), Fault> {
    read(addr, bytes).map_err(|_| Fault { done: 0 })
}

/// As `write`, for dirty-core.
pub(crate) fn store(addr: u64, bytes: &[u8]) -> Result<(), Fault> {
    write(addr, bytes).map_err(|_| Fault { done: 0 })
}

/// Reads `len` bytes at `addr`.
pub(crate) fn bytes(addr: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; len];
    if len != 0 {
        read(addr, &mut bytes)?;
    }
    Ok(bytes)
}

/// Reads `N` words of 64 bits at `addr`, zero where there is no memory.
pub(crate) fn words<const N: usize>(addr: u64) -> [u64; N] {
    let bytes = bytes(addr, 8 * N).unwrap_or_default();
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
    }
    words
}

/// Reads a structure of `W` words of 32 bits at `addr`. The first is argsz, which must be at
/// least the size of all of them, or it fails with EINVAL.
pub(crate) fn structure<const W: usize>(addr: u64) -> Result<[u32; W], Errno> {
    let bytes = bytes(addr, 4 * W)?;
    let mut words = [0; W];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_ne_bytes(bytes.try_into().unwrap_or_default());
    }
    match words.first() {
        Some(argsz) if *argsz as usize >= 4 * W => Ok(words),
        _ => Err(Errno::EINVAL),
    }
}

/// Writes words of 32 bits to `addr`.
pub(crate) fn put(addr: u64, words: &[u32]) -> Result<(), Errno> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    write(addr, &bytes)
}

/// Reads the string at `addr`, which ends with a zero. `None` if it is bad or longer than 255
/// bytes.
pub(crate) fn string(addr: u64) -> Option<String> {
    let mut string = Vec::new();
    for at in 0..256 {
        let mut byte = [0];
        read(addr.checked_add(at)?, &mut byte).ok()?;
        match byte {
            [0] => return String::from_utf8(string).ok(),
            [byte] => string.push(byte),
        }
    }
    None
}
