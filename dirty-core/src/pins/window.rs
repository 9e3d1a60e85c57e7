// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pins of one window: 2^20 neighbouring pages of a mapping.
//!
//! A page that is pinned by itself has an entry in a hash table. Of pages that
//! are pinned one after the other, 16 share an entry: a cluster.
#![allow(clippy::arithmetic_side_effects)] // numbers of pages, and counts of pins

use crate::error::NoMemory;
use crate::host::Memory;
use crate::mem::List;
use crate::pins::table::{self, Entry, Slot, Table};

/// log2 of the pages of a window.
pub(crate) const SHIFT: u32 = table::SHIFT;

/// Pages of a cluster.
const PAGES: u32 = 16;

#[derive(Clone, Copy)]
#[repr(Rust, packed(4))]
struct Pin {
    pfn: u64,
    /// 0: the page is not pinned.
    refs: u32,
}

type Cluster = [Pin; PAGES as usize];

/// No index of a cluster.
const NONE: u64 = u64::MAX;

const NO_PINS: Cluster = [Pin { pfn: NONE, refs: 0 }; PAGES as usize];

pub(crate) struct Window<M: Memory> {
    /// Pages whose cluster has no entry: the page's key, how often it is pinned,
    /// its pfn.
    pages: Table<M>,
    /// The cluster's key, how many of its pages are pinned, its index in `clusters`.
    entries: Table<M>,
    /// INVARIANT: those that have no entry have no pins, and are in a chain:
    /// the first is `spare`, the next is what the first pfn says.
    clusters: List<Cluster, M>,
    spare: u64,
    /// Where an entry was that was looked for.
    recent: Slot,
    /// The page after the one that was pinned last.
    next: u32,
    /// No page from this one on is in `pages`.
    end: u32,
}

/// Why a page was not pinned once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NotRepinned {
    /// It is not pinned.
    NotPinned,
    /// It is pinned as often as can be counted.
    Full,
}

/// What an unpin did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unpinned {
    /// The page was not pinned.
    NotPinned,
    /// It has other pins.
    Shared,
    /// It was the last pin, of this pfn.
    Last(u64),
}

/// Key of a page in `pages`.
fn page_key(page: u32) -> u32 {
    page + 1
}

/// Key of a page's cluster in `entries`.
fn cluster_key(page: u32) -> u32 {
    page / PAGES + 1
}

/// Index of a page in its cluster.
fn index(page: u32) -> usize {
    (page % PAGES) as usize
}

impl<M: Memory> Window<M> {
    pub(crate) fn new(mem: &M) -> Self {
        Window {
            pages: Table::new(mem),
            entries: Table::new(mem),
            clusters: List::new(mem),
            spare: NONE,
            recent: Slot::default(),
            next: u32::MAX,
            end: 0,
        }
    }

    /// The pfn of a pinned page.
    #[inline]
    pub(crate) fn get(&self, page: u32) -> Option<u64> {
        match self.entries.get(cluster_key(page)) {
            Some(entry) => {
                let pin = self.clusters.get(entry.value as usize)?.get(index(page))?;
                (pin.refs != 0).then_some(pin.pfn)
            }
            None => Some(self.pages.get(page_key(page))?.value),
        }
    }

    /// The pin of a page in its cluster, if that has an entry: there may be none.
    #[inline]
    fn in_cluster(&mut self, page: u32) -> Option<(Slot, &mut Pin)> {
        let key = cluster_key(page);
        if self.entries.at(self.recent).map(|entry| entry.key) != Some(key) {
            self.recent = self.entries.find(key)?;
        }
        let slot = self.recent;
        let at = self.entries.at(slot)?.value as usize;
        let pin = self
            .clusters
            .as_mut_slice()
            .get_mut(at)?
            .get_mut(index(page))?;
        Some((slot, pin))
    }

    /// Takes one more pin of a pinned page, and returns its pfn.
    #[inline]
    pub(crate) fn repin(&mut self, page: u32) -> Result<u64, NotRepinned> {
        let (refs, pfn) = match self.in_cluster(page) {
            Some((_, pin)) if pin.refs == 0 => return Err(NotRepinned::NotPinned),
            Some((_, pin)) => (&mut pin.refs, pin.pfn),
            None => {
                let entry = self
                    .pages
                    .get_mut(page_key(page))
                    .ok_or(NotRepinned::NotPinned)?;
                (&mut entry.count, entry.value)
            }
        };
        *refs = refs.checked_add(1).ok_or(NotRepinned::Full)?;
        Ok(pfn)
    }

    /// Keeps the first pin of a page; false if it is refused.
    #[inline]
    pub(crate) fn insert(&mut self, mem: &M, page: u32, pfn: u64) -> Result<bool, NoMemory> {
        if page == self.next && index(page) == 0 {
            self.start_cluster(mem, page)?;
        }
        self.next = page + 1;
        if self.put(page, Pin { pfn, refs: 1 }) {
            return Ok(true);
        }
        self.end = self.end.max(page + 1);
        let (key, count, value) = (page_key(page), 1, pfn);
        self.pages.insert(mem, Entry { key, count, value })
    }

    /// Keeps a pin in its page's cluster; false if that has no entry.
    #[inline]
    fn put(&mut self, page: u32, new: Pin) -> bool {
        let Some((slot, pin)) = self.in_cluster(page) else {
            return false;
        };
        *pin = new;
        if let Some(entry) = self.entries.at_mut(slot) {
            entry.count += 1;
        }
        true
    }

    /// Gives the cluster of pages from `first` on an entry, unless it has one or
    /// the table refuses it.
    #[inline(never)]
    fn start_cluster(&mut self, mem: &M, first: u32) -> Result<(), NoMemory> {
        if self.in_cluster(first).is_some() {
            return Ok(());
        }
        if self.spare == NONE {
            self.clusters.push(NO_PINS)?;
            self.spare = self.clusters.len() as u64 - 1;
        }
        let (key, count, value) = (cluster_key(first), 0, self.spare);
        let inserted = self.entries.insert(mem, Entry { key, count, value });
        if inserted == Ok(true) {
            let cluster = self.clusters.as_mut_slice().get_mut(value as usize);
            self.spare = cluster.map_or(NONE, |[pin, ..]| pin.pfn);
            for page in first..self.end.min(first + PAGES) {
                if let Some(slot) = self.pages.find(page_key(page)) {
                    let entry = self.pages.remove(slot);
                    self.put(
                        page,
                        Pin {
                            pfn: entry.value,
                            refs: entry.count,
                        },
                    );
                }
            }
        }
        self.tidy();
        inserted.map(|_| ())
    }

    /// Without entries, gives back the clusters.
    fn tidy(&mut self) {
        if self.entries.is_empty() {
            self.clusters.reset();
            self.spare = NONE;
        }
    }

    /// Drops one pin of a page.
    #[inline]
    pub(crate) fn remove(&mut self, page: u32) -> Unpinned {
        let Some((slot, pin)) = self.in_cluster(page) else {
            return self.remove_single(page);
        };
        let pfn = pin.pfn;
        match pin.refs {
            0 => return Unpinned::NotPinned,
            1 => pin.refs = 0,
            _ => {
                pin.refs -= 1;
                return Unpinned::Shared;
            }
        }
        if let Some(entry) = self.entries.at_mut(slot) {
            entry.count -= 1;
            if entry.count == 0 {
                self.end_cluster(slot);
            }
        }
        Unpinned::Last(pfn)
    }

    #[inline]
    fn remove_single(&mut self, page: u32) -> Unpinned {
        let Some(slot) = self.pages.find(page_key(page)) else {
            return Unpinned::NotPinned;
        };
        match self.pages.at_mut(slot) {
            Some(entry) if entry.count > 1 => {
                entry.count -= 1;
                Unpinned::Shared
            }
            _ => Unpinned::Last(self.pages.remove(slot).value),
        }
    }

    /// The last pin of a cluster is gone, and its entry goes.
    #[inline(never)]
    fn end_cluster(&mut self, slot: Slot) {
        let at = self.entries.remove(slot).value;
        if let Some([pin, ..]) = self.clusters.as_mut_slice().get_mut(at as usize) {
            pin.pfn = self.spare;
            self.spare = at;
        }
        self.tidy();
    }

    /// Whether a page from `first` to `last` is pinned.
    pub(crate) fn any_in(&self, first: u32, last: u32) -> bool {
        let mut pages = first..=last;
        if ((last - first) as usize) < self.pages.len() + self.entries.len() {
            pages.any(|page| self.get(page).is_some())
        } else {
            self.iter().any(|(page, _)| pages.contains(&page))
        }
    }

    /// Every pinned page, and its pfn, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        let singles = self.pages.iter().map(|entry| (entry.key - 1, entry.value));
        let clusters = self.entries.iter().flat_map(|entry| {
            let cluster = self
                .clusters
                .get(entry.value as usize)
                .into_iter()
                .flatten();
            let pins = ((entry.key - 1) * PAGES..).zip(cluster);
            pins.filter_map(|(page, pin)| (pin.refs != 0).then_some((page, pin.pfn)))
        });
        singles.chain(clusters)
    }
}
