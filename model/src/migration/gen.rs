// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes sequences of operations out of bytes.

use arbitrary::{Arbitrary, Result, Unstructured};
use dirty_core::Errno;

use super::memory::Place;
use super::op::Op;
use super::uart::{HEADER, TOTAL};
use super::Core;

/// A step of a [`Sequence`].
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    Op(Op),
    Fail {
        after: usize,
        errno: Errno,
        breaks: bool,
    },
}

/// Operations on a device with some features, and the device's failures among them.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub(super) features: u64,
    pub(super) steps: Vec<Step>,
}

impl<'a> Arbitrary<'a> for Sequence {
    /// Never fails: any bytes make a sequence.
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let features = u.int_in_range(0..=7)?;
        let mut files = Files::new(features);
        let mut steps = Vec::new();
        while steps.len() < 200 && !u.is_empty() {
            if rarely(u, 12)? {
                let after = u.int_in_range(0..=3)?;
                let errno = *u.choose(&[Errno::EIO, Errno::ENOMEM, Errno::EBUSY])?;
                let breaks = u.arbitrary()?;
                files.core.fail(after, errno, breaks);
                steps.push(Step::Fail {
                    after,
                    errno,
                    breaks,
                });
            } else {
                steps.push(Step::Op(files.op(u)?));
            }
        }
        Ok(Sequence { features, steps })
    }
}

/// As many operations as asked for, out of random bytes, for a device with all
/// features.
///
/// # Errors
///
/// If there are too few bytes; 64 for each operation are enough.
pub fn random(bytes: &[u8], count: usize) -> Result<Vec<Op>> {
    let mut u = Unstructured::new(bytes);
    let mut files = Files::new(7);
    let mut ops = Vec::new();
    for _ in 0..count {
        if u.is_empty() {
            return Err(arbitrary::Error::NotEnoughData);
        }
        ops.push(files.op(&mut u)?);
    }
    Ok(ops)
}

/// True once in `n` times.
fn rarely(u: &mut Unstructured<'_>, n: u8) -> Result<bool> {
    Ok(u.int_in_range(0..=n - 1)? == n - 1)
}

/// How many data files were opened so far. A device that runs along tells it.
struct Files {
    core: Core,
    opened: usize,
}

impl Files {
    fn new(features: u64) -> Self {
        Files {
            core: Core::new(features),
            opened: 0,
        }
    }

    fn op(&mut self, u: &mut Unstructured<'_>) -> Result<Op> {
        let op = op(u, self.opened)?;
        if self.core.run(&op).contains(" f") {
            self.opened += 1;
        }
        Ok(op)
    }
}

/// An operation that is sensible most of the time.
fn op(u: &mut Unstructured<'_>, files: usize) -> Result<Op> {
    let file = |u: &mut Unstructured<'_>| {
        let back: usize = *u.choose(&[0, 1, 1, 1, 1, 1, 1, 2, 2, 3])?;
        Ok(files.saturating_sub(back))
    };
    Ok(match u.int_in_range(0..=19)? {
        0..=8 => Op::Feature {
            n: 2,
            flags: 0x2_0000,
            argsz: 16,
            at: match rarely(u, 20)? {
                true => *u.choose(&Place::ALL)?,
                false => Place::Mem,
            },
            state: match rarely(u, 20)? {
                true => u.int_in_range(0..=9)?,
                false => u.int_in_range(1..=7)?,
            },
        },
        9..=11 => head(u)?,
        12 => Op::Precopy {
            file: file(u)?,
            nr: 0x3b79,
            argsz: 24,
            flags: 0,
            at: Place::Mem,
        },
        13 => Op::Precopy {
            file: file(u)?,
            nr: *u.choose(&[0x3b79, 0x3b79, 0x3b79, 0x3b75, 0x3b7a])?,
            argsz: *u.choose(&[24, 24, 25, 23, 8, 0, u32::MAX])?,
            flags: *u.choose(&[0, 1, 0x8000_0001])?,
            at: *u.choose(&Place::ALL)?,
        },
        14 | 15 => Op::Read {
            file: file(u)?,
            len: *u.choose(&[0, 1, HEADER, TOTAL - HEADER, TOTAL, 100])?,
        },
        16 => Op::Write {
            file: file(u)?,
            len: *u.choose(&[0, 1, HEADER, TOTAL - HEADER, TOTAL, TOTAL + 1])?,
        },
        17 => Op::Copy {
            from: file(u)?,
            to: file(u)?,
        },
        18 => Op::Close { file: file(u)? },
        _ => match rarely(u, 4)? {
            true => Op::Reopen,
            false => Op::Reset,
        },
    })
}

/// A VFIO_DEVICE_FEATURE with any flags, size and place.
fn head(u: &mut Unstructured<'_>) -> Result<Op> {
    // START, STOP and REPORT are only probed or refused here: they concern the log.
    let n = *u.choose(&[1, 1, 2, 2, 2, 9, 9, 12, 6, 7, 8, 0, 3, 10, 13, 0xffff])?;
    let mut flags = *u.choose(&[
        0,
        0x1_0000,
        0x1_0000,
        0x1_0000,
        0x2_0000,
        0x2_0000,
        0x3_0000,
        0x4_0000,
        0x5_0000,
        0x6_0000,
        0x7_0000,
        0x9_0000,
        0x8000_0000,
    ])?;
    if (6..=8).contains(&n) {
        flags |= 0x4_0000;
    }
    Ok(Op::Feature {
        n,
        flags,
        argsz: *u.choose(&[16, 16, 16, 8, 15, 17, 7, 0, u32::MAX])?,
        at: *u.choose(&[
            Place::Mem,
            Place::Mem,
            Place::Mem,
            Place::ReadOnly,
            Place::Half,
            Place::Hole,
        ])?,
        state: u.int_in_range(0..=8)?,
    })
}
