// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the ioctls of groups, devices and data files answer.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;

use adapter_user::emulated::uapi::*;
use adapter_user::emulated::{DataFile, MigrationVersion, Settings};
use adapter_user::{Container, Errno, IommuType, Options};

use crate::{group, v2, world, Table, World};

const FEATURE: u32 = 0x3b75;
const PRECOPY_INFO: u32 = 0x3b79;
const GET: u32 = 1 << 16;
const SET: u32 = 1 << 17;
const PROBE: u32 = 1 << 18;

/// Makes an ioctl of a data file with a structure of 32-bit words.
fn of_data(file: &DataFile, nr: u32, words: &mut [u32]) -> Result<i32, Errno> {
    let arg = words.as_mut_ptr() as u64;
    // SAFETY: the structure is `words`.
    unsafe { file.ioctl(nr, arg) }
}

/// Makes an ioctl of a device with a structure of 32-bit words.
fn ioctl(world: &World, nr: u32, words: &mut [u32]) -> Result<i32, Errno> {
    with(world, &Table::default(), nr, words)
}

fn with(world: &World, table: &Table, nr: u32, words: &mut [u32]) -> Result<i32, Errno> {
    let arg = words.as_mut_ptr() as u64;
    // SAFETY: the structure is `words`, and these ioctls have no other addresses.
    unsafe { world.device.ioctl(nr, arg, table) }
}

#[test]
fn groups() {
    let (group, _toys) = group(v2(false, false));
    let container = Container::new(Options::default());
    let mut table = Table::default();
    table.containers.insert(7, container.clone());
    let file = group.open().unwrap();
    assert_eq!(group.open().unwrap_err(), Errno::EBUSY);
    let call = |nr, arg: u64| {
        // SAFETY: each `arg` below is the address of what the ioctl takes, or no address.
        unsafe { file.ioctl(nr, arg, &table) }
    };
    let address = |words: &mut [u32]| words.as_mut_ptr() as u64;
    let mut status = [8, 0];
    assert_eq!(call(VFIO_GROUP_GET_STATUS, address(&mut status)), Ok(0));
    assert_eq!(status, [8, 1]);
    assert_eq!(
        call(VFIO_GROUP_GET_STATUS, address(&mut [7, 0])),
        Err(Errno::EINVAL)
    );
    assert_eq!(call(VFIO_GROUP_GET_STATUS, 16), Err(Errno::EFAULT));
    assert_eq!(call(VFIO_GROUP_UNSET_CONTAINER, 0), Err(Errno::EINVAL));
    let name = c"toy".as_ptr() as u64;
    assert_eq!(
        call(VFIO_GROUP_GET_DEVICE_FD, name),
        Err(Errno::EINVAL),
        "no container"
    );
    assert_eq!(
        call(VFIO_GROUP_SET_CONTAINER, address(&mut [8])),
        Err(Errno::EBADF)
    );
    assert_eq!(call(VFIO_GROUP_SET_CONTAINER, address(&mut [7])), Ok(0));
    assert_eq!(
        call(VFIO_GROUP_GET_DEVICE_FD, name),
        Err(Errno::EINVAL),
        "no IOMMU type"
    );
    container.set_iommu(IommuType::Type1v2).unwrap();
    let other = c"other".as_ptr() as u64;
    assert_eq!(call(VFIO_GROUP_GET_DEVICE_FD, other), Err(Errno::ENODEV));
    assert_eq!(call(VFIO_GROUP_GET_DEVICE_FD, name), Ok(1));
    assert_eq!(
        call(VFIO_GROUP_GET_DEVICE_FD, name),
        Ok(2),
        "another handle"
    );
    assert!({
        let devices = table.devices.lock().unwrap();
        Arc::ptr_eq(&devices[0], &devices[1])
    });
    assert_eq!(call(VFIO_GROUP_UNSET_CONTAINER, 0), Err(Errno::EBUSY));
    table.devices.lock().unwrap().clear();
    assert_eq!(call(VFIO_GROUP_UNSET_CONTAINER, 0), Ok(0));
    assert_eq!(call(VFIO_DEVICE_GET_INFO, 0), Err(Errno::ENOTTY));
}

#[test]
fn info_and_regions() {
    let world = world(v2(false, false));
    let mut info = [24, 9, 9, 9, 9, 9];
    assert_eq!(ioctl(&world, VFIO_DEVICE_GET_INFO, &mut info), Ok(0));
    assert_eq!(info, [24, 3, 9, 5, 0, 0]);
    let mut short = [16, 0, 0, 0, 77, 77];
    assert_eq!(ioctl(&world, VFIO_DEVICE_GET_INFO, &mut short), Ok(0));
    assert_eq!(short, [16, 3, 9, 5, 77, 77]);
    assert_eq!(
        ioctl(&world, VFIO_DEVICE_GET_INFO, &mut [15, 0, 0, 0]),
        Err(Errno::EINVAL)
    );
    for (index, size, flags) in [(0, 8, 3), (1, 0, 0), (7, 256, 3)] {
        let mut region = [32, 0, index, 9, 9, 9, 9, 9];
        assert_eq!(
            ioctl(&world, VFIO_DEVICE_GET_REGION_INFO, &mut region),
            Ok(0)
        );
        assert_eq!(region, [32, flags, index, 0, size, 0, 0, index << 8]);
    }
    let mut region = [32, 0, 9, 0, 0, 0, 0, 0];
    assert_eq!(
        ioctl(&world, VFIO_DEVICE_GET_REGION_INFO, &mut region),
        Err(Errno::EINVAL)
    );
    assert_eq!(ioctl(&world, VFIO_DEVICE_RESET, &mut []), Ok(0));
    assert_eq!(ioctl(&world, 0x3bff, &mut []), Err(Errno::ENOTTY));
}

#[test]
fn the_region_of_version_1_has_a_capability() {
    let world = world(Settings {
        migration: MigrationVersion::V1,
        own_log: false,
    });
    let mut info = [24, 0, 0, 0, 0, 0];
    ioctl(&world, VFIO_DEVICE_GET_INFO, &mut info).unwrap();
    assert_eq!(info[2], 10);
    let mut region = [32, 0, 9, 9, 0, 0, 0, 0, 77, 77, 77, 77];
    assert_eq!(
        ioctl(&world, VFIO_DEVICE_GET_REGION_INFO, &mut region),
        Ok(0)
    );
    assert_eq!(
        region,
        [48, 11, 9, 0, 0x11000, 0, 0, 9 << 8, 77, 77, 77, 77]
    );
    assert_eq!(
        ioctl(&world, VFIO_DEVICE_GET_REGION_INFO, &mut region),
        Ok(0)
    );
    assert_eq!(
        region,
        [48, 11, 9, 32, 0x11000, 0, 0, 9 << 8, 1 << 16 | 2, 0, 3, 1]
    );
    assert_eq!(
        ioctl(&world, FEATURE, &mut [16, 1 | GET, 0, 0]),
        Err(Errno::ENOTTY)
    );
}

#[test]
fn reads_and_writes_end_with_their_region() {
    let world = world(v2(false, false));
    assert_eq!(world.device.write(6, &[1, 2, 3, 4]), Ok(2));
    let mut bytes = [9; 4];
    assert_eq!(world.device.read(5, &mut bytes), Ok(3));
    assert_eq!(bytes, [0, 1, 2, 9]);
    let region = |index: u64| index << 40;
    for offset in [
        8,
        region(1),
        region(7) + 256,
        region(8),
        region(9),
        u64::MAX,
    ] {
        assert_eq!(
            world.device.read(offset, &mut bytes),
            Err(Errno::EINVAL),
            "{offset:#x}"
        );
        assert_eq!(
            world.device.write(offset, &bytes),
            Err(Errno::EINVAL),
            "{offset:#x}"
        );
    }
    assert_eq!(world.device.read(region(7), &mut bytes), Ok(4));
    assert_eq!(bytes, [0x34, 0x12, 0x78, 0x56]);
    // The program writes ones to the BAR, and reads how large it is.
    world.device.write(region(7) + 0x10, &[0xff; 4]).unwrap();
    world.device.read(region(7) + 0x10, &mut bytes).unwrap();
    assert_eq!(bytes, [0xf0, 0xff, 0xff, 0xff]);
}

#[test]
fn features_of_migration() {
    let world = world(v2(true, true));
    let mut words = [16, 1 | GET, 0, 0];
    assert_eq!(ioctl(&world, FEATURE, &mut words), Ok(0));
    assert_eq!(words[2..], [7, 0]);
    assert_eq!(
        ioctl(&world, FEATURE, &mut [8, 6 | PROBE]),
        Err(Errno::ENOTTY),
        "no log"
    );
    assert_eq!(ioctl(&world, FEATURE, &mut [8, 9 | PROBE | GET]), Ok(0));
    let mut words = [16, 9 | GET, 0, 0];
    assert_eq!(ioctl(&world, FEATURE, &mut words), Ok(0));
    assert_eq!(words[2..], [16 + 8, 0]);
    let table = Table::default();
    let mut words = [16, 2 | SET, 6, 0];
    assert_eq!(with(&world, &table, FEATURE, &mut words), Ok(0));
    assert_eq!(words[2..], [6, 100]);
    let mut words = [16, 2 | GET, 0, 0];
    assert_eq!(with(&world, &table, FEATURE, &mut words), Ok(0));
    assert_eq!(words[2..], [6, u32::MAX]);
    let file = table.data.lock().unwrap()[&100].clone();
    let mut info = [24, 0, 1, 1, 1, 1];
    assert_eq!(of_data(&file, PRECOPY_INFO, &mut info), Ok(0));
    assert_eq!(info, [24, 0, 16, 0, 0, 0]);
    assert_eq!(of_data(&file, FEATURE, &mut []), Err(Errno::ENOTTY));
    with(&world, &table, FEATURE, &mut [16, 2 | SET, 1, 0]).unwrap();
    let after = of_data(&file, PRECOPY_INFO, &mut info);
    assert_eq!(after, Err(Errno::EINVAL));
}

#[test]
fn a_data_file_without_a_descriptor_is_an_error() {
    let world = world(v2(false, false));
    let full = Some(Errno(24));
    let table = Table {
        full,
        ..Table::default()
    };
    let mut words = [16, 2 | SET, 3, 0];
    assert_eq!(with(&world, &table, FEATURE, &mut words), Err(Errno(24)));
    assert_eq!(words[3], u32::MAX);
    assert_eq!(world.device.state().raw(), 3, "the state has changed");
}

#[test]
fn a_log_of_its_own() {
    let world = world(Settings {
        own_log: true,
        ..v2(false, false)
    });
    let mut ranges = [0u64, 1 << 18];
    let ranges = ranges.as_mut_ptr() as u64;
    let mut start = [
        32,
        6 | SET,
        4096,
        0,
        1,
        0,
        ranges as u32,
        (ranges >> 32) as u32,
    ];
    assert_eq!(ioctl(&world, FEATURE, &mut start), Ok(0));
    world.toy.dma.write(0x3000, &[1]).unwrap();
    let mut bitmap = [0u64];
    let bits = bitmap.as_mut_ptr() as u64;
    let mut report = [
        40,
        8 | GET,
        0,
        0,
        1 << 18,
        0,
        4096,
        0,
        bits as u32,
        (bits >> 32) as u32,
    ];
    assert_eq!(ioctl(&world, FEATURE, &mut report), Ok(0));
    assert_eq!(bitmap, [1 << 3]);
    assert_eq!(ioctl(&world, FEATURE, &mut [8, 7 | SET]), Ok(0));
    assert!(!world.device.log().is_on());
}

#[test]
fn interrupts() {
    let world = world(v2(false, false));
    for (index, flags, count) in [(0, 1, 0), (1, 9, 9), (2, 9, 4), (3, 1, 0)] {
        let mut irq = [16, 0, index, 77];
        assert_eq!(ioctl(&world, VFIO_DEVICE_GET_IRQ_INFO, &mut irq), Ok(0));
        assert_eq!(irq, [16, flags, index, count]);
    }
    let info = ioctl(&world, VFIO_DEVICE_GET_IRQ_INFO, &mut [16, 0, 5, 0]);
    assert_eq!(info, Err(Errno::EINVAL));
    let (none, boolean, eventfd) = (1, 2, 4);
    let (mask, trigger) = (8, 32);
    let set = |words: &[u32]| ioctl(&world, VFIO_DEVICE_SET_IRQS, &mut words.to_vec());
    let signals = |fd: &File| {
        let mut count = [0; 8];
        let mut fd = fd;
        fd.read(&mut count).map_or(0, |_| u64::from_ne_bytes(count))
    };
    let (first, second) = (eventfd_file(), eventfd_file());
    let (a, b) = (first.as_raw_fd() as u32, second.as_raw_fd() as u32);
    assert!(!world.toy.irqs.trigger(2, 1), "nothing is enabled");
    assert_eq!(set(&[20, none | trigger, 2, 1, 1]), Err(Errno::EINVAL));
    assert_eq!(set(&[28, eventfd | trigger, 2, 1, 2, a, b]), Ok(0));
    assert!(world.toy.irqs.trigger(2, 1));
    assert!(!world.toy.irqs.trigger(2, 0) && !world.toy.irqs.trigger(1, 1));
    assert_eq!((signals(&first), signals(&second)), (1, 0));
    assert_eq!(set(&[20, none | trigger, 2, 0, 4]), Ok(0));
    assert_eq!((signals(&first), signals(&second)), (1, 1));
    assert_eq!(set(&[22, boolean | trigger, 2, 1, 2, 0x0100]), Ok(0));
    assert_eq!((signals(&first), signals(&second)), (0, 1));
    assert_eq!(set(&[24, eventfd | trigger, 2, 1, 1, u32::MAX]), Ok(0));
    assert!(!world.toy.irqs.trigger(2, 1) && world.toy.irqs.trigger(2, 2));
    for (words, errno) in [
        (vec![28, eventfd | trigger, 2, 0, 2, a, 9999], Errno::EBADF),
        (vec![24, eventfd | trigger, 2, 0, 1, 9999], Errno::EBADF), // no other thread opens it
        (vec![27, eventfd | trigger, 2, 0, 2, a, b], Errno::EINVAL), // too short
        (vec![20, none | trigger, 2, 3, 2], Errno::EINVAL),         // beyond the last
        (vec![20, none | trigger, 2, u32::MAX, 1], Errno::EINVAL),
        (vec![20, none | trigger, 0, 0, 1], Errno::EINVAL),
        (vec![20, none | boolean | trigger, 2, 0, 1], Errno::EINVAL),
        (vec![20, 64, 2, 0, 1], Errno::EINVAL),
        (vec![20, none | mask, 2, 0, 1], Errno::ENOTTY),
        (vec![19, none | trigger, 2, 0, 1], Errno::EINVAL),
    ] {
        assert_eq!(set(&words), Err(errno), "{words:?}");
    }
    assert!(
        !world.toy.irqs.trigger(2, 0),
        "a call that fails enables nothing"
    );
    let file = File::open("/dev/null").unwrap();
    let call = set(&[24, eventfd | trigger, 2, 0, 1, file.as_raw_fd() as u32]);
    assert_eq!(call, Err(Errno::EINVAL), "it is no eventfd");
    assert_eq!(set(&[20, none | trigger, 2, 0, 0]), Ok(0), "disables all");
    assert!(!world.toy.irqs.trigger(2, 2));
}

/// An eventfd that does not wait.
fn eventfd_file() -> File {
    // SAFETY: it accesses no memory.
    let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
    assert!(fd >= 0);
    // SAFETY: it is new, and nobody else has it.
    unsafe { File::from_raw_fd(fd) }
}
