// SPDX-License-Identifier: MIT OR Apache-2.0
//! The naive model: the transitions of each set of features as a list, ways by
//! breadth-first search, and the checks one by one. It shares no code with the core
//! but the errnos.

use std::collections::{HashMap, VecDeque};

use dirty_core::Errno;

use super::memory::{Memory, Place, ADDR};
use super::op::{Op, PATTERN};
use super::text;
use super::uart::{Uart, TOTAL};

const ERROR: u32 = 0;
const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
const RUNNING_P2P: u32 = 5;
const PRE_COPY: u32 = 6;
const PRE_COPY_P2P: u32 = 7;

const GET: u32 = 0x1_0000;
const SET: u32 = 0x2_0000;
const PROBE: u32 = 0x4_0000;

/// The transitions that a driver with these features has.
fn transitions(features: u64) -> Vec<(u32, u32)> {
    let mut list = vec![
        (RESUMING, STOP),
        (STOP, RESUMING),
        (STOP, STOP_COPY),
        (STOP_COPY, STOP),
    ];
    let (p2p, pre_copy) = (features & 2 != 0, features & 4 != 0);
    if p2p {
        list.extend([(RUNNING, RUNNING_P2P), (RUNNING_P2P, RUNNING)]);
        list.extend([(RUNNING_P2P, STOP), (STOP, RUNNING_P2P)]);
    } else {
        list.extend([(RUNNING, STOP), (STOP, RUNNING)]);
    }
    if pre_copy {
        list.extend([(RUNNING, PRE_COPY), (PRE_COPY, RUNNING)]);
    }
    if pre_copy && p2p {
        list.extend([(PRE_COPY, PRE_COPY_P2P), (PRE_COPY_P2P, PRE_COPY)]);
        list.extend([(PRE_COPY_P2P, RUNNING_P2P), (RUNNING_P2P, PRE_COPY_P2P)]);
        list.push((PRE_COPY_P2P, STOP_COPY));
    } else if pre_copy {
        list.push((PRE_COPY, STOP_COPY));
    }
    list
}

fn saves(state: u32) -> bool {
    [STOP_COPY, PRE_COPY, PRE_COPY_P2P].contains(&state)
}

/// The shortest way: all states after `from` up to `to`. In between nothing is saved
/// or loaded, unless all of the way is one save.
pub(super) fn way(features: u64, from: u32, to: u32) -> Option<Vec<u32>> {
    if features & 1 == 0 {
        return None;
    }
    let list = transitions(features);
    let known = |state| list.iter().any(|(a, b)| *a == state || *b == state);
    if !known(from) || !known(to) {
        return None;
    }
    // A save that has ended is not taken up again.
    if from == STOP_COPY && (to == PRE_COPY || to == PRE_COPY_P2P) {
        return None;
    }
    let one_save = saves(from) && saves(to);
    let mut came_from = HashMap::from([(from, from)]);
    let mut queue = VecDeque::from([from]);
    while let Some(at) = queue.pop_front() {
        let inner_ok = at == from
            || match one_save {
                true => saves(at),
                false => !saves(at) && at != RESUMING,
            };
        if !inner_ok {
            continue;
        }
        for (a, b) in &list {
            if *a == at && !came_from.contains_key(b) {
                came_from.insert(*b, at);
                queue.push_back(*b);
            }
        }
    }
    let mut back = vec![to];
    loop {
        let last = back[back.len() - 1];
        if last == from {
            break;
        }
        back.push(*came_from.get(&last)?);
    }
    back.pop();
    back.reverse();
    Some(back)
}

/// The next state on the way from one to another, or `None` if there is no way.
#[must_use]
pub fn next(features: u64, from: u32, to: u32) -> Option<u32> {
    let way = way(features, from, to)?;
    Some(way.first().copied().unwrap_or(to))
}

/// The model of a device that migrates.
#[derive(Debug)]
pub struct Naive {
    features: u64,
    state: u32,
    v2: bool,
    uart: Uart,
    transitions: Vec<(u32, u32)>,
    fail: Option<(usize, Errno, bool)>,
}

impl Naive {
    /// A device with these features, as bits; without STOP_COPY it does not migrate.
    #[must_use]
    pub fn new(features: u64) -> Self {
        Naive {
            features: if features & 1 == 0 { 0 } else { features },
            state: RUNNING,
            v2: false,
            uart: Uart::default(),
            transitions: Vec::new(),
            fail: None,
        }
    }

    /// The state's number.
    #[must_use]
    pub fn state(&self) -> u32 {
        self.state
    }

    /// The transitions that the device has done since the last call.
    pub fn transitions(&mut self) -> Vec<(u32, u32)> {
        std::mem::take(&mut self.transitions)
    }

    /// Lets the device fail a transition, after it has done `after` more.
    pub fn fail(&mut self, after: usize, errno: Errno, breaks: bool) {
        self.fail = Some((after, errno, breaks));
    }

    /// Runs an operation and returns its answer as text.
    pub fn run(&mut self, op: &Op) -> String {
        match *op {
            Op::Feature {
                n,
                flags,
                argsz,
                at,
                state,
            } => {
                let mut memory = Memory::new(at, &[argsz, n | flags, state, PATTERN]);
                let answer = self.feature((n | flags, argsz), at, state, &mut memory);
                let file = answer.as_ref().ok().copied().flatten();
                text::feature(answer.map(|_| ()), at, &memory, file)
            }
            Op::Precopy {
                file,
                nr,
                argsz,
                flags,
                at,
            } => {
                let words = [argsz, flags, PATTERN, PATTERN, PATTERN, PATTERN];
                let mut memory = Memory::new(at, &words);
                let answer = self.precopy(file, nr, argsz, at, &mut memory);
                text::precopy(answer, at, &memory)
            }
            Op::Read { file, len } => text::count(self.uart.read(file, len)),
            Op::Write { file, len } => text::count(self.uart.write(file, &vec![0; len])),
            Op::Copy { from, to } => {
                let bytes = self.uart.taken(from);
                text::count(self.uart.write(to, &bytes))
            }
            Op::Close { file } => text::done(self.uart.close(file)),
            Op::Reset => {
                self.state = RUNNING;
                self.uart.end();
                text::done(Ok(()))
            }
            Op::Reopen => {
                self.uart.close_all();
                self.uart.end();
                self.state = RUNNING;
                self.v2 = false;
                text::done(Ok(()))
            }
        }
    }

    /// VFIO_DEVICE_FEATURE; the number of a data file that was opened.
    fn feature(
        &mut self,
        (flags, argsz): (u32, u32),
        at: Place,
        state: u32,
        memory: &mut Memory,
    ) -> Result<Option<usize>, Errno> {
        let check = |good: bool, errno: Errno| if good { Ok(()) } else { Err(errno) };
        check(at != Place::Hole, Errno::EFAULT)?;
        check(argsz >= 8, Errno::EINVAL)?;
        check(flags < 8 * GET, Errno::EINVAL)?;
        let (get, set, probe) = (flags & GET > 0, flags & SET > 0, flags & PROBE > 0);
        check(probe || !(get && set), Errno::EINVAL)?;
        let n = flags % GET;
        match n {
            1 | 2 | 9 => check(self.features > 0, Errno::ENOTTY)?,
            6..=8 => {}
            12 => check(self.features & 4 > 0, Errno::EINVAL)?,
            _ => return Err(Errno::ENOTTY),
        }
        check(!get || [1, 2, 8, 9].contains(&n), Errno::EINVAL)?;
        check(!set || [2, 6, 7, 12].contains(&n), Errno::EINVAL)?;
        if probe {
            return Ok(None);
        }
        check(get || set, Errno::EINVAL)?;
        let size = match n {
            7 | 12 => 0,
            6 => 24,
            8 => 32,
            _ => 8,
        };
        check(argsz >= 8 + size, Errno::EINVAL)?;
        let reads = [2, 6, 8].contains(&n);
        check(!reads || at != Place::Half, Errno::EFAULT)?;

        let mut opened = None;
        let mut result = Ok(());
        let (low, high) = match n {
            1 => (self.features as u32, 0),
            9 => (TOTAL as u32, 0),
            2 if get => (self.state, u32::MAX),
            2 => {
                result = self.set(state).map(|file| opened = file);
                (state, if opened.is_some() { 0x1234 } else { u32::MAX })
            }
            12 => {
                self.v2 = true;
                return Ok(None);
            }
            _ => return Ok(None),
        };
        check(at == Place::Mem, Errno::EFAULT)?;
        let answer = u64::from(low) | u64::from(high) << 32;
        let written = memory.write(ADDR + 8, &answer.to_ne_bytes());
        written.expect("memory that can be written");
        result.map(|()| opened.map(|index| self.uart.give(index)))
    }

    fn set(&mut self, to: u32) -> Result<Option<usize>, Errno> {
        let mut opened = None;
        if self.state == to {
            return Ok(None);
        }
        for to in way(self.features, self.state, to).ok_or(Errno::EINVAL)? {
            let from = self.state;
            match &mut self.fail {
                Some((0, errno, breaks)) => {
                    let errno = *errno;
                    if *breaks {
                        self.state = ERROR;
                    }
                    self.fail = None;
                    return Err(errno);
                }
                Some((left, ..)) => *left -= 1,
                None => {}
            }
            opened = None;
            match (from, to) {
                (RESUMING, STOP) => self.uart.end_load()?,
                (STOP, RESUMING) => opened = Some(self.uart.begin_load()),
                (STOP, STOP_COPY) => opened = Some(self.uart.begin_save(true)),
                (RUNNING, PRE_COPY) | (RUNNING_P2P, PRE_COPY_P2P) => {
                    opened = Some(self.uart.begin_save(false));
                }
                (PRE_COPY | PRE_COPY_P2P, STOP_COPY) => self.uart.save_rest(),
                (STOP_COPY, STOP) | (PRE_COPY, RUNNING) | (PRE_COPY_P2P, RUNNING_P2P) => {
                    self.uart.end();
                }
                _ => {}
            }
            self.transitions.push((from, to));
            self.state = to;
        }
        Ok(opened)
    }

    fn precopy(
        &mut self,
        file: usize,
        nr: u32,
        argsz: u32,
        at: Place,
        memory: &mut Memory,
    ) -> Result<(), Errno> {
        let check = |good: bool, errno: Errno| if good { Ok(()) } else { Err(errno) };
        check(self.uart.has_precopy(file)? && nr == 0x3b79, Errno::ENOTTY)?;
        check(at.readable() >= 24, Errno::EFAULT)?;
        check(argsz >= 24, Errno::EINVAL)?;
        let pre_copy = [PRE_COPY, PRE_COPY_P2P].contains(&self.state);
        check(pre_copy, Errno::EINVAL)?;
        let left = self.uart.left(file)?;
        check(at == Place::Mem, Errno::EFAULT)?;
        if self.v2 {
            memory.bytes[4..8].fill(0);
        }
        memory.bytes[8..16].copy_from_slice(&left.to_ne_bytes());
        memory.bytes[16..24].fill(0);
        Ok(())
    }
}
