// SPDX-License-Identifier: MIT OR Apache-2.0
//! The iovas that every group of a container can use: spans in ascending order.
//! An empty list restricts nothing.

use crate::error::{Error, NoMemory};
use crate::host::{GroupId, Host, Memory};
use crate::mem::List;
use crate::span::Span;

pub(super) type Ranges<M> = List<Span, M>;

/// Whether `span` lies inside one range.
pub(super) fn allowed(ranges: &[Span], span: Span) -> bool {
    ranges.is_empty() || ranges.iter().any(|range| range.encloses(span))
}

/// The reserved regions of `group`, where nothing may be mapped.
pub(super) fn reserved(host: &dyn Host, group: GroupId) -> impl Iterator<Item = Span> + '_ {
    let regions = (0..).map_while(move |index| host.reserved(group, index));
    regions.filter_map(|(first, last)| Span::between(first, last))
}

/// Cuts `hole` out of every range.
fn exclude<M: Memory>(ranges: &mut Ranges<M>, hole: Span) -> Result<(), NoMemory> {
    let mut at = 0;
    while let Some(&range) = ranges.get(at) {
        if range.intersect(hole).is_none() {
            at = at.saturating_add(1);
            continue;
        }
        ranges.remove(at);
        for rest in range.without(hole).into_iter().flatten() {
            ranges.insert(at, rest)?;
            at = at.saturating_add(1);
        }
    }
    Ok(())
}

/// Cuts the reserved regions of `group` out of every range.
pub(super) fn exclude_reserved<M: Memory>(
    ranges: &mut Ranges<M>,
    host: &dyn Host,
    group: GroupId,
) -> Result<(), NoMemory> {
    reserved(host, group).try_for_each(|hole| exclude(ranges, hole))
}

/// A copy of `old`, cut down to the addresses that a domain translates.
pub(super) fn narrowed<M: Memory>(
    mem: &M,
    old: &[Span],
    aperture: Span,
) -> Result<Ranges<M>, Error> {
    let mut ranges = List::new(mem);
    if old.is_empty() {
        ranges.push(aperture)?;
    }
    for range in old.iter().filter_map(|range| range.intersect(aperture)) {
        ranges.push(range)?;
    }
    Ok(ranges)
}
