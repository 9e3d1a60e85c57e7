// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bytes that are not what a save returned: an error and everything dirty, no panic, and
//! no more memory than is promised.

use adapter_user::guest::RestoreError;
use proptest::prelude::*;

use super::altered::{allocated, bound, check, sealed, words};
use super::*;

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
    let before = allocated();
    let result = new.restore(bytes);
    let allocated = allocated() - before;
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

    #[test]
    fn altered_bytes_lose_no_page(bytes in prop::collection::vec(any::<u8>(), 2..400)) {
        check(&bytes);
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
