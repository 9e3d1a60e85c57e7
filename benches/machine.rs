// SPDX-License-Identifier: MIT OR Apache-2.0
//! The machine's limits: copies and fills of plain memory.

use std::hint::black_box;

use crate::data::{check, random_words, zeroed};
use crate::harness::Bench;
use crate::report::row::{Row, Who};

/// Limits of a dense snapshot: a copy, and one past the caches that also clears.
pub(crate) fn snapshot(bench: &mut Bench, row: &mut Row, words: usize) {
    let setup = || (random_words(words, 1), zeroed(words));
    bench.time_on(row, Who::Limit, "memcpy", setup, |(from, to), b| {
        b.iter(|| black_box(&mut *to).copy_from_slice(black_box(from)));
    });
    let setup = || {
        let (mut from, mut to) = setup();
        let want = from.clone();
        stream(&mut from, &mut to);
        check("non-temporal copy", &to, &want);
        check("non-temporal copy, cleared", &from, &zeroed(words));
        (from, to)
    };
    let name = "non-temporal copy + clear";
    bench.time_on(row, Who::Limit, name, setup, |(from, to), b| {
        b.iter(|| stream(black_box(from), black_box(to)));
    });
}

/// The limit of a sparse snapshot: a copy, and a fill that clears.
pub(crate) fn copy_and_clear(bench: &mut Bench, row: &mut Row, words: usize) {
    let setup = || (random_words(words, 1), zeroed(words));
    bench.time_on(
        row,
        Who::Limit,
        "memcpy + memset",
        setup,
        |(from, to), b| {
            b.iter(|| {
                black_box(&mut *to).copy_from_slice(black_box(from));
                black_box(&mut *from).fill(0);
            });
        },
    );
}

/// Copies past the caches, page by page, and clears.
#[cfg(target_arch = "x86_64")]
fn stream(from: &mut [u64], to: &mut [u64]) {
    use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_sfence, _mm_stream_si128};

    assert_eq!(to.as_ptr() as usize % 16, 0, "an aligned destination");
    for (from, to) in from.chunks_mut(512).zip(to.chunks_mut(512)) {
        let pairs = from.chunks_exact(2).zip(to.chunks_exact_mut(2));
        for (from, to) in pairs {
            // SAFETY: `from` has 16 bytes.
            let pair = unsafe { _mm_loadu_si128(from.as_ptr().cast::<__m128i>()) };
            // SAFETY: `to` has 16 bytes, aligned as was asserted.
            unsafe { _mm_stream_si128(to.as_mut_ptr().cast::<__m128i>(), pair) };
        }
        from.fill(0);
    }
    // SAFETY: an instruction of every x86-64.
    unsafe { _mm_sfence() };
}

/// Copies and clears, on processors without such a copy.
#[cfg(not(target_arch = "x86_64"))]
fn stream(from: &mut [u64], to: &mut [u64]) {
    to.copy_from_slice(from);
    from.fill(0);
}
