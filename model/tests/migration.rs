// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core's migration machine against the naive model: random sequences with
//! failures of the device, and the way between any two states. The seeds of the fuzz
//! target are such sequences too.

use std::fs;

#[path = "../../adapter-user/tests/support/cases.rs"]
mod cases;

use arbitrary::{Arbitrary, Unstructured};
use cases::cases;
use dirty_core::migration::{Features, State};
use dirty_model::migration::{compare, compare_region, next, run, Op, RegionSequence, Sequence};
use proptest::collection::vec;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases(20_000)) })]
    #[test]
    fn the_core_agrees_with_the_model(bytes in vec(any::<u8>(), 8..1500)) {
        let sequence = Sequence::arbitrary(&mut Unstructured::new(&bytes)).expect("a sequence");
        if let Err(what) = compare(&sequence) {
            prop_assert!(false, "{what}");
        }
    }

    #[test]
    fn the_core_s_region_agrees_with_the_model(bytes in vec(any::<u8>(), 8..1000)) {
        let mut bytes = Unstructured::new(&bytes);
        let sequence = RegionSequence::arbitrary(&mut bytes).expect("a sequence");
        if let Err(what) = compare_region(&sequence) {
            prop_assert!(false, "{what}");
        }
    }
}

#[test]
fn every_next_state_is_the_model_s() {
    for bits in 0..16 {
        for (from, to) in (0..9).flat_map(|from| (0..9).map(move |to| (from, to))) {
            let ours = Features::from_bits(bits).and_then(|features| {
                let (from, to) = (State::from_raw(from)?, State::from_raw(to)?);
                features.next(from, to).ok().map(State::raw)
            });
            let known = if bits < 8 { next(bits, from, to) } else { None };
            assert_eq!(ours, known, "features {bits}, {from} to {to}");
        }
    }
}

#[test]
fn operations_print_as_they_are_read() {
    let mut seen = 0;
    for seed in 0..200u8 {
        let bytes: Vec<u8> = (0..6400u32)
            .map(|n| (n * 31 + n / 7) as u8 ^ seed)
            .collect();
        for op in dirty_model::migration::random(&bytes, 50).expect("operations") {
            assert_eq!(op.to_string().parse::<Op>().as_ref(), Ok(&op));
            seen += 1;
        }
    }
    assert_eq!(seen, 10_000);
    for line in [
        "",
        "seek",
        "feature n=2",
        "feature n=2 flags=x argsz=1 at=mem state=1",
    ] {
        assert!(line.parse::<Op>().is_err(), "{line}");
    }
}

#[test]
fn seeds_of_migration_ops() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/migration_ops");
    let mut seeds = 0;
    for entry in fs::read_dir(dir).expect("seeds") {
        let bytes = fs::read(entry.expect("entry").path()).expect("a seed");
        run(&bytes).unwrap_or_else(|what| panic!("{what}"));
        seeds += 1;
    }
    assert!(seeds >= 7, "no seed");
}
