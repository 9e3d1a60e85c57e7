// SPDX-License-Identifier: MIT OR Apache-2.0
//! The lines of a block, which is what one word of each summary stands for.

/// Where more lines of a block than these are nonempty, visiting them one by one
/// takes longer than visiting all.
pub(crate) const FEW_LINES: u32 = 44;

/// The lines of a block, a bit each.
#[derive(Clone, Copy, Default)]
pub(crate) struct Lines {
    /// Those with a dirty page.
    pub(crate) dirty: u64,
    /// Those whose pages are all dirty, and whose words nobody reads.
    pub(crate) full: u64,
    /// Those with a pinned page.
    pub(crate) pinned: u64,
    /// Those that are in the bitmap at all.
    pub(crate) all: u64,
}

impl Lines {
    /// The lines with a dirty or a pinned page.
    #[inline]
    pub(crate) fn nonempty(self) -> u64 {
        self.dirty | self.pinned
    }

    /// Whether every line is full.
    #[inline]
    pub(crate) fn is_full(self) -> bool {
        self.full == self.all
    }

    /// Whether every line is dirty, none is full, and none has a pin: the block's
    /// dirty words are what it holds.
    #[inline]
    pub(crate) fn is_plain(self) -> bool {
        self.dirty == self.all && self.pinned | self.full == 0
    }

    /// Whether few lines are nonempty by their words.
    #[inline]
    pub(crate) fn is_few(self) -> bool {
        (self.nonempty() & !self.full).count_ones() <= FEW_LINES
    }

    /// The lines whose words have to be read.
    #[inline]
    pub(crate) fn by_words(self) -> Lines {
        Lines {
            dirty: self.dirty & !self.full,
            full: 0,
            pinned: self.pinned & !self.full,
            all: self.all,
        }
    }

    /// Only line `number`.
    #[inline]
    pub(crate) fn only(self, number: usize) -> Lines {
        let bit = 1 << (number & 63);
        Lines {
            dirty: self.dirty & bit,
            full: self.full & bit,
            pinned: self.pinned & bit,
            all: self.all & bit,
        }
    }
}
