// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core against the model: whatever the script, they agree.

use std::{fmt, fs};

use arbitrary::{Arbitrary, Unstructured};
use dirty_model::{compare, RawScript, Script};
use dirty_script::op::Op;
use proptest::collection::vec;
use proptest::prelude::*;

/// Optimised builds look further.
const CASES: u32 = if cfg!(debug_assertions) {
    2_000
} else {
    100_000
};

/// Scripts out of up to `max` bytes; a failure shows the script.
fn scripts<T: for<'a> Arbitrary<'a> + fmt::Debug>(max: usize) -> impl Strategy<Value = T> {
    vec(any::<u8>(), 0..max)
        .prop_map(|bytes| T::arbitrary(&mut Unstructured::new(&bytes)).expect("any bytes do"))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: CASES,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Typed operations with wrong arguments and with faults.
    #[test]
    fn random_scripts(script in scripts::<Script>(700)) {
        compare(&script.0).map_err(TestCaseError::fail)?;
    }

    /// Raw ioctls: any number, any bytes.
    #[test]
    fn random_ioctls(script in scripts::<RawScript>(1500)) {
        compare(&script.0).map_err(TestCaseError::fail)?;
    }

    /// What a failure prints is the script that failed.
    #[test]
    fn scripts_print_as_what_they_are(typed in scripts::<Script>(700), raw in scripts::<RawScript>(700)) {
        prop_assert_eq!(parsed(&format!("{typed:?}")), typed.0);
        prop_assert_eq!(parsed(&format!("{raw:?}")), raw.0);
    }
}

fn parsed(text: &str) -> Vec<Op> {
    let cases = dirty_script::parse(text, &mut 65535).expect("a script");
    let lines = cases.into_iter().flat_map(|case| case.lines);
    lines.map(|line| line.op).collect()
}

/// The bytes of every seed of a fuzz target, which is also where findings go.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let dir = format!("{}/../fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let entries = fs::read_dir(dir).expect("seeds");
    let seeds: Vec<_> = entries
        .map(|entry| fs::read(entry.expect("entry").path()).expect("a seed"))
        .collect();
    assert!(seeds.len() >= 40, "only {} seeds", seeds.len());
    seeds
}

#[test]
fn seeds_of_ioctl_ops() {
    for bytes in seeds("ioctl_ops") {
        let script = Script::arbitrary_take_rest(Unstructured::new(&bytes));
        let compared = compare(&script.expect("any bytes do").0);
        compared.unwrap_or_else(|difference| panic!("{difference}"));
    }
}

#[test]
fn seeds_of_ioctl_bytes() {
    for bytes in seeds("ioctl_bytes") {
        let script = RawScript::arbitrary_take_rest(Unstructured::new(&bytes));
        let compared = compare(&script.expect("any bytes do").0);
        compared.unwrap_or_else(|difference| panic!("{difference}"));
    }
}
