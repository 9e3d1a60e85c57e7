// SPDX-License-Identifier: MIT OR Apache-2.0
//! Mappings that may overlap, found by the IOVAs that they cover.

use super::mapping::Mapping;

/// Some mappings, sorted by their first IOVA, with a tree over their last IOVAs. A
/// look-up takes O(log n) for each mapping that it finds, and O(log n) besides.
pub(super) struct Index {
    mappings: Vec<Mapping>,
    /// A complete binary tree in an array: the children of node k are 2k and 2k + 1,
    /// and leaf `leaves + k` is mapping k. Each node has the highest last IOVA below
    /// it, and a leaf without a mapping has `None`.
    highest: Vec<Option<u64>>,
    leaves: usize,
}

impl Index {
    pub(super) fn new(mut mappings: Vec<Mapping>) -> Index {
        mappings.sort_by_key(Mapping::iova);
        let leaves = mappings.len().next_power_of_two();
        let mut highest = vec![None; 2 * leaves];
        for (leaf, mapping) in highest[leaves..].iter_mut().zip(&mappings) {
            *leaf = Some(mapping.last());
        }
        for node in (1..leaves).rev() {
            highest[node] = highest[2 * node].max(highest[2 * node + 1]);
        }
        Index {
            mappings,
            highest,
            leaves,
        }
    }

    pub(super) fn all(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Calls `found` for each mapping that overlaps the IOVAs from `first` to
    /// `last`, in the order of their first IOVAs.
    pub(super) fn overlapping(&self, first: u64, last: u64, mut found: impl FnMut(&Mapping)) {
        let end = self.mappings.partition_point(|m| m.iova() <= last);
        // The nodes that are still to be looked at, the leftmost on top.
        let mut nodes = vec![1];
        while let Some(node) = nodes.pop() {
            if self.highest[node].is_none_or(|highest| highest < first) {
                continue;
            }
            match node.checked_sub(self.leaves) {
                Some(leaf) if leaf >= end => return,
                Some(leaf) => found(&self.mappings[leaf]),
                None => nodes.extend([2 * node + 1, 2 * node]),
            }
        }
    }
}
