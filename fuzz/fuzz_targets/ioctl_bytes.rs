// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any ioctl number, any argument, any bytes where the argument points to: the
//! core must answer and write what the model does.
#![no_main]

use dirty_model::{compare, RawScript};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: RawScript| {
    if let Err(difference) = compare(&script.0) {
        panic!("{difference}");
    }
});
