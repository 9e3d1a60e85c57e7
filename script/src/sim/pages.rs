// SPDX-License-Identifier: MIT OR Apache-2.0
//! A number for each page, kept in chunks, so that large ranges are cheap.

use std::collections::BTreeMap;

/// Pages in a chunk.
const CHUNK: u64 = 512;

/// A number for each page; 0 where none was set.
#[derive(Debug, Default)]
pub(crate) struct Pages {
    chunks: BTreeMap<u64, Box<[u64; CHUNK as usize]>>,
}

impl Pages {
    pub(crate) fn get(&self, page: u64) -> u64 {
        let chunk = self.chunks.get(&(page / CHUNK));
        chunk.map_or(0, |chunk| chunk[(page % CHUNK) as usize])
    }

    /// Calls `change` for the numbers of `n` pages from `first` on, a part of a
    /// chunk at a time: with the page of the first number, and the numbers.
    pub(crate) fn update(&mut self, first: u64, n: u64, mut change: impl FnMut(u64, &mut [u64])) {
        let mut page = first;
        while page < first + n {
            let end = (first + n).min((page / CHUNK + 1) * CHUNK);
            let chunk = self.chunks.entry(page / CHUNK);
            let chunk = chunk.or_insert_with(|| Box::new([0; CHUNK as usize]));
            let from = (page % CHUNK) as usize;
            change(page, &mut chunk[from..][..(end - page) as usize]);
            page = end;
        }
    }
}
