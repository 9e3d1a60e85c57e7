// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compares walks over dirty pages and runs with a look at every bit.

mod support;

use std::ops::Range;

use dirty_core::{pages, runs, Bitmap};
use proptest::collection::vec;
use proptest::prelude::*;
use support::words::bits;
use support::TestMemory;

fn naive_runs(pages: &[u64]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.end == *page => run.end += 1,
            _ => runs.push(*page..page + 1),
        }
    }
    runs
}

/// Words, some of them many times in a row: a walk over runs looks at 64 at a time.
fn words() -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![
        3 => Just(0),
        3 => Just(!0),
        1 => any::<u64>(),
        1 => (0..64u32).prop_map(|k| 1 << k),
        1 => (0..64u32).prop_map(|k| !0 << k),
        1 => (0..64u32).prop_map(|k| !0 >> k),
    ];
    let times = prop_oneof![6 => Just(1usize), 1 => 0..150usize];
    vec((word, times), 0..40).prop_map(|words| {
        let words = words.into_iter();
        words
            .flat_map(|(word, n)| std::iter::repeat_n(word, n))
            .collect()
    })
}

proptest! {
    #[test]
    fn of_words(words in words(), skip in 0..1000usize) {
        let all = bits(&words);
        prop_assert!(pages(&words).eq(all.iter().copied()));
        prop_assert!(runs(&words).eq(naive_runs(&all)));
        // `for_each` on a walk that has begun visits the rest.
        let mut rest = pages(&words);
        rest.by_ref().take(skip).for_each(drop);
        let mut found = Vec::new();
        rest.for_each(|page| found.push(page));
        prop_assert_eq!(&found[..], all.get(skip..).unwrap_or_default());
        let mut rest = pages(&words);
        rest.by_ref().take(skip).for_each(drop);
        prop_assert_eq!(rest.count(), all.len().saturating_sub(skip));
        let all = naive_runs(&all);
        for skip in [0, 1, skip % 8, skip % 64] {
            let mut rest = runs(&words);
            rest.by_ref().take(skip).for_each(drop);
            let mut found = Vec::new();
            rest.for_each(|run| found.push(run));
            prop_assert_eq!(&found[..], all.get(skip..).unwrap_or_default());
            let mut rest = runs(&words);
            rest.by_ref().take(skip).for_each(drop);
            prop_assert_eq!(rest.count(), all.len().saturating_sub(skip));
        }
    }

    #[test]
    fn of_a_bitmap(
        npages in prop_oneof![0..3000u64, 32_700..33_300u64, 65_500..98_400u64],
        lines in vec((0..200u64, prop_oneof![Just(1u64), 0..140u64]), 0..4),
        skip in 0..2000usize,
        dirty in vec((0..33_300u64, prop_oneof![Just(1u64), 0..1200u64]), 0..8),
        words in vec(0..520u64, 0..8),
        pinned in vec(0..33_300u64, 0..8),
    ) {
        let mem = TestMemory::default();
        let mut bitmap = Bitmap::new(&mem, npages).expect("memory");
        dirty.into_iter().for_each(|(first, n)| bitmap.set(first, n));
        words.into_iter().for_each(|word| bitmap.set(64 * word, 64));
        lines.into_iter().for_each(|(line, n)| bitmap.set(512 * line, 512 * n));
        pinned.into_iter().for_each(|page| bitmap.pin(&mem, page).expect("memory"));
        let mut words = vec![0; npages.div_ceil(64) as usize];
        for _ in 0..2 {
            bitmap.copy(0, 0, &mut words);
            let all = bits(&words);
            prop_assert!(bitmap.pages().eq(all.iter().copied()));
            prop_assert!(bitmap.runs().eq(naive_runs(&all)));
            let mut found = Vec::new();
            bitmap.pages().for_each(|page| found.push(page));
            prop_assert_eq!(&found, &all);
            let mut found = Vec::new();
            bitmap.runs().for_each(|run| found.push(run));
            let runs = naive_runs(&all);
            prop_assert_eq!(&found, &runs);
            prop_assert_eq!(bitmap.pages().count(), all.len());
            prop_assert_eq!(bitmap.runs().count(), runs.len());
            // `for_each` on a walk that has begun visits the rest.
            let mut rest = bitmap.pages();
            rest.by_ref().take(skip).for_each(drop);
            let mut found = Vec::new();
            rest.for_each(|page| found.push(page));
            prop_assert_eq!(&found[..], all.get(skip..).unwrap_or_default());
            for skip in 0..3 {
                let mut rest = bitmap.runs();
                rest.by_ref().take(skip).for_each(drop);
                let mut found = Vec::new();
                rest.for_each(|run| found.push(run));
                prop_assert_eq!(&found[..], runs.get(skip..).unwrap_or_default());
            }
            bitmap.clear(); // pinned pages stay dirty
        }
    }
}
