// SPDX-License-Identifier: MIT OR Apache-2.0
//! States, interrupts and regions.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::sync::atomic::Ordering;

use adapter_user::emulated::{MigrationVersion, Settings};
use vfio_user_wire::wire::*;
use vfio_user_wire::{FeatureAnswer, FeatureCall, Request};

use crate::{world, world_as, Errno, Failed, World};

const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
const PRE_COPY: u32 = 6;

#[test]
fn a_state_goes_to_another_server() {
    let (mut source, mut destination) = (world(), world());
    source.client.write_region(0, 0, &7u64.to_le_bytes());
    source.toy.early.store(100, Ordering::SeqCst);
    let features = |answer: FeatureAnswer<'_>| assert_eq!(answer, FeatureAnswer::Migration(5));
    source
        .client
        .feature(FeatureCall::GetMigration, features)
        .unwrap();
    assert_eq!(source.client.mig_read(8), Err(Errno(22)), "no transfer");
    source.client.state(PRE_COPY).unwrap();
    let mut stream = source.client.mig_read_all();
    assert_eq!(stream.len(), 116);
    assert_eq!(
        source.client.mig_read(64).unwrap(),
        [],
        "nothing more at present"
    );
    source.toy.early.store(50, Ordering::SeqCst);
    stream.extend(source.client.mig_read_all());
    assert_eq!(source.client.mig_write(&[1]), Err(Errno(22)));
    source.client.state(STOP_COPY).unwrap();
    stream.extend(source.client.mig_read_all());
    source.client.state(STOP).unwrap();
    assert_eq!(source.client.mig_read(8), Err(Errno(19)), "it is over");

    destination.client.bus_master(false);
    destination.client.state(RESUMING).unwrap();
    assert_eq!(destination.client.mig_read(8), Err(Errno(22)));
    for part in stream.chunks(50) {
        destination.client.mig_write(part).unwrap();
    }
    destination.client.state(RUNNING).unwrap();
    assert_eq!(destination.toy.registers.lock().unwrap()[0], 7);
    let file = crate::memfd(4096, true);
    destination
        .client
        .map((0, 4096), crate::RW, Some((&file, 0)))
        .unwrap();
    assert_eq!(
        destination.toy.write(0, &[1]),
        Some(Ok(())),
        "the bus-master bit came with the state"
    );
}

#[test]
fn states_that_cannot_be() {
    let mut world = world();
    for state in [0, 5, 8, u32::MAX] {
        assert_eq!(world.client.state(state), Err(Errno(22)), "{state}");
    }
    world.client.state(RESUMING).unwrap();
    world.client.mig_write(&[1; 40]).unwrap();
    assert_eq!(world.client.state(STOP), Err(Errno(22)), "no such state");
    let broken = FeatureAnswer::State(MigState {
        device_state: 0,
        data_fd: u32::MAX,
    });
    world
        .client
        .feature(FeatureCall::GetState, |answer| assert_eq!(answer, broken))
        .unwrap();
    assert_eq!(world.client.state(RUNNING), Err(Errno(22)));
    world.client.raw(13, &[]).unwrap();
    world.client.state(STOP).unwrap();
}

#[test]
fn a_device_that_neither_migrates_nor_logs() {
    for migration in [MigrationVersion::None, MigrationVersion::V1] {
        let settings = Settings {
            migration,
            own_log: false,
        };
        let mut world = world_as(settings, |server| server);
        for feature in [1, 2, 6, 7, 8] {
            let got = world.client.feature(FeatureCall::Probe { feature }, |_| ());
            assert_eq!(got, Err(Errno(25)), "{feature}");
        }
        assert_eq!(world.client.state(STOP), Err(Errno(25)));
        assert_eq!(world.client.start(4096, &[]), Err(Errno(25)));
        assert_eq!(world.client.mig_read(8), Err(Errno(22)));
    }
}

fn eventfd() -> File {
    // SAFETY: it accesses no memory.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: it is new, and nobody else has it.
    unsafe { File::from_raw_fd(fd) }
}

fn signals(mut fd: &File) -> u64 {
    let mut count = [0; 8];
    fd.read(&mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

#[test]
fn interrupts() {
    let mut world = world();
    let set = |world: &mut World,
               flags,
               span: (u32, u32, u32),
               data: &[u8],
               fds: &[BorrowedFd<'_>]|
     -> Result<(), Failed> {
        let set = IrqSet {
            argsz: 20 + data.len() as u32,
            flags,
            index: span.0,
            start: span.1,
            count: span.2,
        };
        world
            .client
            .call(&Request::SetIrqs(set, data), fds)
            .map(drop)
    };
    let (one, other) = (eventfd(), eventfd());
    let fds = [one.as_fd(), other.as_fd()];
    let trigger = IRQ_ACTION_TRIGGER;
    let (none, boolean, event) = (
        IRQ_DATA_NONE | trigger,
        IRQ_DATA_BOOL | trigger,
        IRQ_DATA_EVENTFD | trigger,
    );
    assert!(!world.toy.irqs.trigger(2, 1));
    assert_eq!(
        set(&mut world, none, (2, 1, 1), &[], &[]),
        Err(Errno(22)),
        "none is enabled"
    );
    assert_eq!(set(&mut world, event, (2, 1, 2), &[], &fds), Ok(()));
    assert!(world.toy.irqs.trigger(2, 1));
    assert_eq!((signals(&one), signals(&other)), (1, 0));
    assert_eq!(set(&mut world, none, (2, 0, 4), &[], &[]), Ok(()));
    assert_eq!(set(&mut world, boolean, (2, 1, 2), &[0, 1], &[]), Ok(()));
    assert_eq!((signals(&one), signals(&other)), (1, 2));
    // Without descriptors it disables them.
    assert_eq!(set(&mut world, event, (2, 1, 1), &[], &[]), Ok(()));
    assert!(!world.toy.irqs.trigger(2, 1) && world.toy.irqs.trigger(2, 2));
    for (flags, span, fds, errno) in [
        (IRQ_DATA_NONE | IRQ_ACTION_MASK, (2, 0, 1), &fds[..0], 25),
        (IRQ_DATA_NONE | IRQ_ACTION_UNMASK, (2, 0, 1), &fds[..0], 25),
        (event, (2, 3, 2), &fds[..], 22),
        (event, (2, 0, u32::MAX), &fds[..0], 22),
        (event, (0, 0, 1), &fds[..1], 22),
        (event, (5, 0, 1), &fds[..1], 22),
        (
            event,
            (2, 0, 1),
            &[world.client.socket.try_clone().unwrap().as_fd()],
            22,
        ),
    ] {
        let fds: Vec<_> = fds.to_vec();
        assert_eq!(
            set(&mut world, flags, span, &[], &fds),
            Err(Errno(errno)),
            "{flags} {span:?}"
        );
    }
    assert_eq!(set(&mut world, none, (2, 0, 0), &[], &[]), Ok(()));
    assert!(!world.toy.irqs.trigger(2, 2));
}

#[test]
fn regions_and_what_is_beyond() {
    let mut world = world();
    let info = |world: &mut World, index| {
        let asked = RegionInfo {
            argsz: 32,
            index,
            ..RegionInfo::default()
        };
        let payload = world.client.call(&Request::GetRegionInfo(asked), &[])?;
        let info = RegionInfo::split(&payload).unwrap().0;
        Ok((info.flags, info.size))
    };
    for (index, want) in [
        (0, Ok((3, 16))),
        (1, Ok((0, 0))),
        (7, Ok((3, 256))),
        (9, Err(Errno(22))),
    ] {
        assert_eq!(info(&mut world, index), want);
    }
    let read = |world: &mut World, region, offset, count| {
        let at = RegionAccess {
            offset,
            region,
            count,
        };
        let payload = world.client.call(&Request::RegionRead(at), &[])?;
        Ok(payload[16..].to_vec())
    };
    assert_eq!(read(&mut world, 7, 0, 4).unwrap(), [0x34, 0x12, 0x78, 0x56]);
    assert_eq!(read(&mut world, 0, 16, 0).unwrap(), []);
    for (region, offset, count) in [
        (0, 13, 4),
        (0, 16, 1),
        (1, 0, 1),
        (9, 0, 1),
        (0, u64::MAX, 1),
        (0, 1 << 40, 1),
    ] {
        let got: Result<_, Failed> = read(&mut world, region, offset, count);
        assert_eq!(got, Err(Errno(22)), "{region} {offset:#x}");
    }
    let payload = world
        .client
        .raw(4, &[16u32, 0, 0, 0].map(u32::to_ne_bytes).concat())
        .unwrap();
    assert_eq!(payload, [16u32, 3, 9, 5].map(u32::to_ne_bytes).concat());
    let io = RegionIoFds {
        argsz: 64,
        index: 0,
        ..RegionIoFds::default()
    };
    assert_eq!(
        world
            .client
            .call(&Request::GetRegionIoFds(io), &[])
            .unwrap()
            .len(),
        16
    );
}
