// SPDX-License-Identifier: MIT OR Apache-2.0
//! How many random cases there are.

use std::env;

/// `most`, or PROPTEST_CASES if it is set and lower: a slow machine runs fewer.
pub(crate) fn cases(most: u32) -> u32 {
    match env::var("PROPTEST_CASES") {
        Ok(cases) => most.min(cases.parse().expect("PROPTEST_CASES is a number")),
        Err(_) => most,
    }
}
