// SPDX-License-Identifier: MIT OR Apache-2.0
//! The migration of a device: features and states (M1, M2), what the machine does when
//! a device fails (M3), and the order of checks in VFIO_DEVICE_FEATURE (M4, M5, M7)
//! and VFIO_MIG_GET_PRECOPY_INFO (M6). The model's tests compare all of it with
//! recordings of Linux.

use dirty_core::host::Fault;
use dirty_core::migration::uapi::*;
use dirty_core::migration::{
    Device, DeviceFeature, Failure, Features, LoggingCall, Migration, MigrationCall, Offers,
    Precopy, PrecopyInfo, State, Transfer, Transition,
};
use dirty_core::{Errno, Error};

const ALL: Features = Features {
    p2p: true,
    pre_copy: true,
};
const GET: u32 = VFIO_DEVICE_FEATURE_GET;
const SET: u32 = VFIO_DEVICE_FEATURE_SET;
const PROBE: u32 = VFIO_DEVICE_FEATURE_PROBE;

/// A device that notes what it is asked for, and fails once.
#[derive(Default)]
struct Noting {
    asked: Vec<Transition>,
    /// The transition that fails, and how.
    fail: Option<(State, Failure)>,
}

impl Noting {
    fn note(&mut self, transition: Transition) -> Result<(), Failure> {
        if let Some((_, failure)) = self.fail.take_if(|(to, _)| *to == transition.to) {
            return Err(failure);
        }
        self.asked.push(transition);
        Ok(())
    }
}

impl Device for Noting {
    type File = Transfer;
    fn begin(&mut self, transition: Transition) -> Result<Transfer, Failure> {
        self.note(transition).map(|()| transition.transfer())
    }
    fn step(&mut self, transition: Transition) -> Result<(), Failure> {
        self.note(transition)
    }
    fn stop_copy_length(&mut self) -> Result<u64, Errno> {
        match self.fail {
            Some((_, Failure::Broken(errno) | Failure::Unchanged(errno))) => Err(errno),
            None => Ok(0x1_2345_6789),
        }
    }
}

fn transition(from: State, to: State) -> Transition {
    Transition { from, to }
}

#[test]
fn features_are_bits_with_stop_copy() {
    let known: Vec<u64> = (0..16)
        .filter(|b| Features::from_bits(*b).is_some())
        .collect();
    assert_eq!(known, [1, 3, 5, 7]);
    for bits in known {
        assert_eq!(Features::from_bits(bits).map(Features::bits), Some(bits));
    }
    assert_eq!(Features::from_bits(1 << 63 | 1), None);
    for state in State::ALL {
        assert_eq!(State::from_raw(state.raw()), Some(state));
        assert_eq!(ALL.has(state), state != State::Error);
    }
    assert_eq!(State::from_raw(8), None);
}

#[test]
fn who_may_write_what() {
    use State::*;
    for state in State::ALL {
        let runs = [Running, RunningP2p, PreCopy, PreCopyP2p].contains(&state);
        assert_eq!(state.may_write_memory(), runs, "{state:?}");
        assert_eq!(
            state.may_access_devices(),
            [Running, PreCopy].contains(&state)
        );
    }
}

#[test]
fn what_a_transition_does_to_the_transfer() {
    use State::*;
    for (from, to, transfer) in [
        (Stop, Resuming, Transfer::BeginLoad),
        (Resuming, Stop, Transfer::EndLoad),
        (Stop, StopCopy, Transfer::BeginSave),
        (StopCopy, Stop, Transfer::EndSave),
        (Running, PreCopy, Transfer::BeginSave),
        (RunningP2p, PreCopyP2p, Transfer::BeginSave),
        (PreCopy, Running, Transfer::EndSave),
        (PreCopyP2p, RunningP2p, Transfer::EndSave),
        (PreCopy, StopCopy, Transfer::SaveRest),
        (PreCopyP2p, StopCopy, Transfer::SaveRest),
        (PreCopy, PreCopyP2p, Transfer::None),
        (PreCopyP2p, PreCopy, Transfer::None),
        (Running, RunningP2p, Transfer::None),
        (RunningP2p, Running, Transfer::None),
        (RunningP2p, Stop, Transfer::None),
        (Stop, RunningP2p, Transfer::None),
        (Running, Stop, Transfer::None),
        (Stop, Running, Transfer::None),
    ] {
        assert_eq!(
            transition(from, to).transfer(),
            transfer,
            "{from:?} to {to:?}"
        );
    }
}

#[test]
fn why_there_is_no_next_state() {
    use State::*;
    for state in State::ALL {
        assert_eq!(ALL.next(Error, state), Err(dirty_core::Error::DeviceFailed));
    }
    let unknown = Err(dirty_core::Error::UnknownState);
    for state in [Stop, Running, StopCopy, Resuming] {
        assert_eq!(ALL.next(state, Error), unknown);
        for absent in [RunningP2p, PreCopy, PreCopyP2p] {
            assert_eq!(Features::default().next(state, absent), unknown);
            assert_eq!(Features::default().next(absent, state), unknown);
        }
    }
    for saving in [PreCopy, PreCopyP2p] {
        assert_eq!(
            ALL.next(StopCopy, saving),
            Err(dirty_core::Error::NoTransition)
        );
    }
}

#[test]
fn the_last_transition_opens_the_file() {
    let mut migration = Migration::new(ALL);
    let mut device = Noting::default();
    let file = migration.set_state(&mut device, VFIO_DEVICE_STATE_RESUMING);
    assert_eq!(file, Ok(Some(Transfer::BeginLoad)));
    use State::*;
    let way = [(Running, RunningP2p), (RunningP2p, Stop), (Stop, Resuming)];
    assert_eq!(device.asked, way.map(|(from, to)| transition(from, to)));
    // The state that it is in already asks for nothing, and opens nothing.
    assert_eq!(
        migration.set_state(&mut device, VFIO_DEVICE_STATE_RESUMING),
        Ok(None)
    );
    assert_eq!(device.asked.len(), 3);
}

#[test]
fn a_device_that_fails_stays_or_breaks() {
    use State::*;
    let way = [RunningP2p, Stop, StopCopy];
    for (done, to) in (0..).zip(way) {
        let before = [Running, RunningP2p, Stop][done];
        for (failure, after) in [
            (Failure::Unchanged(Errno::EBUSY), before),
            (Failure::Broken(Errno::EIO), Error),
        ] {
            let mut migration = Migration::new(ALL);
            let mut device = Noting {
                fail: Some((to, failure)),
                ..Noting::default()
            };
            let (Failure::Unchanged(errno) | Failure::Broken(errno)) = failure;
            let answer = migration.set_state(&mut device, VFIO_DEVICE_STATE_STOP_COPY);
            assert_eq!(answer, Err(dirty_core::Error::Device(errno)));
            assert_eq!((migration.state(), device.asked.len()), (after, done));
            // What did not break goes on from where it is.
            let again = migration.set_state(&mut device, VFIO_DEVICE_STATE_STOP_COPY);
            match after {
                Error => assert_eq!(again, Err(dirty_core::Error::DeviceFailed)),
                _ => assert_eq!(again, Ok(Some(Transfer::BeginSave))),
            }
            migration.reset();
            assert_eq!(migration.state(), Running);
        }
    }
}

#[test]
fn a_failed_device_has_reached_error() {
    let mut migration = Migration::new(ALL);
    let mut device = Noting::default();
    let error = VFIO_DEVICE_STATE_ERROR;
    let refused = Err(Error::UnknownState);
    assert_eq!(migration.set_state(&mut device, error), refused);
    device.fail = Some((State::RunningP2p, Failure::Broken(Errno::EIO)));
    let stop = VFIO_DEVICE_STATE_STOP;
    assert_eq!(
        migration.set_state(&mut device, stop),
        Err(Error::Device(Errno::EIO))
    );
    // Drivers of Linux look first whether the device is there already.
    assert_eq!(migration.set_state(&mut device, error), Ok(None));
    assert_eq!(migration.set_state(&mut device, 8), refused);
}

/// A user's memory: `readable` bytes from `BASE` on.
struct User {
    bytes: [u8; 64],
    readable: usize,
}

const BASE: u64 = 0x4000;

impl User {
    fn new(words: &[u32]) -> User {
        let mut bytes = [0; 64];
        for (at, word) in bytes.chunks_exact_mut(4).zip(words) {
            at.copy_from_slice(&word.to_ne_bytes());
        }
        let readable = 64;
        User { bytes, readable }
    }

    fn get(&self, addr: u64, to: &mut [u8]) -> Result<(), Fault> {
        let at = (addr - BASE) as usize;
        let from = self.bytes[..self.readable].get(at..at + to.len());
        to.copy_from_slice(from.ok_or(Fault { done: 0 })?);
        Ok(())
    }

    fn put(&mut self, addr: u64, from: &[u8]) -> Result<(), Fault> {
        let at = (addr - BASE) as usize;
        let to = self.bytes[..self.readable].get_mut(at..at + from.len());
        to.ok_or(Fault { done: 0 })?.copy_from_slice(from);
        Ok(())
    }

    fn words(&self) -> Vec<u32> {
        let words = self.bytes.chunks_exact(4);
        words
            .map(|w| u32::from_ne_bytes(w.try_into().expect("4 bytes")))
            .collect()
    }
}

const BOTH: Offers = Offers {
    migration: Some(ALL),
    logging: true,
};

fn feature(offers: Offers, words: &[u32], readable: usize) -> Result<DeviceFeature, Error> {
    let mut user = User::new(words);
    user.readable = readable;
    DeviceFeature::read(offers, BASE, |addr, to| user.get(addr, to))
}

/// Each line breaks what it names and all that is checked after it.
#[test]
fn the_order_of_checks() {
    let none = Offers::default();
    let n = VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE;
    let unknown = 1 << 19;
    for (step, offers, argsz, flags, readable, error) in [
        (1, none, 0, u32::MAX, 7, Error::BadAddress),
        (2, none, 7, u32::MAX, 8, Error::ShortArgsz),
        (3, none, 8, unknown | GET | SET | n, 8, Error::UnknownFlags),
        (4, none, 8, GET | SET | n, 8, Error::FlagCombination),
        (5, none, 8, n, 8, Error::UnknownFeature),
        (
            6,
            BOTH,
            8,
            SET | VFIO_DEVICE_FEATURE_MIGRATION,
            8,
            Error::FlagCombination,
        ),
        (8, BOTH, 8, n, 8, Error::FlagCombination),
        (9, BOTH, 15, SET | n, 8, Error::ShortArgsz),
        (10, BOTH, 16, SET | n, 15, Error::BadAddress),
        (10, BOTH, 16, GET | n, 15, Error::BadAddress),
    ] {
        assert_eq!(
            feature(offers, &[argsz, flags], readable),
            Err(error),
            "step {step}"
        );
    }
    // Step 7: a PROBE needs no data, and may ask for all that the feature has.
    for flags in [PROBE, PROBE | GET, PROBE | SET, PROBE | GET | SET] {
        assert_eq!(feature(BOTH, &[8, flags | n], 8), Ok(DeviceFeature::Probe));
    }
    let both = [8, PROBE | GET | SET | VFIO_DEVICE_FEATURE_MIGRATION];
    assert_eq!(feature(BOTH, &both, 8), Err(Error::FlagCombination));
}

#[test]
fn what_each_feature_takes() {
    let addr = BASE + 8;
    let calls = [
        (
            1,
            GET,
            8,
            DeviceFeature::Migration(MigrationCall::GetFeatures { addr }),
        ),
        (
            2,
            GET,
            8,
            DeviceFeature::Migration(MigrationCall::GetState { addr }),
        ),
        (
            2,
            SET,
            8,
            DeviceFeature::Migration(MigrationCall::SetState { addr, state: 5 }),
        ),
        (
            9,
            GET,
            8,
            DeviceFeature::Migration(MigrationCall::GetDataSize { addr }),
        ),
        (
            12,
            SET,
            0,
            DeviceFeature::Migration(MigrationCall::SetPrecopyInfoV2),
        ),
        (7, SET, 0, DeviceFeature::Logging(LoggingCall::Stop)),
        (
            6,
            SET,
            24,
            DeviceFeature::Logging(LoggingCall::Start {
                addr,
                control: vfio_device_feature_dma_logging_control {
                    page_size: 6 << 32 | 5,
                    num_ranges: 7,
                    __reserved: 8,
                    ranges: 10 << 32 | 9,
                },
            }),
        ),
        (
            8,
            GET,
            32,
            DeviceFeature::Logging(LoggingCall::Report(
                vfio_device_feature_dma_logging_report {
                    iova: 6 << 32 | 5,
                    length: 8 << 32 | 7,
                    page_size: 10 << 32 | 9,
                    bitmap: 12 << 32 | 11,
                },
            )),
        ),
    ];
    for n in 0..=0xffff {
        for operation in [GET, SET] {
            let call = calls.iter().find(|call| (call.0, call.1) == (n, operation));
            let data = [5, 6, 7, 8, 9, 10, 11, 12];
            let words = |argsz| [&[argsz, n | operation], &data[..]].concat();
            let Some((_, _, size, call)) = call else {
                let known = calls.iter().any(|call| call.0 == n);
                let error = match known {
                    true => Error::FlagCombination,
                    false => Error::UnknownFeature,
                };
                assert_eq!(feature(BOTH, &words(64), 64), Err(error), "{n}");
                continue;
            };
            assert_eq!(feature(BOTH, &words(8 + size), 64), Ok(*call), "{n}");
            assert_eq!(
                feature(BOTH, &words(7 + size), 64),
                Err(Error::ShortArgsz),
                "{n}"
            );
        }
    }
}

#[test]
fn what_a_device_does_not_offer() {
    let without_pre_copy = Offers {
        migration: Some(Features {
            p2p: true,
            pre_copy: false,
        }),
        logging: false,
    };
    for (n, operation, bare) in [
        (1, GET, Error::UnknownFeature),
        (2, SET, Error::UnknownFeature),
        (9, GET, Error::UnknownFeature),
        (12, SET, Error::NotPreCopy),
        (6, SET, Error::UnknownFeature),
        (7, SET, Error::UnknownFeature),
        (8, GET, Error::UnknownFeature),
    ] {
        for flags in [operation, PROBE, PROBE | operation] {
            assert_eq!(
                feature(Offers::default(), &[64, n | flags], 64),
                Err(bare),
                "{n}"
            );
        }
        let offered = feature(without_pre_copy, &[64, n | operation], 64).map(|_| ());
        let answer = if n < 6 || n == 9 { Ok(()) } else { Err(bare) };
        assert_eq!(offered, answer, "{n}");
    }
}

#[test]
fn an_argument_at_the_end_of_the_address_space() {
    let read = |n: u32, operation: u32| {
        DeviceFeature::read(BOTH, u64::MAX - 7, |_, to| {
            let words = [64, n | operation].map(u32::to_ne_bytes);
            to.copy_from_slice(&words.concat());
            Ok(())
        })
    };
    assert_eq!(read(2, SET), Err(Error::BadAddress));
    assert_eq!(read(7, SET), Ok(DeviceFeature::Logging(LoggingCall::Stop)));
}

/// Runs a call with [`Noting`] and returns the answer and the user's memory.
fn run(
    migration: &mut Migration,
    device: &mut Noting,
    call: MigrationCall,
    readable: usize,
) -> (Result<Option<Transfer>, Error>, Vec<u32>) {
    let mut user = User::new(&[1, 2, 3, 4]);
    user.readable = readable;
    let answer = migration.run(device, call, |_| 0x55, |addr, from| user.put(addr, from));
    (answer, user.words()[..5].to_vec())
}

#[test]
fn answers_are_written_where_the_data_are() {
    let addr = BASE + 8;
    let mut migration = Migration::new(ALL);
    let mut device = Noting::default();
    let get_state = MigrationCall::GetState { addr };
    let set = |state| MigrationCall::SetState { addr, state };
    let m = &mut migration;
    let d = &mut device;
    let none = u32::MAX;
    assert_eq!(
        run(m, d, MigrationCall::GetFeatures { addr }, 64),
        (Ok(None), vec![1, 2, 7, 0, 0])
    );
    let size = MigrationCall::GetDataSize { addr };
    assert_eq!(
        run(m, d, size, 64),
        (Ok(None), vec![1, 2, 0x2345_6789, 1, 0])
    );
    assert_eq!(run(m, d, get_state, 64), (Ok(None), vec![1, 2, 2, none, 0]));
    let opened = Ok(Some(Transfer::BeginSave));
    assert_eq!(run(m, d, set(3), 64), (opened, vec![1, 2, 3, 0x55, 0]));
    assert_eq!(run(m, d, set(1), 64), (Ok(None), vec![1, 2, 1, none, 0]));
    // What was refused is written too.
    let refused = Err(Error::UnknownState);
    assert_eq!(run(m, d, set(77), 64), (refused, vec![1, 2, 77, none, 0]));
    d.fail = Some((State::Resuming, Failure::Unchanged(Errno::ENOMEM)));
    let failed = Err(Error::Device(Errno::ENOMEM));
    assert_eq!(run(m, d, set(4), 64), (failed, vec![1, 2, 4, none, 0]));

    // A bad address comes before that, and after the change of state.
    for call in [
        MigrationCall::GetFeatures { addr },
        size,
        get_state,
        set(77),
    ] {
        assert_eq!(run(m, d, call, 15).0, Err(Error::BadAddress));
    }
    assert_eq!(m.state(), State::Stop);
    assert_eq!(run(m, d, set(4), 15).0, Err(Error::BadAddress));
    assert_eq!(m.state(), State::Resuming);
    d.fail = Some((State::Error, Failure::Unchanged(Errno::ENODEV)));
    assert_eq!(run(m, d, size, 15).0, Err(Error::Device(Errno::ENODEV)));
}

fn precopy_info(nr: u32, argsz: u32, readable: usize) -> Result<PrecopyInfo, Error> {
    let mut user = User::new(&[argsz, 0x30]);
    user.readable = readable;
    PrecopyInfo::read(nr, BASE, |addr, to| user.get(addr, to))
}

#[test]
fn pre_copy_info() {
    let nr = VFIO_MIG_GET_PRECOPY_INFO;
    for (nr, argsz, readable, error) in [
        (nr - 1, 23, 23, Error::UnknownIoctl),
        (nr, 23, 23, Error::BadAddress),
        (nr, 23, 24, Error::ShortArgsz),
    ] {
        assert_eq!(precopy_info(nr, argsz, readable).map(|_| ()), Err(error));
    }
    let mut migration = Migration::new(ALL);
    let mut device = Noting::default();
    let precopy = Precopy {
        initial_bytes: 7,
        dirty_bytes: 8,
        reinit: true,
    };
    let ask = |migration: &Migration, estimate: Result<Precopy, Errno>, readable| {
        let mut user = User::new(&[25, 0x30]);
        user.readable = readable;
        let info = precopy_info(nr, 25, 64).expect("an argument");
        let put = |addr, from: &[u8]| user.put(addr, from);
        let answer = migration.precopy_info(info, || estimate, put);
        (answer, user.words()[..6].to_vec())
    };
    let untouched = vec![25, 0x30, 0, 0, 0, 0];
    for state in [1, 2, 3, 4, 5] {
        migration.set_state(&mut device, state).expect("a state");
        let answer = ask(&migration, Err(Errno::ENODEV), 0);
        assert_eq!(answer, (Err(Error::NotPreCopy), untouched.clone()));
    }
    for state in [6, 7] {
        migration.set_state(&mut device, state).expect("a state");
        let gone = ask(&migration, Err(Errno::ENODEV), 0);
        assert_eq!(gone, (Err(Error::Device(Errno::ENODEV)), untouched.clone()));
        assert_eq!(ask(&migration, Ok(precopy), 23).0, Err(Error::BadAddress));
        // Without version 2 the flags stay as they are.
        assert_eq!(
            ask(&migration, Ok(precopy), 24),
            (Ok(()), vec![25, 0x30, 7, 0, 8, 0])
        );
    }
    let v2 = MigrationCall::SetPrecopyInfoV2;
    assert_eq!(run(&mut migration, &mut device, v2, 0).0, Ok(None));
    assert_eq!(
        ask(&migration, Ok(precopy), 64),
        (Ok(()), vec![25, 1, 7, 0, 8, 0])
    );
    let same = Precopy {
        reinit: false,
        ..precopy
    };
    assert_eq!(
        ask(&migration, Ok(same), 64),
        (Ok(()), vec![25, 0, 7, 0, 8, 0])
    );
    // A reset keeps it, and the last close ends it.
    migration.reset();
    migration.set_state(&mut device, 6).expect("pre-copy");
    assert_eq!(ask(&migration, Ok(same), 64).1[1], 0);
    migration.close();
    assert_eq!(migration.state(), State::Running);
    migration.set_state(&mut device, 6).expect("pre-copy");
    assert_eq!(ask(&migration, Ok(same), 64).1[1], 0x30);
}
