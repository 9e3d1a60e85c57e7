// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random scripts with faults of a guest whose memory, mappings and logs change while
//! they are tracked: the tracker against a naive model.

use dirty_model::tracked::{decode, run};
use proptest::collection::vec;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(50_000) })]
    #[test]
    fn the_tracker_agrees_with_the_model(bytes in vec(any::<[u8; 4]>(), 4..150)) {
        let ops = decode(&bytes.concat());
        if let Err(what) = run(&ops) {
            let ops: Vec<String> = ops.iter().map(|op| format!("{op:?}")).collect();
            prop_assert!(false, "{what}\n{}", ops.join("\n"));
        }
    }
}
