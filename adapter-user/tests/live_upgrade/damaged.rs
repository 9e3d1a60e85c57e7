// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes that are not what a save returned: an error and everything dirty, no panic, and
//! no more memory than is promised.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use adapter_user::guest::RestoreError;
use proptest::prelude::*;

use super::*;

/// Counts what a thread allocates.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: it hands every call to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATED.try_with(|sum| sum.set(sum.get() + layout.size()));
        // SAFETY: the caller promises what the system's allocator asks.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A saved tracker that has some of everything.
fn saved() -> Vec<u8> {
    let old = fresh();
    let view = old.iova_view();
    old.add_source("kvm", |_| Ok(()));
    old.add_log("a name of some length", &view, 0, clean)
        .unwrap();
    old.start().unwrap();
    view.map(0, MIB, 8 * PAGE).unwrap();
    view.map(0x10_0000, 16 * MIB, 8 * PAGE).unwrap();
    // A source that moves a slot while it is asked leaves something to remember.
    let weak = old.downgrade();
    old.add_source("moves", move |_| {
        let tracker = weak.upgrade().ok_or("gone")?;
        tracker.move_slot(5, 64 * MIB)?;
        Ok(tracker.move_slot(5, MIB)?)
    });
    old.slots()[0].bits.mark(3 * PAGE, 1).unwrap();
    old.slots()[1].bits.mark(60 * PAGE, 9 * PAGE).unwrap();
    old.save(&Report::new()).unwrap()
}

/// Restores bytes that cannot be restored, and checks that every page is dirty then.
#[track_caller]
fn refused(bytes: &[u8]) -> RestoreError {
    let new = fresh();
    let failed = new.restore(bytes).unwrap_err();
    assert_eq!(take(&new).len(), ALL);
    failed
}

#[test]
fn every_prefix_is_refused() {
    let saved = saved();
    fresh().restore(&saved).unwrap();
    for end in 0..saved.len() {
        assert_eq!(refused(&saved[..end]), RestoreError::Damaged);
    }
    let longer = [&saved[..], &[0; 8]].concat();
    assert_eq!(refused(&longer), RestoreError::Damaged);
}

#[test]
fn every_flipped_bit_is_seen() {
    let mut saved = saved();
    for bit in 0..saved.len() * 8 {
        saved[bit / 8] ^= 1 << (bit % 8);
        let failed = refused(&saved);
        let version = matches!(failed, RestoreError::Version { .. });
        assert_eq!(version, (64..128).contains(&bit), "{failed}");
        saved[bit / 8] ^= 1 << (bit % 8);
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks_exact(8);
    words
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect()
}

/// The bytes of words whose length and checksum are right, as docs/live-upgrade.md has
/// them.
fn sealed(mut words: Vec<u64>) -> Vec<u8> {
    words[2] = words.len() as u64 * 8;
    let others = words.iter().enumerate().filter(|(at, _)| *at != 3);
    words[3] = others.fold(0x9e37_79b9_7f4a_7c15, |sum, (_, word)| {
        (sum ^ word)
            .wrapping_mul(0xd6e8_feb8_6659_fd93)
            .rotate_left(29)
    });
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// The format is what the document says, word by word.
#[test]
fn the_format_is_the_documented_one() {
    let name = words(b"a name of some length\0\0\0");
    let wanted = [
        &[u64::from_le_bytes(*b"vfdirty\0"), 1, 0, 0, 1][..],
        &[2], // slots
        &[5, MIB, 100 * PAGE, PAGE, 1 << 3, 0],
        &[2, 16 * MIB, 70 * PAGE, PAGE, 0xf << 60, 0x1f],
        &[2], // places that slots had
        &[0, MIB, 100 * PAGE, 0, 64 * MIB, 100 * PAGE],
        &[3], // sources
        &[0, 3, words(b"kvm\0\0\0\0\0")[0]],
        &[1, 21],
        &name,
        &[0, 5, words(b"moves\0\0\0")[0]],
        &[1, 2], // views, and mappings of the first
        &[0, MIB, 8 * PAGE, 1, 0, 8 * PAGE - 1, 0, 0],
        &[0x10_0000, 16 * MIB, 8 * PAGE, 1, 0, 8 * PAGE - 1, 1, 0],
    ];
    assert_eq!(saved(), sealed(wanted.concat()));
}

/// Restores whatever it is, uses what came of it, and returns the allocated bytes.
fn try_restore(bytes: &[u8]) -> usize {
    let new = fresh();
    let before = ALLOCATED.get();
    let result = new.restore(bytes);
    let allocated = ALLOCATED.get() - before;
    let mut report = Report::new();
    if let Ok(restored) = &result {
        for source in &restored.sources {
            if let Some(view) = &source.view {
                let all = |ask: &[IovaRange], dirty: &mut DirtyIovas| {
                    ask.iter()
                        .try_for_each(|ask| dirty.or_range(ask.iova, ask.size))?;
                    Ok(())
                };
                new.add_log(&source.name, view, 0, all).unwrap();
            }
        }
    }
    let _ = new.take(&mut report);
    if result.is_err() {
        assert_eq!(pages(&report).len(), ALL);
    }
    allocated
}

/// What restoring may take: 32 bytes for each byte, and a little for itself.
fn bound(bytes: &[u8]) -> usize {
    32 * bytes.len() + 4096
}

/// Numbers that are at the edge of something.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..8u64,
        any::<u64>(),
        (0..64u32, -2..3i64).prop_map(|(shift, more)| (1u64 << shift).wrapping_add_signed(more)),
        (0..200u64).prop_map(|page| page * PAGE),
        Just(u64::MAX),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(3000) })]
    #[test]
    fn hostile_words_do_no_harm(
        changes in prop::collection::vec((0..200usize, number()), 0..4),
        cut in prop::option::of(5..60usize),
    ) {
        let mut words = words(&saved());
        for (at, word) in changes {
            let at = at % words.len();
            words[at] = word;
        }
        if let Some(cut) = cut {
            words.truncate(cut);
        }
        let bytes = sealed(words);
        prop_assert!(try_restore(&bytes) <= bound(&bytes));
    }
}

/// As many things as fit, each as small as it can be.
#[test]
fn memory_is_in_proportion_to_the_bytes() {
    let header = |rest: &[&[u64]]| {
        let start = [u64::from_le_bytes(*b"vfdirty\0"), 1, 0, 0, 1];
        sealed([&[&start[..]], rest].concat().concat())
    };
    let n = 1 << 16;
    let sources: Vec<u64> = (0..n).flat_map(|view| [view + 1, 0]).collect();
    let views = vec![0; n as usize];
    let many_views = header(&[&[0, 0, n], &sources, &[n], &views]);
    let mapping = [0, 0, PAGE, 0];
    let mappings = mapping.repeat(n as usize);
    let many_mappings = header(&[&[0, 0, 1, 1, 0, 1, n], &mappings]);
    let slot = [5, MIB, 100 * PAGE, PAGE, 0, 0];
    let pages: Vec<u64> = (0..n).flat_map(|at| [at, at, 0, at % 4096]).collect();
    let many_parts = header(&[
        &[1],
        &slot,
        &[0, 1, 1, 0, 1, 1],
        &[0, 0, n * PAGE, n],
        &pages,
    ]);
    for bytes in [many_views, many_mappings, many_parts] {
        let new = fresh();
        new.restore(&bytes).unwrap();
        let allocated = try_restore(&bytes);
        assert!(
            allocated <= bound(&bytes),
            "{allocated} for {}",
            bytes.len()
        );
    }
    // A count that promises more than there is takes nothing.
    for at in [5, 6, 7] {
        let mut words = vec![u64::from_le_bytes(*b"vfdirty\0"), 1, 0, 0, 1, 0, 0, 0, 0];
        words[at] = 1 << 40;
        let bytes = sealed(words);
        assert!(try_restore(&bytes) <= bound(&bytes));
        assert_eq!(refused(&bytes), RestoreError::Damaged);
    }
    // More than a saved tracker may have.
    let long = header(&[&[0, 0, 0, 0], &vec![0; 17 << 17]]);
    assert_eq!(refused(&long), RestoreError::Damaged);
}
