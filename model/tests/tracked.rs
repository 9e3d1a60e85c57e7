// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random scripts with faults of a guest whose memory, mappings and logs change while
//! they are tracked: the tracker against a naive model. The seeds of the fuzz target,
//! which include past findings, are such scripts too.

use std::fs;

#[path = "../../adapter-user/tests/support/cases.rs"]
mod cases;

use cases::cases;
use dirty_model::tracked::{decode, run};
use proptest::collection::vec;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases(50_000)) })]
    #[test]
    fn the_tracker_agrees_with_the_model(bytes in vec(any::<[u8; 4]>(), 4..150)) {
        let ops = decode(&bytes.concat());
        if let Err(what) = run(&ops) {
            let ops: Vec<String> = ops.iter().map(|op| format!("{op:?}")).collect();
            prop_assert!(false, "{what}\n{}", ops.join("\n"));
        }
    }
}

#[test]
fn seeds_of_tracker_ops() {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/tracker_ops");
    let mut seeds = 0;
    for entry in fs::read_dir(dir).expect("seeds") {
        let bytes = fs::read(entry.expect("entry").path()).expect("a seed");
        run(&decode(&bytes)).unwrap_or_else(|what| panic!("{what}"));
        seeds += 1;
    }
    assert!(seeds >= 1, "no seed");
}
