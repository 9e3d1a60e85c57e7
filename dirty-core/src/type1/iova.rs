// SPDX-License-Identifier: MIT OR Apache-2.0
//! The iovas that every group of a container can use: ordered ranges, first
//! and last address each. An empty list restricts nothing.

use crate::error::{Error, NoMemory};
use crate::host::{GroupId, Host, Memory};
use crate::mem::List;

pub(crate) type Ranges<M> = List<(u64, u64), M>;

/// Whether `first..=last` lies inside one range.
pub(crate) fn allowed(ranges: &[(u64, u64)], first: u64, last: u64) -> bool {
    ranges.is_empty() || ranges.iter().any(|r| r.0 <= first && last <= r.1)
}

/// Cuts `hole` out of every range.
fn exclude<M: Memory>(ranges: &mut Ranges<M>, hole: (u64, u64)) -> Result<(), NoMemory> {
    let mut at = 0;
    while let Some(&(first, last)) = ranges.get(at) {
        if hole.1 < first || hole.0 > last {
            at = at.saturating_add(1);
            continue;
        }
        ranges.remove(at);
        if let Some(below) = hole.0.checked_sub(1).filter(|end| *end >= first) {
            ranges.insert(at, (first, below))?;
            at = at.saturating_add(1);
        }
        if let Some(above) = hole.1.checked_add(1).filter(|start| *start <= last) {
            ranges.insert(at, (above, last))?;
            at = at.saturating_add(1);
        }
    }
    Ok(())
}

/// Cuts the reserved regions of `group` out of every range.
pub(crate) fn exclude_reserved<M: Memory>(
    ranges: &mut Ranges<M>,
    host: &dyn Host,
    group: GroupId,
) -> Result<(), NoMemory> {
    for index in 0.. {
        match host.reserved(group, index) {
            Some(hole) => exclude(ranges, hole)?,
            None => break,
        }
    }
    Ok(())
}

/// Copies `old`, cut down to the addresses of a domain.
pub(crate) fn narrowed<M: Memory>(
    mem: &M,
    old: &[(u64, u64)],
    aperture: (u64, u64),
) -> Result<Ranges<M>, Error> {
    let mut ranges = List::new(mem);
    if old.is_empty() {
        ranges.push(aperture)?;
    }
    for r in old {
        let (first, last) = (r.0.max(aperture.0), r.1.min(aperture.1));
        if first <= last {
            ranges.push((first, last))?;
        }
    }
    Ok(ranges)
}
