// SPDX-License-Identifier: MIT OR Apache-2.0
//! The mappings of a view: the live ones, and those that are gone and that a log
//! may still report.

use std::collections::BTreeMap;
use std::iter;

use super::log::IovaRange;
use super::mapping::Mapping;

/// How many gone mappings a view remembers. The memory of one more is marked at
/// once, as if all of it had been written.
const MAX_GONE: usize = 1 << 16;

#[derive(Default)]
pub(super) struct Maps {
    /// By first IOVA; no two overlap.
    pub(super) live: BTreeMap<u64, Mapping>,
    /// By first IOVA, first guest address, size and version: the number of the last
    /// unmap that removed such a mapping, and the mapping.
    gone: BTreeMap<(u64, u64, u64, u64), (u64, Mapping)>,
    /// The last unmap of a mapping that `gone` had no room for.
    not_remembered: Option<u64>,
    /// How many unmaps there were.
    unmaps: u64,
    /// How many there were when the take began that is going on.
    begun: u64,
    /// Whether the tracker is on.
    on: bool,
    /// How many logs are harvested through the view.
    logs: usize,
}

impl Maps {
    /// The live mappings that overlap a range, given by its first and last IOVA.
    pub(super) fn overlapping(&self, first: u64, last: u64) -> impl Iterator<Item = &Mapping> {
        let before = self.live.range(..first).next_back();
        let before = before.map(|(_, m)| m).filter(move |m| m.last() >= first);
        let inside = self.live.range(first..=last).map(|(_, m)| m);
        before.into_iter().chain(inside)
    }

    /// The live mapping that all of a range is in, if there is one.
    pub(super) fn around(&self, first: u64, last: u64) -> Option<&Mapping> {
        let (_, mapping) = self.live.range(..=first).next_back()?;
        (mapping.last() >= last).then_some(mapping)
    }

    /// Whether a live mapping overlaps a range.
    pub(super) fn has(&self, first: u64, last: u64) -> bool {
        let below = self.live.range(..=last).next_back();
        below.is_some_and(|(_, mapping)| mapping.last() >= first)
    }

    /// Unmaps a range, and returns how many bytes of it were mapped, and the
    /// mappings that there is no room to remember: the caller marks all of them.
    pub(super) fn unmap(&mut self, first: u64, last: u64) -> (u64, Vec<Mapping>) {
        self.unmaps += 1;
        let hit: Vec<Mapping> = self.overlapping(first, last).cloned().collect();
        let (mut unmapped, mut no_room) = (0, Vec::new());
        for mapping in hit {
            self.live.remove(&mapping.iova());
            let before = first.checked_sub(1).and_then(|end| mapping.cut(0, end));
            let after = last
                .checked_add(1)
                .and_then(|start| mapping.cut(start, u64::MAX));
            for rest in [before, after].into_iter().flatten() {
                self.live.insert(rest.iova(), rest);
            }
            if let Some(gone) = mapping.cut(first, last) {
                unmapped += gone.size();
                no_room.extend(self.remember(gone));
            }
        }
        (unmapped, no_room)
    }

    /// Remembers a mapping if a log may report it; gives it back if it should be
    /// remembered, and there is no room.
    fn remember(&mut self, mapping: Mapping) -> Option<Mapping> {
        if !self.on || self.logs == 0 {
            return None;
        }
        let (iova, gpa, size) = (mapping.iova(), mapping.gpa(), mapping.size());
        let key = (iova, gpa, size, mapping.version());
        if self.gone.len() < MAX_GONE || self.gone.contains_key(&key) {
            self.gone.insert(key, (self.unmaps, mapping));
            return None;
        }
        self.not_remembered = Some(self.unmaps);
        Some(mapping)
    }

    /// Remembers the mappings of a saved view, however many they are, until its logs
    /// were read.
    pub(super) fn remember_restored(&mut self, mappings: impl Iterator<Item = Mapping>) {
        for mapping in mappings {
            let (iova, gpa, size) = (mapping.iova(), mapping.gpa(), mapping.size());
            let key = (iova, gpa, size, mapping.version());
            self.gone.insert(key, (self.unmaps, mapping));
        }
    }

    pub(super) fn remembered(&self) -> usize {
        self.gone.len()
    }

    /// Whether a mapping went that there was no room to remember.
    pub(super) fn forgot_some(&self) -> bool {
        self.not_remembered.is_some()
    }

    /// The mappings that a log may report, which are the live ones and the gone ones, in
    /// the order of their first IOVAs.
    pub(super) fn all(&self) -> Vec<Mapping> {
        let mut all = Vec::with_capacity(self.live.len() + self.gone.len());
        all.extend(self.ascending().cloned());
        all
    }

    /// The live and the gone mappings, in the order of their first IOVAs.
    fn ascending(&self) -> impl Iterator<Item = &Mapping> {
        let mut live = self.live.values().peekable();
        let mut gone = self.gone.values().map(|(_, mapping)| mapping).peekable();
        iter::from_fn(move || match (live.peek(), gone.peek()) {
            (Some(live), Some(next)) if next.iova() < live.iova() => gone.next(),
            (Some(_), _) => live.next(),
            (None, _) => gone.next(),
        })
    }

    /// The IOVAs of all these mappings: disjoint, in order, and those merged that
    /// are at most `gap` bytes apart.
    pub(super) fn ranges(&self, gap: u64) -> Vec<IovaRange> {
        let all = self.ascending().map(|m| (m.iova(), m.last()));
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for (mut first, last) in all {
            if let Some((start, end)) = merged.last_mut() {
                let touches = first <= end.saturating_add(gap).saturating_add(1);
                // A range of 2^64 bytes has no size.
                if touches && (*start, last) != (0, u64::MAX) {
                    *end = last.max(*end);
                    continue;
                }
                first = first.max(end.saturating_add(1));
            }
            merged.push((first, last));
        }
        let ranges = merged.into_iter();
        ranges
            .map(|(first, last)| IovaRange::new(first, last))
            .collect()
    }

    /// Says whether the tracker is on. Either way nothing is remembered any more.
    pub(super) fn set_on(&mut self, on: bool) {
        self.on = on;
        self.forget_all();
    }

    pub(super) fn add_log(&mut self) {
        self.logs += 1;
    }

    pub(super) fn remove_log(&mut self) {
        self.logs -= 1;
        if self.logs == 0 {
            self.forget_all();
        }
    }

    fn forget_all(&mut self) {
        self.gone.clear();
        self.not_remembered = None;
    }

    /// Begins a take.
    pub(super) fn begin(&mut self) {
        self.begun = self.unmaps;
    }

    /// Ends a take in which every log of the view was read: forgets the mappings
    /// that were gone when it began.
    pub(super) fn finish(&mut self) {
        let begun = self.begun;
        self.gone.retain(|_, (unmap, _)| *unmap > begun);
        self.not_remembered = self.not_remembered.filter(|unmap| *unmap > begun);
    }
}
