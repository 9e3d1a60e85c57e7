// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver of a script's device, as the recorder's test driver is.

use std::collections::BTreeSet;

use crate::op::{Action, PAGE};
use crate::system::Stat;

/// What a driver remembers.
#[derive(Clone, Debug)]
pub struct Driver {
    unmap_calls: u32,
    last: (u64, u64),
    /// Iovas of single pins, in order.
    pins: Vec<u64>,
    /// What its dma_unmap callback does.
    pub actions: Vec<Action>,
}

impl Default for Driver {
    fn default() -> Self {
        Driver {
            unmap_calls: 0,
            last: (0, 0),
            pins: Vec::new(),
            actions: vec![Action::Unpin],
        }
    }
}

impl Driver {
    /// Its dma_unmap callback was called; what it is to do.
    pub fn dma_unmap(&mut self, iova: u64, size: u64) -> Vec<Action> {
        self.unmap_calls += 1;
        self.last = (iova, size);
        self.actions.clone()
    }

    /// It has pinned `n` pages.
    pub fn pinned(&mut self, iova: u64, n: i32) {
        let pages = 0..u64::try_from(n).unwrap_or(0);
        self.pins.extend(pages.map(|k| iova.wrapping_add(k * PAGE)));
    }

    /// It has unpinned `n` pages, whether or not it had pinned them.
    pub fn unpinned(&mut self, iova: u64, n: i32) {
        let n = u64::try_from(n).unwrap_or(0);
        let mut dropped = BTreeSet::new(); // one pin of each page
        self.pins.retain(|pin| {
            let offset = pin.wrapping_sub(iova);
            let inside = offset % PAGE == 0 && offset / PAGE < n;
            !(inside && dropped.insert(*pin))
        });
    }

    /// Forgets the pins in a range and returns their iovas.
    pub fn take(&mut self, iova: u64, size: u64) -> Vec<u64> {
        let inside = |at: &u64| at.checked_sub(iova).is_some_and(|offset| offset < size);
        let taken = self.pins.iter().copied().filter(inside).collect();
        self.pins.retain(|at| !inside(at));
        taken
    }

    /// What it has counted.
    #[must_use]
    pub fn stat(&self) -> Stat {
        Stat {
            unmap_calls: self.unmap_calls,
            last: self.last,
            pinned: self.pins.len(),
        }
    }
}
