// SPDX-License-Identifier: MIT OR Apache-2.0
//! The log: what is mapped, whether it is on, and marks.

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::{Error, PageSize};

use super::ask::last_iova;
use super::options::LogOptions;
use super::range::LogRange;
use super::spans::Spans;
use super::state::State;
use crate::dirty_bits::BASE_PAGE;
use crate::error::TrackError;

/// How many ranges one START may have: Linux takes one page of their structures.
pub(super) const MAX_RANGES: usize = 256;

/// The log of what a device wrote, by IOVA.
///
/// The log follows the device's map: [`add_range`](DeviceLog::add_range) for each
/// mapping that the device gets, [`remove_range`](DeviceLog::remove_range) for each
/// that goes, whether the log is on or off. Only mapped IOVAs have bits.
///
/// There are three ways to switch it on:
///
/// | call | logs what is mapped and | as |
/// |---|---|---|
/// | [`start`](DeviceLog::start) | in the ranges that it names | VFIO_DEVICE_FEATURE_DMA_LOGGING_START |
/// | [`start_all`](DeviceLog::start_all) | anywhere | a START without ranges of vfio-user |
/// | [`set_tracking`](DeviceLog::set_tracking) | anywhere | IOMMU_HWPT_SET_DIRTY_TRACKING |
///
/// The log is clean after each of them, so copy all memory after it. A range that is
/// added while the log is on is clean too: add it before the device can write there,
/// and copy what it held before if the receiver does not have it. The dirty pages of
/// a range that is removed stay until a report has had them.
///
/// A device that does not know its map adds once all that it may ever write, for
/// instance 2^48 bytes from IOVA 0 on. Bits then exist for the ranges that `start`
/// names.
///
/// **If a report fails, every page that it asked for counts as dirty.**
///
/// A clone is another handle to the same log, and any thread may call it. Marks
/// share the log's lock with each other, and wait while a report or another call
/// has it; marks through a [`LogRange`] take no lock. To add or to remove a range
/// takes time in the logarithm of the number of ranges, and to remove one also takes
/// a look at its bits.
///
/// ```
/// use adapter_user::device_log::DeviceLog;
///
/// let log = DeviceLog::new(None);
/// log.add_range(0x10_0000, 0x10_0000)?; // the device's map: first IOVA and bytes
/// log.start(&[(0, 1 << 40)], 4096)?; // what is to be logged of it
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
}

impl DeviceLog {
    /// Creates a log that is off and has no ranges. The bitmaps of mapped ranges may
    /// take `budget` bytes in all, or any amount if there is none. The other options
    /// are the default.
    #[must_use]
    pub fn new(budget: Option<u64>) -> Self {
        Self::with_options(LogOptions {
            budget,
            ..LogOptions::default()
        })
    }

    /// Creates a log that is off and has no ranges.
    #[must_use]
    pub fn with_options(options: LogOptions) -> Self {
        DeviceLog {
            state: Arc::new(RwLock::new(State::new(options))),
        }
    }

    pub(super) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Switches the log on for what is mapped in `ranges` of IOVAs, each by its first
    /// IOVA and its length in bytes, and returns the page size of the log. This is
    /// DMA_LOGGING_START. What is mapped later in the ranges is logged too.
    ///
    /// `pgsize` is a hint, in bytes; the log's pages have this size, or 4 KiB if it
    /// is smaller. Every page is clean.
    ///
    /// A second start is refused, as Linux's drivers refuse it. An interface that
    /// lets a second start with the same page size succeed, as libvfio-user does,
    /// compares [`pgsize`](DeviceLog::pgsize) when it gets [`TrackError::Started`].
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
        self.start_below(u64::MAX, ranges, pgsize)
    }

    /// As `start`, but no IOVA may be above `limit`.
    pub(super) fn start_below(
        &self,
        limit: u64,
        ranges: &[(u64, u64)],
        pgsize: u64,
    ) -> Result<PageSize, TrackError> {
        if ranges.is_empty() {
            return Err(TrackError::NoRanges);
        }
        if ranges.len() > MAX_RANGES {
            return Err(TrackError::TooManyRanges);
        }
        let hint = PageSize::new(pgsize).ok_or(TrackError::PageSize)?;
        let mut seen = Spans::default();
        let mut filter = Vec::new();
        for (iova, size) in ranges {
            if !hint.aligns(iova | size) {
                return Err(Error::Misaligned.into());
            }
            let last = last_iova(*iova, *size, limit)?;
            if seen.touches(*iova, last) {
                return Err(TrackError::RangesOverlap);
            }
            seen.insert(*iova, last, true);
            filter.push((*iova, last));
        }
        filter.sort_unstable();
        self.start_for(hint, filter)
    }

    /// As [`start`](DeviceLog::start), for all that is mapped or will be. A START
    /// without ranges means this in vfio-user; Linux refuses it.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`TrackError::PageSize`] unless `pgsize` is a power of two.
    /// - [`TrackError::Started`] if the log is on.
    /// - [`TrackError::Budget`], [`TrackError::NoMemory`].
    pub fn start_all(&self, pgsize: u64) -> Result<PageSize, TrackError> {
        let hint = PageSize::new(pgsize).ok_or(TrackError::PageSize)?;
        self.start_for(hint, vec![(0, u64::MAX)])
    }

    fn start_for(&self, hint: PageSize, filter: Vec<(u64, u64)>) -> Result<PageSize, TrackError> {
        let mut state = self.write();
        if state.on.is_some() {
            return Err(TrackError::Started);
        }
        let chosen = hint.max(BASE_PAGE);
        state.start(chosen, filter)?;
        Ok(chosen)
    }

    /// Switches the log off, and forgets what was dirty. The ranges stay. This is
    /// DMA_LOGGING_STOP, and `set_tracking(false)`.
    pub fn stop(&self) {
        self.write().stop();
    }

    /// Switches the log on or off. This is IOMMU_HWPT_SET_DIRTY_TRACKING.
    ///
    /// `true` makes every page clean, also if the log is on already. A log that was
    /// off gets pages of 4 KiB, and logs all that is mapped or will be. `false`
    /// forgets what was dirty.
    ///
    /// # Errors
    ///
    /// Only when a log that was off is switched on: [`TrackError::Budget`],
    /// [`TrackError::NoMemory`]. Nothing changes then.
    pub fn set_tracking(&self, on: bool) -> Result<(), TrackError> {
        let mut state = self.write();
        match (on, &mut state.on) {
            (false, _) => state.stop(),
            (true, Some(on)) => on.reset(),
            (true, None) => state.start(BASE_PAGE, vec![(0, u64::MAX)])?,
        }
        Ok(())
    }

    /// Returns whether the log is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.read().on.is_some()
    }

    /// Returns the page size of the log, which [`start`](DeviceLog::start) chose. It
    /// is `None` if the log is off.
    #[must_use]
    pub fn pgsize(&self) -> Option<PageSize> {
        self.read().on.as_ref().map(|on| on.pgsize)
    }

    /// Adds the `size` bytes of IOVAs from `iova` on. Call it before the device can
    /// reach them. If the log is on, the range is logged from now on, and it is
    /// clean.
    ///
    /// The log does not limit the number of ranges: whoever lets a client map limits
    /// how much it maps.
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
        let last = last_iova(iova, size, u64::MAX)?;
        self.write().add(iova, last)
    }

    /// Removes the range that starts at `iova` and has `size` bytes. Call it after
    /// the device can no longer reach them.
    ///
    /// If the log is on, the range's dirty pages stay until a report has had them,
    /// also in parts, or until [`take_removed`](DeviceLog::take_removed). A thread
    /// that wrote before the removal may mark through its [`LogRange`] until then.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`].
    /// - [`Error::NoMapping`] if there is no range with exactly these bounds.
    pub fn remove_range(&self, iova: u64, size: u64) -> Result<(), TrackError> {
        let last = last_iova(iova, size, u64::MAX)?;
        Ok(self.write().remove(iova, last)?)
    }

    /// Returns the logged range that holds `iova`, to mark through it. It is the part
    /// of a mapped range that the log was started for. It is `None` if the log is
    /// off, or if `iova` is not mapped or not to be logged.
    #[must_use]
    pub fn range(&self, iova: u64) -> Option<LogRange> {
        let state = self.read();
        let on = state.on.as_ref()?;
        let piece = on.live(iova, iova).next()?;
        let log = Arc::downgrade(&self.state);
        Some(LogRange::new(piece.clone(), on.start, log))
    }

    /// Marks as dirty every page that the `len` bytes at IOVA `iova` touch; they may
    /// span ranges. No bytes mark nothing, and neither do bytes that are mapped but
    /// that the log was not started for. This is for devices that keep no
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
        match len {
            0 => Ok(()),
            _ => self.read().mark(iova, last_iova(iova, len, u64::MAX)?),
        }
    }
}

impl fmt::Debug for DeviceLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = self.read();
        f.debug_struct("DeviceLog")
            .field("on", &state.on.is_some())
            .field("ranges", &state.ranges())
            .finish_non_exhaustive()
    }
}
