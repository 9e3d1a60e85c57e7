// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core against the model: whatever the script, they agree.

use std::fs;

use arbitrary::{Arbitrary, Unstructured};
use dirty_model::{compare, compare_raw, script, RawCall};
use proptest::collection::vec;
use proptest::prelude::*;

/// Optimised builds look further.
const CASES: u32 = if cfg!(debug_assertions) {
    2_000
} else {
    20_000
};

proptest! {
    #![proptest_config(ProptestConfig {
        cases: CASES,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Typed operations with wrong arguments and with faults.
    #[test]
    fn random_scripts(bytes in vec(any::<u8>(), 0..700)) {
        compare(&script(&bytes)).map_err(TestCaseError::fail)?;
    }

    /// Raw ioctls: any number, any bytes.
    #[test]
    fn random_ioctls(bytes in vec(any::<u8>(), 0..1500)) {
        let calls = Vec::<RawCall>::arbitrary(&mut Unstructured::new(&bytes));
        compare_raw(&calls.unwrap_or_default()).map_err(TestCaseError::fail)?;
    }
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
        compare(&script(&bytes)).unwrap_or_else(|difference| panic!("{difference}"));
    }
}

#[test]
fn seeds_of_ioctl_bytes() {
    for bytes in seeds("ioctl_bytes") {
        let calls = Vec::<RawCall>::arbitrary_take_rest(Unstructured::new(&bytes));
        let compared = compare_raw(&calls.unwrap_or_default());
        compared.unwrap_or_else(|difference| panic!("{difference}"));
    }
}
