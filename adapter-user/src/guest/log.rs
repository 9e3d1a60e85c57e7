// SPDX-License-Identifier: MIT OR Apache-2.0
//! Logs by IOVA that somebody else keeps: what they are asked, and what they answer.

use std::ops::Range;

use dirty_core::{Error, Extent};

use super::handles::SourceError;
use crate::error::TrackError;

/// A log of dirty pages by IOVA that somebody else keeps, for the devices behind
/// one [`IovaView`](super::IovaView): VFIO's DMA logging, iommufd's dirty tracking,
/// a type1 container, a vfio-user device.
///
/// [`Tracker::add_log`](super::Tracker::add_log) adds one. A
/// [`DeviceLog`](crate::device_log::DeviceLog) is one, and so are a `Container` and a
/// closure with the arguments of [`read`](DirtyLog::read).
pub trait DirtyLog: Send {
    /// Reads and clears the log for the IOVAs of `ask`, and puts what it has into
    /// `dirty`. The tracker calls it once in each take.
    ///
    /// `ask` has every IOVA that the view maps, or has mapped since the last take.
    /// Its ranges are disjoint and sorted. Pages that the log has besides may be
    /// put into `dirty` too, and pages of no mapping inside `ask` are ignored.
    ///
    /// # Errors
    ///
    /// Return one if some of the IOVAs cannot be read. Then all memory behind the
    /// view counts as dirty, and the next take asks again.
    fn read(&mut self, ask: &[IovaRange], dirty: &mut DirtyIovas) -> Result<(), SourceError>;
}

impl<F> DirtyLog for F
where
    F: FnMut(&[IovaRange], &mut DirtyIovas) -> Result<(), SourceError> + Send,
{
    fn read(&mut self, ask: &[IovaRange], dirty: &mut DirtyIovas) -> Result<(), SourceError> {
        self(ask, dirty)
    }
}

/// A range of IOVAs, in whole pages of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IovaRange {
    /// The first IOVA.
    pub iova: u64,
    /// The length in bytes, which is not 0.
    pub size: u64,
}

impl IovaRange {
    /// `last - first` is less than 2^64 - 1.
    pub(super) fn new(first: u64, last: u64) -> IovaRange {
        IovaRange {
            iova: first,
            size: last - first + 1,
        }
    }

    /// Returns the last IOVA.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.iova + (self.size - 1)
    }
}

/// The dirty IOVAs that a [`DirtyLog`] has read.
#[derive(Debug, Default)]
pub struct DirtyIovas {
    parts: Vec<Part>,
    /// The words of all bitmaps.
    words: Vec<u64>,
    /// Whether pages that are neither asked for nor mapped are no sign of an error.
    beside: bool,
}

#[derive(Debug)]
enum Part {
    /// What the bits of a bitmap stand for, and the place of its words.
    Bitmap(Extent, Range<usize>),
    Range(u64, u64),
}

/// A run of dirty IOVAs.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) last: u64,
    /// The size of the pages that it consists of, minus 1.
    pub(super) inside: u64,
}

impl DirtyIovas {
    /// ORs a bitmap: bit `extent.bit + k` of `words` is the page at IOVA
    /// `extent.iova + k * extent.pgsize`. Any page size will do.
    ///
    /// # Errors
    ///
    /// If `extent` does not describe `words`, in this order; nothing changes then:
    ///
    /// - [`Error::Misaligned`] if its IOVA is not a multiple of its page size.
    /// - [`Error::BitmapSize`] if it has more bits than `words`.
    /// - [`Error::Wraps`] if it goes beyond the last address.
    pub fn or_bitmap(&mut self, words: &[u64], extent: Extent) -> Result<(), TrackError> {
        Ok(self.or(words, extent)?)
    }

    pub(crate) fn or(&mut self, words: &[u64], extent: Extent) -> Result<(), Error> {
        let clean = extent.ranges(words)?.next().is_none();
        if !clean {
            let start = self.words.len();
            self.words.extend_from_slice(words);
            let place = start..self.words.len();
            self.parts.push(Part::Bitmap(extent, place));
        }
        Ok(())
    }

    /// ORs the pages that the `size` bytes at `iova` touch. No bytes change
    /// nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Wraps`] if the IOVAs wrap; nothing changes then.
    pub fn or_range(&mut self, iova: u64, size: u64) -> Result<(), TrackError> {
        if let Some(more) = size.checked_sub(1) {
            let last = iova.checked_add(more).ok_or(Error::Wraps)?;
            self.parts.push(Part::Range(iova, last));
        }
        Ok(())
    }

    /// Lets the log have pages that are neither asked for nor mapped: a log that has
    /// larger pages or ranges than the view, or that keeps what was unmapped.
    pub(crate) fn allow_beside(&mut self) {
        self.beside = true;
    }

    pub(super) fn has_beside(&self) -> bool {
        self.beside
    }

    /// The runs of dirty IOVAs, in no order.
    pub(super) fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        self.parts.iter().flat_map(|part| {
            let (bitmap, range) = match part {
                Part::Bitmap(extent, place) => {
                    let words = &self.words[place.clone()];
                    (runs(words, *extent).ok(), None)
                }
                Part::Range(first, last) => {
                    let (first, last, inside) = (*first, *last, 0);
                    (
                        None,
                        Some(Run {
                            first,
                            last,
                            inside,
                        }),
                    )
                }
            };
            bitmap.into_iter().flatten().chain(range)
        })
    }
}

/// The runs of dirty IOVAs in a bitmap.
pub(super) fn runs(words: &[u64], extent: Extent) -> Result<impl Iterator<Item = Run> + '_, Error> {
    let inside = extent.pgsize.bytes() - 1;
    let ranges = extent.ranges(words)?;
    Ok(ranges.map(move |(first, last)| Run {
        first,
        last,
        inside,
    }))
}
