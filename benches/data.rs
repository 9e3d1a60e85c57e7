// SPDX-License-Identifier: MIT OR Apache-2.0
//! The data of the benches: sizes, random pages, and naive bitmaps against which
//! answers are checked before they are timed.

use std::fs;
use std::hint::black_box;
use std::ops::Range;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A size of guest memory.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) name: &'static str,
    pub(crate) pages: u64,
}

const fn size(name: &'static str, pages: u64) -> Size {
    Size { name, pages }
}

pub(crate) const GIB_1: Size = size("1 GiB", 1 << 18);
pub(crate) const GIB_64: Size = size("64 GiB", 1 << 24);
pub(crate) const TIB_1: Size = size("1 TiB", 1 << 28);
/// A bitmap has at most 2^31-1 pages, and a report 256 MiB: a little less.
pub(crate) const TIB_8: Size = size("8 TiB", (1 << 31) - 128);

impl Size {
    /// Words of a bitmap.
    pub(crate) fn words(self) -> usize {
        self.pages.div_ceil(64) as usize
    }

    /// Whether this machine has room for some bitmaps.
    fn fits(self) -> bool {
        let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let line = info.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
        let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<usize>().ok());
        kib.is_none_or(|kib| kib / 1024 * (1 << 20) > self.words() * 8 * 8)
    }
}

/// All sizes that fit in memory.
pub(crate) fn sizes() -> impl Iterator<Item = Size> {
    let all = [GIB_1, GIB_64, TIB_1, TIB_8];
    all.into_iter().filter(|size| size.fits())
}

/// A generator of the same numbers in every run.
pub(crate) fn random(seed: u64) -> SmallRng {
    SmallRng::seed_from_u64(seed)
}

/// `n` different pages below `pages`, in random order.
pub(crate) fn distinct(pages: u64, n: usize) -> Vec<u64> {
    let mut rng = random(n as u64);
    let mut seen = vec![0u64; pages.div_ceil(64) as usize];
    let mut found = Vec::with_capacity(n);
    while found.len() < n {
        let page = rng.random_range(0..pages);
        let bit = 1 << (page % 64);
        let word = &mut seen[page as usize / 64];
        if *word & bit == 0 {
            *word |= bit;
            found.push(page);
        }
    }
    found
}

/// Single pages at random, `share` of all.
pub(crate) fn scattered(pages: u64, share: f64) -> Vec<Range<u64>> {
    let n = (pages as f64 * share) as usize;
    distinct(pages, n).into_iter().map(|p| p..p + 1).collect()
}

/// Aligned runs of 512 pages at random, `share` of all.
pub(crate) fn huge_pages(pages: u64, share: f64) -> Vec<Range<u64>> {
    let runs = scattered(pages / 512, share).into_iter();
    runs.map(|r| r.start * 512..r.end * 512).collect()
}

/// Words in which each bit is set with a chance of 2^-`halvings`.
pub(crate) fn random_words(words: usize, halvings: u32) -> Vec<u64> {
    let mut rng = random(u64::from(halvings));
    let mut word = || (0..halvings).fold(!0, |w, _| w & rng.random::<u64>());
    (0..words).map(|_| word()).collect()
}

/// Words of zero in memory that is touched, so that no page fault comes later.
pub(crate) fn zeroed(words: usize) -> Vec<u64> {
    let mut zeroed = vec![!0; words];
    black_box(&mut zeroed).fill(0);
    zeroed
}

/// The bitmap of `pages` pages of which some are dirty, bit by bit.
pub(crate) fn naive(pages: u64, dirty: impl IntoIterator<Item = u64>) -> Vec<u64> {
    let mut words = vec![0; pages.div_ceil(64) as usize];
    for page in dirty {
        words[page as usize / 64] |= 1 << (page % 64);
    }
    words
}

/// Whether bit `bit` of `words` is set.
pub(crate) fn bit(words: &[u64], bit: u64) -> bool {
    words[bit as usize / 64] >> (bit % 64) & 1 != 0
}

/// Panics if an answer is wrong, since it is not worth timing.
pub(crate) fn check(what: &str, got: &[u64], want: &[u64]) {
    assert_eq!(got.len(), want.len(), "{what}: another number of words");
    let wrong = got.iter().zip(want).position(|(g, w)| g != w);
    if let Some(at) = wrong {
        panic!("{what}: word {at} is {:#x}, not {:#x}", got[at], want[at]);
    }
}
