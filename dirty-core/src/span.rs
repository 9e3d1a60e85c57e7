// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ranges of addresses, made once at the edge and passed on as a value.

use crate::error::Error;
use crate::pgsize::PageSize;

/// The addresses from `first` to `last`, both included. A span is never empty,
/// and may end with the address space, which an exclusive end cannot say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// INVARIANT: at most `last`.
    first: u64,
    last: u64,
}

impl Span {
    /// The whole address space.
    pub(crate) const ALL: Span = Span {
        first: 0,
        last: u64::MAX,
    };

    /// `size` bytes from `first` on.
    ///
    /// # Errors
    ///
    /// `ZeroSize`; `Wraps` if they go beyond the end of the address space.
    #[inline]
    pub(crate) const fn new(first: u64, size: u64) -> Result<Span, Error> {
        let Some(more) = size.checked_sub(1) else {
            return Err(Error::ZeroSize);
        };
        match first.checked_add(more) {
            Some(last) => Ok(Span { first, last }),
            None => Err(Error::Wraps),
        }
    }

    /// From `first` to `last`; `None` if they are the wrong way round.
    pub(crate) fn between(first: u64, last: u64) -> Option<Span> {
        (first <= last).then_some(Span { first, last })
    }

    #[inline]
    pub(crate) const fn first(self) -> u64 {
        self.first
    }

    #[inline]
    pub(crate) const fn last(self) -> u64 {
        self.last
    }

    /// Bytes; 0 stands for the 2^64 of the whole address space.
    #[inline]
    pub(crate) const fn size(self) -> u64 {
        self.last.wrapping_sub(self.first).wrapping_add(1)
    }

    /// Whether it starts and ends where pages do.
    pub(crate) const fn is_aligned(self, page: PageSize) -> bool {
        page.aligns(self.first) && page.aligns(self.last.wrapping_add(1))
    }

    pub(crate) const fn encloses(self, other: Span) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// The addresses that both have.
    pub(crate) fn intersect(self, other: Span) -> Option<Span> {
        Span::between(self.first.max(other.first), self.last.min(other.last))
    }

    /// The addresses below those of `other`, and those above.
    pub(crate) fn without(self, other: Span) -> [Option<Span>; 2] {
        let below = other.first.checked_sub(1);
        let above = other.last.checked_add(1);
        [
            below.and_then(|last| Span::between(self.first, last.min(self.last))),
            above.and_then(|first| Span::between(first.max(self.first), self.last)),
        ]
    }
}
