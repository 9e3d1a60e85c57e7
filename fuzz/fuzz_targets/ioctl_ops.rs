// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whole scripts, faults among them: the core must do what the model does.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Err(difference) = dirty_model::compare(&dirty_model::script(data)) {
        panic!("{difference}");
    }
});
