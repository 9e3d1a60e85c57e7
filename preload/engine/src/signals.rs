// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads that take no signals: those of the program are not for them.

use nix::sys::signal::{sigprocmask, SigSet, SigmaskHow};

/// Calls `start` while this thread takes no signals, which the threads inherit that it starts.
pub fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    let mut before = SigSet::empty();
    // Neither fails: the arguments are valid.
    let _ = sigprocmask(
        SigmaskHow::SIG_SETMASK,
        Some(&SigSet::all()),
        Some(&mut before),
    );
    let started = start();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None);
    started
}
