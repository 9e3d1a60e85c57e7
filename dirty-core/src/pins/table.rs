// SPDX-License-Identifier: MIT OR Apache-2.0
//! A hash table from numbers to counted values, in lines of four.
//!
//! An entry lies in the line that its key hashes to, its home, or in one of the
//! next: finding it takes one miss of the cache, where a tree takes one a level.
//! Keys that collide may be chosen on purpose, so an entry is refused if there
//! is no room near its home.
#![allow(clippy::arithmetic_side_effects)] // lines and entries, at most 2^20

use core::mem;
use core::ops::Range;

use crate::error::NoMemory;
use crate::host::Memory;
use crate::mem::List;

/// log2 of the most entries. Keys of one table differ in as many low bits.
pub(crate) const SHIFT: u32 = 20;
const MOST: usize = 1 << SHIFT;
/// An entry that would lie as many lines from its home is refused.
const FAR: usize = 32;

#[derive(Clone, Copy)]
pub(crate) struct Entry {
    /// Not 0: that is an empty slot.
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

/// INVARIANT: entries come first, then empty slots.
type Bucket = [Entry; WIDTH];

#[inline]
fn is_full(line: &Bucket) -> bool {
    let [.., last] = line;
    last.key != 0
}

/// Entries in a line.
#[inline]
fn count(line: &Bucket) -> usize {
    line.iter().map(|entry| usize::from(entry.key != 0)).sum()
}

/// The line where the entry of a key should lie: neighbours lie far apart. (The
/// factor is the golden ratio's.)
#[inline]
fn home(key: u32, lines: &[Bucket]) -> usize {
    let hash = u64::from(key.wrapping_mul(0x9_e377)) % MOST as u64;
    ((hash * lines.len() as u64) >> SHIFT) as usize
}

/// The line after line `at`; after the last comes the first.
#[inline]
fn after(at: usize, lines: &[Bucket]) -> usize {
    let next = at + 1;
    if next < lines.len() {
        next
    } else {
        0
    }
}

/// How many lines after its home an entry in line `at` lies.
#[inline]
fn distance(entry: &Entry, at: usize, lines: &[Bucket]) -> usize {
    let home = home(entry.key, lines);
    match at.checked_sub(home) {
        Some(n) => n,
        None => at + lines.len() - home,
    }
}

/// Puts an entry into the first line from its home on that has room, if it is
/// one of the first `far`, and returns which: 1 for its home.
#[inline]
fn place(entry: Entry, lines: &mut [Bucket], far: usize) -> Option<usize> {
    let mut at = home(entry.key, lines);
    for distance in 0..far {
        let line = lines.get_mut(at)?;
        let n = count(line);
        if let Some(slot) = line.get_mut(n) {
            *slot = entry;
            return Some(distance + 1);
        }
        at = after(at, lines);
    }
    None
}

pub(crate) struct Table<M: Memory> {
    /// INVARIANT: an entry lies in one of the `reach` lines from its home on,
    /// and those before are full.
    lines: List<Bucket, M>,
    reach: usize,
    len: usize,
    /// How many entries may be in these lines.
    fits: Range<usize>,
}

/// The slot of an entry. Good until another comes or goes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Slot(usize);

impl<M: Memory> Table<M> {
    pub(crate) fn new(mem: &M) -> Self {
        Table {
            lines: List::new(mem),
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
        let lines = &*self.lines;
        let mut at = home(key, lines);
        for _ in 0..self.reach {
            let line = lines.get(at)?;
            if let Some(k) = line.iter().position(|entry| entry.key == key) {
                return Some(Slot(at * WIDTH + k));
            }
            if !is_full(line) {
                return None;
            }
            at = after(at, lines);
        }
        None
    }

    #[inline]
    pub(crate) fn at(&self, slot: Slot) -> Option<&Entry> {
        self.lines.as_flattened().get(slot.0)
    }

    #[inline]
    pub(crate) fn get(&self, key: u32) -> Option<&Entry> {
        self.at(self.find(key)?)
    }

    #[inline]
    pub(crate) fn at_mut(&mut self, slot: Slot) -> Option<&mut Entry> {
        let slots = self.lines.as_mut_slice().as_flattened_mut();
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
        let placed = place(entry, self.lines.as_mut_slice(), FAR);
        if let Some(reach) = placed {
            self.reach = self.reach.max(reach);
            self.len += 1;
        }
        Ok(placed.is_some())
    }

    /// Takes as many lines as are right when one more entry comes.
    #[inline(never)]
    fn resize(&mut self, mem: &M) -> Result<(), NoMemory> {
        // 3/5 will be taken. Beyond 4/5 many entries would lie far from home;
        // not so with as many slots as keys.
        let slots = ((self.len + 1) * 5 / 3 + 2).min(MOST);
        let most = if slots == MOST { MOST } else { slots * 4 / 5 };
        let mut list = List::filled(mem, slots.div_ceil(WIDTH), [EMPTY; WIDTH])?;
        let lines = list.as_mut_slice();
        // Among more lines entries lie no farther; among fewer they might.
        let fewer = lines.len() < self.lines.len();
        let far = if fewer { FAR } else { lines.len() };
        let reach = self.iter().try_fold(0, |reach, entry| {
            Some(place(*entry, lines, far)?.max(reach))
        });
        let Some(reach) = reach else {
            self.fits.start = 0; // it keeps its lines
            return Ok(());
        };
        self.lines = list;
        self.reach = reach;
        self.fits = slots / 8..most + 1;
        Ok(())
    }

    /// Removes an entry. The last takes the memory with it.
    #[inline]
    pub(crate) fn remove(&mut self, slot: Slot) -> Entry {
        let entry = self.at(slot).copied().unwrap_or(EMPTY);
        let mut hole = Some(slot);
        while let Some(slot) = hole {
            hole = self.vacate(slot);
        }
        self.len -= 1;
        if self.len == 0 {
            self.lines.reset();
            self.reach = 0;
            self.fits = 0..0;
        }
        entry
    }

    /// Empties a slot. If an entry found its line full before, it moves there;
    /// returns where that was.
    #[inline]
    fn vacate(&mut self, slot: Slot) -> Option<Slot> {
        let (at, k) = (slot.0 / WIDTH, slot.0 % WIDTH);
        let lines = self.lines.as_mut_slice();
        let line = lines.get_mut(at)?;
        let last = count(line).checked_sub(1)?;
        let entry = mem::replace(line.get_mut(last)?, EMPTY);
        if k != last {
            *line.get_mut(k)? = entry;
        }
        if last + 1 < WIDTH {
            return None;
        }
        let mut from = at;
        for gap in 1..self.reach {
            from = after(from, lines);
            let line = lines.get(from)?;
            let passed = |entry: &Entry| entry.key != 0 && distance(entry, from, lines) >= gap;
            if let Some(k) = line.iter().position(passed) {
                let entry = *line.get(k)?;
                *lines.get_mut(at)?.get_mut(last)? = entry;
                return Some(Slot(from * WIDTH + k));
            }
            if !is_full(line) {
                return None;
            }
        }
        None
    }

    /// In no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Entry> {
        let slots = self.lines.iter().flatten();
        slots.filter(|entry| entry.key != 0)
    }
}
