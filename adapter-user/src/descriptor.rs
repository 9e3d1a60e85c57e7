// SPDX-License-Identifier: MIT OR Apache-2.0
//! Descriptors of this process that a caller names by number.

use std::os::fd::{FromRawFd, OwnedFd};

use dirty_core::Errno;

/// Returns a descriptor of the same file. EBADF if `fd` is not open.
pub(crate) fn duplicate(fd: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: with this command fcntl(2) accesses no memory.
    let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if new < 0 {
        let errno = std::io::Error::last_os_error().raw_os_error();
        return Err(errno.map_or(Errno::EBADF, Errno));
    }
    // SAFETY: it is open, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}
