// SPDX-License-Identifier: MIT OR Apache-2.0
//! The device's log of what it wrote.

use std::sync::atomic::{AtomicU64, Ordering};

use dirty_core::{Errno, Extent, PageSize};
use vfio_user_wire::wire::{
    bitmap_bytes, LoggingRange, LoggingReport, DMA_LOGGING_START, FEATURE_SET,
};
use vfio_user_wire::{FeatureAnswer, FeatureCall, Migration, Ranges};

use super::maps::last;
use super::{Client, ClientError};
use crate::dirty_bits::BASE_PAGE;
use crate::guest::{DirtyIovas, DirtyLog, IovaRange, SourceError};

/// The page size of the log, or 0 before it has one.
#[derive(Default)]
pub(super) struct LogState(AtomicU64);

impl Client {
    /// Starts the device's log of what it writes, for `ranges` of IOVAs, or for everything if
    /// there are none. `page_size` is a wish. Returns the page size that the log has.
    ///
    /// For a [`log`](Client::log) of a tracker, start it for everything, before the tracker.
    ///
    /// # Errors
    ///
    /// A guest must not be migrated with the device after any of them.
    ///
    /// - [`ClientError::NoLog`] if the device keeps no log.
    /// - [`ClientError::Argument`] for more ranges than a message has room for.
    /// - As every call of a [`Client`], as for a log that is on already.
    pub fn start_logging(
        &self,
        ranges: &[IovaRange],
        page_size: PageSize,
    ) -> Result<PageSize, ClientError> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|range| LoggingRange {
                iova: range.iova,
                length: range.size,
            })
            .collect();
        if ranges.len() > self.max_data() / LoggingRange::SIZE {
            return Err(ClientError::Argument(
                "the log was started with too many ranges",
            ));
        }
        let mut buffer = vec![0; ranges.len() * LoggingRange::SIZE];
        let ranges = Ranges::write(&ranges, &mut buffer)
            .map_err(|_| ClientError::Argument("the message is too large"))?; // unreachable: it fits
        let page_size = page_size.bytes();
        let call = FeatureCall::StartLogging { page_size, ranges };
        let started = self.feature(&call, |answer| match answer {
            FeatureAnswer::Started(page_size) => PageSize::new(page_size),
            _ => None,
        });
        match started {
            Ok(page_size) => {
                self.inner.log.0.store(page_size.bytes(), Ordering::Relaxed);
                Ok(page_size)
            }
            Err(ClientError::Refused(_, errno)) if !self.has_log()? => {
                Err(ClientError::NoLog(errno))
            }
            Err(cause) => Err(cause),
        }
    }

    /// Returns whether the device can log what it writes. If not, a guest must not be migrated
    /// with it.
    ///
    /// # Errors
    ///
    /// Those that end the connection.
    pub fn has_log(&self) -> Result<bool, ClientError> {
        self.probe(DMA_LOGGING_START | FEATURE_SET)
    }

    /// Stops the log. What was not read is forgotten.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`].
    pub fn stop_logging(&self) -> Result<(), ClientError> {
        self.feature(&FeatureCall::StopLogging, |_| Some(()))
    }

    /// Reads and clears the log for the `size` bytes of IOVAs from `iova` on, and ORs it into
    /// `words`: bit k is the page at IOVA `iova + k * page_size`. More than fits into a
    /// message is asked for with several.
    ///
    /// # Errors
    ///
    /// - [`ClientError::Argument`] if the IOVAs wrap or are none, or `words` has fewer bits
    ///   than there are pages.
    /// - As every call of a [`Client`]. What was read before is in `words` then, and no longer
    ///   in the log.
    pub fn read_log(
        &self,
        iova: u64,
        size: u64,
        page_size: PageSize,
        words: &mut [u64],
    ) -> Result<(), ClientError> {
        let last = last(iova, size)?;
        let needed = bitmap_bytes(size, page_size.bytes()).map_or(u64::MAX, |bytes| bytes / 8);
        if needed > words.len() as u64 {
            return Err(ClientError::Argument("the bitmap has too few words"));
        }
        let mut rest = words;
        for (first, last) in pieces(iova, last, self.most_iovas(page_size)) {
            let bits = self.report(first, last, page_size)?;
            let Some((now, later)) = rest.split_at_mut_checked(bits.len()) else {
                break; // unreachable: there are enough words
            };
            now.iter_mut()
                .zip(&bits)
                .for_each(|(word, bits)| *word |= bits);
            rest = later;
        }
        Ok(())
    }

    /// Returns the device's log as a source of a tracker, for
    /// [`Tracker::add_log`](crate::guest::Tracker::add_log). Then each
    /// [`take`](crate::guest::Tracker::take) has what the device wrote.
    ///
    /// A server may have forgotten what was written to IOVAs that were unmapped, and answer
    /// ENOENT, as libvfio-user does. These IOVAs then count as dirty. After any other error,
    /// all memory behind the view counts as dirty.
    #[must_use]
    pub fn log(&self) -> ClientLog {
        ClientLog {
            client: self.clone(),
        }
    }

    /// How many bytes of IOVAs one report can have: whole words of pages.
    fn most_iovas(&self, page_size: PageSize) -> u64 {
        let agreed = &self.inner.agreed;
        let limit = agreed
            .migration
            .map_or(Migration::default(), |theirs| theirs);
        let bytes = u64::from(agreed.max_data_xfer_size).min(limit.max_bitmap_size);
        (bytes / 8)
            .max(1)
            .saturating_mul(64)
            .saturating_mul(page_size.bytes())
    }

    /// The log of the IOVAs from `first` to `last`, which one report can have.
    fn report(&self, first: u64, last: u64, page_size: PageSize) -> Result<Vec<u64>, ClientError> {
        let report = LoggingReport {
            iova: first,
            length: (last - first).saturating_add(1),
            page_size: page_size.bytes(),
        };
        let bytes = bitmap_bytes(report.length, report.page_size);
        let bitmap_bytes = bytes.and_then(|bytes| u32::try_from(bytes).ok());
        let bitmap_bytes =
            bitmap_bytes.ok_or(ClientError::Argument("a report has too many pages"))?;
        let call = FeatureCall::Report {
            report,
            bitmap_bytes,
        };
        self.feature(&call, |answer| match answer {
            FeatureAnswer::Report(_, bitmap) => {
                let words = bitmap.chunks_exact(8);
                Some(
                    words
                        .map(|word| word.try_into().map_or(0, u64::from_ne_bytes))
                        .collect(),
                )
            }
            _ => None,
        })
    }
}

/// The IOVAs from `first` to `last` in pieces of at most `most` bytes, which is not 0.
fn pieces(first: u64, last: u64, most: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut next = Some(first);
    std::iter::from_fn(move || {
        let first = next?;
        let end = first.saturating_add(most - 1).min(last);
        next = end.checked_add(1).filter(|next| *next <= last);
        Some((first, end))
    })
}

/// The log of a device in another process, as a source of a tracker.
#[derive(Clone, Debug)]
pub struct ClientLog {
    client: Client,
}

impl DirtyLog for ClientLog {
    fn read(&mut self, ask: &[IovaRange], dirty: &mut DirtyIovas) -> Result<(), SourceError> {
        // The log's pages may be larger than the view's, and so reach beyond what it maps.
        dirty.allow_beside();
        let page_size = self.client.inner.log.0.load(Ordering::Relaxed);
        let page_size = PageSize::new(page_size.max(BASE_PAGE.bytes())).unwrap_or(BASE_PAGE);
        let inside = page_size.bytes() - 1;
        for range in ask {
            self.range(
                range.iova & !inside,
                range.last() | inside,
                page_size,
                dirty,
            )?;
        }
        Ok(())
    }
}

impl ClientLog {
    /// Reads the log of whole pages.
    fn range(
        &self,
        first: u64,
        last: u64,
        page_size: PageSize,
        dirty: &mut DirtyIovas,
    ) -> Result<(), SourceError> {
        let client = &self.client;
        for (first, last) in pieces(first, last, client.most_iovas(page_size)) {
            match client.report(first, last, page_size) {
                Ok(words) => or(dirty, &words, first, last, page_size)?,
                // libvfio-user reports one whole mapping at a time.
                Err(ClientError::Refused(_, Errno::ENOENT | Errno::EOPNOTSUPP)) => {
                    for (first, last) in client.inner.maps.split(first, last) {
                        self.mapping(first, last, page_size, dirty)?;
                    }
                }
                Err(cause) => return Err(cause.into()),
            }
        }
        Ok(())
    }

    /// Reads the log of a mapping, or of IOVAs that are in none.
    fn mapping(
        &self,
        first: u64,
        last: u64,
        page_size: PageSize,
        dirty: &mut DirtyIovas,
    ) -> Result<(), SourceError> {
        let client = &self.client;
        for (first, last) in pieces(first, last, client.most_iovas(page_size)) {
            match client.report(first, last, page_size) {
                Ok(words) => or(dirty, &words, first, last, page_size)?,
                Err(ClientError::Refused(_, Errno::ENOENT)) => {
                    // Each piece is less than 2^64 bytes.
                    dirty.or_range(first, (last - first).saturating_add(1))?;
                }
                Err(cause) => return Err(cause.into()),
            }
        }
        Ok(())
    }
}

fn or(
    dirty: &mut DirtyIovas,
    words: &[u64],
    first: u64,
    last: u64,
    pgsize: PageSize,
) -> Result<(), SourceError> {
    let extent = Extent {
        bit: 0,
        iova: first,
        npages: ((last - first) >> pgsize.shift()) + 1,
        pgsize,
    };
    Ok(dirty.or_bitmap(words, extent)?)
}
