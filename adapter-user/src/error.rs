// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a tracker of guest memory, or a device's log, refuses.

use std::fmt;

use dirty_core::{Errno, Error};

/// Why a call failed that a container does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackError {
    /// One of the causes that a container has too.
    Cause(Error),
    /// The bitmaps would exceed the budget. `ENOMEM`
    Budget {
        /// Bytes that the call wanted.
        wanted: u64,
        /// Bytes that the budget has left.
        left: u64,
    },
    /// No memory for a bitmap. `ENOMEM`
    NoMemory {
        /// Bytes that the call wanted.
        wanted: u64,
    },
    /// An address is in no slot or mapping: nobody can report it. `EINVAL`
    Unmapped {
        /// The first such address.
        addr: u64,
    },
    /// No slot has this number. `EINVAL`
    UnknownSlot {
        /// The number.
        id: u32,
    },
    /// A slot has this number already. `EEXIST`
    DuplicateSlot {
        /// The number.
        id: u32,
    },
    /// START without ranges. `EINVAL`
    NoRanges,
    /// START with more ranges than allowed. `E2BIG`
    TooManyRanges,
    /// Two ranges of a START overlap. `EINVAL`
    RangesOverlap,
    /// The page size is no power of two, or below 4 KiB. `EINVAL`
    PageSize,
    /// START while the log is on. `EINVAL`
    Started,
    /// A flag is unknown, or a reserved field is not zero. `EOPNOTSUPP`
    NotSupported,
    /// A feature that the log does not have. `ENOTTY`
    UnknownFeature,
}

impl TrackError {
    /// What Linux answers for this cause.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            TrackError::Cause(cause) => cause.errno(),
            TrackError::Budget { .. } | TrackError::NoMemory { .. } => Errno::ENOMEM,
            TrackError::DuplicateSlot { .. } => Errno::EEXIST,
            TrackError::TooManyRanges => Errno::E2BIG,
            TrackError::NotSupported => Errno::EOPNOTSUPP,
            TrackError::UnknownFeature => Errno::ENOTTY,
            TrackError::Unmapped { .. }
            | TrackError::UnknownSlot { .. }
            | TrackError::NoRanges
            | TrackError::RangesOverlap
            | TrackError::PageSize
            | TrackError::Started => Errno::EINVAL,
        }
    }
}

impl fmt::Display for TrackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrackError::Cause(cause) => cause.fmt(f),
            TrackError::Budget { wanted, left } => {
                write!(
                    f,
                    "bitmaps of {wanted} bytes exceed the budget, which has {left} left"
                )
            }
            TrackError::NoMemory { wanted } => {
                write!(f, "no memory for bitmaps of {wanted} bytes")
            }
            TrackError::Unmapped { addr } => write!(f, "{addr:#x} is in no slot or mapping"),
            TrackError::UnknownSlot { id } => write!(f, "there is no slot {id}"),
            TrackError::DuplicateSlot { id } => write!(f, "slot {id} is there already"),
            TrackError::NoRanges => f.write_str("no ranges to log"),
            TrackError::TooManyRanges => f.write_str("more ranges than a log may start with"),
            TrackError::RangesOverlap => f.write_str("two ranges to log overlap"),
            TrackError::PageSize => {
                f.write_str("the page size is not a power of two of at least 4096")
            }
            TrackError::Started => f.write_str("the log is on already"),
            TrackError::NotSupported => f.write_str("a flag is unknown, or a field is reserved"),
            TrackError::UnknownFeature => f.write_str("the device does not have this feature"),
        }
    }
}

impl std::error::Error for TrackError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            TrackError::Cause(cause) => Some(cause),
            _ => None,
        }
    }
}

impl From<Error> for TrackError {
    fn from(cause: Error) -> Self {
        TrackError::Cause(cause)
    }
}
