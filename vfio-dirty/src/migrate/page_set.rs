// SPDX-License-Identifier: MIT OR Apache-2.0
//! A set of guest pages, one bit a page.

use std::ops::Range;

#[derive(Debug, Clone)]
pub(super) struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    pub(super) fn new(pages: u64) -> Self {
        let words = vec![0; pages.div_ceil(64) as usize];
        Self { words, pages }
    }

    pub(super) fn full(pages: u64) -> Self {
        let mut set = Self::new(pages);
        set.insert(0..pages);
        set
    }

    /// Adds `pages`; what lies beyond the guest's last page is left out.
    pub(super) fn insert(&mut self, pages: Range<u64>) {
        for page in pages.start..pages.end.min(self.pages) {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    pub(super) fn union(&mut self, other: &Self) {
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    pub(super) fn clear(&mut self) {
        self.words.fill(0);
    }

    pub(super) fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        adapter_user::pages(&self.words).take_while(|page| *page < self.pages)
    }

    /// The words as a bitmap that a container fills in.
    pub(super) fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_go_in_and_come_out_in_order() {
        let mut set = PageSet::new(130);
        set.insert(63..66);
        set.insert(128..1000);
        assert_eq!(set.iter().collect::<Vec<_>>(), [63, 64, 65, 128, 129]);
        assert_eq!(set.len(), 5);

        let mut other = PageSet::new(130);
        other.insert(0..1);
        other.union(&set);
        assert_eq!(other.len(), 6);
        other.clear();
        assert_eq!(other.iter().next(), None);
        assert_eq!(PageSet::full(130).len(), 130);
    }
}
