// SPDX-License-Identifier: MIT OR Apache-2.0
//! The migration region: which states can be written and what the device is asked for
//! (M8), and in which order registers and data are accessed (M9).

use dirty_core::migration::v1::*;
use dirty_core::migration::{Device, Failure, State, Transition};
use dirty_core::{Errno, Error};

const OFFSET: u64 = 0x1000;
const SIZE: u64 = 16;

const STOP: u32 = 0;
const RUNNING: u32 = 1;
const STOP_COPY: u32 = 2;
const PRE_COPY: u32 = 3;
const RESUMING: u32 = 4;
const ERROR: u32 = 6;

const DEVICE_STATE: u64 = 0;
const PENDING: u64 = 8;
const DATA_OFFSET: u64 = 16;
const DATA_SIZE: u64 = 24;

/// A device that saves `left` and loads into `loaded`.
#[derive(Default)]
struct Blob {
    left: Vec<u8>,
    loaded: Vec<u8>,
    section: Vec<u8>,
    asked: Vec<(State, State)>,
    fail: Option<Failure>,
}

impl Device for Blob {
    type File = ();
    fn begin(&mut self, transition: Transition) -> Result<(), Failure> {
        self.step(transition)
    }
    fn step(&mut self, transition: Transition) -> Result<(), Failure> {
        self.asked.push((transition.from, transition.to));
        self.fail.take().map_or(Ok(()), Err)
    }
    fn stop_copy_length(&mut self) -> Result<u64, Errno> {
        Ok(self.left.len() as u64)
    }
}

impl DataSection for Blob {
    fn pending(&mut self) -> Result<u64, Errno> {
        Ok(self.left.len() as u64)
    }
    fn stage(&mut self, room: u64) -> Result<u64, Errno> {
        if let Some(Failure::Unchanged(errno)) = self.fail.take() {
            return Err(errno);
        }
        let n = self.left.len().min(room as usize);
        self.section = self.left.drain(..n).collect();
        Ok(n as u64)
    }
    fn load(&mut self, size: u64) -> Result<(), Errno> {
        if let Some(Failure::Unchanged(errno)) = self.fail.take() {
            return Err(errno);
        }
        self.loaded.extend(&self.section[..size as usize]);
        Ok(())
    }
    fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        let at = at as usize;
        to.copy_from_slice(&self.section[at..at + to.len()]);
        Ok(())
    }
    fn write(&mut self, at: u64, from: &[u8]) -> Result<(), Errno> {
        let at = at as usize;
        self.section.resize(SIZE as usize, 0);
        self.section[at..at + from.len()].copy_from_slice(from);
        Ok(())
    }
}

struct Rig {
    region: Region,
    device: Blob,
}

impl Rig {
    fn new() -> Rig {
        Rig {
            region: Region::new(OFFSET, SIZE).expect("a region"),
            device: Blob::default(),
        }
    }

    /// A device in a state, which it has reached from RUNNING.
    fn in_state(state: u32) -> Rig {
        let mut rig = Rig::new();
        if state == ERROR {
            rig.device.fail = Some(Failure::Broken(Errno::EIO));
            assert_eq!(rig.set(STOP), Err(Error::Device(Errno::EIO)));
        } else {
            rig.set(state).expect("a state");
        }
        rig.device.asked.clear();
        rig
    }

    fn read<const N: usize>(&mut self, offset: u64) -> Result<[u8; N], Error> {
        let mut bytes = [0xee; N];
        self.region.read(&mut self.device, offset, &mut bytes)?;
        Ok(bytes)
    }

    fn get(&mut self, offset: u64) -> Result<u64, Error> {
        self.read(offset).map(u64::from_ne_bytes)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.region.write(&mut self.device, offset, bytes)
    }

    fn set(&mut self, state: u32) -> Result<(), Error> {
        self.write(DEVICE_STATE, &state.to_ne_bytes())
    }

    fn state(&mut self) -> u32 {
        self.read(DEVICE_STATE)
            .map(u32::from_ne_bytes)
            .expect("the state")
    }
}

#[test]
fn a_region_s_data_begin_after_its_registers() {
    assert!(Region::new(31, 1).is_none());
    assert!(Region::new(u64::MAX, 1).is_none());
    assert_eq!(Region::new(32, 0).expect("a region").size(), 32);
    assert_eq!(Region::new(OFFSET, SIZE).expect("a region").size(), 0x1010);
}

/// Each state to each value of three bits: the transitions that the device is asked
/// for, or why the write is refused.
#[test]
fn every_state_to_every_value() {
    use State::{PreCopy as P, Resuming as L, Running as R, Stop as S, StopCopy as C};
    let refused = Err(Error::UnknownState);
    type Way = Result<&'static [(State, State)], Error>;
    let ways: [(u32, [Way; 5]); 5] = [
        // to STOP, RUNNING, STOP_COPY, PRE_COPY, RESUMING
        (
            STOP,
            [
                Ok(&[]),
                Ok(&[(S, R)]),
                Ok(&[(S, C)]),
                Ok(&[(S, R), (R, P)]),
                Ok(&[(S, L)]),
            ],
        ),
        (
            RUNNING,
            [
                Ok(&[(R, S)]),
                Ok(&[]),
                Ok(&[(R, S), (S, C)]),
                Ok(&[(R, P)]),
                Ok(&[(R, S), (S, L)]),
            ],
        ),
        (
            STOP_COPY,
            [
                Ok(&[(C, S)]),
                Ok(&[(C, S), (S, R)]),
                Ok(&[]),
                Err(Error::NoTransition),
                Ok(&[(C, S), (S, L)]),
            ],
        ),
        (
            PRE_COPY,
            [
                Ok(&[(P, R), (R, S)]),
                Ok(&[(P, R)]),
                Ok(&[(P, C)]),
                Ok(&[]),
                Ok(&[(P, R), (R, S), (S, L)]),
            ],
        ),
        (
            RESUMING,
            [
                Ok(&[(L, S)]),
                Ok(&[(L, S), (S, R)]),
                Ok(&[(L, S), (S, C)]),
                Ok(&[(L, S), (S, R), (R, P)]),
                Ok(&[]),
            ],
        ),
    ];
    for (from, row) in ways {
        for (to, way) in (0..).zip(row) {
            let mut rig = Rig::in_state(from);
            assert_eq!(rig.state(), from);
            assert_eq!(rig.set(to), way.map(|_| ()), "{from} to {to}");
            assert_eq!(rig.device.asked, way.unwrap_or_default(), "{from} to {to}");
            assert_eq!(rig.state(), if way.is_ok() { to } else { from });
        }
        // RESUMING beside another bit, and unknown bits.
        for to in [5, 6, 7, 8, 9, 0x8000_0001] {
            let mut rig = Rig::in_state(from);
            assert_eq!(rig.set(to), refused, "{from} to {to}");
            assert_eq!((rig.state(), rig.device.asked.len()), (from, 0));
        }
    }
}

#[test]
fn only_a_reset_leaves_a_failure() {
    let mut rig = Rig::in_state(ERROR);
    assert_eq!(rig.state(), ERROR);
    for to in 0..5 {
        assert_eq!(rig.set(to), Err(Error::DeviceFailed));
    }
    for offset in [PENDING, DATA_OFFSET, DATA_SIZE, OFFSET] {
        assert_eq!(rig.get(offset), Err(Error::DeviceFailed));
    }
    assert_eq!(rig.write(OFFSET, &[1]), Err(Error::DeviceFailed));
    assert_eq!(rig.write(DATA_SIZE, &[0; 8]), Err(Error::DeviceFailed));
    assert_eq!(rig.read(4), Ok([0; 4]));
    rig.region.reset();
    assert_eq!(rig.state(), RUNNING);
    assert_eq!(rig.set(RESUMING), Ok(()));
}

#[test]
fn a_device_that_refuses_stays_where_it_came() {
    let mut rig = Rig::in_state(RUNNING);
    rig.device.fail = Some(Failure::Unchanged(Errno::ENOSPC));
    assert_eq!(rig.set(STOP_COPY), Err(Error::Device(Errno::ENOSPC)));
    assert_eq!(rig.state(), RUNNING);
    let mut rig = Rig::in_state(RESUMING);
    rig.device.fail = Some(Failure::Unchanged(Errno::EINVAL));
    assert_eq!(rig.set(RUNNING), Err(Error::Device(Errno::EINVAL)));
    assert_eq!(rig.state(), RESUMING);
}

#[test]
fn registers_are_accessed_as_a_whole() {
    for state in [STOP, RUNNING, STOP_COPY, PRE_COPY, RESUMING, ERROR] {
        let registers = [(0, 4), (4, 4), (8, 8), (16, 8), (24, 8)];
        for (offset, len) in (0..40).flat_map(|at| (0..=16).map(move |len| (at, len))) {
            let mut rig = Rig::in_state(state);
            let read = rig.region.read(&mut rig.device, offset, &mut vec![0; len]);
            let known = registers.contains(&(offset, len));
            assert_eq!(
                read == Err(Error::RegionAccess),
                !known,
                "read {offset} {len}"
            );
            let write = rig.write(offset, &vec![0; len]);
            let writable = known && ![8, 16].contains(&offset);
            assert_eq!(
                write == Err(Error::RegionAccess),
                !writable,
                "write {offset} {len}"
            );
        }
    }
    let mut rig = Rig::in_state(RESUMING);
    rig.get(DATA_OFFSET).expect("an open section");
    assert_eq!(rig.write(OFFSET, &[7; 16]), Ok(()));
    assert_eq!(rig.write(OFFSET + 15, &[7]), Ok(()));
    for (offset, len) in [
        (OFFSET, 17),
        (OFFSET + 15, 2),
        (OFFSET - 1, 1),
        (u64::MAX, 2),
    ] {
        assert_eq!(rig.write(offset, &vec![7; len]), Err(Error::RegionAccess));
    }
}

#[test]
fn outside_of_a_transfer_there_are_no_data() {
    for state in [STOP, RUNNING] {
        let mut rig = Rig::in_state(state);
        rig.device.left = vec![1; 5];
        assert_eq!(rig.get(PENDING), Ok(0));
        assert_eq!(rig.get(DATA_OFFSET), Err(Error::RegionOrder));
        assert_eq!(rig.get(DATA_SIZE), Err(Error::RegionOrder));
        assert_eq!(rig.write(DATA_SIZE, &[0; 8]), Err(Error::RegionOrder));
        assert_eq!(rig.read::<1>(OFFSET), Err(Error::RegionOrder));
        assert_eq!(rig.write(OFFSET, &[1]), Err(Error::RegionOrder));
    }
}

#[test]
fn a_save_is_read_in_chunks() {
    for state in [STOP_COPY, PRE_COPY] {
        let mut rig = Rig::in_state(state);
        rig.device.left = (0..20).collect();
        // Before data_offset was read there is no chunk.
        assert_eq!(rig.get(DATA_SIZE), Err(Error::RegionOrder));
        assert_eq!(rig.read::<1>(OFFSET), Err(Error::RegionOrder));
        assert_eq!((rig.get(PENDING), rig.get(PENDING)), (Ok(20), Ok(20)));
        // Reading it again changes nothing.
        assert_eq!(
            (rig.get(DATA_OFFSET), rig.get(DATA_OFFSET)),
            (Ok(OFFSET), Ok(OFFSET))
        );
        assert_eq!((rig.get(DATA_SIZE), rig.get(DATA_SIZE)), (Ok(16), Ok(16)));
        assert_eq!(rig.read(OFFSET), Ok::<[u8; 4], _>([0, 1, 2, 3]));
        assert_eq!(rig.read(OFFSET + 12), Ok::<[u8; 4], _>([12, 13, 14, 15]));
        // The section is read-only, and so is its size.
        assert_eq!(rig.write(OFFSET, &[1]), Err(Error::RegionOrder));
        assert_eq!(rig.write(DATA_SIZE, &[0; 8]), Err(Error::RegionOrder));
        // pending_bytes ends the chunk.
        assert_eq!(rig.get(PENDING), Ok(4));
        assert_eq!(rig.get(DATA_SIZE), Err(Error::RegionOrder));
        assert_eq!(rig.read::<1>(OFFSET), Err(Error::RegionOrder));
        assert_eq!(
            (rig.get(DATA_OFFSET), rig.get(DATA_SIZE)),
            (Ok(OFFSET), Ok(4))
        );
        assert_eq!(rig.read(OFFSET), Ok::<[u8; 4], _>([16, 17, 18, 19]));
        assert_eq!(rig.read::<5>(OFFSET), Err(Error::RegionOrder));
        assert_eq!(rig.get(PENDING), Ok(0));
        // Nothing is left: a chunk of no bytes.
        assert_eq!(
            (rig.get(DATA_OFFSET), rig.get(DATA_SIZE)),
            (Ok(OFFSET), Ok(0))
        );
    }
}

#[test]
fn a_chunk_of_pre_copy_is_still_there_when_the_device_has_stopped() {
    let mut rig = Rig::in_state(PRE_COPY);
    rig.device.left = vec![1; 3];
    assert_eq!(
        (rig.get(DATA_OFFSET), rig.set(STOP_COPY)),
        (Ok(OFFSET), Ok(()))
    );
    rig.device.left = vec![2; 2];
    assert_eq!((rig.get(DATA_SIZE), rig.read(OFFSET)), (Ok(3), Ok([1; 3])));
    assert_eq!(
        (rig.get(PENDING), rig.get(DATA_OFFSET)),
        (Ok(2), Ok(OFFSET))
    );
    assert_eq!((rig.get(DATA_SIZE), rig.read(OFFSET)), (Ok(2), Ok([2; 2])));
    // The end of the save drops it, also on the way into another.
    assert_eq!(rig.set(RUNNING), Ok(()));
    assert_eq!(rig.set(PRE_COPY), Ok(()));
    assert_eq!(rig.get(DATA_SIZE), Err(Error::RegionOrder));
    // The same state again is no change.
    rig.device.left = vec![3; 1];
    assert_eq!(
        (rig.get(DATA_OFFSET), rig.set(PRE_COPY)),
        (Ok(OFFSET), Ok(()))
    );
    assert_eq!(rig.get(DATA_SIZE), Ok(1));
}

#[test]
fn a_load_is_written_in_chunks() {
    let mut rig = Rig::in_state(RESUMING);
    assert_eq!(rig.get(PENDING), Ok(0));
    assert_eq!(rig.get(DATA_SIZE), Err(Error::RegionOrder));
    assert_eq!(rig.write(OFFSET, &[1]), Err(Error::RegionOrder));
    assert_eq!(
        rig.write(DATA_SIZE, &1u64.to_ne_bytes()),
        Err(Error::RegionOrder)
    );
    assert_eq!(rig.get(DATA_OFFSET), Ok(OFFSET));
    assert_eq!(rig.get(DATA_SIZE), Err(Error::RegionOrder));
    assert_eq!(rig.read::<1>(OFFSET), Err(Error::RegionOrder));
    assert_eq!(rig.write(OFFSET, &[1, 2, 3, 4]), Ok(()));
    assert_eq!(rig.write(OFFSET + 4, &[5, 6]), Ok(()));
    assert_eq!(
        rig.write(DATA_SIZE, &17u64.to_ne_bytes()),
        Err(Error::RegionOrder)
    );
    assert_eq!(rig.write(DATA_SIZE, &5u64.to_ne_bytes()), Ok(()));
    assert_eq!(rig.device.loaded, [1, 2, 3, 4, 5]);
    // The next chunk begins with data_offset.
    assert_eq!(
        rig.write(DATA_SIZE, &5u64.to_ne_bytes()),
        Err(Error::RegionOrder)
    );
    assert_eq!(rig.write(OFFSET, &[9]), Err(Error::RegionOrder));
    assert_eq!(
        (rig.get(DATA_OFFSET), rig.write(OFFSET, &[9])),
        (Ok(OFFSET), Ok(()))
    );
    assert_eq!(rig.write(DATA_SIZE, &1u64.to_ne_bytes()), Ok(()));
    assert_eq!(rig.device.loaded, [1, 2, 3, 4, 5, 9]);
    assert_eq!(rig.set(RUNNING), Ok(()));
}

#[test]
fn a_chunk_that_fails_is_not_there() {
    let mut rig = Rig::in_state(STOP_COPY);
    rig.device.left = vec![4; 4];
    rig.device.fail = Some(Failure::Unchanged(Errno::EIO));
    assert_eq!(rig.get(DATA_OFFSET), Err(Error::Device(Errno::EIO)));
    assert_eq!(rig.get(DATA_SIZE), Err(Error::RegionOrder));
    assert_eq!(
        (rig.get(DATA_OFFSET), rig.get(DATA_SIZE)),
        (Ok(OFFSET), Ok(4))
    );
    let mut rig = Rig::in_state(RESUMING);
    assert_eq!(
        (rig.get(DATA_OFFSET), rig.write(OFFSET, &[1])),
        (Ok(OFFSET), Ok(()))
    );
    rig.device.fail = Some(Failure::Unchanged(Errno::EINVAL));
    let size = 1u64.to_ne_bytes();
    assert_eq!(
        rig.write(DATA_SIZE, &size),
        Err(Error::Device(Errno::EINVAL))
    );
    assert_eq!(rig.write(DATA_SIZE, &size), Err(Error::RegionOrder));
}
