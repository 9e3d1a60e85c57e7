// SPDX-License-Identifier: MIT OR Apache-2.0
//! The model: sets of pages.

use std::collections::BTreeSet;

use super::ops::{IOVAS, MEMORIES, PLACE, SMALL, VIEWS};

/// A page of a memory: the memory's number, and the page's.
pub(super) type Page = (usize, u64);

/// Where a page of IOVAs leads.
#[derive(Clone, Copy)]
pub(super) struct Target {
    pub(super) gpa: u64,
    /// The page that was at `gpa` when the mapping was made.
    pub(super) bound: Option<Page>,
}

#[derive(Default)]
pub(super) struct View {
    pub(super) live: [Option<Target>; IOVAS as usize],
    /// Where IOVAs led that were unmapped since the logs were read.
    pub(super) gone: Vec<(u64, Target)>,
    /// Whether it has a log.
    pub(super) logged: bool,
}

pub(super) struct World {
    /// The first page of each memory that is a slot.
    pub(super) place: [Option<u64>; MEMORIES],
    pub(super) pages: [u64; MEMORIES],
    pub(super) on: bool,
    /// What was written since it was last delivered.
    pub(super) written: BTreeSet<Page>,
    /// What may be told.
    pub(super) allowed: BTreeSet<Page>,
    pub(super) views: [View; VIEWS],
    /// What was at which guest address before it moved or went, since all logs were
    /// read.
    pub(super) departed: BTreeSet<(u64, Page)>,
    /// What was written since the last take.
    pub(super) since: BTreeSet<Page>,
}

impl World {
    pub(super) fn new() -> World {
        World {
            place: [None; MEMORIES],
            pages: [SMALL; MEMORIES],
            on: false,
            written: BTreeSet::new(),
            allowed: BTreeSet::new(),
            views: Default::default(),
            departed: BTreeSet::new(),
            since: BTreeSet::new(),
        }
    }

    /// The page of a slot that is at a guest address.
    pub(super) fn at(&self, gpa: u64) -> Option<Page> {
        (0..MEMORIES).find_map(|memory| {
            let page = gpa.checked_sub(self.place[memory]?)?;
            (page < self.pages[memory]).then_some((memory, page))
        })
    }

    /// Whether no slot has one of the first pages of a place, but for `memory`.
    pub(super) fn is_free(&self, memory: usize, place: u64) -> bool {
        (0..MEMORIES).all(|other| other == memory || self.place[other] != Some(place * PLACE))
    }

    /// The pages that a write to a target may have reached.
    pub(super) fn behind(&self, target: Target) -> impl Iterator<Item = Page> + '_ {
        let bound = target
            .bound
            .filter(|(memory, _)| self.place[*memory].is_some());
        let here = self
            .departed
            .iter()
            .filter(move |(gpa, _)| *gpa == target.gpa);
        let here = here.map(|(_, page)| *page).chain(self.at(target.gpa));
        let here = here.filter(move |_| bound.is_none());
        target.bound.into_iter().chain(here)
    }

    /// A page is written, and what says so is not lost.
    pub(super) fn write(&mut self, page: Page) {
        if self.on {
            self.written.insert(page);
            self.allowed.insert(page);
            self.since.insert(page);
        }
    }

    /// A device writes to a target and says so.
    pub(super) fn write_to(&mut self, target: Target) {
        let real = target.bound.or_else(|| self.at(target.gpa));
        if let Some(page) = real {
            self.write(page);
        }
        // Bits of what is no slot are marked also while the tracker is off.
        let also: Vec<Page> = self.behind(target).collect();
        let place = self.place;
        let kept = also
            .into_iter()
            .filter(|(memory, _)| self.on || place[*memory].is_none());
        self.allowed.extend(kept);
    }

    /// Where an IOVA led since the view's log was read.
    pub(super) fn targets(&self, view: usize, iova: u64) -> Vec<Target> {
        let view = &self.views[view];
        let gone = view.gone.iter().filter(|(at, _)| *at == iova);
        let gone = gone.map(|(_, target)| *target);
        view.live[iova as usize].into_iter().chain(gone).collect()
    }

    /// The tracker counts a dirty IOVA for each of its targets.
    pub(super) fn allow(&mut self, view: usize, iova: u64) {
        for target in self.targets(view, iova) {
            let pages: Vec<Page> = self.behind(target).collect();
            self.allowed.extend(pages);
        }
    }

    pub(super) fn unmap(&mut self, view: usize, iova: u64, n: u64) -> u64 {
        let on = self.on;
        let view = &mut self.views[view];
        let mut unmapped = 0;
        for iova in iova..iova + n {
            if let Some(target) = view.live[iova as usize].take() {
                unmapped += 1;
                if on && view.logged {
                    view.gone.push((iova, target));
                }
            }
        }
        unmapped
    }

    /// A memory leaves its place.
    pub(super) fn depart(&mut self, memory: usize) {
        if let (Some(place), true) = (self.place[memory].take(), self.on) {
            let pages = 0..self.pages[memory];
            self.departed
                .extend(pages.map(|page| (place + page, (memory, page))));
        }
    }

    pub(super) fn forget(&mut self) {
        self.departed.clear();
        self.views.iter_mut().for_each(|view| view.gone.clear());
    }

    pub(super) fn allow_all(&mut self) {
        for memory in 0..MEMORIES {
            if self.place[memory].is_some() {
                self.allowed
                    .extend((0..self.pages[memory]).map(|page| (memory, page)));
            }
        }
    }
}
