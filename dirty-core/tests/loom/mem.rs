// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core's memory for words on `loom`'s atomics: the same interface, and
//! `loom` sees every access.

use dirty_core::Error;
pub(crate) use loom::hint::spin_loop;
use loom::sync::atomic;
use std::sync::atomic::Ordering;

/// How bits are OR-ed into a word.
#[derive(Clone, Copy)]
pub(crate) enum Or {
    /// In one atomic step, as the core does.
    Atomic,
    /// By a load and a store, which loses bits: shows that the tests find it.
    Torn,
}

/// Stands for the host's memory: says how its words take in bits.
pub(crate) trait Memory: Clone {
    fn or(&self) -> Or;
}

impl Memory for Or {
    fn or(&self) -> Or {
        *self
    }
}

pub(crate) struct AtomicU64 {
    word: atomic::AtomicU64,
    or: Or,
}

impl AtomicU64 {
    pub(crate) fn load(&self, order: Ordering) -> u64 {
        self.word.load(order)
    }

    pub(crate) fn store(&self, value: u64, order: Ordering) {
        self.word.store(value, order);
    }

    pub(crate) fn fetch_or(&self, bits: u64, order: Ordering) -> u64 {
        match self.or {
            Or::Atomic => self.word.fetch_or(bits, order),
            Or::Torn => {
                let old = self.word.load(order);
                self.word.store(old | bits, order);
                old
            }
        }
    }
}

/// Words that are `loom`'s atomics, or plain words while they are lent.
pub(crate) struct Words<M> {
    shared: Vec<AtomicU64>,
    /// The words that [`exclusive`](Words::exclusive) has lent.
    lent: Vec<u64>,
    /// Their values when they were lent.
    before: Vec<u64>,
    _mem: M,
}

impl<M: Memory> Words<M> {
    pub(crate) fn new(mem: &M, len: usize) -> Result<Self, Error> {
        let word = || AtomicU64 {
            word: atomic::AtomicU64::new(0),
            or: mem.or(),
        };
        Ok(Words {
            shared: (0..len).map(|_| word()).collect(),
            lent: vec![0; len],
            before: vec![0; len],
            _mem: mem.clone(),
        })
    }

    pub(crate) fn shared(&self) -> &[AtomicU64] {
        &self.shared
    }

    /// Takes back the words that were lent last, then lends every word. `loom`
    /// fails here if another thread's access is not ordered before.
    pub(crate) fn exclusive(&mut self) -> &mut [u64] {
        let words = self.shared.iter_mut().zip(&mut self.lent);
        for ((word, lent), before) in words.zip(&mut self.before) {
            word.word.with_mut(|word| {
                if lent != before {
                    *word = *lent;
                }
                (*lent, *before) = (*word, *word);
            });
        }
        &mut self.lent
    }
}
