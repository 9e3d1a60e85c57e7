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
const MOST_HITS: u64 = 1 << 22;

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
    let index = Index::new(mappings);
    let mut result = Ok(());
    let mut hits = 0;
    for run in runs {
        let Run { first, last, .. } = run;
        *told = told.saturating_add((last - first).saturating_add(1));
        index.overlapping(first, last, |mapping| {
            mapping.mark_inside(first.max(mapping.iova()), last.min(mapping.last()));
            hits += 1;
        });
        if hits > MOST_HITS {
            let what = "more than 2^22 mappings have dirty IOVAs";
            mark_all(view, index.all(), Why::StackedMappings, &what);
            return result;
        }
        // A mapping that is not remembered was marked when it went, so the page may
        // have been in that one.
        if let (Expected::Asked(ask), false) = (&expected, forgot_some) {
            result = result.and_then(|()| check_known(run, &index, ask));
        }
    }
    result
}

/// Checks that each page of a run was asked for in part, or is in a mapping in part.
fn check_known(run: Run, index: &Index, ask: &[IovaRange]) -> Result<(), TrackError> {
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
    index.overlapping(run.first, run.last, |mapping| {
        seen.push(whole(mapping.iova(), mapping.last()));
    });
    check_covered(seen, run.first, run.last)
}
