// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pinned pages of one mapping.
//!
//! Pins are kept by the iova they were made at, 64 neighbouring pages to a
//! chunk, so that pinning a run touches few nodes. An iova need not be
//! page-aligned; pins at different offsets inside a page are different pins,
//! and have chunks of their own.
#![allow(clippy::arithmetic_side_effects)] // masks and shifts of an iova

use crate::error::Error;
use crate::host::Memory;
use crate::mem::List;
use crate::pgsize::PageSize;
use crate::tree::Tree;

#[derive(Clone, Copy)]
struct Pin {
    pfn: u64,
    refs: u32,
}

struct Chunk<M: Memory> {
    key: u64,
    /// Bit k: the k-th page of the chunk is pinned.
    mask: u64,
    /// One for each bit of `mask`, in order.
    pins: List<Pin, M>,
}

/// What an unpin did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unpinned {
    /// The page has other pins.
    Shared,
    /// It was the last pin, of this pfn.
    Last(u64),
}

pub(crate) struct Pins<M: Memory> {
    chunks: Tree<Chunk<M>, M>,
    mem: M,
    page: PageSize,
}

impl<M: Memory> Pins<M> {
    pub(crate) fn new(mem: &M, page: PageSize) -> Self {
        Pins {
            chunks: Tree::new(mem),
            mem: mem.clone(),
            page,
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The chunk that holds the pin at `iova`, and the pin's bit there. The
    /// key keeps the offset inside the page.
    fn locate(&self, iova: u64) -> (u64, u64) {
        let shift = self.page.shift();
        let page_in_chunk = iova >> shift & 63;
        (iova & !(63 << shift), 1 << page_in_chunk)
    }

    /// The pfn pinned at `iova`.
    pub(crate) fn get(&self, iova: u64) -> Option<u64> {
        let (key, bit) = self.locate(iova);
        let chunk = self.chunks.get(key)?;
        let pin = chunk.pins.get(chunk.rank(bit)?)?;
        Some(pin.pfn)
    }

    /// Takes one more pin of a page that is pinned at `iova`, and returns its
    /// pfn; `None` if it is not.
    pub(crate) fn again(&mut self, iova: u64) -> Option<Result<u64, Error>> {
        let (key, bit) = self.locate(iova);
        let chunk = self.chunks.get_mut(key)?;
        let rank = chunk.rank(bit)?;
        let pin = chunk.pins.as_mut_slice().get_mut(rank)?;
        let Some(refs) = pin.refs.checked_add(1) else {
            return Some(Err(Error::PinCount));
        };
        pin.refs = refs;
        Some(Ok(pin.pfn))
    }

    /// Keeps the first pin at `iova`.
    pub(crate) fn insert(&mut self, iova: u64, pfn: u64) -> Result<(), Error> {
        let (key, bit) = self.locate(iova);
        let fresh = self.chunks.get(key).is_none();
        let chunk = if fresh {
            let pins = List::new(&self.mem);
            let mask = 0;
            self.chunks.insert(key, Chunk { key, mask, pins })?
        } else {
            self.chunks.get_mut(key).ok_or(Error::NoMemory)?
        };
        let rank = (chunk.mask & (bit - 1)).count_ones() as usize;
        match chunk.pins.insert(rank, Pin { pfn, refs: 1 }) {
            Ok(()) => {
                chunk.mask |= bit;
                Ok(())
            }
            Err(e) => {
                if fresh {
                    self.chunks.remove(key);
                }
                Err(e.into())
            }
        }
    }

    /// Drops one pin of the page at `iova`; `None` if it has none.
    pub(crate) fn remove(&mut self, iova: u64) -> Option<Unpinned> {
        let (key, bit) = self.locate(iova);
        let chunk = self.chunks.get_mut(key)?;
        let rank = chunk.rank(bit)?;
        let pin = chunk.pins.as_mut_slice().get_mut(rank)?;
        pin.refs = pin.refs.saturating_sub(1);
        if pin.refs != 0 {
            return Some(Unpinned::Shared);
        }
        let pfn = pin.pfn;
        chunk.pins.remove(rank);
        chunk.mask &= !bit;
        if chunk.mask == 0 {
            self.chunks.remove(key);
        }
        Some(Unpinned::Last(pfn))
    }

    /// Whether a page is pinned at an iova from `first` to `last`.
    pub(crate) fn any_in(&self, first: u64, last: u64) -> bool {
        let shift = self.page.shift();
        let start = first & !((64u64 << shift) - 1);
        self.chunks
            .iter_from(start)
            .take_while(|chunk| chunk.key <= last)
            .any(|chunk| {
                chunk
                    .iter(shift)
                    .any(|(iova, _)| iova >= first && iova <= last)
            })
    }

    /// Every pinned page: where, and its pfn.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let shift = self.page.shift();
        self.chunks.iter_from(0).flat_map(move |c| c.iter(shift))
    }
}

impl<M: Memory> Chunk<M> {
    /// Where the pin of `bit` is among the pins, if it is.
    fn rank(&self, bit: u64) -> Option<usize> {
        if self.mask & bit == 0 {
            return None;
        }
        Some((self.mask & (bit - 1)).count_ones() as usize)
    }

    fn iter(&self, shift: u32) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut mask = self.mask;
        let key = self.key;
        self.pins.iter().map(move |pin| {
            let page = u64::from(mask.trailing_zeros());
            mask &= mask.wrapping_sub(1);
            (key | page << shift, pin.pfn)
        })
    }
}
