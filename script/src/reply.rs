// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an operation answered, and how the recordings write it.

use std::fmt;

use dirty_core::Errno;

use crate::system::{Answer, Stat};

/// Words of a bitmap that were shown; `cut` where they cannot be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Words {
    /// The words that can be read.
    pub words: Vec<u64>,
    /// Whether one that cannot came after them.
    pub cut: bool,
}

/// What an operation answered. `Display` is what follows its text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// In words of its own.
    Text(String),
    /// A system call's answer.
    Answer(Answer),
    /// Bytes of memory.
    Bytes(Vec<u8>),
    /// UNMAP_DMA: the size in the structure afterwards, and the bitmap.
    Unmap(Answer, u64, Option<Words>),
    /// GET_BITMAP.
    Get(Answer, Words),
    /// A typed report or harvest: bytes unmapped, and the bitmap.
    Report(Result<u64, Errno>, Words),
    /// What a call inside the kernel returned.
    Returned(Result<i32, Errno>),
    /// Likewise in a child.
    Child(Result<i32, Errno>),
    /// What a driver has counted.
    Stat(Stat),
}

/// C's `%#x`: no prefix before 0.
pub(crate) struct Alternate(pub(crate) u64);

impl fmt::Display for Alternate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("0"),
            v => write!(f, "{v:#x}"),
        }
    }
}

/// Bytes as two digits each.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// ` => value ok` or ` => -1 errno`.
pub(crate) struct Result_(pub(crate) Answer);

impl fmt::Display for Result_ {
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
            Reply::Answer(answer) => Result_(*answer).fmt(f),
            Reply::Bytes(bytes) => write!(f, " => {}", Hex(bytes)),
            Reply::Unmap(answer, size, words) => {
                write!(f, "{} size={}", Result_(*answer), Alternate(*size))?;
                words.as_ref().map_or(Ok(()), |words| words.fmt(f))
            }
            Reply::Get(answer, words) => write!(f, "{}{words}", Result_(*answer)),
            Reply::Report(answer, words) => match answer {
                Ok(size) => write!(f, " => 0 ok size={}{words}", Alternate(*size)),
                Err(e) => write!(f, " => -1 {e}{words}"),
            },
            Reply::Returned(Ok(ret)) if *ret < 0 => write!(f, " => ret={ret} {}", Errno(-ret)),
            Reply::Returned(Ok(ret)) => write!(f, " => ret={ret}"),
            Reply::Child(Ok(0)) => f.write_str(" child=0 "),
            Reply::Child(Ok(ret)) => write!(f, " child={ret} {}", Errno(-ret)),
            Reply::Returned(Err(e)) | Reply::Child(Err(e)) => Result_(Err(*e)).fmt(f),
            Reply::Stat(stat) => {
                let (iova, size) = stat.last;
                write!(
                    f,
                    " => dma_unmap_calls={} last={}+{} pinned={}",
                    stat.unmap_calls,
                    Alternate(iova),
                    Alternate(size),
                    stat.pinned
                )
            }
        }
    }
}
