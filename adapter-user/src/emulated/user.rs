// SPDX-License-Identifier: MIT OR Apache-2.0
//! The structures of ioctls in this process's memory.

use dirty_core::Errno;

use crate::process_memory::{read_process, write_process};

/// Reads `N` bytes at `addr`, or answers EFAULT.
pub(super) fn get<const N: usize>(addr: u64) -> Result<[u8; N], Errno> {
    let mut bytes = [0; N];
    read_process(addr, &mut bytes).map_err(|_| Errno::EFAULT)?;
    Ok(bytes)
}

/// Reads `len` bytes at `addr`, or answers EFAULT.
pub(super) fn get_bytes(addr: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; len];
    match len {
        0 => Ok(bytes),
        _ => {
            read_process(addr, &mut bytes).map_err(|_| Errno::EFAULT)?;
            Ok(bytes)
        }
    }
}

/// Reads the `W` words of 32 bits at `addr`, of which the first is argsz, which must be
/// at least the size of all of them.
pub(super) fn get_words<const W: usize>(addr: u64) -> Result<[u32; W], Errno> {
    let bytes = get_bytes(addr, size_of::<[u32; W]>())?;
    let mut words = [0; W];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_ne_bytes(bytes.try_into().map_err(|_| Errno::EFAULT)?);
        // unreachable: 4 bytes
    }
    match words.first() {
        Some(argsz) if *argsz as usize >= size_of::<[u32; W]>() => Ok(words),
        _ => Err(Errno::EINVAL),
    }
}

/// Writes `bytes` to `addr`, or answers EFAULT.
pub(super) fn put(addr: u64, bytes: &[u8]) -> Result<(), Errno> {
    write_process(addr, bytes).map_err(|_| Errno::EFAULT)
}

/// Reads the string at `addr`, which ends with a zero. EINVAL if it has 4096 bytes or more.
pub(super) fn get_string(addr: u64) -> Result<Vec<u8>, Errno> {
    let mut string = Vec::new();
    for at in 0..4096 {
        match get::<1>(offset(addr, at)?)? {
            [0] => return Ok(string),
            [byte] => string.push(byte),
        }
    }
    Err(Errno::EINVAL)
}

/// The address `by` bytes after `addr`.
pub(super) fn offset(addr: u64, by: u64) -> Result<u64, Errno> {
    addr.checked_add(by).ok_or(Errno::EFAULT)
}
