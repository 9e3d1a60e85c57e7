// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a program has mapped in a container, for writes that mark nothing.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::uio::{process_vm_writev, RemoteIoVec};
use nix::unistd::Pid;

/// The mappings of a container: the first IOVA, the size in bytes, and the address.
#[derive(Default)]
pub(crate) struct Mappings(Mutex<BTreeMap<u64, (u64, u64)>>);

impl Mappings {
    fn map(&self) -> MutexGuard<'_, BTreeMap<u64, (u64, u64)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, iova: u64, size: u64, vaddr: u64) {
        self.map().insert(iova, (size, vaddr));
    }

    /// Removes the mappings that begin in the `size` bytes at `iova`.
    pub(crate) fn remove(&self, iova: u64, size: u64) {
        self.map().retain(|at, _| *at < iova || at - iova >= size);
    }

    /// Writes `data` at `iova`, and tells nobody. It must be inside one mapping.
    pub(crate) fn write_unmarked(&self, iova: u64, data: &[u8]) -> Result<(), String> {
        let map = self.map();
        let (at, (size, vaddr)) = map.range(..=iova).next_back().ok_or("nothing is mapped")?;
        let offset = iova - at;
        if offset
            .checked_add(data.len() as u64)
            .is_none_or(|end| end > *size)
        {
            return Err(format!("{iova:#x} is in no mapping"));
        }
        let base = (vaddr + offset) as usize;
        let len = data.len();
        let remote = [RemoteIoVec { base, len }];
        match process_vm_writev(Pid::this(), &[IoSlice::new(data)], &remote) {
            Ok(done) if done == data.len() => Ok(()),
            Ok(_) => Err("only a part was written".into()),
            Err(errno) => Err(errno.to_string()),
        }
    }
}
