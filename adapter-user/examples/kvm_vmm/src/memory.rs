// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest RAM, as the VMM and as its devices have it.

use std::fs::File;
use std::os::fd::OwnedFd;

use adapter_user::{DirtyBits, GuestMemory};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::guest::{PAGE, RAM};
use crate::Result;

/// Guest RAM as the VMM has it: writes through vm-memory are tracked.
pub(crate) type Memory = GuestMemoryMmap<DirtyBits>;
/// The same RAM as a device has it: nothing sees writes through this mapping.
pub(crate) type DeviceMemory = GuestMemoryMmap<()>;

/// Allocates guest RAM in memory files and maps them twice.
pub(crate) fn allocate() -> Result<(Memory, DeviceMemory)> {
    let mut ranges = Vec::new();
    for (at, len) in RAM {
        let memory = GuestMemory::new(len as u64)?;
        let file: OwnedFd = memory.as_fd().try_clone_to_owned()?;
        ranges.push((at, len, Some(FileOffset::new(File::from(file), 0))));
    }
    Ok((
        Memory::from_ranges_with_files(&ranges)?,
        DeviceMemory::from_ranges_with_files(&ranges)?,
    ))
}

/// The address of every page of RAM, in order.
pub(crate) fn pages(memory: &Memory) -> impl Iterator<Item = GuestAddress> + '_ {
    RAM.into_iter()
        .flat_map(|(at, len)| (0..len).step_by(PAGE as usize).map(move |to| (at, to)))
        .filter_map(|(at, to)| memory.checked_offset(at, to))
}

/// A checksum of each page of RAM, in order.
pub(crate) fn checksums(memory: &Memory) -> Result<Vec<u32>> {
    let mut bytes = [0; PAGE as usize];
    let sums = pages(memory).map(|at| {
        memory.read_slice(&mut bytes, at)?;
        Ok(crc32fast::hash(&bytes))
    });
    sums.collect()
}
