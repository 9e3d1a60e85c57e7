// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a saved tracker cannot be restored.

use std::fmt;

use dirty_core::Errno;

use crate::error::TrackError;

/// Why a saved tracker cannot be restored. [`Tracker::restore`](super::super::Tracker::restore)
/// has made every page dirty then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RestoreError {
    /// The bytes are not what a save returned: some are missing or were changed.
    /// `EINVAL`
    Damaged,
    /// The bytes have another version of the format, which this version of the library
    /// does not read. `EOPNOTSUPP`
    Version {
        /// The version that they have.
        found: u64,
    },
    /// The tracker has no such slot, or one with another address, size or page size.
    /// `EINVAL`
    Slot {
        /// The slot's number.
        id: u32,
    },
    /// The tracker could not be switched on: [`TrackError::Barrier`]. Its errno is that
    /// of the cause.
    Start(TrackError),
}

impl RestoreError {
    /// Returns the errno of this cause.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            RestoreError::Damaged | RestoreError::Slot { .. } => Errno::EINVAL,
            RestoreError::Version { .. } => Errno::EOPNOTSUPP,
            RestoreError::Start(cause) => cause.errno(),
        }
    }
}

impl fmt::Display for RestoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RestoreError::Damaged => f.write_str("the saved tracker is damaged or incomplete"),
            RestoreError::Version { found } => {
                write!(f, "the saved tracker has version {found} of the format")
            }
            RestoreError::Slot { id } => write!(
                f,
                "slot {id} was saved, and the tracker has none or another one"
            ),
            RestoreError::Start(cause) => write!(f, "the tracker cannot be switched on: {cause}"),
        }
    }
}

impl std::error::Error for RestoreError {}
