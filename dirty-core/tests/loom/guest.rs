// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest: its memory, the bitmap of it behind a lock, and a copy at the
//! destination.

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use loom::sync::Mutex;

use crate::bitmap::Bitmap;
use crate::mem::Or;

/// A report of every page, for the copy of everything after START.
pub(crate) const ALL: [u64; 512] = [!0; 512];

pub(crate) struct Guest {
    npages: u64,
    or: Or,
    tracked: Lock,
    /// The pages whose content is compared. Its content is how often each was
    /// written.
    pages: Vec<(u64, AtomicU64)>,
}

impl Guest {
    /// A guest whose pages `watched` are compared; tracking is off.
    pub(crate) fn new(npages: u64, watched: &[u64], or: Or) -> Self {
        Guest {
            npages,
            or,
            tracked: Lock::default(),
            pages: watched.iter().map(|p| (*p, AtomicU64::new(0))).collect(),
        }
    }

    /// Writes pages as a device or a CPU does, without a lock and in no order.
    pub(crate) fn write(&self, first: u64, n: u64) {
        for (_, page) in self
            .pages
            .iter()
            .filter(|(p, _)| (first..first + n).contains(p))
        {
            page.fetch_add(1, Relaxed);
        }
    }

    /// Marks pages. Each thread has its own `slot` of the lock.
    pub(crate) fn mark(&self, slot: usize, first: u64, n: u64) {
        self.tracked.read(slot, |bitmap| {
            if let Some(bitmap) = bitmap {
                bitmap.mark(first, n);
            }
        });
    }

    pub(crate) fn mark_without_lock(&self, first: u64, n: u64) {
        self.tracked.read_unlocked(|bitmap| {
            if let Some(bitmap) = bitmap {
                bitmap.mark(first, n);
            }
        });
    }

    pub(crate) fn pin(&self, page: u64) {
        self.change(|bitmap| bitmap.pin(&self.or, page).expect("memory"));
    }

    pub(crate) fn unpin(&self, page: u64) {
        self.change(|bitmap| bitmap.unpin(page));
    }

    /// START, with nothing pinned.
    pub(crate) fn start(&self) {
        let clean = Bitmap::new(&self.or, self.npages).expect("words");
        self.tracked.write(|bitmap| *bitmap = Some(clean));
    }

    pub(crate) fn stop(&self) {
        self.tracked.write(|bitmap| *bitmap = None);
    }

    /// Reports the pages written since the last report.
    pub(crate) fn report(&self) -> Vec<u64> {
        let mut words = vec![0; self.npages.div_ceil(64) as usize];
        self.change(|bitmap| bitmap.take_sparse(0, &mut words).expect("room"));
        words
    }

    fn change(&self, f: impl FnOnce(&mut Bitmap<Or>)) {
        self.tracked.write(|bitmap| {
            if let Some(bitmap) = bitmap {
                f(bitmap);
                // The next access takes back the words that were lent.
                bitmap.copy(0, 0, &mut []);
            }
        });
    }

    /// An empty copy.
    pub(crate) fn copy(&self) -> Vec<u64> {
        vec![0; self.pages.len()]
    }

    /// Copies the reported pages.
    pub(crate) fn copy_pages(&self, report: &[u64], copy: &mut [u64]) {
        for ((number, page), copy) in self.pages.iter().zip(copy) {
            if report[(number / 64) as usize] >> (number % 64) & 1 != 0 {
                *copy = page.load(Relaxed);
            }
        }
    }

    pub(crate) fn harvest(&self, copy: &mut [u64]) {
        let report = self.report();
        self.copy_pages(&report, copy);
    }

    /// Makes the last report. Then the copy must equal the memory.
    pub(crate) fn finish(&self, copy: &mut [u64]) {
        self.harvest(copy);
        let memory = self.pages.iter().map(|(_, page)| page.load(Relaxed));
        assert!(memory.eq(copy.iter().copied()), "a write is lost");
    }
}

/// A reader-writer lock that orders no more than it must: readers with writers,
/// but not readers with each other, as `loom`'s own lock does.
#[derive(Default)]
struct Lock {
    /// A reader holds its own slot, a writer all slots.
    slots: [Mutex<()>; 2],
    bitmap: UnsafeCell<Option<Bitmap<Or>>>,
}

// SAFETY: a reader that holds a slot has `&`, a writer that holds every slot
// has `&mut`, so they exclude each other. Without a slot `loom` fails at the
// race.
unsafe impl Sync for Lock {}

impl Lock {
    fn read(&self, slot: usize, f: impl FnOnce(&Option<Bitmap<Or>>)) {
        let _slot = self.slots[slot].lock().expect("no poison");
        self.read_unlocked(f);
    }

    fn read_unlocked(&self, f: impl FnOnce(&Option<Bitmap<Or>>)) {
        // SAFETY: see `Sync`: nobody has `&mut` meanwhile.
        self.bitmap.with(|bitmap| f(unsafe { &*bitmap }));
    }

    fn write(&self, f: impl FnOnce(&mut Option<Bitmap<Or>>)) {
        let _slots = self
            .slots
            .each_ref()
            .map(|slot| slot.lock().expect("no poison"));
        // SAFETY: every slot is held, so nobody else has a reference.
        self.bitmap.with_mut(|bitmap| f(unsafe { &mut *bitmap }));
    }
}
