// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sets of pages: the core's bitmap, the peers, and plain words.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use dirty_core::Bitmap;
use fixedbitset::FixedBitSet;
use roaring::RoaringBitmap;
use vm_memory::bitmap::AtomicBitmap;

use crate::data::zeroed;
use crate::host::{Heap, PAGE};

/// A set of the pages below a number.
pub(crate) trait PageSet {
    const NAME: &'static str;

    /// An empty set.
    fn new(pages: u64) -> Self;

    /// Adds one page, by the peer's best way for a single page.
    fn mark_one(&mut self, page: u64);

    /// Adds `n` pages.
    fn mark(&mut self, first: u64, n: u64);

    /// Adds every page.
    fn mark_all(&mut self);

    /// Empties it.
    fn clear(&mut self);

    /// Makes every word dirty, so that a snapshot has the most to do.
    fn make_dense(&mut self) {
        self.mark_all();
    }

    /// Writes the set as a bitmap to words that are zero, and empties it.
    fn take(&mut self, out: &mut [u64]);
}

fn bitmap(pages: u64) -> Bitmap<Heap> {
    Bitmap::new(&Heap, pages).expect("memory for a bitmap")
}

/// Ours, marked by its only owner.
pub(crate) struct Exclusive(Bitmap<Heap>);

impl PageSet for Exclusive {
    const NAME: &'static str = "ours";

    fn new(pages: u64) -> Self {
        Exclusive(bitmap(pages))
    }

    fn mark_one(&mut self, page: u64) {
        self.0.set(page, 1);
    }

    fn mark(&mut self, first: u64, n: u64) {
        self.0.set(first, n);
    }

    fn mark_all(&mut self) {
        self.0.set_all();
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    fn take(&mut self, out: &mut [u64]) {
        self.0.take(0, out).expect("enough words");
    }
}

/// Ours, marked by threads that share it.
pub(crate) struct Shared(Bitmap<Heap>);

impl PageSet for Shared {
    const NAME: &'static str = "ours";

    fn new(pages: u64) -> Self {
        Shared(bitmap(pages))
    }

    fn mark_one(&mut self, page: u64) {
        self.0.mark(page, 1);
    }

    fn mark(&mut self, first: u64, n: u64) {
        self.0.mark(first, n);
    }

    fn mark_all(&mut self) {
        self.0.mark(0, self.0.npages());
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    fn take(&mut self, out: &mut [u64]) {
        self.0.take(0, out).expect("enough words");
    }
}

/// Bits `first..first + n` as words: the index and the bits of the first word, then of
/// the last, which may be the same word.
fn masks(first: u64, n: u64) -> (usize, u64, usize, u64) {
    let last = first + n - 1;
    let (head, tail) = (first as usize / 64, last as usize / 64);
    (head, !0 << (first % 64), tail, !0 >> (63 - last % 64))
}

pub(crate) fn set_bits(words: &mut [u64], first: u64, n: u64) {
    let (head, from, tail, up_to) = masks(first, n);
    if head == tail {
        words[head] |= from & up_to;
    } else {
        words[head] |= from;
        words[head + 1..tail].fill(!0);
        words[tail] |= up_to;
    }
}

/// Plain words, the limit for one owner.
pub(crate) struct Words {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet for Words {
    const NAME: &'static str = "plain words";

    fn new(pages: u64) -> Self {
        let words = zeroed(pages.div_ceil(64) as usize);
        Words { words, pages }
    }

    fn mark_one(&mut self, page: u64) {
        self.words[page as usize / 64] |= 1 << (page % 64);
    }

    fn mark(&mut self, first: u64, n: u64) {
        set_bits(&mut self.words, first, n);
    }

    fn mark_all(&mut self) {
        assert_eq!(self.pages % 64, 0);
        self.words.fill(!0);
    }

    fn clear(&mut self) {
        self.words.fill(0);
    }

    fn take(&mut self, out: &mut [u64]) {
        out.copy_from_slice(&self.words);
        self.words.fill(0);
    }
}

/// Atomic words without anything around them, relaxed, whole words stored.
pub(crate) struct AtomicWords(Vec<AtomicU64>);

impl PageSet for AtomicWords {
    const NAME: &'static str = "atomic words";

    fn new(pages: u64) -> Self {
        let words = zeroed(pages.div_ceil(64) as usize).into_iter();
        AtomicWords(words.map(AtomicU64::new).collect())
    }

    fn mark_one(&mut self, page: u64) {
        self.0[page as usize / 64].fetch_or(1 << (page % 64), Relaxed);
    }

    fn mark(&mut self, first: u64, n: u64) {
        let (head, from, tail, up_to) = masks(first, n);
        if head == tail {
            self.0[head].fetch_or(from & up_to, Relaxed);
            return;
        }
        self.0[head].fetch_or(from, Relaxed);
        for word in &self.0[head + 1..tail] {
            word.store(!0, Relaxed);
        }
        self.0[tail].fetch_or(up_to, Relaxed);
    }

    fn mark_all(&mut self) {
        self.mark(0, self.0.len() as u64 * 64);
    }

    fn clear(&mut self) {
        self.0.iter().for_each(|word| word.store(0, Relaxed));
    }

    fn take(&mut self, out: &mut [u64]) {
        for (out, word) in out.iter_mut().zip(&self.0) {
            *out = word.swap(0, Relaxed);
        }
    }
}

pub(crate) struct Fixed(FixedBitSet);

impl PageSet for Fixed {
    const NAME: &'static str = "fixedbitset";

    fn new(pages: u64) -> Self {
        let mut set = FixedBitSet::with_capacity(pages as usize);
        set.insert_range(..);
        set.clear(); // now its memory is there
        Fixed(set)
    }

    fn mark_one(&mut self, page: u64) {
        self.0.insert(page as usize);
    }

    fn mark(&mut self, first: u64, n: u64) {
        self.0.insert_range(first as usize..(first + n) as usize);
    }

    fn mark_all(&mut self) {
        self.0.insert_range(..);
    }

    fn clear(&mut self) {
        self.0.clear();
    }

    fn take(&mut self, out: &mut [u64]) {
        for (out, block) in out.iter_mut().zip(self.0.as_slice()) {
            *out = *block as u64;
        }
        self.0.clear();
    }
}

pub(crate) struct Roaring {
    set: RoaringBitmap,
    pages: u64,
}

impl PageSet for Roaring {
    const NAME: &'static str = "roaring";

    fn new(pages: u64) -> Self {
        let set = RoaringBitmap::new();
        Roaring { set, pages }
    }

    fn mark_one(&mut self, page: u64) {
        self.set.insert(page as u32);
    }

    fn mark(&mut self, first: u64, n: u64) {
        self.set.insert_range(first as u32..=(first + n - 1) as u32);
    }

    fn mark_all(&mut self) {
        self.mark(0, self.pages);
    }

    fn clear(&mut self) {
        self.set.clear();
    }

    /// Writes only the words that have dirty pages.
    fn take(&mut self, out: &mut [u64]) {
        let mut runs = self.set.iter();
        while let Some(run) = runs.next_range() {
            let (first, last) = run.into_inner();
            set_bits(out, u64::from(first), u64::from(last - first) + 1);
        }
        self.set.clear();
    }
}

pub(crate) struct Atomic(pub(crate) AtomicBitmap);

impl PageSet for Atomic {
    const NAME: &'static str = "AtomicBitmap";

    fn new(pages: u64) -> Self {
        let page = NonZeroUsize::new(PAGE as usize).expect("not 0");
        Atomic(AtomicBitmap::new((pages * PAGE) as usize, page))
    }

    fn mark_one(&mut self, page: u64) {
        self.0.set_bit(page as usize);
    }

    fn mark(&mut self, first: u64, n: u64) {
        self.0
            .set_addr_range((first * PAGE) as usize, (n * PAGE) as usize);
    }

    fn mark_all(&mut self) {
        self.mark(0, self.0.len() as u64);
    }

    fn clear(&mut self) {
        self.0.reset();
    }

    /// Marks one page of each word: marks take a bit at a time, a snapshot whole
    /// words.
    fn make_dense(&mut self) {
        for page in (0..self.0.len()).step_by(64) {
            self.0.set_bit(page);
        }
    }

    fn take(&mut self, out: &mut [u64]) {
        out.copy_from_slice(&self.0.get_and_reset());
    }
}
