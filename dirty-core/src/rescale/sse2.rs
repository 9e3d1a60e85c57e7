// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is twice as fast, or more, with the instructions that every x86-64
//! has, where it may use them at all: a kernel may not.
#![allow(unsafe_code)]
#![allow(unused_unsafe)] // these functions are safe from Rust 1.87 on

use core::arch::x86_64::{
    __m128i, _mm_cmpeq_epi16, _mm_movemask_epi8, _mm_packs_epi16, _mm_set_epi64x, _mm_setzero_si128,
};

/// [`collapse_any`](crate::rescale::lanes::collapse_any) of 16 words, or of lanes of 16
/// bits.
pub(crate) fn collapse_16(words: &[u64]) -> u64 {
    words.chunks_exact(4).rev().fold(0, |flags, quad| {
        let [a, b, c, d] = *quad else {
            return flags; // chunks are of 4
        };
        flags << 16 | u64::from(!mask(clean_lanes(a, b), clean_lanes(c, d)))
    })
}

/// All ones in each lane of 16 bits that is 0.
fn clean_lanes(low: u64, high: u64) -> __m128i {
    // SAFETY: this module is compiled for targets with SSE2 only.
    let lanes = unsafe { _mm_set_epi64x(high as i64, low as i64) };
    // SAFETY: likewise.
    let zero = unsafe { _mm_setzero_si128() };
    // SAFETY: likewise.
    unsafe { _mm_cmpeq_epi16(lanes, zero) }
}

/// One bit for each of 16 lanes, which are all ones or 0.
#[inline]
fn mask(low: __m128i, high: __m128i) -> u16 {
    // SAFETY: this module is compiled for targets with SSE2 only.
    let bytes = unsafe { _mm_packs_epi16(low, high) };
    // SAFETY: likewise.
    unsafe { _mm_movemask_epi8(bytes) as u16 }
}
