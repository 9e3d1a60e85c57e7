// SPDX-License-Identifier: MIT OR Apache-2.0
//! The replies to operations, and how the recordings write them.

use std::fmt;

use dirty_core::Errno;

use crate::system::{Answer, Stat};

/// The words of a bitmap that a reply shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// The words up to the first that cannot be read.
    pub words: Vec<u64>,
    /// Whether a word that cannot be read follows.
    pub cut: bool,
}

/// The reply to an operation. `Display` writes what follows the operation in a
/// transcript.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Text that only this operation has.
    Text(String),
    /// The result of a system call.
    Answer(Answer),
    /// Bytes of memory.
    Bytes(Vec<u8>),
    /// UNMAP_DMA: its result, `size` in the argument afterwards, and the bitmap
    /// if one was asked for.
    Unmap(Answer, u64, Option<Words>),
    /// GET_BITMAP: its result, and the bitmap.
    Get(Answer, Words),
    /// A typed report or harvest: bytes unmapped (0 for a report), and the
    /// bitmap.
    Report(Result<u64, Errno>, Words),
    /// What a call inside the kernel returned: a value, or minus an errno; an
    /// errno if the device could not be told to make it.
    Returned(Result<i32, Errno>),
    /// As `Returned`, for a call by a child process.
    Child(Result<i32, Errno>),
    /// The counters of a device's driver.
    Stat(Stat),
}

/// A number as C's `%#x` writes it: hexadecimal, without a prefix for 0.
pub(crate) struct HexOr0(pub(crate) u64);

impl fmt::Display for HexOr0 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0"),
            v => write!(f, "{v:#x}"),
        }
    }
}

/// Bytes, two hexadecimal digits each.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The result of a system call: ` => VALUE ok` or ` => -1 ERRNO`.
pub(crate) struct Arrow(pub(crate) Answer);

impl fmt::Display for Arrow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Ok(value) => write!(f, " => {value} ok"),
            Err(e) => write!(f, " => -1 {e}"),
        }
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(" bm=")?;
        for (k, word) in self.words.iter().enumerate() {
            let comma = if k == 0 { "" } else { "," };
            write!(f, "{comma}{word:x}")?;
        }
        if self.cut {
            let comma = if self.words.is_empty() { "" } else { "," };
            write!(f, "{comma}<unmapped>")?;
        }
        Ok(())
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reply::Text(text) => f.write_str(text),
            Reply::Answer(answer) => Arrow(*answer).fmt(f),
            Reply::Bytes(bytes) => write!(f, " => {}", Hex(bytes)),
            Reply::Unmap(answer, size, words) => {
                write!(f, "{} size={}", Arrow(*answer), HexOr0(*size))?;
                words.as_ref().map_or(Ok(()), |words| words.fmt(f))
            }
            Reply::Get(answer, words) => write!(f, "{}{words}", Arrow(*answer)),
            Reply::Report(answer, words) => match answer {
                Ok(size) => write!(f, " => 0 ok size={}{words}", HexOr0(*size)),
                Err(e) => write!(f, " => -1 {e}{words}"),
            },
            Reply::Returned(Ok(ret)) if *ret < 0 => write!(f, " => ret={ret} {}", Errno(-ret)),
            Reply::Returned(Ok(ret)) => write!(f, " => ret={ret}"),
            Reply::Child(Ok(0)) => f.write_str(" child=0 "),
            Reply::Child(Ok(ret)) => write!(f, " child={ret} {}", Errno(-ret)),
            Reply::Returned(Err(e)) | Reply::Child(Err(e)) => Arrow(Err(*e)).fmt(f),
            Reply::Stat(stat) => {
                let (iova, size) = stat.last;
                write!(
                    f,
                    " => dma_unmap_calls={} last={}+{} pinned={}",
                    stat.unmap_calls,
                    HexOr0(iova),
                    HexOr0(size),
                    stat.pinned
                )
            }
        }
    }
}
