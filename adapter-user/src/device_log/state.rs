// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the lock of a log protects: the mapped ranges, and the bits while it is on.

use std::collections::BTreeMap;

use dirty_core::{Error, PageSize};

use super::options::{Holes, LogOptions};
use super::piece::Piece;
use super::removed::Removed;
use crate::dirty_bits::check_budget;
use crate::error::TrackError;
use crate::ranges::check_covered;

/// The state of a log.
pub(super) struct State {
    options: LogOptions,
    /// The mapped ranges by first IOVA, each with its last. No two overlap.
    mapped: BTreeMap<u64, u64>,
    /// `None` while the log is off.
    pub(super) on: Option<On>,
    /// How often the log was switched on from off.
    starts: u64,
}

/// The state of a log that is on.
pub(super) struct On {
    pub(super) pgsize: PageSize,
    /// Says which start this is, so that a handle of an earlier one is told apart.
    pub(super) start: u64,
    /// What the log was started for: first and last IOVAs, ascending and disjoint.
    filter: Vec<(u64, u64)>,
    /// What is both mapped and in the filter, by first IOVA. No two overlap.
    live: BTreeMap<u64, Piece>,
    /// How many bytes the bits of `live` take.
    used: u64,
    pub(super) removed: Removed,
}

/// The items of a map of disjoint ranges from `first` to `last`, ascending. `end`
/// says where an item ends.
fn between<T>(
    map: &BTreeMap<u64, T>,
    first: u64,
    last: u64,
    end: impl Fn(&T) -> u64,
) -> impl Iterator<Item = (u64, &T)> {
    let below = map.range(..first).next_back();
    let below = below.filter(|(_, item)| end(item) >= first);
    let all = below.into_iter().chain(map.range(first..=last));
    all.map(|(start, item)| (*start, item))
}

/// The item of such a map that all addresses from `first` to `last` are in.
fn around<T>(map: &BTreeMap<u64, T>, first: u64, last: u64, end: impl Fn(&T) -> u64) -> Option<&T> {
    let (_, item) = map.range(..=first).next_back()?;
    (end(item) >= last).then_some(item)
}

/// The parts of a range that are in the filter.
fn cut(filter: &[(u64, u64)], first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
    let skip = filter.partition_point(|(_, end)| *end < first);
    let hit = filter[skip..]
        .iter()
        .take_while(move |(start, _)| *start <= last);
    hit.map(move |(start, end)| ((*start).max(first), (*end).min(last)))
}

impl State {
    pub(super) fn new(options: LogOptions) -> State {
        State {
            options,
            mapped: BTreeMap::new(),
            on: None,
            starts: 0,
        }
    }

    pub(super) fn on(&self) -> Result<&On, Error> {
        self.on.as_ref().ok_or(Error::NotTracking)
    }

    pub(super) fn on_mut(&mut self) -> Result<&mut On, Error> {
        self.on.as_mut().ok_or(Error::NotTracking)
    }

    pub(super) fn options(&self) -> &LogOptions {
        &self.options
    }

    /// The number of mapped ranges.
    pub(super) fn ranges(&self) -> usize {
        self.mapped.len()
    }

    /// Switches the log on for what is both mapped and in `filter`. Every page is
    /// clean. On an error nothing changes.
    pub(super) fn start(
        &mut self,
        pgsize: PageSize,
        filter: Vec<(u64, u64)>,
    ) -> Result<(), TrackError> {
        let mut on = On {
            pgsize,
            start: self.starts + 1,
            filter,
            live: BTreeMap::new(),
            used: 0,
            removed: Removed::new(pgsize, self.options.removed),
        };
        let mapped: Vec<(u64, u64)> = self.mapped.iter().map(|(a, b)| (*a, *b)).collect();
        on.add(&mapped, self.options.budget)?;
        self.starts += 1;
        self.on = Some(on);
        Ok(())
    }

    /// Switches the log off and keeps what is mapped.
    pub(super) fn stop(&mut self) {
        if let Some(on) = self.on.take() {
            on.live.values().for_each(Piece::close);
        }
    }

    /// Adds a mapped range. On an error nothing changes.
    pub(super) fn add(&mut self, first: u64, last: u64) -> Result<(), TrackError> {
        let below = self.mapped.range(..=last).next_back();
        if below.is_some_and(|(_, end)| *end >= first) {
            return Err(Error::Overlap.into());
        }
        if let Some(on) = &mut self.on {
            let logged = cut(&on.filter, first, last).next();
            match logged == Some((first, last)) {
                true => on.add_piece(first, last, self.options.budget)?,
                false => on.add(&[(first, last)], self.options.budget)?,
            }
        }
        self.mapped.insert(first, last);
        Ok(())
    }

    /// Removes a mapped range, which must have these bounds.
    pub(super) fn remove(&mut self, first: u64, last: u64) -> Result<(), Error> {
        if self.mapped.get(&first) != Some(&last) {
            return Err(Error::NoMapping);
        }
        self.mapped.remove(&first);
        if let Some(on) = &mut self.on {
            on.remove(first, last);
        }
        Ok(())
    }

    /// Checks that the log was started for all IOVAs from `first` to `last`.
    pub(super) fn check_started(&self, first: u64, last: u64) -> Result<(), TrackError> {
        let filter = &self.on()?.filter;
        check_covered(cut(filter, first, last).collect(), first, last)
    }

    /// Checks that a report may ask for the IOVAs from `first` to `last`.
    pub(super) fn check_reportable(&self, first: u64, last: u64) -> Result<(), TrackError> {
        if self.options.holes == Holes::Clean {
            return self.check_started(first, last);
        }
        let on = self.on()?;
        let live = on.live(first, last).map(|piece| (piece.first, piece.last));
        let known = on.removed.known(first, last);
        // The cap may have joined removed ranges over IOVAs outside the filter.
        let known = known.flat_map(|(from, to)| cut(&on.filter, from, to));
        check_covered(live.chain(known).collect(), first, last)
    }

    /// Marks pages. Fails if an IOVA is not mapped; the others are marked all the
    /// same.
    pub(super) fn mark(&self, first: u64, last: u64) -> Result<(), TrackError> {
        let on = self.on()?;
        if let Some(piece) = around(&on.live, first, last, |piece| piece.last) {
            return Ok(piece.mark(first, last)?); // most often
        }
        for piece in on.live(first, last) {
            piece.mark(first.max(piece.first), last.min(piece.last))?;
        }
        let mut next = first; // the first IOVA that is not known to be mapped
        for (start, end) in between(&self.mapped, first, last, |end| *end) {
            if start > next {
                break;
            }
            match end.checked_add(1).filter(|after| *after <= last) {
                Some(after) => next = after,
                None => return Ok(()),
            }
        }
        Err(TrackError::Unmapped { addr: next })
    }
}

impl On {
    /// Gives bits to ranges that were mapped. On an error nothing changes.
    fn add(&mut self, ranges: &[(u64, u64)], budget: Option<u64>) -> Result<(), TrackError> {
        let cuts = |range: &(u64, u64)| cut(&self.filter, range.0, range.1);
        let wanted = ranges.iter().flat_map(cuts).fold(0, |sum: u64, (a, b)| {
            sum.saturating_add(Piece::bytes(a, b, self.pgsize))
        });
        check_budget(budget, self.used, wanted)?;
        let pieces = ranges.iter().flat_map(cuts);
        let pieces = pieces.map(|(a, b)| Piece::new(a, b, self.pgsize));
        let pieces = pieces.collect::<Result<Vec<Piece>, TrackError>>()?;
        for piece in pieces {
            self.live.insert(piece.first, piece);
        }
        self.used = self.used.saturating_add(wanted);
        Ok(())
    }

    /// As `add`, for one range that is in the filter as a whole, as most are.
    fn add_piece(&mut self, first: u64, last: u64, budget: Option<u64>) -> Result<(), TrackError> {
        let wanted = Piece::bytes(first, last, self.pgsize);
        check_budget(budget, self.used, wanted)?;
        let piece = Piece::new(first, last, self.pgsize)?;
        self.live.insert(first, piece);
        self.used = self.used.saturating_add(wanted);
        Ok(())
    }

    /// Takes the bits of a range that is no longer mapped, and keeps its dirty pages.
    fn remove(&mut self, first: u64, last: u64) {
        while let Some((start, piece)) = self.live.range(first..=last).next() {
            let (start, end) = (*start, piece.last);
            self.removed.keep(piece);
            self.used -= Piece::bytes(start, end, self.pgsize);
            self.live.remove(&start);
            if end == last {
                break;
            }
        }
    }

    /// The logged pieces that have IOVAs from `first` to `last`, ascending.
    pub(super) fn live(&self, first: u64, last: u64) -> impl Iterator<Item = &Piece> {
        between(&self.live, first, last, |piece| piece.last).map(|(_, piece)| piece)
    }

    /// The number of logged pieces.
    pub(super) fn pieces(&self) -> usize {
        self.live.len()
    }

    /// The bytes that their bits take.
    pub(super) fn bytes(&self) -> u64 {
        self.used
    }

    /// Makes every page clean and forgets the removed ranges.
    pub(super) fn reset(&mut self) {
        self.live.values().for_each(Piece::reset);
        self.removed.clear();
    }
}
