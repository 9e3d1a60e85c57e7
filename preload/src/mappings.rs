// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a program has mapped in a container.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use adapter_user::Prot;

use crate::user;

/// A mapping of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) iova: u64,
    /// In bytes, not 0.
    pub(crate) size: u64,
    pub(crate) vaddr: u64,
    pub(crate) prot: Prot,
}

impl Mapping {
    pub(crate) fn last(&self) -> u64 {
        self.iova.saturating_add(self.size - 1)
    }
}

/// The mappings of a container, by their first IOVA.
#[derive(Default)]
pub(crate) struct Mappings(Mutex<BTreeMap<u64, Mapping>>);

impl Mappings {
    fn map(&self) -> MutexGuard<'_, BTreeMap<u64, Mapping>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, mapping: Mapping) {
        self.map().insert(mapping.iova, mapping);
    }

    /// A mapping has moved to another address.
    pub(crate) fn move_to(&self, iova: u64, vaddr: u64) {
        if let Some(mapping) = self.map().get_mut(&iova) {
            mapping.vaddr = vaddr;
        }
    }

    pub(crate) fn remove(&self, gone: &[Mapping]) {
        let mut map = self.map();
        for mapping in gone {
            map.remove(&mapping.iova);
        }
    }

    /// The mappings that touch the IOVAs from `first` to `last`.
    pub(crate) fn touched(&self, first: u64, last: u64) -> Vec<Mapping> {
        let map = self.map();
        let before = map.range(..first).next_back().map(|(_, mapping)| *mapping);
        let before = before.filter(|mapping| mapping.last() >= first);
        let others = map.range(first..=last).map(|(_, mapping)| *mapping);
        before.into_iter().chain(others).collect()
    }

    /// Writes `data` at `iova`, and tells nobody. It must be inside one mapping.
    pub(crate) fn write_unmarked(&self, iova: u64, data: &[u8]) -> Result<(), String> {
        let touched = self.touched(iova, iova);
        let mapping = touched.first().ok_or("nothing is mapped")?;
        let offset = iova - mapping.iova;
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > mapping.size) {
            return Err(format!("{iova:#x} is in no mapping"));
        }
        user::write(mapping.vaddr + offset, data).map_err(|errno| errno.to_string())
    }
}
