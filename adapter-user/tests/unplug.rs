// SPDX-License-Identifier: MIT OR Apache-2.0
//! The example in which a device is unplugged loses nothing, and finds what is lost when
//! the device's last log is not asked.

#[path = "../examples/unplug.rs"]
#[expect(dead_code, reason = "its main function")]
mod unplug;

#[test]
fn the_memories_are_equal() {
    assert!(unplug::migrate(false).unwrap());
}

#[test]
fn a_last_log_that_nobody_asks_is_lost() {
    assert!(!unplug::migrate(true).unwrap());
}
