// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver of a script's device. It behaves as the test driver with which
//! Linux was recorded.

use std::collections::BTreeSet;

use crate::op::{Action, PAGE};
use crate::system::Stat;

/// What a device's driver remembers.
#[derive(Clone, Debug)]
pub struct Driver {
    unmap_calls: u32,
    last: (u64, u64),
    /// The iova of each pin, in the order in which they were made.
    pins: Vec<u64>,
    /// What the dma_unmap callback does, in order.
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
    /// Counts a call of the dma_unmap callback, and returns what it has to do.
    pub fn dma_unmap(&mut self, iova: u64, size: u64) -> Vec<Action> {
        self.unmap_calls += 1;
        self.last = (iova, size);
        self.actions.clone()
    }

    /// Notes that the device has pinned `n` pages from `iova` on.
    pub fn pinned(&mut self, iova: u64, n: i32) {
        let pages = 0..u64::try_from(n).unwrap_or(0);
        self.pins.extend(pages.map(|k| iova.wrapping_add(k * PAGE)));
    }

    /// Forgets one pin of each of `n` pages. Pages that it had not pinned are
    /// passed over.
    pub fn unpinned(&mut self, iova: u64, n: i32) {
        let n = u64::try_from(n).unwrap_or(0);
        let mut dropped = BTreeSet::new(); // pages that have lost their one pin
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

    /// The driver's counters.
    #[must_use]
    pub fn stat(&self) -> Stat {
        Stat {
            unmap_calls: self.unmap_calls,
            last: self.last,
            pinned: self.pins.len(),
        }
    }
}
