// SPDX-License-Identifier: MIT OR Apache-2.0
//! Naive books of devices: a count for each page.

use std::collections::BTreeMap;

use adapter_user::Error;

use super::{mapping, Mode, DEVICES, MAPPINGS, PAGE};

/// A guard in the naive books: where its first page is, how many there are, and whether
/// they are pinned.
#[derive(Clone, Copy)]
pub(crate) struct Guard {
    pub(crate) id: u64,
    pub(crate) device: usize,
    pub(crate) iova: u64,
    pub(crate) size: u64,
    pub(crate) live: bool,
}

impl Guard {
    pub(crate) fn pages(&self) -> impl Iterator<Item = u64> {
        (self.iova / PAGE..=(self.iova + self.size - 1) / PAGE).map(|page| page * PAGE)
    }
}

/// The naive books.
#[derive(Default)]
pub(crate) struct Books {
    pub(crate) mapped: [bool; MAPPINGS as usize],
    /// How often the core has pinned what is at an IOVA.
    pub(crate) core: BTreeMap<u64, u64>,
    /// How often each device has, by `pin_pages`.
    pub(crate) raw: [BTreeMap<u64, u64>; DEVICES],
    pub(crate) guards: Vec<Guard>,
    /// The open devices, in the order in which they were opened and are told.
    pub(crate) open: Vec<usize>,
    pub(crate) modes: [Option<Mode>; DEVICES],
    /// What is dirty besides what is pinned.
    pub(crate) dirty: Vec<u64>,
}

fn less(counts: &mut BTreeMap<u64, u64>, iova: u64) -> bool {
    let Some(count) = counts.get_mut(&iova) else {
        return false;
    };
    *count -= 1;
    if *count == 0 {
        counts.remove(&iova);
    }
    true
}

impl Books {
    pub(crate) fn mapping_at(&self, iova: u64) -> Option<u64> {
        (0..MAPPINGS).find(|m| {
            let (start, size) = mapping(*m);
            self.mapped[*m as usize] && (start..start + size).contains(&iova)
        })
    }

    pub(crate) fn mark(&mut self, iova: u64) {
        self.dirty.push(iova / PAGE);
    }

    /// Pins in the core: all of them, or none.
    pub(crate) fn pin(&mut self, iovas: &[u64]) -> bool {
        for (k, iova) in iovas.iter().enumerate() {
            if self.mapping_at(*iova).is_none() {
                iovas[..k].iter().for_each(|iova| self.core_unpin(*iova));
                return false;
            }
            *self.core.entry(*iova).or_default() += 1;
            self.mark(*iova);
        }
        true
    }

    pub(crate) fn core_unpin(&mut self, iova: u64) {
        if less(&mut self.core, iova) {
            self.mark(iova);
        }
    }

    pub(crate) fn unpin_pages(&mut self, device: usize, iova: u64, npages: u64) {
        for iova in (0..npages).map(|k| iova + k * PAGE) {
            let touches = |at| self.mapping_at(at).is_some();
            if !touches(iova) && !touches(iova + PAGE - 1) {
                break;
            }
            self.core_unpin(iova);
            less(&mut self.raw[device], iova);
        }
    }

    pub(crate) fn drop_guard(&mut self, k: usize) {
        if std::mem::take(&mut self.guards[k].live) {
            let guard = self.guards[k];
            guard.pages().for_each(|iova| self.core_unpin(iova));
        }
    }

    pub(crate) fn unpin_range(&mut self, device: usize, first: u64, last: u64) {
        for k in 0..self.guards.len() {
            let guard = self.guards[k];
            let within = |iova: u64| iova <= last && iova + PAGE > first;
            if guard.device == device && guard.pages().any(within) {
                self.drop_guard(k);
            }
        }
        for (iova, count) in self.raw[device].clone() {
            if (first..=last).contains(&iova) {
                self.raw[device].remove(&iova);
                (0..count).for_each(|_| self.core_unpin(iova));
            }
        }
    }

    pub(crate) fn close(&mut self, device: usize) {
        self.unpin_range(device, 0, u64::MAX);
        self.open.retain(|d| *d != device);
    }

    pub(crate) fn pinned(&self, device: usize) -> u64 {
        let raw = self.raw[device].values().sum::<u64>();
        let guards = self.guards.iter().filter(|g| g.device == device && g.live);
        raw + guards
            .map(|guard| guard.pages().count() as u64)
            .sum::<u64>()
    }

    pub(crate) fn is_pinned(&self, m: u64) -> bool {
        let (start, size) = mapping(m);
        self.core.range(start..start + size).next().is_some()
    }

    pub(crate) fn remove(&mut self, m: u64) {
        self.mapped[m as usize] = false;
        let (start, size) = mapping(m);
        let gone = start / PAGE..(start + size) / PAGE;
        self.dirty.retain(|page| !gone.contains(page));
    }

    /// An unmap of mappings: how many bytes, an error, or `None` for a panic.
    pub(crate) fn unmap(&mut self, range: std::ops::Range<u64>) -> Option<Result<u64, Error>> {
        let (mut asked, mut tries) = (None, 0);
        loop {
            let mapped: Vec<u64> = range.clone().filter(|m| self.mapped[*m as usize]).collect();
            let Some(m) = mapped.iter().copied().find(|m| self.is_pinned(*m)) else {
                let size = mapped.iter().map(|m| mapping(*m).1).sum();
                mapped.iter().for_each(|m| self.remove(*m));
                return Some(Ok(size));
            };
            if asked.is_some_and(|asked| m <= asked) {
                tries += 1;
            } else {
                (asked, tries) = (Some(m), 0);
            }
            if tries == 11 {
                return Some(Err(Error::StillPinned));
            }
            for device in self.open.clone() {
                self.callback(device, m)?;
            }
        }
    }

    pub(crate) fn callback(&mut self, device: usize, m: u64) -> Option<()> {
        let (start, size) = mapping(m);
        match self.modes[device]? {
            Mode::Panic => return None,
            Mode::Nothing => return Some(()),
            Mode::Close => {
                self.close(device);
                return Some(());
            }
            Mode::UnmapFirst => {
                if !self.is_pinned(m) {
                    self.remove(m);
                }
            }
            Mode::PinFirst => {
                if self.pin(&[start]) {
                    *self.raw[device].entry(start).or_default() += 1;
                }
            }
            Mode::Unpin | Mode::DropGuards => {}
        }
        self.unpin_range(device, start, start + size - 1);
        Some(())
    }
}
