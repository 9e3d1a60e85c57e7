// SPDX-License-Identifier: MIT OR Apache-2.0
//! The simulated memory of a script's process.

use std::collections::HashMap;
use std::iter;
use std::ops::Range;

use crate::op::*;

/// User memory: regions, and the pages in them that were written.
#[derive(Clone, Debug)]
pub struct User {
    /// Of each region: first address, bytes, and whether it can be written.
    regions: Vec<(u64, u64, bool)>,
    pages: HashMap<u64, Vec<u8>>,
}

impl Default for User {
    fn default() -> Self {
        User {
            regions: vec![
                (MEM, MEM_SIZE, true),
                (BUF, BUF_SIZE, true),
                (RO, RO_SIZE, false),
                (ARG, ARG_SIZE, true),
            ],
            pages: HashMap::new(),
        }
    }
}

impl User {
    /// Adds a region. Returns false, and adds nothing, if it is empty or
    /// overlaps another.
    pub fn map(&mut self, addr: u64, size: u64, write: bool) -> bool {
        let taken = |r: &(u64, u64, bool)| addr < r.0 + r.1 && r.0 < addr.saturating_add(size);
        let free = size != 0 && !self.regions.iter().any(taken);
        if free {
            self.regions.push((addr, size, write));
        }
        free
    }

    /// How many of `len` bytes from `addr` on can be read (or written, if
    /// `write`). Ends with the region, even if another follows.
    #[must_use]
    pub fn accessible(&self, addr: u64, len: usize, write: bool) -> usize {
        let region = self
            .regions
            .iter()
            .find(|r| addr >= r.0 && addr - r.0 < r.1);
        match region {
            Some((start, size, writable)) if *writable || !write => {
                let left = size - (addr - start);
                usize::try_from(left).map_or(len, |left| left.min(len))
            }
            _ => 0,
        }
    }

    /// Reads up to the first byte that cannot be read; returns how many bytes.
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> usize {
        let n = self.accessible(addr, buf.len(), false);
        for (page, offset, piece) in pieces(addr, n) {
            let out = &mut buf[piece];
            match self.pages.get(&page) {
                Some(bytes) => out.copy_from_slice(&bytes[offset..][..out.len()]),
                None => out.fill(0),
            }
        }
        n
    }

    /// Writes up to the first byte that cannot be written; returns how many
    /// bytes.
    pub fn write(&mut self, addr: u64, buf: &[u8]) -> usize {
        let n = self.accessible(addr, buf.len(), true);
        for (page, offset, piece) in pieces(addr, n) {
            let bytes = self.pages.entry(page);
            let bytes = bytes.or_insert_with(|| vec![0; PAGE as usize]);
            bytes[offset..][..piece.len()].copy_from_slice(&buf[piece]);
        }
        n
    }
}

/// Splits `n` bytes from `addr` on at page boundaries: the page, the offset in
/// it, and which of the bytes.
fn pieces(addr: u64, n: usize) -> impl Iterator<Item = (u64, usize, Range<usize>)> {
    let mut done = 0;
    iter::from_fn(move || {
        let at = addr + done as u64;
        let offset = (at % PAGE) as usize;
        let end = n.min(done + PAGE as usize - offset);
        let piece = (done < n).then_some((at / PAGE, offset, done..end));
        done = end;
        piece
    })
}
