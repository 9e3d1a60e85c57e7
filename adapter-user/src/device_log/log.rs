// SPDX-License-Identifier: MIT OR Apache-2.0
//! The log: on or off, and its ranges.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::{Error, PageSize};

use super::range::{LogRange, Logged};
use super::report::Ask;
use crate::dirty_bits::{DirtyBits, BASE_PAGE};
use crate::error::TrackError;
use crate::guest::within;

/// Ranges that one START may have: a page of the kernel's structures.
pub(super) const MAX_RANGES: usize = 256;

/// What a device wrote, by IOVA, while its log is on.
///
/// Two ways to switch it on. [`start`](DeviceLog::start) names the ranges, as
/// VFIO_DEVICE_FEATURE_DMA_LOGGING_START. [`set_tracking`](DeviceLog::set_tracking)
/// logs the ranges that were added before, as IOMMU_HWPT_SET_DIRTY_TRACKING logs
/// what is mapped. Either starts clean: copy everything after it. Ranges come and
/// go while the log is on.
///
/// **An error of a report means that every page of it is dirty.** Clones are
/// handles to one log.
///
/// ```
/// use adapter_user::device_log::DeviceLog;
///
/// let log = DeviceLog::new(None);
/// log.start(&[(0x10_0000, 0x10_0000)], 4096)?;
/// let dma = log.range(0x10_0000).unwrap(); // for a thread of the device
/// dma.mark(0x10_1000, 1)?;
///
/// let mut bitmap = [0];
/// log.report(0x10_0000, 0x4_0000, 4096, &mut bitmap)?;
/// assert_eq!(bitmap, [0b10]);
///
/// // The virtual IOMMU unmaps: the log keeps what was not reported yet.
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
    /// The page size of the bits while the log is on.
    pub(super) on: Option<PageSize>,
    /// Logged ranges by first IOVA; no two overlap. While the log is on each
    /// has bits.
    pub(super) ranges: BTreeMap<u64, Logged>,
    /// Ranges that were removed while the log was on, until a report has taken
    /// the whole of them.
    pub(super) gone: Vec<Logged>,
}

impl State {
    /// Bytes of all bitmaps.
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

    /// Gives every range clean bits, or changes nothing.
    fn start(&mut self, pgsize: PageSize, budget: Option<u64>) -> Result<(), TrackError> {
        let mut wanted = 0u64;
        for range in self.ranges.values() {
            wanted = wanted.saturating_add(range.bytes(pgsize)?);
        }
        within(budget, 0, wanted)?;
        let ranges = self.ranges.iter();
        let ranges = ranges.map(|(first, range)| Ok((*first, range.clone().with_bits(pgsize)?)));
        self.ranges = ranges.collect::<Result<_, TrackError>>()?;
        self.on = Some(pgsize);
        Ok(())
    }
}

impl DeviceLog {
    /// A log that is off and has no ranges, whose bitmaps may take `budget`
    /// bytes in all, or any amount.
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

    /// DMA_LOGGING_START: logs `ranges` of IOVAs (first, bytes) from now on,
    /// clean. `pgsize` is a hint; returns the size chosen, at least 4 KiB.
    /// Ranges that were added before are replaced.
    ///
    /// # Errors
    ///
    /// In this order: `NoRanges`, `TooManyRanges` beyond 256, `PageSize` unless
    /// the hint is a power of two, and for each range `Misaligned`, `Wraps`,
    /// `ZeroSize`, `RangesOverlap`; then `Started`, `Budget`, `NoMemory`.
    /// Nothing changes then.
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

    /// DMA_LOGGING_STOP: forgets the ranges and what was dirty. No effect if
    /// the log is off.
    pub fn stop(&self) {
        let mut state = self.write();
        state.stop();
        state.ranges.clear();
    }

    /// HWPT_SET_DIRTY_TRACKING: on, clean, for the ranges that are there, in
    /// pages of 4 KiB (again clean if it is on already); or off, and what was
    /// dirty is forgotten. The ranges stay.
    ///
    /// # Errors
    ///
    /// `Budget`, `NoMemory`; nothing changes then.
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

    /// Whether the log is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.read().on.is_some()
    }

    /// Adds a range of IOVAs, before the device can reach it. It is logged from
    /// now on if the log is on.
    ///
    /// # Errors
    ///
    /// `Misaligned` unless both are multiples of 4 KiB, `ZeroSize`, `Wraps`,
    /// `Overlap`, `Budget`, `NoMemory`; nothing changes then.
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
            within(self.budget, state.used(), range.bytes(pgsize)?)?;
            range = range.with_bits(pgsize)?;
        }
        state.ranges.insert(iova, range);
        Ok(())
    }

    /// Removes exactly this range, after the device cannot reach it any more.
    /// While the log is on its dirty pages stay, until a report has taken the
    /// whole of it.
    ///
    /// # Errors
    ///
    /// `NoMapping` if there is no such range.
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

    /// The range that holds `iova`, to mark through, if the log is on.
    #[must_use]
    pub fn range(&self, iova: u64) -> Option<LogRange> {
        let state = self.read();
        state.overlapping(iova, iova)?.handle()
    }

    /// Marks `len` bytes from `iova` on, which may span ranges: for devices that
    /// keep no [`LogRange`]. It shares the log's lock with other marks.
    ///
    /// # Errors
    ///
    /// `NotTracking` if the log is off, [`TrackError::Unmapped`] if a part is in
    /// no range; the rest is marked.
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

    /// DMA_LOGGING_REPORT: ORs the dirty pages of a range into `bitmap`, in pages
    /// of `pgsize` (bit k is the page at `iova + k * pgsize`), and clears them.
    /// Copy the pages after this call. The range may span several ranges of the
    /// log, or be a part of one.
    ///
    /// # Errors
    ///
    /// `PageSize` unless it is a power of two of at least 4 KiB, `Wraps`,
    /// `ZeroSize`, `BitmapSize` if `bitmap` is too short, `NotTracking`,
    /// [`TrackError::Unmapped`] if a part of the range is not logged: nobody
    /// knows what was written there. Nothing is cleared then, and every page
    /// counts as dirty.
    pub fn report(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &mut [u64],
    ) -> Result<(), TrackError> {
        self.answer_words(Ask::logging(iova, size, pgsize)?, true, bitmap)
    }

    /// HWPT_GET_DIRTY_BITMAP: as [`report`](DeviceLog::report), for any page
    /// size, and with `clear` false the pages stay dirty.
    ///
    /// # Errors
    ///
    /// `ZeroSize`, `Wraps`, `PageSize` unless it is a power of two, `Misaligned`
    /// unless the range is aligned to it; then as `report`.
    pub fn dirty_bitmap(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<(), TrackError> {
        self.answer_words(Ask::iommufd(iova, size, pgsize)?, clear, bitmap)
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
