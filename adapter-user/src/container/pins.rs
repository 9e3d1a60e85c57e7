// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one device has pinned, and the calls to the core that change it.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use dirty_core::host::{DeviceId, Prot};
use dirty_core::{Error, PageSize};

use super::counts::{Counts, Pins};
use super::host::{Call, Caller};
use super::pinned::Pages;
use super::shared::{Core, Shared};

/// How many pages of a guard are pinned in one call of the core. It takes one for each 8
/// bytes of a page, and no page has less than 4 KiB.
const AT_ONCE: usize = 512;

/// The pins of guards, by the first IOVA and a number that makes the key unique.
type Guards = BTreeMap<(u64, u64), Arc<Pages>>;

struct Book {
    closed: bool,
    /// Pins by `pin_pages`.
    counts: Counts,
    guards: Guards,
    next_guard: u64,
    /// No guard's last page ends further from where its first page starts.
    longest: u64,
}

impl Book {
    fn new(page: PageSize) -> Self {
        Book {
            closed: false,
            counts: Counts::new(page),
            guards: Guards::new(),
            next_guard: 0,
            longest: 0,
        }
    }

    /// Removes and returns the guards that have a page in a range.
    fn take_guards(&mut self, first: u64, last: u64) -> Vec<Arc<Pages>> {
        let from = (first.saturating_sub(self.longest), 0);
        let candidates = self.guards.range(from..=(last, u64::MAX));
        let hit = candidates.filter(|(key, pages)| key.0 >= first || pages.last() >= first);
        let keys: Vec<_> = hit.map(|(key, _)| *key).collect();
        keys.iter().filter_map(|k| self.remove_guard(*k)).collect()
    }

    fn remove_guard(&mut self, key: (u64, u64)) -> Option<Arc<Pages>> {
        let pages = self.guards.remove(&key);
        if self.guards.is_empty() {
            self.longest = 0;
        }
        pages
    }
}

/// What one device has pinned. It outlives its device for those who wait until the
/// device has closed.
///
/// Lock order: the book, then the container's core.
pub(super) struct DevicePins {
    pub(super) shared: Arc<Shared>,
    pub(super) id: DeviceId,
    book: Mutex<Book>,
    /// Told when the device has closed.
    closed: Condvar,
}

impl DevicePins {
    pub(super) fn new(shared: &Arc<Shared>, id: DeviceId) -> Self {
        DevicePins {
            shared: Arc::clone(shared),
            id,
            book: Mutex::new(Book::new(shared.state.page)),
            closed: Condvar::new(),
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn page(&self) -> PageSize {
        self.shared.state.page
    }

    fn call(&self) -> Call<'_> {
        Call::new(&self.shared.state, Caller::Process)
    }

    fn pin_in_core(
        &self,
        core: &mut Core,
        iova: u64,
        prot: Prot,
        pfns: &mut [u64],
    ) -> Result<(), Error> {
        core.pin_pages(&mut self.call(), self.id, iova, prot, pfns)
    }

    /// Drops one pin of each page, and returns how many pages the core went over.
    fn unpin_in_core(&self, core: &mut Core, iova: u64, npages: u64) -> u64 {
        let unpinned = core.unpin_pages(&mut self.call(), self.id, iova, npages);
        unpinned.unwrap_or(0) // unreachable: the device is open
    }

    /// Drops one pin of each page that is still mapped. A page with a pin is, unless
    /// another device has unpinned it.
    fn unpin_run(&self, core: &mut Core, iova: u64, npages: u64) {
        let mut done = 0;
        while done < npages {
            let at = iova + (done << self.page().shift());
            done += self.unpin_in_core(core, at, npages - done) + 1;
        }
    }

    pub(super) fn pin_pages(&self, iova: u64, prot: Prot, pfns: &mut [u64]) -> Result<(), Error> {
        let mut book = self.book();
        self.pin_in_core(&mut self.shared.write(), iova, prot, pfns)?;
        book.counts.add(iova, pfns.len() as u64);
        Ok(())
    }

    pub(super) fn unpin_pages(&self, iova: u64, npages: u64) {
        let mut book = self.book();
        if !book.closed {
            let went_over = self.unpin_in_core(&mut self.shared.write(), iova, npages);
            book.counts.remove(iova, went_over);
        }
    }

    /// Pins every page that the bytes touch. Returns the pages, and their key for
    /// [`release`](DevicePins::release).
    pub(super) fn pin(
        &self,
        iova: u64,
        size: u64,
        prot: Prot,
    ) -> Result<((u64, u64), Arc<Pages>), Error> {
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        iova.checked_add(more).ok_or(Error::Wraps)?;
        let mut pages = Pages::new(self.page(), iova, size, prot);
        let (first, npages) = (pages.first(), pages.npages());
        let mut book = self.book();
        let mut pfns = [0; AT_ONCE];
        let mut done = 0;
        while done < npages {
            let n = (npages - done).min(AT_ONCE as u64);
            let pfns = &mut pfns[..n as usize];
            // Reports and marks go on in between. An unmap of pages that are pinned
            // already waits for the book.
            let mut core = self.shared.write();
            let at = first + (done << self.page().shift());
            let pinned = self.pin_in_core(&mut core, at, prot, pfns);
            if let Err(e) = pinned {
                self.unpin_in_core(&mut core, first, done);
                return Err(e);
            }
            drop(core);
            self.add_parts(&mut pages, pfns);
            done += n;
        }
        let pages = Arc::new(pages);
        let key = (first, book.next_guard);
        book.next_guard += 1;
        book.longest = book.longest.max(pages.last() - first);
        book.guards.insert(key, Arc::clone(&pages));
        Ok((key, pages))
    }

    /// Appends pages to those of a guard, whose pfns are the numbers of the pages in
    /// this process.
    fn add_parts(&self, pages: &mut Pages, pfns: &[u64]) {
        for run in pfns.chunk_by(|a, b| a + 1 == *b) {
            let place = self.shared.state.place(run[0]);
            pages.push(run.len() as u64, place);
        }
    }

    /// Unpins the pages of a guard, unless that was done already.
    pub(super) fn release(&self, key: (u64, u64)) {
        let mut book = self.book();
        if let Some(pages) = book.remove_guard(key) {
            self.unpin_run(&mut self.shared.write(), pages.first(), pages.npages());
        }
    }

    /// Drops every pin in a range. Guards go as a whole, when nobody accesses their
    /// pages any more.
    pub(super) fn unpin_range(&self, first: u64, last: u64) {
        let mut book = self.book();
        if !book.closed {
            self.drop_pins(&mut book, first, last);
        }
    }

    fn drop_pins(&self, book: &mut Book, first: u64, last: u64) {
        let mut runs: Vec<Pins> = Vec::new();
        for pages in book.take_guards(first, last) {
            pages.revoke();
            // Guards whose pages follow each other are unpinned in one go.
            match runs.last_mut() {
                Some(run) if run.end(self.page()) == Some(pages.first()) => {
                    run.npages += pages.npages();
                }
                _ => runs.push(Pins {
                    iova: pages.first(),
                    npages: pages.npages(),
                    count: 1,
                }),
            }
        }
        runs.append(&mut book.counts.take(first, last));
        let mut core = self.shared.write();
        for run in runs {
            for _ in 0..run.count {
                self.unpin_run(&mut core, run.iova, run.npages);
            }
        }
    }

    /// How many pins there are.
    pub(super) fn pinned(&self) -> u64 {
        let book = self.book();
        let guards = book.guards.values().map(|pages| pages.npages());
        guards.fold(book.counts.total(), u64::saturating_add)
    }

    /// Drops every pin and closes the device in the core.
    pub(super) fn close(&self) {
        let mut book = self.book();
        if book.closed {
            return;
        }
        self.drop_pins(&mut book, 0, u64::MAX);
        self.shared.callbacks().remove(&self.id.0);
        self.shared.write().close_device(self.id);
        book.closed = true;
        self.closed.notify_all();
    }

    /// Waits until the device has closed.
    pub(super) fn wait_closed(&self) {
        let book = self.book();
        let closed = self.closed.wait_while(book, |book| !book.closed);
        drop(closed.unwrap_or_else(PoisonError::into_inner));
    }
}
