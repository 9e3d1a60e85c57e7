// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a call failed: an errno for the return value, and a sentence.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::{fmt, io};

use adapter_user::guest::{RestoreError, TakeError};
use adapter_user::{Error, TrackError};
use libc::c_int;

/// Why a call failed. As an error of a source it is what its callback answered.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    /// Positive.
    pub(crate) errno: c_int,
    pub(crate) text: Cow<'static, str>,
}

impl Failure {
    pub(crate) fn new(errno: c_int, text: impl Into<Cow<'static, str>>) -> Self {
        let text = text.into();
        Failure { errno, text }
    }

    /// The argument `name` is not what the call takes.
    pub(crate) fn argument(name: &str, is: &str) -> Self {
        Self::new(libc::EINVAL, format!("the argument {name} {is}"))
    }

    /// A mark failed. That of a slot which was removed has an errno of its own.
    pub(crate) fn of_mark(cause: impl Into<TrackError>) -> Self {
        match cause.into() {
            TrackError::Cause(Error::NotTracking) => {
                Self::new(libc::ESTALE, "the slot was removed")
            }
            cause => cause.into(),
        }
    }

    /// A callback returned `rc`, which is not 0.
    pub(crate) fn of_callback(rc: c_int) -> Self {
        match rc.checked_neg() {
            Some(errno @ 1..=4095) => {
                let text = io::Error::from_raw_os_error(errno);
                Self::new(errno, format!("its callback failed: {text}"))
            }
            _ => Self::new(
                libc::EIO,
                format!("its callback returned {rc}, which is neither 0 nor a negative errno"),
            ),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Failure {}

impl From<Error> for Failure {
    fn from(cause: Error) -> Self {
        Failure::new(cause.errno().0, cause.to_string())
    }
}

impl From<TrackError> for Failure {
    fn from(cause: TrackError) -> Self {
        Failure::new(cause.errno().0, cause.to_string())
    }
}

impl From<RestoreError> for Failure {
    fn from(cause: RestoreError) -> Self {
        Failure::new(cause.errno().0, cause.to_string())
    }
}

impl From<TakeError> for Failure {
    /// The errno is that of what the source answered.
    fn from(failed: TakeError) -> Self {
        let cause: &(dyn StdError + 'static) = &*failed.cause;
        let errno = if let Some(cause) = cause.downcast_ref::<Failure>() {
            cause.errno
        } else if let Some(cause) = cause.downcast_ref::<TrackError>() {
            cause.errno().0
        } else if let Some(cause) = cause.downcast_ref::<Error>() {
            cause.errno().0
        } else {
            libc::EIO
        };
        Failure::new(errno, format!("{failed}: {cause}"))
    }
}
