// SPDX-License-Identifier: MIT OR Apache-2.0
//! A piece of IOVA space with its dirty bits.

use dirty_core::{Error, PageSize};

use super::zeroed::zeroed;
use crate::dirty_bits::DirtyBits;
use crate::error::TrackError;

/// A range of IOVAs that is mapped and logged. A clone has the same bits.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) pgsize: PageSize,
    /// One bit per page of the log. Page k of the bits is page `base + k` of the
    /// IOVA space.
    ///
    /// The bits measure memory in pages and not in bytes. A piece of large pages may
    /// end at 2^64, where a number of bytes would overflow.
    bits: DirtyBits,
    /// A multiple of 64: each word of the bits is one word of the IOVA space.
    base: u64,
}

/// The bits count pages, so that one page of the log is one unit of them.
const UNIT: PageSize = match PageSize::new(1) {
    Some(unit) => unit,
    None => unreachable!(),
};

impl Piece {
    /// Creates a clean piece from IOVA `first` to IOVA `last`.
    pub(super) fn new(first: u64, last: u64, pgsize: PageSize) -> Result<Piece, TrackError> {
        let wanted = Self::bytes(first, last, pgsize);
        let base = pgsize.pages(first) / 64 * 64;
        let words = usize::try_from(wanted / 8).ok().and_then(zeroed);
        let words = words.ok_or(TrackError::NoMemory { wanted })?;
        let npages = pgsize.pages(last) - base + 1;
        Ok(Piece {
            first,
            last,
            pgsize,
            bits: DirtyBits::from_words(words, npages, UNIT),
            base,
        })
    }

    /// The number of bytes that the bits of a piece take.
    pub(super) fn bytes(first: u64, last: u64, pgsize: PageSize) -> u64 {
        (pgsize.pages(last) / 64 - pgsize.pages(first) / 64 + 1) * 8
    }

    /// Marks the pages from IOVA `first` to IOVA `last`, which must be in the piece.
    /// Fails if the piece is closed.
    pub(super) fn mark(&self, first: u64, last: u64) -> Result<(), Error> {
        let (from, to) = (self.pgsize.pages(first), self.pgsize.pages(last));
        self.bits.mark(from - self.base, to - from + 1)
    }

    /// The index of the first word of the piece, in words of the IOVA space.
    pub(super) fn first_word(&self) -> u64 {
        self.base / 64
    }

    /// The index of the last word of the piece, in words of the IOVA space.
    pub(super) fn last_word(&self) -> u64 {
        self.pgsize.pages(self.last) / 64
    }

    /// ORs the words from word `first` of the IOVA space on into `out`. The piece
    /// must have the first one.
    pub(super) fn peek(&self, first: u64, out: &mut [u64]) {
        self.bits.peek((first - self.first_word()) as usize, out);
    }

    /// Clears the bits of `words`, which are the words from word `first` of the IOVA
    /// space on. The piece must have the first one.
    pub(super) fn clear(&self, first: u64, words: &[u64]) {
        self.bits.clear((first - self.first_word()) as usize, words);
    }

    /// Makes every page clean.
    pub(super) fn reset(&self) {
        self.bits.reset();
    }

    /// Refuses every later mark.
    pub(super) fn close(&self) {
        self.bits.close();
    }
}
