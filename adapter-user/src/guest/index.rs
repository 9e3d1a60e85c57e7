// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mappings that may overlap, found by the IOVAs that they cover.

use super::mapping::Mapping;
use crate::ranges::partition_near;

/// Some mappings, sorted by their first IOVA, with a tree over their last IOVAs. A
/// look-up takes O(log n) for each mapping that it finds, and O(log n) besides. It
/// takes O(1) if the look-up before was in the same mappings.
pub(super) struct Index {
    mappings: Vec<Mapping>,
    /// A complete binary tree in an array: the children of node k are 2k and 2k + 1,
    /// and leaf `leaves + k` is mapping k. Each node has the highest last IOVA below
    /// it. Leaves without a mapping are never read.
    highest: Vec<u64>,
    /// The number of leaves, which is above the number of mappings.
    leaves: usize,
    /// The mappings that the last look-up found, by index, and the number of mappings
    /// that start at its last IOVA or below.
    found: Vec<usize>,
    starts: usize,
    /// Every range of IOVAs that is inside `from..=to` overlaps those mappings, and no
    /// other one.
    from: u64,
    to: u64,
}

impl Index {
    /// `mappings` are in the order of their first IOVAs.
    pub(super) fn new(mappings: Vec<Mapping>) -> Index {
        debug_assert!(mappings.is_sorted_by_key(Mapping::iova));
        let leaves = (mappings.len() + 1).next_power_of_two();
        let mut highest = vec![0; 2 * leaves];
        for (leaf, mapping) in highest[leaves..].iter_mut().zip(&mappings) {
            *leaf = mapping.last();
        }
        for node in (1..leaves).rev() {
            highest[node] = highest[2 * node].max(highest[2 * node + 1]);
        }
        Index {
            mappings,
            highest,
            leaves,
            found: Vec::new(),
            starts: 0,
            from: 1,
            to: 0,
        }
    }

    pub(super) fn all(&self) -> &[Mapping] {
        &self.mappings
    }

    /// The mappings that overlap the IOVAs from `first` to `last`, in no order.
    pub(super) fn overlapping(
        &mut self,
        first: u64,
        last: u64,
    ) -> impl ExactSizeIterator<Item = &Mapping> {
        if first < self.from || self.to < last {
            self.look_up(first, last);
        }
        self.found.iter().map(|at| &self.mappings[*at])
    }

    fn look_up(&mut self, first: u64, last: u64) {
        self.starts = partition_near(&self.mappings, self.starts, |m| m.iova() <= last);
        self.found.clear();
        // The mappings before leaf `leaves + starts` are below the left siblings of the
        // nodes on its way to the root.
        let mut node = self.leaves + self.starts;
        while node > 1 {
            if node % 2 == 1 {
                self.find_below(node - 1, first);
            }
            node /= 2;
        }
        let next = self.mappings.get(self.starts);
        (self.from, self.to) = (first, next.map_or(u64::MAX, |next| next.iova() - 1));
        for mapping in self.found.iter().map(|at| &self.mappings[*at]) {
            self.from = self.from.max(mapping.iova());
            self.to = self.to.min(mapping.last());
        }
    }

    /// Finds the mappings below a node that do not end below `first`.
    fn find_below(&mut self, node: usize, first: u64) {
        if self.highest[node] < first {
            return;
        }
        match node.checked_sub(self.leaves) {
            Some(at) => self.found.push(at),
            None => {
                self.find_below(2 * node, first);
                self.find_below(2 * node + 1, first);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::guest::slots::Slots;
    use std::sync::Arc;

    /// Mappings that nest and overlap, looked up near the look-up before and far away.
    #[test]
    fn finds_what_a_walk_over_all_finds() {
        let mut rng = SmallRng::seed_from_u64(7);
        let slots = Arc::new(Slots::new(None));
        for n in (0..40).chain([64, 200]) {
            let mut mappings: Vec<Mapping> = (0..n)
                .map(|_| {
                    let size = 1 << rng.random_range(0..8);
                    Mapping::new(rng.random_range(0..300), 0, size, &slots)
                })
                .collect();
            mappings.sort_by_key(Mapping::iova);
            let mut index = Index::new(mappings);
            let mut first = 0;
            for _ in 0..500 {
                first = match rng.random_range(0..8) {
                    0 => rng.random_range(0..500),
                    _ => first + rng.random_range(0..3),
                };
                let last = first + rng.random_range(0..6);
                let key = |m: &Mapping| (m.iova(), m.last());
                let mut found: Vec<_> = index.overlapping(first, last).map(key).collect();
                found.sort_unstable();
                let hit = |m: &&Mapping| m.iova() <= last && first <= m.last();
                let mut want: Vec<_> = index.all().iter().filter(hit).map(key).collect();
                want.sort_unstable();
                assert_eq!(found, want, "{first} to {last} of {:?}", index.all());
            }
        }
    }
}
