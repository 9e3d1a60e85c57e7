// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reports of a device's log: which pages are dirty, and what is cleared.

use dirty_core::{normalise, Error, Extent};

use super::ask::{Ask, Windows};
use super::log::DeviceLog;
use super::piece::Piece;
use super::state::On;
use super::words::keep;
use crate::error::TrackError;

/// How many words of a piece are cleared at a time.
const BLOCK: usize = 512;

/// The pages of a piece that somebody asks for.
struct Part<'a> {
    piece: &'a Piece,
    /// The first and last page.
    pages: (u64, u64),
    /// The first page, and the one after the last, that the asked IOVAs have as a
    /// whole. They have only a part of the other pages. Those stay dirty, because
    /// somebody may ask for the other part.
    whole: (u64, u64),
}

impl<'a> Part<'a> {
    /// The part of a piece that is between two IOVAs. The two must overlap.
    fn new(piece: &'a Piece, first: u64, last: u64) -> Part<'a> {
        let pgsize = piece.pgsize;
        let (first, last) = (first.max(piece.first), last.min(piece.last));
        let (from, to) = (pgsize.pages(first), pgsize.pages(last));
        let inside = pgsize.bytes() - 1;
        let cut_head = first > piece.first && first & inside != 0;
        let cut_tail = last < piece.last && last & inside != inside;
        Part {
            piece,
            pages: (from, to),
            whole: (from + u64::from(cut_head), to + 1 - u64::from(cut_tail)),
        }
    }

    /// The first word of the part, in words of the IOVA space.
    fn first_word(&self) -> u64 {
        self.pages.0 / 64
    }

    /// The dirty pages.
    fn words(&self) -> Vec<u64> {
        let (from, to) = self.pages;
        let mut words = vec![0; (to / 64 - from / 64 + 1) as usize];
        self.piece.peek(self.first_word(), &mut words);
        keep(&mut words, from % 64, from % 64 + (to - from));
        words
    }

    /// ORs `words` into a window of a report.
    fn report(&self, words: &[u64], out: &mut [u64], window: Extent) -> Result<(), Error> {
        let (from, to) = self.pages;
        let pages = Extent {
            bit: from % 64,
            iova: from << self.piece.pgsize.shift(),
            npages: to - from + 1,
            pgsize: self.piece.pgsize,
        };
        normalise(words, pages, out, window)
    }

    /// Whether the part has an IOVA from `first` to `last`, counted in whole pages.
    fn overlaps(&self, first: u64, last: u64) -> bool {
        let pgsize = self.piece.pgsize;
        self.pages.0 <= pgsize.pages(last) && pgsize.pages(first) <= self.pages.1
    }

    /// Clears the pages of `words`, but not those that are asked for in part.
    fn clear(&self, mut words: Vec<u64>) {
        self.keep_whole(&mut words, self.first_word());
        self.piece.clear(self.first_word(), &words);
    }

    /// Gives the dirty pages to `put`, some words at a time, and clears them. A page
    /// that is asked for in part is given as a whole.
    fn take(
        &self,
        put: &mut impl FnMut(&[u64], Extent) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        let (from, to) = self.pages;
        let pgsize = self.piece.pgsize;
        for word in (self.first_word()..=to / 64).step_by(BLOCK) {
            let start = word * 64;
            let more = (to / 64 - word).min(BLOCK as u64 - 1) as usize;
            let mut words = [0; BLOCK];
            let words = &mut words[..=more];
            self.piece.peek(word, words);
            keep(words, from.saturating_sub(start), to - start);
            if words.iter().any(|word| *word != 0) {
                let pages = Extent {
                    bit: 0,
                    iova: start << pgsize.shift(),
                    npages: (to - start + 1).min(words.len() as u64 * 64),
                    pgsize,
                };
                put(words, pages)?;
                self.piece.clear(word, words);
            }
        }
        Ok(())
    }

    /// Clears all pages, but not those that are asked for in part.
    fn clear_all(&self) {
        for word in (self.first_word()..=self.pages.1 / 64).step_by(BLOCK) {
            let more = (self.pages.1 / 64 - word).min(BLOCK as u64 - 1) as usize;
            let mut words = [0; BLOCK];
            // Only what is dirty is cleared, so that no clean word is written.
            self.piece.peek(word, &mut words[..=more]);
            self.keep_whole(&mut words[..=more], word);
            self.piece.clear(word, &words[..=more]);
        }
    }

    /// Drops the bits of pages that are asked for in part, and of those outside the
    /// part, from words that start with word `first` of the IOVA space.
    fn keep_whole(&self, words: &mut [u64], first: u64) {
        let (from, end) = self.whole;
        let start = first * 64;
        match end.checked_sub(1).filter(|to| *to >= from && *to >= start) {
            Some(to) => keep(words, from.saturating_sub(start), to - start),
            None => words.fill(0),
        }
    }
}

impl DeviceLog {
    /// ORs the dirty pages of the `size` bytes of IOVAs from `iova` on into `bitmap`,
    /// and clears them. This is DMA_LOGGING_REPORT.
    ///
    /// Bit k % 64 of word k / 64 is the page of `pgsize` bytes at
    /// `iova + k * pgsize`. The IOVAs may span ranges of the log, or be a part of
    /// one. A page of the log stays dirty if they contain only a piece of it.
    ///
    /// The report has removed ranges too, and forgets what it had of them.
    ///
    /// Copy the pages *after* this call.
    ///
    /// # Errors
    ///
    /// In this order. Nothing is cleared then, and every page of the report counts
    /// as dirty:
    ///
    /// - [`TrackError::PageSize`] unless `pgsize` is a power of two of at least
    ///   4 KiB.
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs wrap.
    /// - [`Error::Misaligned`] unless `iova` is a multiple of `pgsize`.
    /// - [`Error::BitmapSize`] if `bitmap` is too short.
    /// - [`Error::NotTracking`] if the log is off.
    /// - [`TrackError::Unmapped`] for an IOVA that the log was not started for, so
    ///   that nobody knows what was written there. With
    ///   [`Holes::Refused`](super::Holes::Refused) also for an IOVA that is not
    ///   mapped, unless it was removed and is still to be reported.
    pub fn report(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &mut [u64],
    ) -> Result<(), TrackError> {
        self.report_words(Ask::logging(u64::MAX, iova, size, pgsize)?, true, bitmap)
    }

    /// As [`report`](DeviceLog::report), at any page size. If `clear` is false, the
    /// pages stay dirty. This is IOMMU_HWPT_GET_DIRTY_BITMAP.
    ///
    /// To read now and clear later, as with KVM's manual clear, pass `false` here and
    /// the bitmap to [`clear_bitmap`](DeviceLog::clear_bitmap), piece by piece, each
    /// right before its pages are copied.
    ///
    /// # Errors
    ///
    /// In this order. Nothing is cleared then, and every page of the report counts
    /// as dirty:
    ///
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs wrap.
    /// - [`TrackError::PageSize`] unless `pgsize` is a power of two.
    /// - [`Error::Misaligned`] unless `iova` and `size` are multiples of `pgsize`
    ///   and of 4 KiB.
    /// - [`Error::BitmapSize`], [`Error::NotTracking`], [`TrackError::Unmapped`] as
    ///   `report`.
    pub fn dirty_bitmap(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<(), TrackError> {
        self.report_words(Ask::iommufd(iova, size, pgsize)?, clear, bitmap)
    }

    /// Makes the pages of the `size` bytes of IOVAs from `iova` on clean, without a
    /// report. What is not mapped or not logged is left out.
    ///
    /// This is for pages whose content nobody needs, as of a balloon, and for pages
    /// that are copied in any case. It forgets removed ranges as a report does. A
    /// page of the log stays dirty if the IOVAs contain only a piece of it.
    ///
    /// A mark that returned before this call is forgotten, and a mark that starts
    /// after it stays. Of a mark at the same time nobody knows. So copy the pages
    /// *after* this call, if they are needed. Do not clear pages that you know from
    /// an earlier read only as clean: they may have become dirty since, and nothing
    /// would tell it. [`clear_bitmap`](DeviceLog::clear_bitmap) leaves them out.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs wrap.
    /// - [`Error::Misaligned`] unless `iova` and `size` are multiples of 4 KiB.
    /// - [`Error::NotTracking`] if the log is off.
    pub fn clear_range(&self, iova: u64, size: u64) -> Result<(), TrackError> {
        let ask = Ask::iommufd(iova, size, 4096)?;
        clear(self.write().on_mut()?, ask.iova, ask.last);
        Ok(())
    }

    /// As [`clear_range`](DeviceLog::clear_range), for the pages whose bits are set
    /// in `bitmap`. The bits stand for the pages that they stand for in
    /// [`dirty_bitmap`](DeviceLog::dirty_bitmap) with the same arguments.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs wrap.
    /// - [`TrackError::PageSize`] unless `pgsize` is a power of two.
    /// - [`Error::Misaligned`] unless `iova` and `size` are multiples of `pgsize`
    ///   and of 4 KiB.
    /// - [`Error::BitmapSize`] if `bitmap` is too short.
    /// - [`Error::NotTracking`] if the log is off.
    pub fn clear_bitmap(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &[u64],
    ) -> Result<(), TrackError> {
        let ask = Ask::iommufd(iova, size, pgsize)?;
        ask.check_fits(bitmap)?;
        let mut state = self.write();
        let on = state.on_mut()?;
        for (first, last) in ask.extent().ranges(bitmap)? {
            clear(on, first, last);
        }
        Ok(())
    }

    /// Gives all dirty pages that are left of removed ranges to `put`, run by run:
    /// the first IOVA and the number of bytes. Then it forgets the removed ranges.
    ///
    /// This is for a caller that does not know which ranges were removed. The runs
    /// consist of whole pages of the log, come in no order, and may overlap. Beyond
    /// [`LogOptions::removed`](super::LogOptions::removed) bytes they also have pages
    /// that were never dirty, or never mapped.
    ///
    /// The log is locked during the call, so `put` must not call it. Copy the pages
    /// *after* this call.
    ///
    /// # Errors
    ///
    /// In this order. The removed ranges are left as they were then:
    ///
    /// - [`Error::NotTracking`] if the log is off.
    /// - The first error of `put`.
    pub fn take_removed(
        &self,
        mut put: impl FnMut(u64, u64) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        let mut state = self.write();
        let on = state.on_mut()?;
        for (first, last) in on.removed.dirty_runs() {
            // A run of all IOVAs has 2^64 bytes, so runs are told in halves at most.
            match (last - first).checked_add(1) {
                Some(size) => put(first, size)?,
                None => {
                    put(0, 1 << 63)?;
                    put(1 << 63, 1 << 63)?;
                }
            }
        }
        on.removed.clear();
        Ok(())
    }

    fn report_words(&self, ask: Ask, clear: bool, bitmap: &mut [u64]) -> Result<(), TrackError> {
        ask.check_fits(bitmap)?;
        self.report_windows(ask, clear, |at, words| {
            bitmap[at..]
                .iter_mut()
                .zip(words)
                .for_each(|(a, b)| *a |= b);
            Ok(())
        })
    }

    /// Makes a report window by window, and gives each to `put`: the index of its
    /// first word in the report, and its words. If `clear` is set and no call of
    /// `put` fails, it then clears what the report has.
    pub(super) fn report_windows(
        &self,
        ask: Ask,
        clear: bool,
        mut put: impl FnMut(usize, &[u64]) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        let mut state = self.write();
        state.check_reportable(ask.iova, ask.last)?;
        let on = state.on_mut()?;
        let parts = on.live(ask.iova, ask.last);
        let parts = parts.map(|piece| Part::new(piece, ask.iova, ask.last));
        // A mark may come after the bits are read, so these words say what to clear.
        let parts: Vec<_> = parts.map(|part| (part.words(), part)).collect();
        let mut next = 0; // the first part that does not end before the window
        let mut windows = Windows::new(ask);
        while let Some((at, to, out)) = windows.next() {
            let last = ask.end_of(to);
            let ended = parts[next..]
                .iter()
                .take_while(|(_, part)| !part.overlaps(to.iova, u64::MAX));
            next += ended.count();
            let hit = parts[next..]
                .iter()
                .take_while(|(_, part)| part.overlaps(0, last));
            for (words, part) in hit {
                part.report(words, out, to)?;
            }
            on.removed.report(out, to, last)?;
            put(at, out)?;
        }
        if clear {
            for (words, part) in parts {
                part.clear(words);
            }
            on.removed.told(ask.iova, ask.last);
        }
        Ok(())
    }
}

/// Gives the dirty pages of the mapped IOVAs from `first` to `last` to `put`, some
/// words at a time, and clears them. A page of the log that is only in part among
/// them is given and cleared as a whole.
pub(super) fn take(
    on: &On,
    first: u64,
    last: u64,
    mut put: impl FnMut(&[u64], Extent) -> Result<(), TrackError>,
) -> Result<(), TrackError> {
    let mut pieces = on.live(first, last);
    pieces.try_for_each(|piece| Part::new(piece, first, last).take(&mut put))
}

/// Makes the pages of the IOVAs from `first` to `last` clean.
fn clear(on: &mut On, first: u64, last: u64) {
    for piece in on.live(first, last) {
        Part::new(piece, first, last).clear_all();
    }
    on.removed.told(first, last);
}
