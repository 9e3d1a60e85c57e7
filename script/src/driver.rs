// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver of a script's device, as the recorder's test driver is.

use crate::op::Action;
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
        self.pins.extend(pages(iova, n));
    }

    /// It has unpinned `n` pages, whether or not it had pinned them.
    pub fn unpinned(&mut self, iova: u64, n: i32) {
        for at in pages(iova, n) {
            if let Some(found) = self.pins.iter().position(|pin| *pin == at) {
                self.pins.remove(found);
            }
        }
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

fn pages(iova: u64, n: i32) -> impl Iterator<Item = u64> {
    (0..u64::try_from(n).unwrap_or(0)).map(move |k| iova.wrapping_add(k << 12))
}
