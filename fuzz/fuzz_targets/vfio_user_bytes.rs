// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any bytes from a vfio-user peer, to a server and to a client: each message gets one
//! answer or ends the connection, and what was read is the same when it is written and
//! read again.
#![no_main]

#[path = "../../vfio-user/tests/support/hostile.rs"]
mod hostile;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| hostile::both(bytes));
