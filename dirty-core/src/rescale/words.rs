// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bits of pages of one size to bits of pages of another, a block at a time: a
//! word of coarse pages, and the words of the fine pages in them. Ends that are
//! no whole block, and words that bits do not start with, take longer.
#![allow(clippy::arithmetic_side_effects)] // bit numbers stay far below 2^63

use crate::bits;
use crate::rescale::lanes::{collapse, spread};

/// Where bits of fine pages and of coarse ones stand for the same bytes: fine
/// bit `fine + k` lies in coarse bit `coarse + ((skip + k) >> shift)`.
#[derive(Clone, Copy)]
pub(crate) struct Overlap {
    pub(crate) fine: u64,
    pub(crate) coarse: u64,
    /// Number of fine bits; the last coarse page may have others beyond them.
    pub(crate) n: u64,
    /// So many fine pages of the first coarse one come before `fine`.
    pub(crate) skip: u64,
    /// log2 of the fine pages in a coarse one.
    pub(crate) shift: u32,
}

impl Overlap {
    /// The fine bits of the first coarse page, if some come before them.
    fn take_ragged(&mut self) -> Option<Overlap> {
        let n = self.n.min((1 << self.shift) - self.skip);
        let ragged = Overlap { n, ..*self };
        (self.skip != 0).then(|| {
            self.advance(n, 1);
            self.skip = 0;
            ragged
        })
    }

    fn advance(&mut self, fine: u64, coarse: u64) {
        self.fine += fine;
        self.coarse += coarse;
        self.n -= fine;
    }
}

/// Sets the coarse bits of which a fine bit is set.
pub(crate) fn coarsen(src: &[u64], dst: &mut [u64], mut at: Overlap) {
    if let Some(ragged) = at.take_ragged() {
        let dirty = any(src, ragged.fine, ragged.n);
        or(dst, ragged.coarse, [u64::from(dirty)]);
    }
    match at.shift {
        0 => coarsen_by::<1>(src, dst, at),
        1 => coarsen_by::<2>(src, dst, at),
        2 => coarsen_by::<4>(src, dst, at),
        3 => coarsen_by::<8>(src, dst, at),
        4 => coarsen_by::<16>(src, dst, at),
        5 => coarsen_by::<32>(src, dst, at),
        6 => coarsen_by::<64>(src, dst, at),
        7 => coarsen_by::<128>(src, dst, at),
        8 => coarsen_by::<256>(src, dst, at),
        9 => coarsen_by::<512>(src, dst, at),
        _ => coarsen_pages(src, dst, at),
    }
}

/// Sets the fine bits of each coarse bit that is set.
pub(crate) fn refine(src: &[u64], dst: &mut [u64], mut at: Overlap) {
    if let Some(ragged) = at.take_ragged() {
        if bits::get(src, ragged.coarse) {
            bits::set(dst, ragged.fine, ragged.fine + ragged.n - 1);
        }
    }
    match at.shift {
        0 => refine_by::<1>(src, dst, at),
        1 => refine_by::<2>(src, dst, at),
        2 => refine_by::<4>(src, dst, at),
        3 => refine_by::<8>(src, dst, at),
        4 => refine_by::<16>(src, dst, at),
        5 => refine_by::<32>(src, dst, at),
        6 => refine_by::<64>(src, dst, at),
        7 => refine_by::<128>(src, dst, at),
        8 => refine_by::<256>(src, dst, at),
        9 => refine_by::<512>(src, dst, at),
        _ => refine_pages(src, dst, at),
    }
}

/// `R` is 2^`shift`.
fn coarsen_by<const R: usize>(src: &[u64], dst: &mut [u64], mut at: Overlap) {
    let block = 64 * R as u64;
    if at.fine & 63 == 0 {
        let whole = at.n / block;
        let words = src.get(bits::word(at.fine)..).unwrap_or_default();
        let blocks = words.chunks_exact(R).take(whole as usize);
        let blocks = blocks.filter_map(|words| words.first_chunk::<R>());
        or(dst, at.coarse, blocks.map(collapse));
        at.advance(whole * block, whole * 64);
    }
    if R > 64 {
        return coarsen_pages(src, dst, at);
    }
    while at.n != 0 {
        let mut words = load::<R>(src, at.fine);
        keep_first(&mut words, at.n);
        or(dst, at.coarse, [collapse(&words)]);
        at.advance(block.min(at.n), 64);
    }
}

/// `R` is 2^`shift`.
fn refine_by<const R: usize>(src: &[u64], dst: &mut [u64], mut at: Overlap) {
    let block = 64 * R as u64;
    if at.fine & 63 == 0 {
        let whole = at.n / block;
        let words = dst.get_mut(bits::word(at.fine)..).unwrap_or_default();
        let blocks = words.chunks_exact_mut(R).take(whole as usize);
        let blocks = blocks.filter_map(|words| words.first_chunk_mut::<R>());
        for (words, done) in blocks.zip((0..).step_by(64)) {
            let [dirty] = load(src, at.coarse + done);
            if dirty != 0 {
                spread(dirty, words);
            }
        }
        at.advance(whole * block, whole * 64);
    }
    if R > 64 {
        return refine_pages(src, dst, at);
    }
    while at.n != 0 {
        let mut words = [0; R];
        let [dirty] = load(src, at.coarse);
        spread(dirty, &mut words);
        keep_first(&mut words, at.n);
        or(dst, at.fine, words.iter().copied());
        at.advance(block.min(at.n), 64);
    }
}

fn coarsen_pages(src: &[u64], dst: &mut [u64], mut at: Overlap) {
    let mut dirty = 0;
    while at.n != 0 {
        let n = at.n.min(1 << at.shift);
        dirty |= u64::from(any(src, at.fine, n)) << (at.coarse & 63);
        if at.coarse & 63 == 63 || at.n == n {
            or(dst, at.coarse & !63, [dirty]);
            dirty = 0;
        }
        at.advance(n, 1);
    }
}

fn refine_pages(src: &[u64], dst: &mut [u64], mut at: Overlap) {
    while at.n != 0 {
        let n = at.n.min(1 << at.shift);
        if bits::get(src, at.coarse) {
            bits::set(dst, at.fine, at.fine + n - 1);
        }
        at.advance(n, 1);
    }
}

/// `N` words from any bit on; those beyond the end are 0.
fn load<const N: usize>(words: &[u64], first: u64) -> [u64; N] {
    let up = first & 63;
    let k = bits::word(first);
    let mut loaded: [u64; N] = padded(words.get(k..));
    let next: [u64; N] = padded(words.get(k + 1..));
    for (low, high) in loaded.iter_mut().zip(next) {
        *low = *low >> up | high << 1 << (63 - up);
    }
    loaded
}

/// The first `N` words, or as many as there are and 0.
fn padded<const N: usize>(words: Option<&[u64]>) -> [u64; N] {
    let words = words.unwrap_or_default();
    words.first_chunk().copied().unwrap_or_else(|| {
        let mut padded = [0; N];
        padded.iter_mut().zip(words).for_each(|(p, w)| *p = *w);
        padded
    })
}

/// Clears all bits but the first `n`.
fn keep_first<const N: usize>(words: &mut [u64; N], n: u64) {
    if let Some(w) = words.get_mut(bits::word(n)) {
        *w &= !bits::from_bit(n);
    }
    let beyond = words.get_mut(bits::word(n) + 1..);
    beyond.unwrap_or_default().fill(0);
}

/// Sets the bits of `more`, the first at `first`.
fn or(words: &mut [u64], first: u64, more: impl IntoIterator<Item = u64>) {
    let up = first & 63;
    let words = words.get_mut(bits::word(first)..);
    let mut words = words.unwrap_or_default().iter_mut();
    let mut carry = 0;
    let mut set = |bits| match words.next() {
        Some(w) => *w |= bits,
        None => debug_assert!(bits == 0, "a dirty bit has no place"),
    };
    for m in more {
        set(m << up | carry);
        carry = m >> 1 >> (63 - up);
    }
    if carry != 0 {
        set(carry);
    }
}

/// Whether one of `n` bits from `first` on is set.
fn any(words: &[u64], first: u64, n: u64) -> bool {
    let last = first + n - 1;
    match words.get(bits::word(first)..=bits::word(last)) {
        Some([only]) => only & bits::from_bit(first) & bits::up_to_bit(last) != 0,
        Some([head, middle @ .., tail]) => {
            let ends = head & bits::from_bit(first) | tail & bits::up_to_bit(last);
            middle.iter().fold(ends, |all, w| all | w) != 0
        }
        _ => false,
    }
}
