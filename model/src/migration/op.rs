// SPDX-License-Identifier: MIT OR Apache-2.0
//! Operations on a device that migrates, and their text.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use super::memory::Place;

/// What the field of an argument holds that an ioctl may write, before it does.
pub const PATTERN: u32 = 0x7777_7777;

/// An operation on a device. Data files have numbers, in the order in which they were
/// opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// VFIO_DEVICE_FEATURE. The feature's data are `state`, [`PATTERN`], and zeros.
    Feature {
        /// The feature's number, in the low 16 bits of the flags.
        n: u32,
        /// GET, SET, PROBE, and unknown bits.
        flags: u32,
        /// The size that the argument claims.
        argsz: u32,
        /// Where the argument is.
        at: Place,
        /// The first 32 bits of the data.
        state: u32,
    },
    /// An ioctl of a data file. Its argument has [`PATTERN`] where bytes come back.
    Precopy {
        /// The data file.
        file: usize,
        /// The ioctl's number.
        nr: u32,
        /// The size that the argument claims.
        argsz: u32,
        /// The flags that the caller leaves there.
        flags: u32,
        /// Where the argument is.
        at: Place,
    },
    /// Reads up to `len` bytes of a data file.
    Read {
        /// The data file.
        file: usize,
        /// Bytes.
        len: usize,
    },
    /// Writes `len` zeros to a data file.
    Write {
        /// The data file.
        file: usize,
        /// Bytes.
        len: usize,
    },
    /// Writes all that was read of one data file to another, with one write.
    Copy {
        /// The data file that was read.
        from: usize,
        /// The data file that is written.
        to: usize,
    },
    /// Closes a data file.
    Close {
        /// The data file.
        file: usize,
    },
    /// VFIO_DEVICE_RESET.
    Reset,
    /// The last user closes the device, and another opens it. The first closes the
    /// data files too.
    Reopen,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Op::Feature {
                n,
                flags,
                argsz,
                at,
                state,
            } => write!(
                f,
                "feature n={n} flags={flags:#x} argsz={argsz} at={at} state={state}"
            ),
            Op::Precopy {
                file,
                nr,
                argsz,
                flags,
                at,
            } => write!(
                f,
                "precopy file={file} nr={nr:#x} argsz={argsz} flags={flags:#x} at={at}"
            ),
            Op::Read { file, len } => write!(f, "read file={file} len={len}"),
            Op::Write { file, len } => write!(f, "write file={file} len={len}"),
            Op::Copy { from, to } => write!(f, "copy from={from} to={to}"),
            Op::Close { file } => write!(f, "close file={file}"),
            Op::Reset => f.write_str("reset"),
            Op::Reopen => f.write_str("reopen"),
        }
    }
}

impl FromStr for Op {
    type Err = String;

    /// Reads what [`Display`](fmt::Display) prints.
    fn from_str(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let name = words.next().ok_or("an empty line")?;
        let fields: HashMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
        let text = |key: &str| {
            let value = fields.get(key).copied();
            value.ok_or_else(|| format!("{key}= is missing: {line}"))
        };
        let number = |key: &str| {
            let value = text(key)?;
            let parsed = match value.strip_prefix("0x") {
                Some(hex) => u32::from_str_radix(hex, 16),
                None => value.parse(),
            };
            parsed.map_err(|e| format!("{key}={value}: {e}"))
        };
        let index = |key: &str| number(key).map(|n| n as usize);
        Ok(match name {
            "feature" => Op::Feature {
                n: number("n")?,
                flags: number("flags")?,
                argsz: number("argsz")?,
                at: text("at")?.parse()?,
                state: number("state")?,
            },
            "precopy" => Op::Precopy {
                file: index("file")?,
                nr: number("nr")?,
                argsz: number("argsz")?,
                flags: number("flags")?,
                at: text("at")?.parse()?,
            },
            "read" => Op::Read {
                file: index("file")?,
                len: index("len")?,
            },
            "write" => Op::Write {
                file: index("file")?,
                len: index("len")?,
            },
            "copy" => Op::Copy {
                from: index("from")?,
                to: index("to")?,
            },
            "close" => Op::Close {
                file: index("file")?,
            },
            "reset" => Op::Reset,
            "reopen" => Op::Reopen,
            _ => return Err(format!("an unknown operation: {line}")),
        })
    }
}
