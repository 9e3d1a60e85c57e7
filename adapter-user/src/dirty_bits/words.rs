// SPDX-License-Identifier: MIT OR Apache-2.0
//! Words that threads set while more words are added behind them.

use std::sync::OnceLock;

use crate::atomic::{AtomicU64, Ordering};
use crate::error::TrackError;

/// A list of pieces, of which only the first is there from the beginning. A piece
/// that was added is never taken away or moved.
pub(super) struct Words {
    piece: Box<[AtomicU64]>,
    next: OnceLock<Box<Words>>,
}

/// Allocates `count` words that are 0.
pub(super) fn zeroed(count: u64) -> Result<Box<[AtomicU64]>, TrackError> {
    let wanted = count.saturating_mul(8);
    let no_memory = TrackError::NoMemory { wanted };
    let count = usize::try_from(count).map_err(|_| no_memory)?;
    let mut words = Vec::new();
    words.try_reserve_exact(count).map_err(|_| no_memory)?;
    words.resize_with(count, || AtomicU64::new(0));
    Ok(words.into_boxed_slice())
}

impl Words {
    pub(super) fn new(piece: Box<[AtomicU64]>) -> Words {
        Words {
            piece,
            next: OnceLock::new(),
        }
    }

    fn pieces(&self) -> impl Iterator<Item = &Words> {
        std::iter::successors(Some(self), |words| words.next.get().map(|next| &**next))
    }

    /// Calls `act` for each word from index `first` on, with the next of `items`,
    /// until one of the two ends.
    pub(super) fn zip<I: Iterator>(
        &self,
        first: usize,
        mut items: I,
        mut act: impl FnMut(&AtomicU64, I::Item),
    ) {
        let mut skip = first;
        for Words { piece, .. } in self.pieces() {
            let here = skip.min(piece.len());
            skip -= here;
            // The words come first: `zip` takes no item when they are at their end.
            for (word, item) in piece[here..].iter().zip(items.by_ref()) {
                act(word, item);
            }
        }
    }

    pub(super) fn get(&self, at: usize) -> Option<&AtomicU64> {
        let mut at = at;
        for Words { piece, .. } in self.pieces() {
            match piece.get(at) {
                Some(word) => return Some(word),
                None => at -= piece.len(),
            }
        }
        None
    }

    /// Adds words until there are at least `count`. Only one thread may do this at
    /// a time.
    pub(super) fn grow(&self, count: u64) -> Result<(), TrackError> {
        let (mut have, mut end) = (0u64, self);
        for words in self.pieces() {
            have += words.piece.len() as u64;
            end = words;
        }
        let Some(more) = count.checked_sub(have).filter(|more| *more > 0) else {
            return Ok(());
        };
        // Growing by a quarter at least keeps the list short, whatever the steps.
        let next = Words::new(zeroed(more.max(have / 4))?);
        let added = end.next.set(Box::new(next));
        debug_assert!(added.is_ok(), "two threads grow the same words");
        Ok(())
    }

    /// Sets the bits `first` to `last`, which must be there.
    pub(super) fn set(&self, first: u64, last: u64) {
        let (from, to) = (!0 << (first % 64), !0 >> (63 - last % 64));
        let (head, tail) = ((first / 64) as usize, (last / 64) as usize);
        let or = |word: &AtomicU64, bits: u64| {
            word.fetch_or(bits, Ordering::SeqCst);
        };
        match self.piece.get(head..=tail) {
            Some([only]) => or(only, from & to),
            Some([head, middle @ .., tail]) => {
                or(head, from);
                middle.iter().for_each(|word| or(word, !0));
                or(tail, to);
            }
            // A part of them is in a later piece.
            _ => self.zip(head, head..=tail, |word, at| {
                let from = if at == head { from } else { !0 };
                let to = if at == tail { to } else { !0 };
                or(word, from & to);
            }),
        }
    }

    /// Clears the bits `first` to `last`.
    pub(super) fn clear(&self, first: u64, last: u64) {
        let (head, tail) = ((first / 64) as usize, (last / 64) as usize);
        self.zip(head, head..=tail, |word, at| {
            let from = if at == head { !0 << (first % 64) } else { !0 };
            let to = if at == tail {
                !0 >> (63 - last % 64)
            } else {
                !0
            };
            if word.load(Ordering::Relaxed) & from & to != 0 {
                word.fetch_and(!(from & to), Ordering::SeqCst);
            }
        });
    }
}
