// SPDX-License-Identifier: GPL-2.0-only
//! Negative errnos.

use crate::alloc::AllocError;
use crate::ffi::c_int;

/// INVARIANT: from -4095 to -1.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Error(c_int);

pub type Result<T = (), E = Error> = core::result::Result<T, E>;

pub mod code {
    use super::Error;

    pub const ENOMEM: Error = Error(-12);
    pub const ENODEV: Error = Error(-19);
    pub const EINVAL: Error = Error(-22);
}

impl Error {
    pub fn to_errno(self) -> c_int {
        self.0
    }

    /// As C's `ERR_PTR`.
    pub fn to_ptr<T>(self) -> *mut T {
        self.0 as isize as *mut T
    }
}

impl From<AllocError> for Error {
    fn from(_: AllocError) -> Error {
        code::ENOMEM
    }
}

/// The result of a C function that returns a negative errno if it fails. A number that
/// is no errno becomes EINVAL.
pub fn to_result(ret: c_int) -> Result {
    match ret {
        0.. => Ok(()),
        -4095..0 => Err(Error(ret)),
        _ => Err(code::EINVAL),
    }
}
