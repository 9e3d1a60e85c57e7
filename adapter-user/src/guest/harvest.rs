// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty pages by IOVA become dirty pages of the guest.
//!
//! A log says which IOVA was written, and not through which mapping. So a dirty
//! page counts for every mapping that its IOVA had since the log was read before:
//! for the live ones, and for the gone ones that the view remembers.
//!
//! No page is lost whatever the guest maps and unmaps meanwhile, because of the
//! order: the take begins, each log is read, and only then the mappings are looked
//! at. A write that a log tells went through a mapping that is live at that time,
//! or that was unmapped since the take before began. Those are remembered until
//! every log of the view was read in a take that began after their unmap.

use std::fmt::Display;

use super::handles::SourceError;
use super::index::Index;
use super::log::{DirtyIovas, DirtyLog, IovaRange, Run};
use super::mapping::Mapping;
use super::view::IovaView;
use super::whole::Why;
use crate::error::TrackError;
use crate::ranges::check_covered;

/// How often a mapping may be hit by a dirty run in one log's harvest. A guest can
/// stack its mappings so that each run hits all of them; then all count as dirty.
const MOST_HITS: usize = 1 << 22;

/// Reads a log and marks what it has in the guest's slots. Adds the bytes of it to
/// `told`.
///
/// A log that is `new` may still have pages from before the tracker was started,
/// whose mappings nobody remembers.
pub(super) fn harvest(
    view: &IovaView,
    log: &mut dyn DirtyLog,
    gap: u64,
    new: bool,
    told: &mut u64,
) -> Result<(), SourceError> {
    let ask = view.read().ranges(gap);
    let mut dirty = DirtyIovas::default();
    log.read(&ask, &mut dirty)?;
    let expected = if new || dirty.has_beside() {
        Expected::Anything
    } else {
        Expected::Asked(&ask)
    };
    Ok(translate(view, dirty.runs(), expected, told)?)
}

/// Marks all of some mappings of a view.
pub(super) fn mark_all(view: &IovaView, mappings: &[Mapping], why: Why, what: &dyn Display) {
    mappings.iter().for_each(Mapping::mark_all);
    let bytes = mappings.iter().map(Mapping::size);
    view.wholes()
        .add(why, bytes.fold(0, u64::saturating_add), what);
}

/// Which dirty IOVAs without a mapping are no sign of an error.
pub(super) enum Expected<'a> {
    Anything,
    Asked(&'a [IovaRange]),
}

/// Marks the guest pages behind dirty IOVAs, and adds the bytes of the IOVAs to `told`.
/// It fails if one was never asked for and is in no mapping, after it has marked the
/// others: the view is not in step with the devices' mappings.
pub(super) fn translate(
    view: &IovaView,
    runs: impl Iterator<Item = Run>,
    expected: Expected<'_>,
    told: &mut u64,
) -> Result<(), TrackError> {
    let mut runs = runs.peekable();
    if runs.peek().is_none() {
        return Ok(());
    }
    // The lock is held while the list of mappings is copied, and no longer.
    let (mappings, forgot_some) = {
        let maps = view.read();
        (maps.all(), maps.forgot_some())
    };
    // A mapping that is not remembered was marked when it went, so a page that is in no
    // mapping may have been in that one.
    let ask = match expected {
        Expected::Asked(ask) if !forgot_some => Some(ask),
        _ => None,
    };
    let mut translation = Translation {
        index: Index::new(mappings),
        ask,
        told: *told,
        hits: 0,
        result: Ok(()),
    };
    runs.for_each(|run| translation.mark(run, view));
    *told = translation.told;
    translation.result
}

/// A translation of a log's dirty IOVAs.
struct Translation<'a> {
    index: Index,
    /// The ranges that were asked for, or `None` where any dirty IOVA is legal.
    ask: Option<&'a [IovaRange]>,
    told: u64,
    hits: usize,
    result: Result<(), TrackError>,
}

impl Translation<'_> {
    /// Marks the memory behind a run.
    fn mark(&mut self, run: Run, view: &IovaView) {
        let Run { first, last, .. } = run;
        if self.hits > MOST_HITS {
            return; // all is marked
        }
        self.told = self.told.saturating_add((last - first).saturating_add(1));
        let hit = self.index.overlapping(first, last);
        self.hits += hit.len();
        let mut mapped = false; // as a whole
        for mapping in hit {
            let (from, to) = (mapping.iova(), mapping.last());
            mapped |= from <= first && last <= to;
            mapping.mark_inside(first.max(from), last.min(to));
        }
        if self.hits > MOST_HITS {
            let what = "more than 2^22 mappings have dirty IOVAs";
            mark_all(view, self.index.all(), Why::StackedMappings, &what);
        } else if let (Some(ask), Ok(()), false) = (self.ask, self.result, mapped) {
            self.result = check_known(run, &mut self.index, ask);
        }
    }
}

/// Checks that each page of a run was asked for in part, or is in a mapping in part.
fn check_known(run: Run, index: &mut Index, ask: &[IovaRange]) -> Result<(), TrackError> {
    let from = ask.partition_point(|range| range.last() < run.first);
    if ask
        .get(from)
        .is_some_and(|range| range.iova <= run.first && range.last() >= run.last)
    {
        return Ok(());
    }
    let whole = |first: u64, last: u64| (first & !run.inside, last | run.inside);
    let asked = ask[from..]
        .iter()
        .take_while(|range| range.iova <= run.last);
    let mut seen: Vec<_> = asked.map(|range| whole(range.iova, range.last())).collect();
    let mapped = index.overlapping(run.first, run.last);
    seen.extend(mapped.map(|mapping| whole(mapping.iova(), mapping.last())));
    check_covered(seen, run.first, run.last)
}
