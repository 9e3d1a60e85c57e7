// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whole scripts, with faults: the core must answer as the model does.
#![no_main]

use dirty_model::{compare, Script};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: Script| {
    if let Err(difference) = compare(&script.0) {
        panic!("{difference}");
    }
});
