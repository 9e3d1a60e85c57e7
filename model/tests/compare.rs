// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core and the model give the same answers to random scripts and to the
//! seeds of the fuzz targets.

use std::{fmt, fs};

mod support;

use arbitrary::{Arbitrary, Unstructured};
use dirty_model::{compare, RawScript, Script};
use dirty_script::op::Op;
use proptest::collection::vec;
use proptest::prelude::*;
use support::ops;

/// Random scripts for each test; more where the build is optimised.
const CASES: u32 = if cfg!(debug_assertions) {
    2_000
} else {
    100_000
};

/// Scripts made of up to `max` bytes. A failure prints the script.
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

    /// Typed operations, some with wrong arguments, and faults.
    #[test]
    fn random_scripts(script in scripts::<Script>(700)) {
        compare(&script.0).map_err(TestCaseError::fail)?;
    }

    /// Raw ioctls: any number, any argument.
    #[test]
    fn random_ioctls(script in scripts::<RawScript>(1500)) {
        compare(&script.0).map_err(TestCaseError::fail)?;
    }

    /// The script that a failure prints is the one that failed.
    #[test]
    fn scripts_print_as_what_they_are(typed in scripts::<Script>(700), raw in scripts::<RawScript>(700)) {
        prop_assert_eq!(ops(&format!("{typed:?}")), typed.0);
        prop_assert_eq!(ops(&format!("{raw:?}")), raw.0);
    }
}

/// Runs the seeds of a fuzz target, which include past findings.
fn agree_on_seeds<T: for<'a> Arbitrary<'a>>(target: &str, ops: fn(T) -> Vec<Op>) {
    let dir = format!("{}/../fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let mut seeds = 0;
    for entry in fs::read_dir(dir).expect("seeds") {
        let bytes = fs::read(entry.expect("entry").path()).expect("a seed");
        let script = T::arbitrary_take_rest(Unstructured::new(&bytes));
        let compared = compare(&ops(script.expect("any bytes do")));
        compared.unwrap_or_else(|difference| panic!("{difference}"));
        seeds += 1;
    }
    assert!(seeds >= 40, "only {seeds} seeds");
}

#[test]
fn seeds_of_ioctl_ops() {
    agree_on_seeds("ioctl_ops", |script: Script| script.0);
}

#[test]
fn seeds_of_ioctl_bytes() {
    agree_on_seeds("ioctl_bytes", |script: RawScript| script.0);
}
