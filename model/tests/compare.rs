// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core and the model give the same answers to random scripts and to the
//! seeds of the fuzz targets.

use std::{fmt, fs};

#[path = "../../adapter-user/tests/support/cases.rs"]
mod cases;
mod support;

use arbitrary::{Arbitrary, Unstructured};
use cases::cases;
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
        cases: cases(CASES),
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

/// A device writes while its mappings are unmapped, and the copy of the bitmap
/// faults at each of its words, or at none. If the first copy faults, nothing was
/// unmapped yet, so nothing was written. In every case the bits are in the report
/// that tells what the failed one has not.
#[test]
fn a_late_write_beside_each_fault() {
    for page in [0x40000u64, 0x7f000, 0x80000, 0xa0000] {
        for word in 0..=9u64 {
            for dirty in ["", "mark iova=0x41000 len=0x1\n"] {
                let data = 0x2_0001_0000 - 8 * word;
                let script = format!(
                    "new devs=xpci0,xpci1 iommudirty=1\n\
                     dirty flags=0x1 argsz=8\n\
                     map iova=0x40000 size=0x61000 vaddr=0x100000000 flags=0x3 argsz=32\n\
                     {dirty}\
                     dma dev=xpci0 iova={page:#x} len=0x1 late=1\n\
                     unmap iova=0x0 size=0x200000 flags=0x1 argsz=48 pgsize=0x1000 \
                     bsize=0x48 data={data:#x} fill=0 dump=9\n\
                     get iova=0x0 size=0x200000 flags=0x4 argsz=48 pgsize=0x1000 \
                     bsize=0x48 data=0x200000000 fill=0 dump=9\n"
                );
                compare(&ops(&script)).unwrap_or_else(|difference| panic!("{difference}"));
            }
        }
    }
}
