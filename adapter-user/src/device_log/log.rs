// SPDX-License-Identifier: MIT OR Apache-2.0
//! The log: whether it is on, its ranges, and marks.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::{Error, PageSize};

use super::range::{LogRange, Logged};
use crate::dirty_bits::{check_budget, DirtyBits, BASE_PAGE};
use crate::error::TrackError;

/// How many ranges one START may have: Linux takes one page of their structures.
pub(super) const MAX_RANGES: usize = 256;

/// The log of what a device wrote, by IOVA.
///
/// There are two ways to switch it on. [`start`](DeviceLog::start) takes the ranges
/// to log, as VFIO_DEVICE_FEATURE_DMA_LOGGING_START does.
/// [`set_tracking`](DeviceLog::set_tracking) logs the ranges that were added before,
/// as IOMMU_HWPT_SET_DIRTY_TRACKING logs what is mapped. The log is clean after
/// either, so copy all memory after it. Ranges may come and go while the log is on.
///
/// **If a report fails, every page that it asked for counts as dirty.**
///
/// A clone is another handle to the same log, and any thread may call it. Marks
/// share the log's lock with each other, and wait while a report or another call
/// has it; marks through a [`LogRange`] take no lock.
///
/// ```
/// use adapter_user::device_log::DeviceLog;
///
/// let log = DeviceLog::new(None);
/// log.start(&[(0x10_0000, 0x10_0000)], 4096)?; // first IOVA and bytes
/// let dma = log.range(0x10_0000).unwrap(); // for a thread of the device
/// dma.mark(0x10_1000, 1)?;
///
/// let mut bitmap = [0];
/// log.report(0x10_0000, 0x4_0000, 4096, &mut bitmap)?;
/// assert_eq!(bitmap, [0b10]);
///
/// // The virtual IOMMU unmaps. The log keeps what was not reported yet.
/// dma.mark(0x10_2000, 1)?;
/// log.remove_range(0x10_0000, 0x10_0000)?;
/// log.report(0x10_0000, 0x10_0000, 0x10_0000, &mut bitmap[..])?;
/// assert_eq!(bitmap, [0b11]);
/// # Ok::<(), adapter_user::TrackError>(())
/// ```
#[derive(Clone)]
pub struct DeviceLog {
    state: Arc<RwLock<State>>,
    budget: Option<u64>,
}

#[derive(Default)]
pub(super) struct State {
    /// The page size of the bits; `None` while the log is off.
    pub(super) on: Option<PageSize>,
    /// The logged ranges by first IOVA; no two overlap. Each has bits while the log
    /// is on.
    pub(super) ranges: BTreeMap<u64, Logged>,
    /// The ranges that were removed while the log was on. Each stays until one
    /// report has taken all of it.
    pub(super) gone: Vec<Logged>,
}

impl State {
    /// How many bytes all bitmaps take.
    fn used(&self) -> u64 {
        let all = self.ranges.values().chain(&self.gone);
        all.filter_map(|range| range.bits.as_ref())
            .map(|bits| bits.words() as u64 * 8)
            .sum()
    }

    fn overlapping(&self, first: u64, last: u64) -> Option<&Logged> {
        let below = self.ranges.range(..=last).next_back();
        below
            .map(|(_, range)| range)
            .filter(|range| range.overlaps(first, last))
    }

    fn stop(&mut self) {
        self.on = None;
        self.forget_gone();
        for range in self.ranges.values_mut() {
            range.close();
            range.bits = None;
        }
    }

    fn forget_gone(&mut self) {
        let gone = std::mem::take(&mut self.gone);
        gone.iter().for_each(Logged::close);
    }

    /// Gives every range clean bits. On an error nothing changes.
    fn start(&mut self, pgsize: PageSize, budget: Option<u64>) -> Result<(), TrackError> {
        let mut wanted = 0u64;
        for range in self.ranges.values() {
            wanted = wanted.saturating_add(range.bytes(pgsize)?);
        }
        check_budget(budget, 0, wanted)?;
        let ranges = self.ranges.iter();
        let ranges = ranges.map(|(first, range)| Ok((*first, range.clone().with_bits(pgsize)?)));
        self.ranges = ranges.collect::<Result<_, TrackError>>()?;
        self.on = Some(pgsize);
        Ok(())
    }
}

impl DeviceLog {
    /// Creates a log that is off and has no ranges. Its bitmaps may take `budget`
    /// bytes in all, or any amount if there is none.
    #[must_use]
    pub fn new(budget: Option<u64>) -> Self {
        DeviceLog {
            state: Arc::default(),
            budget,
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Switches the log on for `ranges` of IOVAs, each by its first IOVA and its
    /// length in bytes, and returns the page size of the log. This is
    /// DMA_LOGGING_START.
    ///
    /// `pgsize` is a hint, in bytes; the log's pages have this size, or 4 KiB if it
    /// is smaller. Every page is clean. Ranges that were added before are replaced.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`TrackError::NoRanges`].
    /// - [`TrackError::TooManyRanges`] if there are more than 256.
    /// - [`TrackError::PageSize`] unless the hint is a power of two.
    /// - For one range after the other: [`Error::Misaligned`] unless its first IOVA
    ///   and its length are multiples of the hint, [`Error::ZeroSize`],
    ///   [`Error::Wraps`], [`TrackError::RangesOverlap`] with a range before it.
    /// - [`TrackError::Started`] if the log is on.
    /// - [`TrackError::Budget`], [`TrackError::NoMemory`].
    pub fn start(&self, ranges: &[(u64, u64)], pgsize: u64) -> Result<PageSize, TrackError> {
        if ranges.is_empty() {
            return Err(TrackError::NoRanges);
        }
        if ranges.len() > MAX_RANGES {
            return Err(TrackError::TooManyRanges);
        }
        let hint = PageSize::new(pgsize).ok_or(TrackError::PageSize)?;
        let mut fresh = State::default();
        for (iova, size) in ranges {
            if !hint.aligns(iova | size) {
                return Err(Error::Misaligned.into());
            }
            let range = Logged::new(*iova, *size)?;
            if fresh.overlapping(range.first, range.last).is_some() {
                return Err(TrackError::RangesOverlap);
            }
            fresh.ranges.insert(range.first, range);
        }
        let mut state = self.write();
        if state.on.is_some() {
            return Err(TrackError::Started);
        }
        let chosen = hint.max(BASE_PAGE);
        fresh.start(chosen, self.budget)?;
        *state = fresh;
        Ok(chosen)
    }

    /// Switches the log off, and forgets its ranges and what was dirty. This is
    /// DMA_LOGGING_STOP. If the log is off already, it only forgets the ranges.
    pub fn stop(&self) {
        let mut state = self.write();
        state.stop();
        state.ranges.clear();
    }

    /// Switches the log on or off and keeps its ranges. This is
    /// IOMMU_HWPT_SET_DIRTY_TRACKING.
    ///
    /// `true` makes every page clean, also if the log is on already. A log that was
    /// off gets pages of 4 KiB. `false` forgets what was dirty.
    ///
    /// # Errors
    ///
    /// Only when a log that was off is switched on: [`TrackError::Budget`],
    /// [`TrackError::NoMemory`]. Nothing changes then.
    pub fn set_tracking(&self, on: bool) -> Result<(), TrackError> {
        let mut state = self.write();
        if !on {
            state.stop();
        } else if state.on.is_some() {
            let bits = state
                .ranges
                .values()
                .filter_map(|range| range.bits.as_ref());
            bits.for_each(DirtyBits::reset);
            state.forget_gone();
        } else {
            state.start(BASE_PAGE, self.budget)?;
        }
        Ok(())
    }

    /// Returns whether the log is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.read().on.is_some()
    }

    /// Adds the `size` bytes of IOVAs from `iova` on. Call it before the device can
    /// reach them. If the log is on, the range is logged from now on, and it is
    /// clean.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::Misaligned`] unless both are multiples of 4 KiB.
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`].
    /// - [`Error::Overlap`] with another range.
    /// - If the log is on: [`TrackError::Budget`], [`TrackError::NoMemory`].
    pub fn add_range(&self, iova: u64, size: u64) -> Result<(), TrackError> {
        if !BASE_PAGE.aligns(iova | size) {
            return Err(Error::Misaligned.into());
        }
        let mut range = Logged::new(iova, size)?;
        let mut state = self.write();
        if state.overlapping(range.first, range.last).is_some() {
            return Err(Error::Overlap.into());
        }
        if let Some(pgsize) = state.on {
            check_budget(self.budget, state.used(), range.bytes(pgsize)?)?;
            range = range.with_bits(pgsize)?;
        }
        state.ranges.insert(iova, range);
        Ok(())
    }

    /// Removes the range that starts at `iova` and has `size` bytes. Call it after
    /// the device can no longer reach them.
    ///
    /// If the log is on, the range's dirty pages stay until one report has taken all
    /// of the range.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`].
    /// - [`Error::NoMapping`] if there is no range with exactly these bounds.
    pub fn remove_range(&self, iova: u64, size: u64) -> Result<(), TrackError> {
        let same = Logged::new(iova, size)?;
        let mut state = self.write();
        match state.ranges.get(&iova) {
            Some(range) if range.last == same.last => {}
            _ => return Err(Error::NoMapping.into()),
        }
        if let Some(range) = state.ranges.remove(&iova).filter(|r| r.bits.is_some()) {
            state.gone.push(range);
        }
        Ok(())
    }

    /// Returns the range that holds `iova`, to mark through it. It is `None` if no
    /// range holds `iova`, or if the log is off.
    #[must_use]
    pub fn range(&self, iova: u64) -> Option<LogRange> {
        let state = self.read();
        state.overlapping(iova, iova)?.handle()
    }

    /// Marks as dirty every page that the `len` bytes at IOVA `iova` touch; they may
    /// span ranges. No bytes mark nothing. This is for devices that keep no
    /// [`LogRange`].
    ///
    /// Call it *after* the write, and before you tell anybody that the write is
    /// done.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::Wraps`] if the IOVAs wrap; nothing is marked then.
    /// - [`Error::NotTracking`] if the log is off.
    /// - [`TrackError::Unmapped`] if some of the bytes are in no range; the others
    ///   are marked all the same.
    pub fn mark(&self, iova: u64, len: u64) -> Result<(), TrackError> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        let state = self.read();
        if state.on.is_none() {
            return Err(Error::NotTracking.into());
        }
        let mut result = Ok(());
        let mut next = Some(iova); // the first byte that no range had so far
        let below = state.ranges.range(..iova).next_back();
        let below = below.filter(|(_, range)| range.last >= iova);
        let inside = state.ranges.range(iova..=last);
        for (_, range) in below.into_iter().chain(inside) {
            let (from, to) = (range.first.max(iova), range.last.min(last));
            if let Some(addr) = next.filter(|addr| *addr != from) {
                result = result.and(Err(TrackError::Unmapped { addr }));
            }
            if let Some(range) = range.handle() {
                result = result.and(range.mark(from, to - from + 1));
            }
            next = to.checked_add(1);
        }
        match next {
            Some(addr) if addr <= last => result.and(Err(TrackError::Unmapped { addr })),
            _ => result,
        }
    }
}

impl fmt::Debug for DeviceLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.read();
        f.debug_struct("DeviceLog")
            .field("on", &state.on.is_some())
            .field("ranges", &state.ranges.len())
            .finish_non_exhaustive()
    }
}
