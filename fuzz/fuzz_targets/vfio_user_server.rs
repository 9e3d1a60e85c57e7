// SPDX-License-Identifier: MIT OR Apache-2.0
//! Messages to a vfio-user server whose device reads and writes: replies, memory and dirty
//! pages must be those of the model.
#![no_main]

use dirty_model::vfio_user::{decode, run};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((carries, rest)) = bytes.split_first() else {
        return;
    };
    let ops = decode(rest);
    if let Err(what) = run(carries % 2 != 0, &ops) {
        panic!("{what}\n{ops:#?}");
    }
});
