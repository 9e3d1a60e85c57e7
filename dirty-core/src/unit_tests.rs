// SPDX-License-Identifier: MIT OR Apache-2.0
//! Rules that cannot be seen from outside, only in how long a report takes.
#![allow(clippy::expect_used, clippy::panic, clippy::arithmetic_side_effects)]

use std::vec;

use crate::bitmap::Bitmap;
use crate::rescale::lanes::{collapse, collapse_any, spread, spread_any};

/// The memory of the integration tests.
#[path = "../tests/support/memory.rs"]
#[allow(dead_code, unsafe_code)]
mod memory;
mod pins;
mod spans;

use memory::TestMemory;

/// 130 lines, the last not whole: three words of summary.
const NPAGES: u64 = 130 * 512 - 1;
/// First and last pages of lines, and of words of the summary.
const PAGES: [u64; 9] = [
    0,
    511,
    512,
    63 * 512,
    64 * 512 - 1,
    64 * 512,
    127 * 512 + 70,
    128 * 512,
    NPAGES - 1,
];

#[test]
fn the_summary_has_the_lines_that_are_dirty_or_pinned() {
    let mem = TestMemory::default();
    let mut bitmap = Bitmap::new(&mem, NPAGES).expect("memory");
    let mut out = vec![0; NPAGES.div_ceil(64) as usize];
    for pinned in PAGES {
        for dirty in PAGES {
            for take in 0..3 {
                bitmap.pin(&mem, pinned).expect("memory");
                assert!(bitmap.is_summarised());
                bitmap.set(dirty, 1);
                assert!(bitmap.is_summarised());
                bitmap.set(dirty.min(pinned), dirty.abs_diff(pinned));
                assert!(bitmap.is_summarised());
                match take {
                    0 => bitmap.clear(),
                    1 => bitmap.take(0, &mut out).expect("room"),
                    _ => bitmap.take_sparse(0, &mut out).expect("room"),
                }
                assert!(bitmap.is_summarised(), "{pinned} {dirty} {take}");
                bitmap.unpin(pinned);
                bitmap.unpin(dirty);
                assert!(bitmap.is_summarised());
                bitmap.mark(dirty, 1);
                assert!(bitmap.is_summarised());
                bitmap.clear();
                assert!(bitmap.is_summarised());
            }
        }
    }
}

/// A mark of whole lines changes the summaries only; a line that is cut off by
/// the end is marked by its words.
#[test]
fn whole_lines_are_full() {
    let runs = [
        (0, NPAGES),
        (512, 512),
        (511, 1025),
        (600, 3000),
        (63 * 512, 1024),
    ];
    for (first, n) in runs {
        for shared in [false, true] {
            let mut bitmap = Bitmap::new(&TestMemory::default(), NPAGES).expect("memory");
            match shared {
                true => bitmap.mark(first, n),
                false => bitmap.set(first, n),
            }
            assert!(bitmap.is_summarised());
            let (view, end) = (bitmap.view(), first + n);
            for (line, words) in (0..).zip(view.dirty.chunks(8)) {
                let full = first <= line * 512 && (line + 1) * 512 <= end;
                assert_eq!(crate::bits::get(view.full, line), full, "{line}");
                assert!(!full || words.iter().all(|w| *w == 0), "{line}");
            }
            bitmap.clear();
            assert!(bitmap.is_summarised() && bitmap.pages().next().is_none());
        }
    }
}

/// Marks whose first and last page are dirty already take a short way, which
/// must leave no line out that lies between.
#[test]
fn marks_between_dirty_pages_leave_no_line_out() {
    let mut bitmap = Bitmap::new(&TestMemory::default(), NPAGES).expect("memory");
    for first in 440..520 {
        for n in 1..1200 {
            bitmap.set(first, 1);
            bitmap.set(first + n - 1, 1);
            bitmap.set(first, n);
            assert!(bitmap.is_summarised(), "{n} pages from {first} on");
            assert!(bitmap.pages().eq(first..first + n));
            bitmap.clear();
        }
    }
}

/// 64K pages have a way of their own, in both directions.
#[test]
fn both_ways_at_16_to_1_agree() {
    for bits in (0..1 << 16).map(|k: u64| k << 40 ^ k << 17 ^ k) {
        let (mut words, mut others) = ([0; 16], [0; 16]);
        spread(bits, &mut words);
        spread_any(bits, &mut others);
        assert_eq!(words, others);
        // Any bit of a lane will do.
        let thin = others.map(|w: u64| w & (bits | 0x8000_0001_0010_0400));
        assert_eq!(collapse(&thin), collapse_any(&thin));
        assert_eq!(collapse(&words), bits);
    }
}
