// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a report of a device's log is asked for, told, and cleared.

use dirty_core::{normalise, Error, Extent, PageSize};

use super::log::DeviceLog;
use super::range::{base, Logged};
use crate::dirty_bits::{DirtyBits, BASE_PAGE};
use crate::error::TrackError;
use crate::guest::covered;

/// Words of a report that are on their way at a time.
const WINDOW: usize = 4096;

/// What a report tells of one range of the log.
struct Told<'a> {
    bits: &'a DirtyBits,
    /// Where `words` starts among the words of `bits`.
    start: usize,
    words: Vec<u64>,
    /// The pages that the words stand for.
    pages: Extent,
    /// First and last of them that the report tells wholly. Others stay dirty:
    /// whoever asks for their rest must hear of them too.
    whole: (u64, u64),
}

impl<'a> Told<'a> {
    fn new(ask: Ask, range: &'a Logged) -> Option<Told<'a>> {
        let bits = range.bits.as_ref()?;
        let pgsize = bits.pgsize();
        let base = base(range.first, pgsize);
        let (first, last) = (ask.iova.max(range.first), ask.last.min(range.last));
        let (from, to) = (pgsize.pages(first - base), pgsize.pages(last - base));
        let start = (from / 64) as usize;
        let mut words = vec![0; (to / 64) as usize - start + 1];
        bits.image(start, &mut words);
        keep(&mut words, from % 64, from % 64 + (to - from));
        let inside = pgsize.bytes() - 1;
        let cut_head = first > range.first && first & inside != 0;
        let cut_tail = last < range.last && last & inside != inside;
        let bit = from % 64;
        Some(Told {
            bits,
            start,
            words,
            pages: Extent {
                bit,
                iova: base + (from << pgsize.shift()),
                npages: to - from + 1,
                pgsize,
            },
            whole: (
                bit + u64::from(cut_head),
                (bit + (to - from) + 1) - u64::from(cut_tail),
            ),
        })
    }

    /// Clears what was told, and nothing else.
    fn clear(mut self) {
        let (first, end) = self.whole;
        match end.checked_sub(1).filter(|last| *last >= first) {
            Some(last) => keep(&mut self.words, first, last),
            None => self.words.fill(0),
        }
        self.bits.clear(self.start, &self.words);
    }
}

/// Clears all bits but `first` to `last`.
fn keep(words: &mut [u64], first: u64, last: u64) {
    for (at, word) in (0..).zip(words) {
        let here = at * 64..at * 64 + 64;
        if first >= here.end || last < here.start {
            *word = 0;
            continue;
        }
        if first > here.start {
            *word &= !0 << (first % 64);
        }
        if last < here.end {
            *word &= !0 >> (63 - last % 64);
        }
    }
}

impl DeviceLog {
    /// ORs a report into `bitmap`.
    pub(super) fn answer_words(
        &self,
        ask: Ask,
        clear: bool,
        bitmap: &mut [u64],
    ) -> Result<(), TrackError> {
        ask.fits(bitmap)?;
        self.answer(ask, clear, |at, words| {
            bitmap[at..]
                .iter_mut()
                .zip(words)
                .for_each(|(a, b)| *a |= b);
            Ok(())
        })
    }

    /// Hands the words of a report to `put`, with their place, and then clears
    /// what they told, if all went well.
    pub(super) fn answer(
        &self,
        ask: Ask,
        clear: bool,
        mut put: impl FnMut(usize, &[u64]) -> Result<(), TrackError>,
    ) -> Result<(), TrackError> {
        let mut state = self.write();
        state.on.ok_or(Error::NotTracking)?;
        let (first, last) = (ask.iova, ask.last);
        let hit = state.ranges.values().chain(&state.gone);
        let hit: Vec<Logged> = hit.filter(|r| r.overlaps(first, last)).cloned().collect();
        covered(hit.iter().map(|r| (r.first, r.last)).collect(), first, last)?;
        if clear {
            // Who marks these from now on is told that nobody will report it.
            let gone = state.gone.iter().filter(|r| r.inside(first, last));
            gone.for_each(Logged::close);
        }
        let told: Vec<Told<'_>> = hit.iter().filter_map(|r| Told::new(ask, r)).collect();
        let mut windows = Windows::new(ask);
        while let Some((at, to, out)) = windows.next() {
            for told in &told {
                normalise(&told.words, told.pages, out, to)?;
            }
            put(at, out)?;
        }
        if clear {
            told.into_iter().for_each(Told::clear);
            state.gone.retain(|r| !r.inside(first, last));
        }
        Ok(())
    }
}

/// A report that was asked for.
#[derive(Clone, Copy)]
pub(super) struct Ask {
    iova: u64,
    last: u64,
    pgsize: PageSize,
}

impl Ask {
    pub(super) fn logging(iova: u64, size: u64, pgsize: u64) -> Result<Ask, TrackError> {
        let pgsize = PageSize::new(pgsize).filter(|size| *size >= BASE_PAGE);
        let pgsize = pgsize.ok_or(TrackError::PageSize)?;
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        if !pgsize.aligns(iova) {
            return Err(Error::Misaligned.into());
        }
        Ok(Ask { iova, last, pgsize })
    }

    pub(super) fn iommufd(iova: u64, size: u64, pgsize: u64) -> Result<Ask, TrackError> {
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = iova.checked_add(more).ok_or(Error::Wraps)?;
        let pgsize = PageSize::new(pgsize).ok_or(TrackError::PageSize)?;
        if !pgsize.aligns(iova | size) || !BASE_PAGE.aligns(iova | size) {
            return Err(Error::Misaligned.into());
        }
        Ok(Ask { iova, last, pgsize })
    }

    pub(super) fn npages(self) -> u64 {
        self.pgsize.pages(self.last - self.iova).saturating_add(1)
    }

    fn fits(self, bitmap: &[u64]) -> Result<(), TrackError> {
        match self.npages().div_ceil(64) <= bitmap.len() as u64 {
            true => Ok(()),
            false => Err(Error::BitmapSize.into()),
        }
    }
}

/// The words of a report, some at a time.
struct Windows {
    ask: Ask,
    words: Vec<u64>,
    done: u64,
}

impl Windows {
    fn new(ask: Ask) -> Windows {
        let words = ask.npages().div_ceil(64).min(WINDOW as u64);
        Windows {
            ask,
            words: vec![0; words as usize],
            done: 0,
        }
    }

    /// The next words, which are zero: their place, and what they stand for.
    fn next(&mut self) -> Option<(usize, Extent, &mut [u64])> {
        let left = self.ask.npages() - self.done;
        if left == 0 {
            return None;
        }
        let npages = left.min(WINDOW as u64 * 64);
        let at = self.done / 64;
        let iova = self.ask.iova + (self.done << self.ask.pgsize.shift());
        self.done += npages;
        let words = &mut self.words[..npages.div_ceil(64) as usize];
        words.fill(0);
        let extent = Extent {
            bit: 0,
            iova,
            npages,
            pgsize: self.ask.pgsize,
        };
        Some((at as usize, extent, words))
    }
}
