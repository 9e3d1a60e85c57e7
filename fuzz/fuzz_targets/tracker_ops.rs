// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tracked guest whose memory, mappings and logs change, with faults: the tracker
//! must keep its promise to the model.
#![no_main]

use dirty_model::tracked::{decode, run};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let ops = decode(bytes);
    if let Err(what) = run(&ops) {
        panic!("{what}\n{ops:#?}");
    }
});
