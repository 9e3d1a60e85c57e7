// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random messages to a vfio-user server, against a naive model. The seeds of the fuzz target,
//! which include past findings, are such messages too.

use std::fs;

#[path = "../../adapter-user/tests/support/cases.rs"]
mod cases;

use cases::cases;
use dirty_model::vfio_user::{decode, run, Op};
use proptest::collection::vec;
use proptest::prelude::*;

fn script(ops: &[Op]) -> String {
    let ops: Vec<String> = ops.iter().map(|op| format!("{op:?}")).collect();
    ops.join("\n")
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases(20_000)) })]
    #[test]
    fn the_server_agrees_with_the_model(carries: bool, bytes in vec(any::<[u8; 4]>(), 4..120)) {
        // A device without bus mastering does nothing.
        let ops = decode(&[&[20, 0, 0, 1][..], &bytes.concat()].concat());
        if let Err(what) = run(carries, &ops) {
            prop_assert!(false, "{what}\n{}", script(&ops));
        }
    }
}

#[test]
fn seeds_of_vfio_user_server() {
    let dir = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../fuzz/corpus/vfio_user_server"
    );
    let mut seeds = 0;
    for entry in fs::read_dir(dir).expect("seeds") {
        let bytes = fs::read(entry.expect("entry").path()).expect("a seed");
        let (carries, rest) = bytes.split_first().expect("a byte");
        run(carries % 2 != 0, &decode(rest)).unwrap_or_else(|what| panic!("{what}"));
        seeds += 1;
    }
    assert!(seeds >= 1, "no seed");
}
