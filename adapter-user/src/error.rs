// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why a call on the tracker or on a device's log failed.

use std::{fmt, io};

use dirty_core::{Errno, Error};

/// Why a call on a [`Tracker`](crate::guest::Tracker) or on a
/// [`DeviceLog`](crate::device_log::DeviceLog) failed.
///
/// Each cause says its errno; [`errno`](TrackError::errno) returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TrackError {
    /// A cause that a container has too, with [its own errno](Error::errno).
    Cause(Error),
    /// The bitmaps would exceed the budget. `ENOMEM`
    Budget {
        /// The bytes that the call wanted.
        wanted: u64,
        /// The bytes that the budget has left.
        left: u64,
    },
    /// The allocator has no memory for a bitmap. `ENOMEM`
    NoMemory {
        /// The bytes that the call wanted.
        wanted: u64,
    },
    /// An address is in no slot, mapping or logged range, so no report can have
    /// it. `EINVAL`
    Unmapped {
        /// The first such address where the call knows it, else the first address
        /// of the range that the call was given.
        addr: u64,
    },
    /// No slot has this number. `EINVAL`
    UnknownSlot {
        /// The slot's number.
        id: u32,
    },
    /// Another slot already has this number. `EEXIST`
    DuplicateSlot {
        /// The slot's number.
        id: u32,
    },
    /// The bits belong to a slot already, of this tracker or of another. `EBUSY`
    BitsInUse,
    /// The bits stand for another number of bytes than the memory has. `EINVAL`
    BitsLength {
        /// The bytes that the bits stand for.
        bits: u64,
        /// The bytes of the memory.
        memory: u64,
    },
    /// The addresses that this process has the memory at overlap another slot's.
    /// `EEXIST`
    HostOverlap {
        /// The number of that slot.
        id: u32,
    },
    /// The view belongs to another tracker. `EINVAL`
    OtherTracker,
    /// Memory can grow, but not shrink. `EINVAL`
    Shrinks,
    /// The kernel refuses membarrier(2), which tracking cannot be switched on
    /// without; a seccomp filter must allow it. `EPERM`
    Barrier,
    /// A log was started without ranges. `EINVAL`
    NoRanges,
    /// A log was started with more than 256 ranges. `E2BIG`
    TooManyRanges,
    /// Two ranges that a log was started with overlap. `EINVAL`
    RangesOverlap,
    /// The page size is not a power of two, or it is too small for this call.
    /// `EINVAL`
    PageSize,
    /// The log is on already. `EINVAL`
    Started,
    /// An iommufd structure has an unknown flag, or a reserved field that is not
    /// zero. `EOPNOTSUPP`
    NotSupported,
}

impl TrackError {
    /// Returns the errno that Linux answers for this cause.
    #[must_use]
    pub const fn errno(self) -> Errno {
        match self {
            TrackError::Cause(cause) => cause.errno(),
            TrackError::Budget { .. } | TrackError::NoMemory { .. } => Errno::ENOMEM,
            TrackError::DuplicateSlot { .. } | TrackError::HostOverlap { .. } => Errno::EEXIST,
            TrackError::BitsInUse => Errno::EBUSY,
            TrackError::Barrier => Errno::EPERM,
            TrackError::TooManyRanges => Errno::E2BIG,
            TrackError::NotSupported => Errno::EOPNOTSUPP,
            TrackError::Unmapped { .. }
            | TrackError::UnknownSlot { .. }
            | TrackError::BitsLength { .. }
            | TrackError::OtherTracker
            | TrackError::Shrinks
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
                    "the bitmaps need {wanted} bytes, and the budget has {left} left"
                )
            }
            TrackError::NoMemory { wanted } => {
                write!(f, "there is no memory for bitmaps of {wanted} bytes")
            }
            TrackError::Unmapped { addr } => {
                write!(f, "address {addr:#x} is in no slot, mapping or range")
            }
            TrackError::UnknownSlot { id } => write!(f, "there is no slot {id}"),
            TrackError::DuplicateSlot { id } => write!(f, "slot {id} exists already"),
            TrackError::BitsInUse => f.write_str("the dirty bits belong to a slot already"),
            TrackError::BitsLength { bits, memory } => {
                write!(
                    f,
                    "the dirty bits stand for {bits} bytes, and the memory has {memory}"
                )
            }
            TrackError::HostOverlap { id } => {
                write!(f, "the memory overlaps slot {id} in this process")
            }
            TrackError::OtherTracker => f.write_str("the view belongs to another tracker"),
            TrackError::Shrinks => f.write_str("memory that is tracked cannot shrink"),
            TrackError::Barrier => {
                f.write_str("the kernel refuses membarrier(2); a seccomp filter must allow it")
            }
            TrackError::NoRanges => f.write_str("the log was started without ranges"),
            TrackError::TooManyRanges => {
                f.write_str("the log was started with more than 256 ranges")
            }
            TrackError::RangesOverlap => f.write_str("two ranges of the log overlap"),
            TrackError::PageSize => {
                f.write_str("the page size is not a power of two, or it is too small")
            }
            TrackError::Started => f.write_str("the log is on already"),
            TrackError::NotSupported => {
                f.write_str("a flag is unknown, or a reserved field is not zero")
            }
        }
    }
}

// A cause that a container has too is shown as it is, so it is no source besides.
impl std::error::Error for TrackError {}

impl From<Error> for TrackError {
    fn from(cause: Error) -> Self {
        TrackError::Cause(cause)
    }
}

impl From<TrackError> for io::Error {
    /// The kind is that of the errno, and the text stays that of the cause.
    fn from(cause: TrackError) -> Self {
        let kind = io::Error::from_raw_os_error(cause.errno().0).kind();
        io::Error::new(kind, cause)
    }
}
