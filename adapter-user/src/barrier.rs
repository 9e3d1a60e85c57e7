// SPDX-License-Identifier: MIT OR Apache-2.0
//! A memory barrier on every running thread of this process, which costs the
//! threads nothing while nobody asks for it.
//!
//! Linux has it as membarrier(2). A thread that has [`light`] between two accesses
//! and another that has [`heavy`] between two of its own are ordered as if both had
//! a sequentially consistent fence there.

use std::io;
use std::sync::atomic::{compiler_fence, Ordering};
use std::sync::OnceLock;

use crate::error::TrackError;

/// MEMBARRIER_CMD_PRIVATE_EXPEDITED: a barrier on the threads of this process.
const EXPEDITED: libc::c_long = 1 << 3;
/// MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED: announces that this process uses it.
const REGISTER: libc::c_long = 1 << 4;

fn membarrier(command: libc::c_long) -> io::Result<()> {
    let (flags, cpu): (libc::c_long, libc::c_long) = (0, 0);
    // SAFETY: membarrier(2) takes three numbers and accesses no memory of ours.
    match unsafe { libc::syscall(libc::SYS_membarrier, command, flags, cpu) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Returns whether [`heavy`] works in this process. The answer never changes.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        membarrier(REGISTER)
            .and_then(|()| membarrier(EXPEDITED))
            .is_ok()
    })
}

/// The half of the pair that is on the hot path: only the compiler sees it.
#[inline]
pub(crate) fn light() {
    compiler_fence(Ordering::SeqCst);
}

/// The half that pays for both.
///
/// # Errors
///
/// [`TrackError::Barrier`] if the kernel refuses: a seccomp filter may have come
/// since [`available`] was asked.
pub(crate) fn heavy() -> Result<(), TrackError> {
    // A process that was forked may have lost its registration.
    membarrier(EXPEDITED)
        .or_else(|_| membarrier(REGISTER).and_then(|()| membarrier(EXPEDITED)))
        .map_err(|_| TrackError::Barrier)
}
