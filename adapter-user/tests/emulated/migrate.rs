// SPDX-License-Identifier: MIT OR Apache-2.0
//! How a device's state goes from one device to another.

use std::sync::atomic::Ordering;

use adapter_user::emulated::{DataFile, MigrationVersion};
use adapter_user::Errno;

use crate::{v2, world, Settings, World};

const ERROR: u32 = 0;
const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
const PRE_COPY: u32 = 6;
const ENOMSG: Errno = Errno(42);

fn state(world: &World) -> u32 {
    world.device.state().raw()
}

fn running(world: &World) -> bool {
    world.toy.running.load(Ordering::SeqCst)
}

fn read_all(file: &DataFile) -> Vec<u8> {
    let mut all = Vec::new();
    let mut some = [0; 10];
    loop {
        match file.read(&mut some) {
            Ok(0) | Err(ENOMSG) => return all,
            Ok(n) => all.extend(&some[..n]),
            Err(errno) => panic!("{errno}"),
        }
    }
}

#[test]
fn a_state_arrives() {
    let (source, destination) = (world(v2(false, true)), world(v2(true, true)));
    source.device.write(0, b"register").unwrap();
    source.toy.early.store(5, Ordering::SeqCst);
    let file = source.device.set_state(PRE_COPY).unwrap().unwrap();
    assert!(running(&source));
    let left = file.left().unwrap();
    assert_eq!((left.initial_bytes, left.dirty_bytes), (16 + 5, 0));
    let mut all = vec![0; 4];
    assert_eq!(file.read(&mut all), Ok(4));
    source.toy.early.store(3, Ordering::SeqCst);
    let left = file.left().unwrap();
    assert_eq!((left.initial_bytes, left.dirty_bytes), (16 + 1, 3));
    all.extend(read_all(&file));
    assert_eq!(
        file.read(&mut [0; 8]),
        Err(ENOMSG),
        "nothing more at present"
    );
    assert!(
        source.device.set_state(STOP_COPY).unwrap().is_none(),
        "the same file goes on"
    );
    assert!(!running(&source));
    assert_eq!(file.left(), Err(Errno::EINVAL));
    all.extend(read_all(&file));
    assert_eq!(file.read(&mut [0; 8]), Ok(0), "the end");
    assert_eq!(file.write(&[1]), Err(Errno::EBADF));
    source.device.set_state(STOP).unwrap();
    assert_eq!(file.read(&mut [0; 8]), Err(Errno::ENODEV));

    let file = destination.device.set_state(RESUMING).unwrap().unwrap();
    assert!(!running(&destination));
    assert_eq!(file.read(&mut [0; 8]), Err(Errno::EBADF));
    for part in all.chunks(7) {
        assert_eq!(file.write(part), Ok(part.len()));
    }
    assert!(destination.device.set_state(RUNNING).unwrap().is_none());
    assert_eq!(file.write(&[1]), Err(Errno::ENODEV));
    assert!(running(&destination));
    assert_eq!(*destination.toy.registers.lock().unwrap(), *b"register");
    assert_eq!(
        *destination.toy.loaded.lock().unwrap(),
        [5, 5, 5, 5, 5, 3, 3, 3]
    );
}

#[test]
fn a_save_that_fails_leaves_the_device_running() {
    let world = world(v2(false, true));
    let file = world.device.set_state(PRE_COPY).unwrap().unwrap();
    world.toy.fail_save.store(true, Ordering::SeqCst);
    assert_eq!(
        world.device.set_state(STOP_COPY).unwrap_err(),
        Errno::ENOSPC
    );
    assert_eq!(state(&world), PRE_COPY);
    assert!(running(&world));
    assert_eq!(read_all(&file).len(), 16);
    world.device.set_state(RUNNING).unwrap();
    // On the way from RUNNING the device has stopped already, and it stays so.
    assert_eq!(
        world.device.set_state(STOP_COPY).unwrap_err(),
        Errno::ENOSPC
    );
    assert_eq!((state(&world), running(&world)), (STOP, false));
    world.toy.fail_save.store(false, Ordering::SeqCst);
    world.device.set_state(STOP_COPY).unwrap();
}

#[test]
fn bad_bytes_break_the_device_until_it_is_reset() {
    let good = {
        let source = world(v2(false, false));
        read_all(&source.device.set_state(STOP_COPY).unwrap().unwrap())
    };
    let mut cases = vec![
        Vec::new(),
        b"no state".to_vec(),
        [&good[..], b"more"].concat(),
    ];
    cases.extend((0..good.len()).map(|n| good[..n].to_vec())); // cut short
    cases.extend((0..16).map(|at| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x80; // a bad head
        bytes
    }));
    for bytes in cases {
        let world = world(v2(false, false));
        let file = world.device.set_state(RESUMING).unwrap().unwrap();
        file.write(&bytes).unwrap();
        assert_eq!(
            world.device.set_state(RUNNING).unwrap_err(),
            Errno::EINVAL,
            "{bytes:?}"
        );
        assert_eq!(state(&world), ERROR);
        assert!(!running(&world), "it may not write memory");
        assert_eq!(world.device.set_state(STOP).unwrap_err(), Errno::EINVAL);
        world.device.reset();
        assert_eq!((state(&world), running(&world)), (RUNNING, true));
    }
}

#[test]
fn a_reset_ends_a_transfer() {
    let world = world(v2(false, false));
    let file = world.device.set_state(RESUMING).unwrap().unwrap();
    world.device.reset();
    assert_eq!(file.write(&[1]), Err(Errno::ENODEV));
    assert_eq!((state(&world), running(&world)), (RUNNING, true));
}

/// What QEMU 7.2 does with the region: reads `pending_bytes`, `data_offset`, `data_size`, the
/// data, until nothing is pending.
#[test]
fn a_state_arrives_by_the_region_of_version_1() {
    let v1 = Settings {
        migration: MigrationVersion::V1,
        own_log: false,
    };
    let (source, destination) = (world(v1), world(v1));
    let region = 9u64 << 40;
    source.device.write(0, b"register").unwrap();
    source.toy.early.store(5, Ordering::SeqCst);
    let register = |at: u64| {
        let mut value = [0; 8];
        source.device.read(region + at, &mut value).unwrap();
        u64::from_le_bytes(value)
    };
    let set = |world: &World, state: u32| world.device.write(region, &state.to_le_bytes());
    let mut moved = 0;
    set(&destination, 4).unwrap();
    assert!(!running(&destination));
    for (state, runs) in [(3, true), (2, false)] {
        set(&source, state).unwrap();
        assert_eq!(running(&source), runs);
        while register(8) != 0 {
            let (at, size) = (register(16), register(24));
            if size == 0 {
                break;
            }
            let mut data = vec![0; size as usize];
            source.device.read(region + at, &mut data).unwrap();
            let mut offset = [0; 8];
            destination.device.read(region + 16, &mut offset).unwrap();
            let to = region + u64::from_le_bytes(offset);
            destination.device.write(to, &data).unwrap();
            destination
                .device
                .write(region + 24, &size.to_le_bytes())
                .unwrap();
            moved += size;
        }
    }
    assert_eq!(moved, 16 + 5 + 16 + 8);
    set(&source, 0).unwrap();
    set(&destination, 1).unwrap();
    assert!(running(&destination));
    assert_eq!(*destination.toy.registers.lock().unwrap(), *b"register");
    assert_eq!(*destination.toy.loaded.lock().unwrap(), [5; 5]);
    assert_eq!(set(&source, 6), Err(Errno::EINVAL), "SAVING and RESUMING");
    assert_eq!(
        source.device.set_state(STOP).unwrap_err(),
        Errno::ENOTTY,
        "no version 2 beside it"
    );
}
