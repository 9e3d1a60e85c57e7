// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tracker is saved, the bytes are altered, and another tracker is restored from them: an
//! error with every page dirty, or the pages that the bytes say, in bounded memory.
#![no_main]

#[path = "../../adapter-user/tests/support/altered.rs"]
mod altered;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| altered::check(bytes));
