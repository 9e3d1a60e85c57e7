// SPDX-License-Identifier: MIT OR Apache-2.0
//! How dirty pages reach a user's bitmap, by copies that may fault.
//!
//! Nothing is cleaned here, so that a report that faulted can be asked for
//! again (D2). Words are collected in staging memory until a copy is worth its
//! cost. Staging words are zero between reports: what a copy leaves behind is
//! wiped line by line, so clean pages, of which there are many, cost the copy
//! and nothing else.

use core::mem;

use crate::bitmap::copy::{copy_full, BLOCK_WORDS};
use crate::bitmap::layout::LINE_WORDS;
use crate::bitmap::lines::FEW_LINES;
use crate::bits;
use crate::error::Error;
use crate::host::{Host, Memory};
use crate::mem::as_bytes;
use crate::type1::dma::Dma;
use crate::type1::report::{Place, Range};
use crate::type1::{Type1, STAGING_WORDS};

/// Bitmaps of no more words are copied by `Bitmap::copy_small`.
const SMALL_WORDS: usize = 32;

impl<M: Memory> Type1<M> {
    /// Copies the dirty pages of `range` to the user's bitmap at `data`. Returns
    /// whether there may be any.
    pub(super) fn copy_out(
        &mut self,
        host: &mut dyn Host,
        range: Range,
        data: u64,
    ) -> Result<bool, Error> {
        let all_dirty = self.all_dirty();
        let Some(tracking) = &mut self.tracking else {
            return Err(Error::NotTracking);
        };
        let mut report = UserReport::new(host, data, tracking.staging.exclusive());
        for dma in self.dmas.range_mut(range.span) {
            let all = all_dirty(dma);
            report.add(range.place(dma), dma, all)?;
        }
        report.finish()
    }
}

/// A report to a user, as far as it is made.
struct UserReport<'a> {
    host: &'a mut dyn Host,
    /// Address of the user's first word.
    data: u64,
    /// INVARIANT: zero but for the lines in `touched`.
    words: &'a mut [u64],
    touched: [u64; STAGING_WORDS / BLOCK_WORDS],
    /// Whether a line was touched at any time.
    any: bool,
    /// The user's word that `words[0]` is for.
    first: usize,
    /// Words in use.
    len: usize,
}

impl<'a> UserReport<'a> {
    /// An empty report to a user at `data`, by way of `words`, which are zero.
    fn new(host: &'a mut dyn Host, data: u64, words: &'a mut [u64]) -> Self {
        UserReport {
            host,
            data,
            words,
            touched: [0; STAGING_WORDS / BLOCK_WORDS],
            any: false,
            first: 0,
            len: 0,
        }
    }

    /// Appends the words of one mapping. Mappings come in ascending order. If
    /// `all` is set, every page is dirty.
    fn add<M: Memory>(&mut self, place: Place, dma: &mut Dma<M>, all: bool) -> Result<(), Error> {
        let Some(bitmap) = &mut dma.bitmap else {
            return Err(Error::NotTracking); // unreachable: every mapping has one
        };
        // The previous mapping may end in the word where this one starts.
        let end = self.first.saturating_add(self.len);
        let mut before = 0;
        if self.len != 0 && place.start < end {
            self.len = self.len.saturating_sub(1);
            before = self.words.get(self.len).copied().unwrap_or(0);
        } else if place.start != end {
            self.flush()?;
            self.first = place.start;
        }
        let total = place.end.saturating_sub(place.start);
        let room = self.words.len().saturating_sub(self.len);
        if total <= SMALL_WORDS.min(room) && !all {
            let end = self.len.saturating_add(total);
            let out = self.words.get_mut(self.len..end).unwrap_or_default();
            if bitmap.copy_small(place.shift, out) {
                touch(&mut self.touched, self.len, 0, total);
            }
            if let Some(word) = out.first_mut() {
                *word |= before;
            }
            self.len = end;
            return Ok(());
        }
        let mut done = 0;
        while done < total {
            if self.words.len().saturating_sub(self.len) < LINE_WORDS {
                self.flush()?;
            }
            let room = self.words.get_mut(self.len..).unwrap_or_default();
            let left = total.saturating_sub(done);
            let n = match room.len() < left {
                // Whole lines, so that the next words begin where a line does.
                true => room.len().saturating_sub(room.len() % LINE_WORDS),
                false => left,
            };
            let out = room.get_mut(..n).unwrap_or_default();
            let mut touch = |first, last| touch(&mut self.touched, self.len, first, last);
            if all {
                copy_full(bitmap.npages(), place.shift, done as u64, out);
                touch(0, n);
            } else {
                bitmap.copy_sparse(place.shift, done, out, touch);
            }
            if let Some(word) = out.first_mut() {
                *word |= mem::take(&mut before);
            }
            self.len = self.len.saturating_add(n);
            done = done.saturating_add(n);
        }
        Ok(())
    }

    /// Copies what is left. Returns whether a page may be dirty.
    fn finish(mut self) -> Result<bool, Error> {
        self.flush()?;
        Ok(self.any)
    }

    fn flush(&mut self) -> Result<(), Error> {
        let words = self.words.get(..self.len).unwrap_or_default();
        if !words.is_empty() {
            let offset = (self.first as u64).saturating_mul(8);
            let addr = self.data.checked_add(offset);
            let copied = addr.and_then(|at| self.host.copy_to_user(at, as_bytes(words)).ok());
            self.wipe();
            copied.ok_or(Error::BadAddress)?;
        }
        self.first = self.first.saturating_add(self.len);
        self.len = 0;
        Ok(())
    }

    /// Makes all words zero.
    fn wipe(&mut self) {
        let blocks = self.words.chunks_mut(BLOCK_WORDS);
        for (lines, block) in self.touched.iter_mut().zip(blocks) {
            if *lines != 0 {
                self.any = true;
                clear_lines(mem::take(lines), block);
            }
        }
    }
}

/// Notes that words `first` to `last`, counted from `base` on, may not be zero.
#[inline]
fn touch(touched: &mut [u64], base: usize, first: usize, last: usize) {
    let line = |at: usize| (base.saturating_add(at) / LINE_WORDS) as u64;
    let most = (touched.len() as u64).saturating_mul(64).saturating_sub(1);
    bits::set(touched, line(first).min(most), line(last).min(most));
}

/// Clears at least those lines of a block whose bits are set in `lines`.
fn clear_lines(lines: u64, block: &mut [u64]) {
    if lines.count_ones() > FEW_LINES {
        block.fill(0);
        return;
    }
    for at in bits::ones(lines) {
        let line = block.get_mut(at.saturating_mul(LINE_WORDS)..);
        if let Some(line) = line.and_then(|l| l.first_chunk_mut()) {
            *line = [0; LINE_WORDS];
        }
    }
}
