// SPDX-License-Identifier: MIT OR Apache-2.0
//! A naive model of a log: sets of pages, with no thought for time or memory.
//!
//! Pages have 4 KiB and are counted from IOVA 0. A big page is a page of the log,
//! which has `1 << shift` pages.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use adapter_user::device_log::{Holes, LogOptions};

type Pages = BTreeSet<u64>;

/// A range that is mapped and logged.
#[derive(Clone)]
pub(super) struct Piece {
    /// No two pieces of a run have the same.
    pub(super) id: u64,
    pub(super) pages: Range<u64>,
    /// The dirty big pages.
    dirty: Pages,
}

#[derive(Clone)]
pub(super) struct Model {
    options: LogOptions,
    pub(super) mapped: BTreeMap<u64, Range<u64>>,
    next: u64,
    pub(super) on: Option<On>,
}

#[derive(Clone)]
pub(super) struct On {
    pub(super) shift: u32,
    filter: Vec<Range<u64>>,
    /// Pieces up to this number are of an earlier start.
    before: u64,
    pub(super) live: Vec<Piece>,
    /// The pages that were removed and are still to be reported.
    known: Pages,
    /// The big pages of removed ranges that are dirty.
    gone: Pages,
}

/// What a report is asked for: some pages, `1 << shift` of them for one bit.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    pub(super) pages: Range<u64>,
    pub(super) shift: u32,
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> Range<u64> {
    a.start.max(b.start)..a.end.min(b.end)
}

/// A filter that leaves nothing out.
pub(super) fn everything() -> Vec<Range<u64>> {
    std::iter::once(0..1 << 52).collect()
}

/// The big pages that have some of the pages.
fn big(pages: &Range<u64>, shift: u32) -> Range<u64> {
    match pages.is_empty() {
        true => 0..0,
        false => pages.start >> shift..((pages.end - 1) >> shift) + 1,
    }
}

/// The pages of a big page.
fn small(page: u64, shift: u32) -> Range<u64> {
    page << shift..(page + 1) << shift
}

impl Model {
    pub(super) fn new(options: LogOptions) -> Model {
        Model {
            options,
            mapped: BTreeMap::new(),
            next: 0,
            on: None,
        }
    }

    /// The pieces that some mapped ranges have in a filter.
    fn pieces(&mut self, filter: &[Range<u64>], ranges: &[Range<u64>]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for range in ranges {
            for part in filter {
                let pages = overlap(range, part);
                if !pages.is_empty() {
                    self.next += 1;
                    let (id, dirty) = (self.next, Pages::new());
                    pieces.push(Piece { id, pages, dirty });
                }
            }
        }
        pieces
    }

    fn fits(&self, pieces: &[Piece], shift: u32) -> bool {
        let words = |piece: &Piece| {
            let big = big(&piece.pages, shift);
            (big.end - 1) / 64 - big.start / 64 + 1
        };
        let bytes: u64 = pieces.iter().map(|piece| words(piece) * 8).sum();
        bytes <= self.options.budget.unwrap_or(u64::MAX)
    }

    /// Switches the log on. Returns whether it works.
    pub(super) fn start(&mut self, shift: u32, filter: Vec<Range<u64>>) -> bool {
        let disjoint =
            (0..filter.len()).all(|a| (0..a).all(|b| overlap(&filter[a], &filter[b]).is_empty()));
        if self.on.is_some() || !disjoint {
            return false;
        }
        let mapped: Vec<_> = self.mapped.values().cloned().collect();
        let before = self.next;
        let live = self.pieces(&filter, &mapped);
        let fits = self.fits(&live, shift);
        if fits {
            self.on = Some(On {
                shift,
                filter,
                before,
                live,
                known: Pages::new(),
                gone: Pages::new(),
            });
        }
        fits
    }

    pub(super) fn add(&mut self, pages: Range<u64>) -> bool {
        let mut others = self.mapped.values();
        if !others.all(|other| overlap(other, &pages).is_empty()) {
            return false;
        }
        if let Some(mut on) = self.on.take() {
            let fresh = self.pieces(&on.filter, std::slice::from_ref(&pages));
            let all: Vec<_> = on.live.iter().chain(&fresh).cloned().collect();
            let fits = self.fits(&all, on.shift);
            if fits {
                on.live = all;
            }
            self.on = Some(on);
            if !fits {
                return false;
            }
        }
        self.mapped.insert(pages.start, pages);
        true
    }

    pub(super) fn remove(&mut self, pages: &Range<u64>) {
        self.mapped.remove(&pages.start);
        let Some(on) = &mut self.on else { return };
        let (gone, live) = std::mem::take(&mut on.live)
            .into_iter()
            .partition(|piece| !overlap(&piece.pages, pages).is_empty());
        on.live = live;
        let gone: Vec<Piece> = gone;
        for piece in gone {
            on.known.extend(piece.pages);
            on.gone.extend(piece.dirty);
        }
    }

    /// `DeviceLog::mark`.
    pub(super) fn mark(&mut self, pages: Range<u64>) -> bool {
        let mapped = |page: u64| self.mapped.values().any(|range| range.contains(&page));
        let all = pages.clone().all(mapped);
        let Some(on) = &mut self.on else { return false };
        for piece in &mut on.live {
            piece
                .dirty
                .extend(big(&overlap(&pages, &piece.pages), on.shift));
        }
        all
    }

    /// A mark through the handle of a piece, which had these pages.
    pub(super) fn late(&mut self, id: u64, had: &Range<u64>, pages: Range<u64>) -> bool {
        let on = self.on.as_mut().filter(|on| id > on.before);
        let Some(on) = on else { return false };
        let inside = overlap(&pages, had);
        if let Some(piece) = on.live.iter_mut().find(|piece| piece.id == id) {
            piece.dirty.extend(big(&inside, on.shift));
            return inside == pages;
        }
        let mut all = inside == pages;
        for page in inside {
            match on.known.contains(&page) {
                true => drop(on.gone.insert(page >> on.shift)),
                false => all = false,
            }
        }
        all
    }

    /// Whether a report of these pages is answered.
    pub(super) fn answers(&self, pages: &Range<u64>) -> bool {
        self.on.as_ref().is_some_and(|on| {
            pages.clone().all(|page| {
                let live = on.live.iter().any(|piece| piece.pages.contains(&page));
                let hole = self.options.holes == Holes::Clean;
                on.filter.iter().any(|part| part.contains(&page))
                    && (hole || live || on.known.contains(&page))
            })
        })
    }

    /// The bits of a report.
    pub(super) fn report(&self, ask: &Ask) -> u64 {
        let Some(on) = &self.on else { return 0 };
        let mut dirty = Pages::new();
        for piece in &on.live {
            let asked = big(&overlap(&piece.pages, &ask.pages), on.shift);
            dirty.extend(piece.dirty.iter().filter(|page| asked.contains(page)));
        }
        let asked = big(&ask.pages, on.shift);
        dirty.extend(on.gone.iter().filter(|page| asked.contains(page)));
        let mut bits = 0;
        for page in dirty {
            for page in overlap(&small(page, on.shift), &ask.pages) {
                bits |= 1u64 << ((page - ask.pages.start) >> ask.shift);
            }
        }
        bits
    }

    /// Makes what these pages have as a whole clean.
    pub(super) fn clear(&mut self, pages: &Range<u64>) {
        let Some(on) = &mut self.on else { return };
        let shift = on.shift;
        let whole = |page: u64, there: &dyn Fn(u64) -> bool| {
            let pages_of = small(page, shift);
            let touched = !overlap(&pages_of, pages).is_empty();
            touched
                && pages_of
                    .into_iter()
                    .all(|p| pages.contains(&p) || !there(p))
        };
        for piece in &mut on.live {
            let (all, hit) = (piece.pages.clone(), overlap(&piece.pages, pages));
            let hit = big(&hit, shift);
            piece
                .dirty
                .retain(|page| !hit.contains(page) || !whole(*page, &|p| all.contains(&p)));
        }
        let known = on.known.clone();
        on.gone
            .retain(|page| !whole(*page, &|p| known.contains(&p)));
        on.known.retain(|page| !pages.contains(page));
    }

    /// The pages of removed ranges that are dirty.
    pub(super) fn gone(&self) -> Pages {
        let Some(on) = &self.on else {
            return Pages::new();
        };
        on.gone
            .iter()
            .flat_map(|page| small(*page, on.shift))
            .collect()
    }

    pub(super) fn forget_removed(&mut self) {
        if let Some(on) = &mut self.on {
            on.gone.clear();
            on.known.clear();
        }
    }

    /// Makes every page clean.
    pub(super) fn reset(&mut self) {
        self.forget_removed();
        if let Some(on) = &mut self.on {
            on.live.iter_mut().for_each(|piece| piece.dirty.clear());
        }
    }
}
