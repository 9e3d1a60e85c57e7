// SPDX-License-Identifier: MIT OR Apache-2.0
//! Answers as text. The program that records the kernel prints the same.

use dirty_core::Errno;

use super::memory::{Memory, Place};
use super::op::PATTERN;

/// An answer without anything else: `ok`, or the errno's name.
pub(super) fn done(answer: Result<(), Errno>) -> String {
    match answer {
        Ok(()) => "ok".into(),
        Err(errno) => errno.to_string(),
    }
}

/// A number, or the errno's name.
pub(super) fn count(answer: Result<usize, Errno>) -> String {
    match answer {
        Ok(n) => n.to_string(),
        Err(errno) => errno.to_string(),
    }
}

/// The answer of VFIO_DEVICE_FEATURE, and the feature's data as they stand in memory
/// then. `file` is the number of a data file that was opened.
pub(super) fn feature(
    answer: Result<(), Errno>,
    at: Place,
    memory: &Memory,
    file: Option<usize>,
) -> String {
    let mut text = done(answer);
    if at.readable() >= 16 {
        text += &match (file, memory.word(3)) {
            (Some(file), _) => format!(" {:#x} f{file}", memory.word(2)),
            (None, PATTERN) => format!(" {:#x} -", memory.word(2)),
            (None, word) => format!(" {:#x} {word:#x}", memory.word(2)),
        };
    }
    text
}

/// The answer of an ioctl of a data file, and its argument as it stands then.
pub(super) fn precopy(answer: Result<(), Errno>, at: Place, memory: &Memory) -> String {
    let mut text = done(answer);
    if at.readable() >= 24 {
        for n in 1..6 {
            text += &match memory.word(n) {
                PATTERN => " -".into(),
                word => format!(" {word:#x}"),
            };
        }
    }
    text
}
