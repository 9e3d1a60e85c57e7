// SPDX-License-Identifier: MIT OR Apache-2.0
//! Raw ioctls with any number, any argument and any bytes where it points: the
//! core must answer, and write to user memory, as the model does.
#![no_main]

use dirty_model::{compare, RawScript};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: RawScript| {
    if let Err(difference) = compare(&script.0) {
        panic!("{difference}");
    }
});
