// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's log, as vfio-user has it.

use dirty_core::{Errno, PageSize};
use vfio_user_wire::wire::{bitmap_bytes, LoggingReport};
use vfio_user_wire::Ranges;

use super::carry::{Carry, PAGE};
use crate::device_log::DeviceLog;
use crate::error::TrackError;

/// What the client has started the log for.
#[derive(Default)]
pub(super) struct Logging {
    /// The page size and the ranges of START, while the log is on.
    started: Option<(u64, Vec<(u64, u64)>)>,
}

impl Logging {
    /// Starts the log for ranges of IOVAs, or for everything if there are none. Returns the page
    /// size of the log. The same START once more does nothing.
    ///
    /// # Errors
    ///
    /// As [`DeviceLog::start`] and [`DeviceLog::start_all`]. Ranges may overlap inside pages of
    /// 4 KiB if the page size is smaller.
    pub(super) fn start(
        &mut self,
        log: &DeviceLog,
        carry: Option<&Carry>,
        page_size: u64,
        ranges: Ranges<'_>,
    ) -> Result<u64, Errno> {
        let ranges: Vec<(u64, u64)> = ranges.iter().map(|r| (r.iova, r.length)).collect();
        let wanted = (page_size, ranges);
        if let (Some(pgsize), true) = (log.pgsize(), self.started.as_ref() == Some(&wanted)) {
            return Ok(pgsize.bytes());
        }
        let (_, ranges) = &wanted;
        let started = match ranges.is_empty() {
            true => log.start_all(page_size),
            false if page_size < PAGE => log.start(&round_out(ranges, page_size)?, PAGE),
            false => log.start(ranges, page_size),
        };
        let pgsize = started.map_err(errno)?;
        // The client copies all memory now, so it gets what was written before.
        match carry {
            Some(carry) if ranges.is_empty() => carry.started_all(),
            Some(carry) => ranges
                .iter()
                .for_each(|(iova, size)| drop(carry.take(*iova, *size))),
            None => {}
        }
        self.started = Some(wanted);
        Ok(pgsize.bytes())
    }

    /// Stops the log.
    pub(super) fn stop(&mut self, log: &DeviceLog) {
        log.stop();
        self.started = None;
    }

    /// Returns which pages of a range are dirty, and makes them clean.
    ///
    /// Pages of the log may be larger or smaller than those of the report. A page that the range
    /// has only in part is reported, and stays dirty.
    ///
    /// # Errors
    ///
    /// ENOENT for IOVAs that the log was not started for; else as [`DeviceLog::report`].
    pub(super) fn report(
        &self,
        log: &DeviceLog,
        carry: Option<&Carry>,
        report: &LoggingReport,
    ) -> Result<Vec<u8>, Errno> {
        // Taken before: what is written during the report must be carried, or be in the next one.
        let taken = carry.map(|carry| carry.take(report.iova, report.length));
        let bits = bits(log, report);
        if let (Err(_), Some(carry), Some(taken)) = (&bits, carry, taken) {
            carry.put_back(taken);
        }
        bits
    }
}

/// The ranges in whole pages of 4 KiB, of which no two overlap.
fn round_out(ranges: &[(u64, u64)], page_size: u64) -> Result<Vec<(u64, u64)>, Errno> {
    let page_size = PageSize::new(page_size).ok_or(Errno::EINVAL)?;
    let mut spans = Vec::new();
    for (iova, size) in ranges {
        let last = size.checked_sub(1).and_then(|more| iova.checked_add(more));
        match last {
            Some(last) if page_size.aligns(iova | size) => {
                spans.push((iova / PAGE, last / PAGE));
            }
            _ => return Err(Errno::EINVAL),
        }
    }
    spans.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, last) in spans {
        match merged.last_mut() {
            Some((_, end)) if first <= *end => *end = last.max(*end),
            _ => merged.push((first, last)),
        }
    }
    let sizes = merged.into_iter();
    // All 2^52 pages have no size in 64 bits.
    let sizes =
        sizes.map(|(first, last)| Some((first * PAGE, (last - first + 1).checked_mul(PAGE)?)));
    sizes.collect::<Option<_>>().ok_or(Errno::EINVAL)
}

/// The bitmap of a report, in whole words.
fn bits(log: &DeviceLog, report: &LoggingReport) -> Result<Vec<u8>, Errno> {
    let (iova, size) = (report.iova, report.length);
    let bytes = bitmap_bytes(size, report.page_size).ok_or(Errno::EINVAL)?;
    let mut words = vec![0u64; usize::try_from(bytes / 8).map_err(|_| Errno::EINVAL)?];
    if report.page_size >= PAGE {
        log.report(iova, size, report.page_size, &mut words)
            .map_err(errno)?;
    } else {
        for page in dirty_pages(log, report)? {
            // Those of its small pages that are in the report.
            let start = page.max(iova) - iova;
            let end = (page + (PAGE - 1)).min(iova + (size - 1)) - iova;
            for k in start / report.page_size..=end / report.page_size {
                if let Some(word) = words.get_mut((k / 64) as usize) {
                    *word |= 1 << (k % 64);
                }
            }
        }
    }
    Ok(words.into_iter().flat_map(u64::to_le_bytes).collect())
}

/// The IOVAs of the dirty pages of 4 KiB that a range touches. Those that are wholly in it are
/// clean then.
fn dirty_pages(log: &DeviceLog, report: &LoggingReport) -> Result<Vec<u64>, Errno> {
    let (iova, page_size) = (report.iova, report.page_size);
    let last = report.length.checked_sub(1).ok_or(Errno::EINVAL)?;
    let last = iova.checked_add(last).ok_or(Errno::EINVAL)?;
    if iova % page_size != 0 {
        return Err(Errno::EINVAL);
    }
    let (first_page, last_page) = (iova / PAGE, last / PAGE);
    let mut dirty = Vec::new();
    let mut inner = first_page..last_page + 1;
    for (edge, cut) in [
        (first_page, iova % PAGE != 0),
        (last_page, last % PAGE != PAGE - 1),
    ] {
        if cut && inner.contains(&edge) {
            let mut bit = [0];
            log.dirty_bitmap(edge * PAGE, PAGE, PAGE, false, &mut bit)
                .map_err(errno)?;
            dirty.extend((bit != [0]).then_some(edge * PAGE));
            inner = match edge == inner.start {
                true => edge + 1..inner.end,
                false => inner.start..edge,
            };
        }
    }
    let pages = inner.end.saturating_sub(inner.start);
    if pages != 0 {
        let mut words = vec![0u64; pages.div_ceil(64) as usize];
        log.report(inner.start * PAGE, pages * PAGE, PAGE, &mut words)
            .map_err(errno)?;
        let is_dirty = |k: &u64| {
            let word = words.get((k / 64) as usize).copied().unwrap_or(0);
            word >> (k % 64) & 1 != 0
        };
        dirty.extend(
            (0..pages)
                .filter(is_dirty)
                .map(|k| (inner.start + k) * PAGE),
        );
    }
    Ok(dirty)
}

fn errno(error: TrackError) -> Errno {
    match error {
        TrackError::Unmapped { .. } => Errno::ENOENT,
        other => other.errno(),
    }
}
