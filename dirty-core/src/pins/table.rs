// SPDX-License-Identifier: MIT OR Apache-2.0
//! A hash table from numbers to counted values, in buckets of four.
//!
//! An entry lies in the bucket that its key hashes to, its home, or in one of
//! the next buckets. A lookup takes one cache miss, where a tree takes one for
//! each level. Somebody may choose keys that collide, so the table refuses an
//! entry for which there is no room near its home.
#![allow(clippy::arithmetic_side_effects)] // buckets and entries, at most 2^20

use core::mem;
use core::ops::Range;

use crate::error::NoMemory;
use crate::host::Memory;
use crate::mem::List;

/// log2 of the largest number of entries. The keys of one table differ in this
/// many low bits.
pub(crate) const SHIFT: u32 = 20;
const MOST: usize = 1 << SHIFT;
/// An entry is refused that would lie this many buckets from its home.
const FAR: usize = 32;

#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// Not 0, which stands for an empty slot.
    pub(crate) key: u32,
    pub(crate) count: u32,
    pub(crate) value: u64,
}

const EMPTY: Entry = Entry {
    key: 0,
    count: 0,
    value: 0,
};

const WIDTH: usize = 4;

/// INVARIANT: entries come before empty slots.
type Bucket = [Entry; WIDTH];

#[inline]
fn is_full(bucket: &Bucket) -> bool {
    let [.., last] = bucket;
    last.key != 0
}

/// The number of entries in a bucket.
#[inline]
fn count(bucket: &Bucket) -> usize {
    bucket.iter().map(|entry| usize::from(entry.key != 0)).sum()
}

/// The home of a key. Neighbouring keys have homes far apart. (The factor is that
/// of the golden ratio.)
#[inline]
fn home(key: u32, buckets: &[Bucket]) -> usize {
    let hash = u64::from(key.wrapping_mul(0x9_e377)) % MOST as u64;
    ((hash * buckets.len() as u64) >> SHIFT) as usize
}

/// The bucket after bucket `at`. The first one comes after the last.
#[inline]
fn after(at: usize, buckets: &[Bucket]) -> usize {
    let next = at + 1;
    if next < buckets.len() {
        next
    } else {
        0
    }
}

/// How many buckets after its home an entry in bucket `at` lies.
#[inline]
fn distance(entry: &Entry, at: usize, buckets: &[Bucket]) -> usize {
    let home = home(entry.key, buckets);
    match at.checked_sub(home) {
        Some(n) => n,
        None => at + buckets.len() - home,
    }
}

/// Puts an entry into the first bucket from its home on that has room, if that is
/// one of the first `far`. Returns which one it is: 1 for the home.
#[inline]
fn place(entry: Entry, buckets: &mut [Bucket], far: usize) -> Option<usize> {
    let mut at = home(entry.key, buckets);
    for distance in 0..far {
        let bucket = buckets.get_mut(at)?;
        let n = count(bucket);
        if let Some(slot) = bucket.get_mut(n) {
            *slot = entry;
            return Some(distance + 1);
        }
        at = after(at, buckets);
    }
    None
}

pub(crate) struct Table<M: Memory> {
    /// INVARIANT: an entry lies in one of the `reach` buckets from its home on,
    /// and the buckets before it are full.
    buckets: List<Bucket, M>,
    reach: usize,
    len: usize,
    /// How many entries may be in so many buckets.
    fits: Range<usize>,
}

/// The slot of an entry. Valid until an entry comes or goes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Slot(usize);

impl<M: Memory> Table<M> {
    pub(crate) fn new(mem: &M) -> Self {
        Table {
            buckets: List::new(mem),
            reach: 0,
            len: 0,
            fits: 0..0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    pub(crate) fn find(&self, key: u32) -> Option<Slot> {
        let buckets = &*self.buckets;
        let mut at = home(key, buckets);
        for _ in 0..self.reach {
            let bucket = buckets.get(at)?;
            if let Some(k) = bucket.iter().position(|entry| entry.key == key) {
                return Some(Slot(at * WIDTH + k));
            }
            if !is_full(bucket) {
                return None;
            }
            at = after(at, buckets);
        }
        None
    }

    #[inline]
    pub(crate) fn at(&self, slot: Slot) -> Option<&Entry> {
        self.buckets.as_flattened().get(slot.0)
    }

    #[inline]
    pub(crate) fn get(&self, key: u32) -> Option<&Entry> {
        self.at(self.find(key)?)
    }

    #[inline]
    pub(crate) fn at_mut(&mut self, slot: Slot) -> Option<&mut Entry> {
        let slots = self.buckets.as_mut_slice().as_flattened_mut();
        slots.get_mut(slot.0)
    }

    #[inline]
    pub(crate) fn get_mut(&mut self, key: u32) -> Option<&mut Entry> {
        self.at_mut(self.find(key)?)
    }

    /// Inserts an entry whose key is not there; false if it is refused.
    #[inline]
    pub(crate) fn insert(&mut self, mem: &M, entry: Entry) -> Result<bool, NoMemory> {
        if !self.fits.contains(&(self.len + 1)) {
            self.resize(mem)?;
        }
        let placed = place(entry, self.buckets.as_mut_slice(), FAR);
        if let Some(reach) = placed {
            self.reach = self.reach.max(reach);
            self.len += 1;
        }
        Ok(placed.is_some())
    }

    /// Takes as many buckets as are right for one more entry.
    #[inline(never)]
    fn resize(&mut self, mem: &M) -> Result<(), NoMemory> {
        // 3/5 of the slots will be taken. Beyond 4/5 many entries would lie far
        // from home, but not where there are as many slots as keys.
        let slots = ((self.len + 1) * 5 / 3 + 2).min(MOST);
        let most = if slots == MOST { MOST } else { slots * 4 / 5 };
        let mut list = List::filled(mem, slots.div_ceil(WIDTH), [EMPTY; WIDTH])?;
        let buckets = list.as_mut_slice();
        // Among more buckets no entry lies farther from home; among fewer one may.
        let fewer = buckets.len() < self.buckets.len();
        let far = if fewer { FAR } else { buckets.len() };
        let reach = self.iter().try_fold(0, |reach, entry| {
            Some(place(*entry, buckets, far)?.max(reach))
        });
        let Some(reach) = reach else {
            self.fits.start = 0; // the table keeps its buckets
            return Ok(());
        };
        self.buckets = list;
        self.reach = reach;
        self.fits = slots / 8..most + 1;
        Ok(())
    }

    /// Removes an entry. The memory goes with the last one.
    #[inline]
    pub(crate) fn remove(&mut self, slot: Slot) -> Entry {
        let entry = self.at(slot).copied().unwrap_or(EMPTY);
        let mut hole = Some(slot);
        while let Some(slot) = hole {
            hole = self.vacate(slot);
        }
        self.len -= 1;
        if self.len == 0 {
            self.buckets.reset();
            self.reach = 0;
            self.fits = 0..0;
        }
        entry
    }

    /// Empties a slot. If some entry lies farther from home because this bucket
    /// was full, moves that entry here and returns the slot where it was.
    #[inline]
    fn vacate(&mut self, slot: Slot) -> Option<Slot> {
        let (at, k) = (slot.0 / WIDTH, slot.0 % WIDTH);
        let buckets = self.buckets.as_mut_slice();
        let bucket = buckets.get_mut(at)?;
        let last = count(bucket).checked_sub(1)?;
        let entry = mem::replace(bucket.get_mut(last)?, EMPTY);
        if k != last {
            *bucket.get_mut(k)? = entry;
        }
        if last + 1 < WIDTH {
            return None;
        }
        let mut from = at;
        for gap in 1..self.reach {
            from = after(from, buckets);
            let bucket = buckets.get(from)?;
            let passed = |entry: &Entry| entry.key != 0 && distance(entry, from, buckets) >= gap;
            if let Some(k) = bucket.iter().position(passed) {
                let entry = *bucket.get(k)?;
                *buckets.get_mut(at)?.get_mut(last)? = entry;
                return Some(Slot(from * WIDTH + k));
            }
            if !is_full(bucket) {
                return None;
            }
        }
        None
    }

    /// Every entry, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        let slots = self.buckets.iter().flatten();
        slots.filter(|entry| entry.key != 0)
    }
}
