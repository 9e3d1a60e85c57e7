// SPDX-License-Identifier: MIT OR Apache-2.0
//! Records of the pinned pages of a guest of 1 TiB: the core's and the peer's.

use std::collections::BTreeMap;

use dirty_core::{Bitmap, Dest};

use crate::data::{zeroed, TIB_1};
use crate::guest::Guest;
use crate::host::{allocated, live, Heap};
use crate::sets::set_bits;

/// Pinned pages and their bitmap.
pub(crate) trait Pins {
    const NAME: &'static str;

    /// No pins.
    fn new() -> Self;

    fn pin(&mut self, page: u64) -> u64;

    /// Pins many pages, all at once where that is faster.
    fn fill(&mut self, pages: &[u64]) {
        for page in pages {
            self.pin(*page);
        }
    }

    /// The pfn of a pinned page.
    fn lookup(&mut self, page: u64) -> u64;

    /// Undoes what a lookup did.
    fn forget(&mut self, _page: u64) {}

    fn unpin(&mut self, page: u64);

    /// Pins a run of pages, as many as fit `pfns`.
    fn pin_run(&mut self, first: u64, pfns: &mut [u64]) {
        for (page, pfn) in (first..).zip(pfns) {
            *pfn = self.pin(page);
        }
    }

    /// Marks `n` pages.
    fn mark(&mut self, first: u64, n: u64);

    /// Dirty and pinned pages; dirty ones are cleared.
    fn get(&mut self, out: &mut [u64]);

    /// Bytes of the pins without bitmaps; `None` where that is not known.
    fn bytes(&self) -> Option<usize>;
}

pub(crate) struct Ours {
    guest: Guest,
    /// Bytes of the core without pins.
    before: usize,
}

impl Pins for Ours {
    const NAME: &'static str = "ours";

    fn new() -> Self {
        let guest = Guest::tracking(&[TIB_1.pages]);
        let before = live();
        Ours { guest, before }
    }

    fn pin(&mut self, page: u64) -> u64 {
        let mut pfns = [0];
        self.guest.pin(page, &mut pfns);
        pfns[0]
    }

    /// Pins the page again, which looks it up and counts: the core has no lookup.
    fn lookup(&mut self, page: u64) -> u64 {
        self.pin(page)
    }

    fn forget(&mut self, page: u64) {
        self.unpin(page);
    }

    fn unpin(&mut self, page: u64) {
        self.guest.unpin(page, 1);
    }

    fn pin_run(&mut self, first: u64, pfns: &mut [u64]) {
        self.guest.pin(first, pfns);
    }

    fn mark(&mut self, first: u64, n: u64) {
        self.guest.mark(first, n);
    }

    fn get(&mut self, out: &mut [u64]) {
        self.guest.get(0, TIB_1.pages, Dest::Words(out));
    }

    /// The pinned bits are not counted, which come with the first pin: they belong to
    /// the range, as the dirty ones do.
    fn bytes(&self) -> Option<usize> {
        let bitmap = Bitmap::<Heap>::pinned_bytes(TIB_1.pages) as usize;
        Some(live() - self.before - bitmap)
    }
}

/// The standard library's map, and a dirty bit for each page. As in Linux, a page that
/// was pinned since the last report is dirty too.
pub(crate) struct Map {
    map: BTreeMap<u64, (u64, u32)>,
    dirty: Vec<u64>,
    /// Bytes allocated without pins.
    before: Option<usize>,
}

impl Pins for Map {
    const NAME: &'static str = "BTreeMap";

    fn new() -> Self {
        let dirty = zeroed(TIB_1.words());
        Map {
            map: BTreeMap::new(),
            dirty,
            before: allocated(),
        }
    }

    fn pin(&mut self, page: u64) -> u64 {
        self.map.insert(page, (page, 1));
        set_bits(&mut self.dirty, page, 1);
        page
    }

    /// Builds full nodes, which is better than what single pins leave.
    fn fill(&mut self, pages: &[u64]) {
        self.map = pages.iter().map(|page| (*page, (*page, 1))).collect();
    }

    fn lookup(&mut self, page: u64) -> u64 {
        self.map.get(&page).expect("a pinned page").0
    }

    fn unpin(&mut self, page: u64) {
        let (_, refs) = self.map.remove(&page).expect("a pinned page");
        assert_eq!(refs, 1);
    }

    fn mark(&mut self, first: u64, n: u64) {
        set_bits(&mut self.dirty, first, n);
    }

    /// Copies and clears. Pinned pages are dirty again.
    fn get(&mut self, out: &mut [u64]) {
        out.copy_from_slice(&self.dirty);
        self.dirty.fill(0);
        for page in self.map.keys() {
            set_bits(&mut self.dirty, *page, 1);
        }
    }

    fn bytes(&self) -> Option<usize> {
        Some(allocated()? - self.before?)
    }
}
