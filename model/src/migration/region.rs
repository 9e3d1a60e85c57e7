// SPDX-License-Identifier: MIT OR Apache-2.0
//! The migration region: a naive model, and its comparison with the core's.

use arbitrary::{Arbitrary, Result, Unstructured};
use dirty_core::migration::v1::{DataSection, Region};
use dirty_core::migration::{Device, Failure, Transition};
use dirty_core::Errno;

use super::naive::way;

/// Where the data section begins, and its bytes.
const OFFSET: u64 = 40;
const ROOM: u64 = 8;

/// An operation on the region, or on the device behind it.
#[derive(Clone, Debug)]
enum Op {
    Read {
        offset: u64,
        len: usize,
    },
    Write {
        offset: u64,
        bytes: Vec<u8>,
    },
    Reset,
    /// The device has so many bytes more to save.
    More(u64),
    /// The device fails what it is asked for, after so many that it does.
    Fail {
        after: usize,
        breaks: bool,
    },
}

/// Operations on a migration region.
#[derive(Clone, Debug)]
pub struct RegionSequence(Vec<Op>);

impl<'a> Arbitrary<'a> for RegionSequence {
    /// Never fails: any bytes make a sequence.
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let mut ops = Vec::new();
        while ops.len() < 200 && !u.is_empty() {
            ops.push(op(u)?);
        }
        Ok(RegionSequence(ops))
    }
}

fn op(u: &mut Unstructured<'_>) -> Result<Op> {
    let registers = [(0, 4), (4, 4), (8, 8), (16, 8), (24, 8)];
    Ok(match u.int_in_range(0..=15)? {
        0..=2 => Op::Write {
            offset: 0,
            bytes: u32::to_ne_bytes(*u.choose(&[0, 1, 2, 2, 3, 3, 4, 4, 5, 6, 7, 8])?).into(),
        },
        3..=6 => {
            let (offset, len) = *u.choose(&registers)?;
            Op::Read { offset, len }
        }
        7 => Op::Read {
            offset: OFFSET + u.int_in_range(0..=ROOM)?,
            len: u.int_in_range(0..=9)?,
        },
        8 => Op::Read { offset: 16, len: 8 },
        9 | 10 => Op::Write {
            offset: OFFSET + u.int_in_range(0..=3)?,
            bytes: u.arbitrary::<[u8; 4]>()?.into(),
        },
        11 => Op::Write {
            offset: 24,
            bytes: u.int_in_range(0..=ROOM + 1)?.to_ne_bytes().into(),
        },
        12 => Op::More(u.int_in_range(0..=20)?),
        13 => Op::Fail {
            after: u.int_in_range(0..=2)?,
            breaks: u.arbitrary()?,
        },
        14 => Op::Reset,
        _ => {
            let offset = match u.arbitrary()? {
                true => u.int_in_range(0..=50)?,
                false => u64::MAX - u.int_in_range(0..=9)?,
            };
            match u.arbitrary()? {
                true => Op::Read {
                    offset,
                    len: u.int_in_range(0..=9)?,
                },
                false => Op::Write {
                    offset,
                    bytes: vec![0; u.int_in_range(0..=9)?],
                },
            }
        }
    })
}

/// The device: what it saves is 0, 1, 2 and so on.
#[derive(Debug, Default, PartialEq)]
struct Counting {
    saved: u64,
    left: u64,
    section: [u8; ROOM as usize],
    loaded: Vec<u8>,
    done: Vec<(u32, u32)>,
    fail: Option<(usize, bool)>,
}

impl Counting {
    /// Whether it fails now, and whether that breaks it.
    fn fails(&mut self) -> Option<bool> {
        match &mut self.fail {
            Some((0, breaks)) => {
                let breaks = *breaks;
                self.fail = None;
                Some(breaks)
            }
            Some((left, _)) => {
                *left -= 1;
                None
            }
            None => None,
        }
    }
}

impl Device for Counting {
    type File = ();

    fn begin(&mut self, transition: Transition) -> std::result::Result<(), Failure> {
        self.step(transition)
    }

    fn step(&mut self, transition: Transition) -> std::result::Result<(), Failure> {
        match self.fails() {
            Some(true) => Err(Failure::Broken(Errno::EIO)),
            Some(false) => Err(Failure::Unchanged(Errno::EIO)),
            None => {
                self.done.push((transition.from.raw(), transition.to.raw()));
                Ok(())
            }
        }
    }

    fn stop_copy_length(&mut self) -> std::result::Result<u64, Errno> {
        Ok(self.left)
    }
}

impl DataSection for Counting {
    fn pending(&mut self) -> std::result::Result<u64, Errno> {
        self.fails().map_or(Ok(self.left), |_| Err(Errno::EIO))
    }

    fn stage(&mut self, room: u64) -> std::result::Result<u64, Errno> {
        if self.fails().is_some() {
            return Err(Errno::EIO);
        }
        let n = room.min(self.left);
        for (byte, value) in self.section.iter_mut().zip(self.saved..self.saved + n) {
            *byte = value as u8;
        }
        self.saved += n;
        self.left -= n;
        Ok(n)
    }

    fn load(&mut self, size: u64) -> std::result::Result<(), Errno> {
        if self.fails().is_some() {
            return Err(Errno::EIO);
        }
        self.loaded.extend(&self.section[..size as usize]);
        Ok(())
    }

    fn read(&mut self, at: u64, to: &mut [u8]) -> std::result::Result<(), Errno> {
        to.copy_from_slice(&self.section[at as usize..at as usize + to.len()]);
        Ok(())
    }

    fn write(&mut self, at: u64, from: &[u8]) -> std::result::Result<(), Errno> {
        self.section[at as usize..at as usize + from.len()].copy_from_slice(from);
        Ok(())
    }
}

/// The model: the state's bits, the bytes of the chunk that can be read, and whether
/// data can be written.
#[derive(Debug)]
struct Model {
    bits: u32,
    chunk: Option<Vec<u8>>,
    open: bool,
    device: Counting,
}

/// Bits of `device_state` and the state's number in today's interface.
const STATES: [(u32, u32); 6] = [(0, 1), (1, 2), (2, 3), (3, 6), (4, 4), (6, 0)];

fn number(bits: u32) -> Option<u32> {
    STATES.iter().find(|s| s.0 == bits).map(|s| s.1)
}

type Answer = std::result::Result<Vec<u8>, Errno>;

impl Model {
    fn new() -> Self {
        Model {
            bits: 1,
            chunk: None,
            open: false,
            device: Counting::default(),
        }
    }

    fn saving(&self) -> bool {
        self.bits == 2 || self.bits == 3
    }

    fn read(&mut self, offset: u64, len: usize) -> Answer {
        let failed = self.bits == 6;
        match (offset, len) {
            (0, 4) => Ok(self.bits.to_ne_bytes().into()),
            (4, 4) => Ok(vec![0; 4]),
            _ if failed => Err(Errno::EINVAL),
            (8, 8) if !self.saving() => Ok(vec![0; 8]),
            (8, 8) => {
                self.chunk = None;
                Ok(self.device.pending()?.to_ne_bytes().into())
            }
            (16, 8) => {
                if self.bits == 4 {
                    self.open = true;
                } else if !self.saving() {
                    return Err(Errno::EINVAL);
                } else if self.chunk.is_none() {
                    let n = self.device.stage(ROOM)? as usize;
                    self.chunk = Some(self.device.section[..n].into());
                }
                Ok(OFFSET.to_ne_bytes().into())
            }
            (24, 8) => {
                let chunk = self.chunk.as_ref().ok_or(Errno::EINVAL)?;
                Ok((chunk.len() as u64).to_ne_bytes().into())
            }
            _ => {
                let at = offset.checked_sub(OFFSET).ok_or(Errno::EINVAL)? as usize;
                let end = at.checked_add(len).ok_or(Errno::EINVAL)?;
                let chunk = self.chunk.as_ref().ok_or(Errno::EINVAL)?;
                chunk.get(at..end).map(<[u8]>::to_vec).ok_or(Errno::EINVAL)
            }
        }
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Answer {
        match (offset, bytes.len()) {
            (0, 4) => self.set(u32::from_ne_bytes(bytes.try_into().expect("4 bytes"))),
            (4, 4) => Ok(vec![]),
            (8 | 16, 8) => Err(Errno::EINVAL),
            _ if !self.open => Err(Errno::EINVAL),
            (24, 8) => {
                let size = u64::from_ne_bytes(bytes.try_into().expect("8 bytes"));
                if size > ROOM {
                    return Err(Errno::EINVAL);
                }
                self.open = false;
                self.device.load(size).map(|()| vec![])
            }
            (_, len) => {
                let at = offset.checked_sub(OFFSET).ok_or(Errno::EINVAL)?;
                if at > ROOM || at + len as u64 > ROOM {
                    return Err(Errno::EINVAL);
                }
                self.device.write(at, bytes).map(|()| vec![])
            }
        }
    }

    fn set(&mut self, bits: u32) -> Answer {
        if bits > 4 {
            return Err(Errno::EINVAL);
        }
        let (from, to) = (number(self.bits), number(bits));
        let (from, to) = from.zip(to).ok_or(Errno::EINVAL)?;
        // The device has all but the states for several devices.
        let mut at = from;
        let mut answer = Ok(vec![]);
        for next in way(5, from, to).ok_or(Errno::EINVAL)? {
            match self.device.fails() {
                None => self.device.done.push((at, next)),
                Some(breaks) => {
                    answer = Err(Errno::EIO);
                    if breaks {
                        at = 0;
                    }
                    break;
                }
            }
            at = next;
        }
        // A chunk of pre-copy can be read to its end.
        if at != from && !(from == 6 && at == 3) {
            self.chunk = None;
            self.open = false;
        }
        let found = STATES.iter().find(|s| s.1 == at);
        self.bits = found.expect("a state of the region").0;
        answer
    }
}

/// Runs a sequence on the core's region and on the model. Each operation must give
/// the same answer, and ask the device for the same.
///
/// # Errors
///
/// The first disagreement, and the operations up to it.
pub fn compare_region(sequence: &RegionSequence) -> std::result::Result<(), String> {
    let mut region = Region::new(OFFSET, ROOM).ok_or("no region")?;
    let mut device = Counting::default();
    let mut model = Model::new();
    let mut script = Vec::new();
    for op in &sequence.0 {
        script.push(op);
        let (ours, theirs) = match op {
            Op::Read { offset, len } => {
                let mut bytes = vec![0; *len];
                let done = region.read(&mut device, *offset, &mut bytes);
                let ours = done.map(|()| bytes).map_err(dirty_core::Error::errno);
                (ours, model.read(*offset, *len))
            }
            Op::Write { offset, bytes } => {
                let done = region.write(&mut device, *offset, bytes);
                let ours = done.map(|()| vec![]).map_err(dirty_core::Error::errno);
                (ours, model.write(*offset, bytes))
            }
            Op::Reset => {
                region.reset();
                (model.bits, model.chunk, model.open) = (1, None, false);
                continue;
            }
            Op::More(n) => {
                device.left += n;
                model.device.left += n;
                continue;
            }
            Op::Fail { after, breaks } => {
                device.fail = Some((*after, *breaks));
                model.device.fail = device.fail;
                continue;
            }
        };
        if ours != theirs || region.device_state() != model.bits || device != model.device {
            return Err(format!(
                "{script:#?}\ncore:  {ours:?} {} {device:?}\nmodel: {theirs:?} {} {:?}",
                region.device_state(),
                model.bits,
                model.device
            ));
        }
    }
    Ok(())
}
