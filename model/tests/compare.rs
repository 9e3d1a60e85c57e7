// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core against the model: whatever the script, they agree.

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
