// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a call of a client failed.

use std::{error, fmt, io};

use dirty_core::Errno;
use vfio_user_wire::{Command, Error as WireError};

/// Why a call of a [`Client`](super::Client) failed.
///
/// After `Refused`, `NoLog` and `Argument` the connection goes on. After each of the others
/// it has ended, and every call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientError {
    /// The server answered the command with this error number.
    Refused(Command, Errno),
    /// The device keeps no log of its writes, so the guest must not be migrated while it has
    /// the device. The server answered with this error number.
    NoLog(Errno),
    /// No message can carry what the caller asks for. Nothing was sent.
    Argument(&'static str),
    /// The server sent what the protocol does not allow.
    Protocol(WireError),
    /// The server did not answer, or took no message, before the deadline.
    Silent,
    /// The connection has ended, or could not be set up.
    Lost(io::ErrorKind),
}

impl ClientError {
    /// Returns the error number: the server's, or one that stands for the cause.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            ClientError::Refused(_, errno) | ClientError::NoLog(errno) => *errno,
            ClientError::Argument(_) => Errno::EINVAL,
            ClientError::Protocol(_) => Errno(libc::EPROTO),
            ClientError::Silent => Errno(libc::ETIMEDOUT),
            ClientError::Lost(_) => Errno(libc::ENOTCONN),
        }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Refused(command, errno) => {
                let cause = io::Error::from_raw_os_error(errno.0);
                write!(f, "the vfio-user server refused {command:?}: {cause}")
            }
            ClientError::NoLog(errno) => write!(
                f,
                "the vfio-user device does not log its writes ({errno}): unplug it before a migration"
            ),
            ClientError::Argument(what) => f.write_str(what),
            ClientError::Protocol(cause) => {
                write!(f, "the vfio-user server broke the protocol: {cause}")
            }
            ClientError::Silent => f.write_str("the vfio-user server does not answer"),
            ClientError::Lost(kind) => {
                write!(f, "the connection to the vfio-user server has ended: {kind}")
            }
        }
    }
}

impl error::Error for ClientError {}

impl From<ClientError> for io::Error {
    fn from(cause: ClientError) -> Self {
        let kind = match cause {
            ClientError::Lost(kind) => kind,
            _ => io::Error::from_raw_os_error(cause.errno().0).kind(),
        };
        io::Error::new(kind, cause)
    }
}
