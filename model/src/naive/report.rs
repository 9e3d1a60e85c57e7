// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reports of dirty pages: GET_BITMAP, as an ioctl and as a typed call.

use dirty_core::Errno;
use dirty_script::op::{ReportArg, PAGE};
use dirty_script::Answer;

use super::abi::Bitmap;
use super::backend::Backend;
use super::check::{check, test_bitmap};
use super::process::{is_user_range, Result};
use super::Naive;

impl Backend {
    /// Fails unless a range can be reported: it is made of whole pages and
    /// whole mappings, and tracking is on.
    fn check_report(&self, first: u64, last: u64, page: u64) -> Result<()> {
        check(first % page == 0 && last.wrapping_add(1) % page == 0)?;
        check(self.granule.is_some())?;
        check(!self.mappings.bisected(first, last))
    }

    /// Calls `take` with the words of a report that overlap a mapping (rule
    /// D1), in order: the index of the first word of a row, and the row.
    pub(super) fn words(
        &self,
        first: u64,
        last: u64,
        pgsize: u64,
        take: &mut dyn FnMut(u64, &[u64]) -> Result<()>,
    ) -> Result<()> {
        const CHUNK: u64 = 512 * 64; // bits
        let mut next = 0;
        for iova in self.mappings.overlapping(first, last) {
            let m = &self.mappings.0[&iova];
            let (from, to) = ((m.iova - first) / pgsize, (m.last() - first) / pgsize);
            for chunk in next.max(from / CHUNK)..=to / CHUNK {
                next = chunk + 1;
                let words = self.chunk((first, last), pgsize, chunk * CHUNK, CHUNK);
                // Neighbouring words that overlap a mapping go out together.
                let mut row = Vec::new();
                for (k, word) in (chunk * (CHUNK / 64)..).zip(words.into_iter().chain([None])) {
                    if let Some(word) = word {
                        row.push(word);
                    } else if !row.is_empty() {
                        take(k - row.len() as u64, &row)?;
                        row.clear();
                    }
                }
            }
        }
        Ok(())
    }

    /// The words of `bits` bits of a report from `bit` on; `None` for a word
    /// that overlaps no mapping.
    fn chunk(&self, range: (u64, u64), pgsize: u64, bit: u64, bits: u64) -> Vec<Option<u64>> {
        let mut words = vec![None; bits as usize / 64];
        let (first, last) = range;
        // The addresses that these bits stand for.
        let from = first + bit * pgsize;
        let bytes = u128::from(bits) * u128::from(pgsize);
        let to = (u128::from(from) + bytes - 1).min(u128::from(last)) as u64;
        for iova in self.mappings.overlapping(from, to) {
            let m = &self.mappings.0[&iova];
            let granule = self.granule.unwrap_or(PAGE);
            let whole = [(0, (m.size - 1) / granule)];
            let some: Vec<(u64, u64)> = m.dirty.iter().copied().collect();
            let dirty = if self.all_dirty(m) { &whole[..] } else { &some };
            let in_chunk = (m.iova.max(from), m.last().min(to));
            let pages = |a: u64, b: u64| ((a - from) / pgsize, (b - from) / pgsize);
            let (a, b) = pages(in_chunk.0, in_chunk.1);
            for word in a / 64..=b / 64 {
                words[word as usize].get_or_insert(0);
            }
            for (g, h) in dirty {
                let a = (m.iova + g * granule).max(in_chunk.0);
                let b = (m.iova + (h * granule + (granule - 1))).min(in_chunk.1);
                if a <= b {
                    let (a, b) = pages(a, b);
                    set_bits(&mut words, a, b);
                }
            }
        }
        words
    }

    /// Makes the mappings of a range clean, after a report of it.
    pub(super) fn clean(&mut self, first: u64, last: u64) {
        let Some(granule) = self.granule else { return };
        for iova in self.mappings.overlapping(first, last) {
            if let Some(m) = self.mappings.0.get_mut(&iova) {
                m.clean(granule);
            }
        }
    }
}

/// Sets bits `first..=last`.
fn set_bits(words: &mut [Option<u64>], first: u64, last: u64) {
    let mut bit = first;
    while bit <= last {
        let word = &mut words[bit as usize / 64];
        if bit % 64 == 0 && last - bit >= 63 {
            *word = Some(u64::MAX);
            bit += 64;
        } else {
            *word = Some(word.unwrap_or(0) | 1 << (bit % 64));
            bit += 1;
        }
    }
}

/// The last address of a range. Fails if it is empty or wraps.
fn last_of(iova: u64, size: u64) -> Result<u64> {
    check(size != 0)?;
    iova.checked_add(size - 1).ok_or(Errno::EOVERFLOW)
}

impl Naive {
    /// GET_BITMAP, from step 6 of A6 on.
    pub(super) fn get(&mut self, iova: u64, size: u64, b: Bitmap) -> Result<()> {
        let (backend, process) = self.parts()?;
        let last = last_of(iova, size)?;
        check(is_user_range(b.data, b.size))?;
        test_bitmap(size, b.pgsize, b.size)?;
        check(backend.granule == Some(b.pgsize))?;
        backend.check_report(iova, last, b.pgsize)?;
        backend.words(iova, last, b.pgsize, &mut |k, words| {
            process.copy_words(b.data.wrapping_add(8 * k), words)
        })?;
        backend.clean(iova, last);
        Ok(())
    }

    /// GET_BITMAP as a typed call, at any page size.
    pub(super) fn typed_report(&mut self, arg: &ReportArg, words: &mut [u64]) -> Answer {
        let (backend, _) = self.parts()?;
        if !backend.v2 {
            return Err(Errno::EACCES);
        }
        check(arg.pgsize.is_power_of_two())?;
        let last = last_of(arg.iova, arg.size)?;
        test_bitmap(arg.size, arg.pgsize, words.len() as u64 * 8)?;
        let page = arg.pgsize.max(backend.granule.unwrap_or(0));
        backend.check_report(arg.iova, last, page)?;
        backend.words(arg.iova, last, arg.pgsize, &mut |k, row| {
            words[k as usize..][..row.len()].copy_from_slice(row);
            Ok(())
        })?;
        backend.clean(arg.iova, last);
        Ok(0)
    }
}
