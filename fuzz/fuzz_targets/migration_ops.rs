// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations on a device that migrates, which fails now and then: the core must
//! answer as the model does, by ioctls and by the migration region.
#![no_main]

use dirty_model::migration::run;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Err(difference) = run(bytes) {
        panic!("{difference}");
    }
});
