// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device of a vfio-user server. The server is in this process; a second one of this program,
//! with the library preloaded, uses the device as a VMM does.

mod program;
mod server;
#[path = "../support/mod.rs"]
mod support;

use std::ffi::c_ulong;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use adapter_user::vfio_user::Server;

use program::*;
use server::{bell, engine, serve};
use support::{device, ioctl, preloaded};

/// Runs `part` of test `name` in a process that has the library and the device.
fn with_server(name: &str, server: fn() -> Server, tracking: &str, part: fn()) {
    if std::env::var_os("PRELOADED").is_some() {
        return part();
    }
    let folder = tempfile::tempdir().unwrap();
    serve(server(), folder.path());
    let socket = folder.path().join("device");
    let devices = format!(
        "42:dev0=vfio-user:{0},43:dev0=vfio-user:{0}",
        socket.display()
    );
    let end = folder.path().join("end");
    let variables = [
        ("VFIO_PRELOAD_DEVICES", devices.as_str()),
        ("VFIO_PRELOAD_TRACKING", tracking),
        ("END", end.to_str().unwrap()),
    ];
    let output = preloaded(name, &variables);
    assert!(
        output.status.success() && String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

// ---- tests

#[test]
fn memory_that_was_mapped_before_and_after() {
    with_server(
        "memory_that_was_mapped_before_and_after",
        engine,
        "container",
        || {
            let (container, _group, device) = device();
            let device = device.as_raw_fd();
            assert_eq!(pread(device, 7 << 40), Ok(0x0d3a_1234));
            bus_master(device);
            for (k, file) in [true, false].into_iter().enumerate() {
                let (memory, iova) = (Memory::new(file), IOVA + k as u64 * SIZE);
                assert!(!dma_write(device, iova, 7), "nothing is mapped");
                memory.map(&container, iova).unwrap();
                assert_eq!(memory.map(&container, iova), Err(libc::EEXIST));
                assert!(dma_write(device, iova + PAGE, 7));
                assert_eq!((memory.word(0), memory.word(1)), (0, 7));
                assert_eq!(unmap(&container, iova + PAGE), Err(libc::EINVAL));
                assert!(dma_write(device, iova + PAGE, 8), "it is mapped as before");
                unmap(&container, iova).unwrap();
                assert!(!dma_write(device, iova + PAGE, 9), "it was unmapped");
                assert_eq!(memory.word(1), 8);
                // A device that is opened now gets it.
                memory.map(&container, iova).unwrap();
            }
            let other = support::other_device(&container, 43);
            let other = other.1.as_raw_fd();
            bus_master(other);
            assert!(dma_write(other, IOVA, 1) && dma_write(other, IOVA + SIZE, 2));
        },
    );
}

#[test]
fn what_the_device_writes_is_in_the_container_s_bitmaps() {
    with_server(
        "what_the_device_writes_is_in_the_container_s_bitmaps",
        engine,
        "container",
        || {
            let (container, _group, device) = device();
            let device = device.as_raw_fd();
            bus_master(device);
            for (k, file) in [true, false].into_iter().enumerate() {
                let (memory, iova) = (Memory::new(file), IOVA + k as u64 * SIZE);
                memory.map(&container, iova).unwrap();
                assert!(dma_write(device, iova, 1), "before tracking: not reported");
                track(&container, 1).unwrap();
                track(&container, 1).unwrap();

                assert_eq!(get_bitmap(&container, iova), Ok(0));
                assert!(dma_write(device, iova + 3 * PAGE, 1));
                assert!(dma_write(device, iova + 63 * PAGE, 1));
                assert_eq!(get_bitmap(&container, iova), Ok(1 << 3 | 1 << 63));
                assert_eq!(get_bitmap(&container, iova), Ok(0));
                assert!(dma_write(device, iova + 5 * PAGE, 1));
                // An answer that fails loses nothing.
                let bad = [48 | 4 << 32, iova, SIZE, PAGE, 8, 16];
                let failed = ioctl(container.as_raw_fd(), 0x3b75, bad.as_ptr() as c_ulong);
                assert_eq!(failed, Err(libc::EFAULT));
                assert_eq!(get_bitmap(&container, iova), Ok(1 << 5));
                // The device's log is the container's: the program finds none.
                assert_eq!(feature(device, SET | 7, []), Err(libc::ENOTTY));
                assert!(dma_write(device, iova + 6 * PAGE, 1));
                assert_eq!(unmap_dirty(&container, iova), Ok(1 << 6));
                memory.map(&container, iova).unwrap();
                assert!(dma_write(device, iova + 7 * PAGE, 1));
                assert_eq!(get_bitmap(&container, iova).unwrap() & 1 << 7, 1 << 7);
                track(&container, 2).unwrap();
            }
        },
    );
}

#[test]
fn what_a_device_wrote_before_it_closed_is_reported() {
    with_server(
        "what_a_device_wrote_before_it_closed_is_reported",
        engine,
        "container",
        || {
            let (container, _group, first) = device();
            let memory = Memory::new(true);
            memory.map(&container, IOVA).unwrap();
            track(&container, 1).unwrap();
            get_bitmap(&container, IOVA).unwrap();
            let (_group, other) = support::other_device(&container, 43);
            bus_master(other.as_raw_fd());
            assert!(dma_write(other.as_raw_fd(), IOVA + PAGE, 1));
            drop(other);
            assert_eq!(get_bitmap(&container, IOVA), Ok(1 << 1));
            drop(first);
        },
    );
}

#[test]
fn the_device_s_own_log() {
    with_server("the_device_s_own_log", engine, "device", || {
        let (container, _group, device) = device();
        let device = device.as_raw_fd();
        bus_master(device);
        let (file, private) = (Memory::new(true), Memory::new(false));
        file.map(&container, IOVA).unwrap();
        private.map(&container, IOVA + SIZE).unwrap();
        let report = || {
            let mut bitmap = [0u64; 2];
            let data = [IOVA, 2 * SIZE, PAGE, bitmap.as_mut_ptr() as u64];
            feature(device, GET | 8, data).map(|_| bitmap)
        };
        assert_eq!(report(), Err(libc::EINVAL), "it is off");
        let ranges = [IOVA, 2 * SIZE];
        let start = || {
            let data = [PAGE, 1, ranges.as_ptr() as u64];
            feature(device, SET | 6, data)
        };
        start().unwrap();
        assert_eq!(start(), Err(libc::EINVAL), "it is on");
        assert_eq!(report(), Ok([0, 0]));
        assert!(dma_write(device, IOVA + PAGE, 1) && dma_write(device, IOVA + SIZE, 1));
        assert_eq!(report(), Ok([1 << 1, 1 << 0]));
        assert_eq!(report(), Ok([0, 0]));
        // What was written to a mapping that has gone is told, once.
        assert!(dma_write(device, IOVA + 2 * PAGE, 1));
        unmap(&container, IOVA).unwrap();
        assert_eq!(report(), Ok([1 << 2, 0]));
        assert_eq!(report(), Ok([0, 0]));
        feature(device, SET | 7, []).unwrap();
        assert_eq!(report(), Err(libc::EINVAL), "it is off again");
        // Half of a mapping.
        let half = [IOVA + SIZE, SIZE / 2];
        feature(device, SET | 6, [PAGE, 1, half.as_ptr() as u64]).unwrap();
        assert!(dma_write(device, IOVA + SIZE, 1) && dma_write(device, IOVA + SIZE + SIZE / 2, 1));
        let mut bitmap = 0u64;
        let data = [IOVA + SIZE, SIZE / 2, PAGE, &raw mut bitmap as u64];
        feature(device, GET | 8, data).unwrap();
        assert_eq!(bitmap, 1);
    });
}

#[test]
fn the_state_moves() {
    with_server("the_state_moves", engine, "container", || {
        let (container, _group, device) = device();
        let (_other_group, other) = support::other_device(&container, 43);
        let (from, to) = (device.as_raw_fd(), other.as_raw_fd());
        // STOP_COPY and P2P: nobody could tell how much is left in the pre-copy phase.
        assert_eq!(feature(from, GET | 1, [0]), Ok([1 | 2]));
        assert_eq!(set_state(from, 6).err(), Some(libc::EINVAL));
        assert!(feature(from, GET | 9, [0]).unwrap()[0] > 0);
        pwrite(from, MAILBOX, 0xfeed).unwrap();
        let mut file = set_state(from, 3).unwrap().unwrap();
        assert_eq!(
            file.write(&[0]).unwrap_err().raw_os_error(),
            Some(libc::EBADF)
        );
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert!(set_state(from, 1).unwrap().is_none());
        assert_eq!(
            file.read(&mut [0]).unwrap_err().raw_os_error(),
            Some(libc::ENODEV)
        );
        let mut file = set_state(to, 4).unwrap().unwrap();
        file.write_all(&bytes).unwrap();
        assert_eq!((state(from), state(to)), (1, 4));
        set_state(to, 2).unwrap();
        assert_eq!(register(to, MAILBOX), Ok(0xfeed));
        // A state that is none is refused, and a reset mends the device.
        let mut file = set_state(to, 4).unwrap().unwrap();
        file.write_all(b"no state").unwrap();
        assert_eq!(set_state(to, 2).err(), Some(libc::EINVAL));
        assert_eq!(state(to), 0, "ERROR");
        ioctl(to, 0x3b6f, 0).unwrap();
        assert_eq!((state(to), register(to, MAILBOX)), (2, Ok(0)));
    });
}

/// Also if the program still has a data file, and so its client.
#[test]
fn a_device_that_is_closed_writes_no_more() {
    with_server(
        "a_device_that_is_closed_writes_no_more",
        engine,
        "container",
        || {
            let (container, _group, device) = device();
            let fd = device.as_raw_fd();
            let memory = Memory::new(true);
            memory.map(&container, IOVA).unwrap();
            bus_master(fd);
            let mut file = set_state(fd, 3).unwrap().unwrap();
            set_state(fd, 2).unwrap();
            // The engine's stream: to one place, from now on.
            for (at, value) in [IOVA as u32, 0, 4, 1, PAGE as u32, 0, 8]
                .into_iter()
                .enumerate()
            {
                pwrite(fd, 4 * at as u64, value).unwrap();
            }
            while memory.word(0) < 10 {
                std::thread::yield_now();
            }
            drop(device);
            let last = memory.word(0);
            std::thread::sleep(std::time::Duration::from_millis(50));
            assert_eq!(memory.word(0), last);
            assert_eq!(
                file.read(&mut [0]).unwrap_err().raw_os_error(),
                Some(libc::ENODEV)
            );
        },
    );
}

#[test]
fn interrupts() {
    with_server("interrupts", bell, "container", || {
        let (_container, _group, device) = device();
        let device = device.as_raw_fd();
        let mut info = [16u32, 0, 1, 0];
        ioctl(device, 0x3b6d, info.as_mut_ptr() as c_ulong).unwrap();
        assert_eq!(info[3], 4);
        let eventfds: Vec<OwnedFd> = (0..3)
            .map(|_| {
                // SAFETY: it accesses no memory.
                let fd = unsafe { libc::eventfd(0, libc::EFD_NONBLOCK) };
                // SAFETY: the descriptor is new, and nobody else has it.
                unsafe { OwnedFd::from_raw_fd(fd) }
            })
            .collect();
        let fd = |k: usize| eventfds[k].as_raw_fd() as u32;
        // Number 2 has none.
        let set = [36, 4 | 32, 1, 0, 4, fd(0), fd(1), u32::MAX, fd(2)];
        ioctl(device, 0x3b6e, set.as_ptr() as c_ulong).unwrap();
        for number in [0, 1, 1, 2, 3] {
            pwrite(device, 0, number).unwrap();
        }
        let counts: Vec<u64> = eventfds
            .iter()
            .map(|fd| {
                let mut count = [0; 8];
                File::from(fd.try_clone().unwrap())
                    .read_exact(&mut count)
                    .unwrap();
                u64::from_ne_bytes(count)
            })
            .collect();
        assert_eq!(counts, [1, 2, 1]);
        let bad = [20, 4 | 32, 1, 0, 4];
        assert_eq!(
            ioctl(device, 0x3b6e, bad.as_ptr() as c_ulong),
            Err(libc::EINVAL)
        );
    });
}

#[test]
fn a_server_that_goes() {
    with_server("a_server_that_goes", engine, "container", || {
        let (container, group, device) = device();
        let fd = device.as_raw_fd();
        bus_master(fd);
        let memory = Memory::new(true);
        memory.map(&container, IOVA).unwrap();
        track(&container, 1).unwrap();
        get_bitmap(&container, IOVA).unwrap();
        assert!(dma_write(fd, IOVA + PAGE, 1));
        end_connection(fd);
        let gone = Err(libc::ENOTCONN);
        assert_eq!(register(fd, STATUS), gone);
        assert_eq!(get_bitmap(&container, IOVA), Err(libc::ENOTCONN));
        assert_eq!(set_state(fd, 3).err(), Some(libc::ENOTCONN));
        assert_eq!(ioctl(fd, 0x3b6f, 0), Ok(0), "there is nothing to reset");
        set_state(fd, 1).unwrap(); // it writes nothing
        assert_eq!(set_state(fd, 4).err(), Some(libc::ENOTCONN));
        // Nobody knows what it wrote, so it may be all. The container goes on.
        assert_eq!(unmap_dirty(&container, IOVA), Ok(u64::MAX));
        memory.map(&container, IOVA).unwrap();
        track(&container, 2).unwrap();
        assert_eq!(track(&container, 1), Err(libc::ENOTCONN));
        drop(device);
        track(&container, 1).unwrap();
        let again = support::get_device(&group);
        assert_eq!(pread(again.as_raw_fd(), 7 << 40), Ok(0x0d3a_1234));
        bus_master(again.as_raw_fd());
        assert!(dma_write(again.as_raw_fd(), IOVA + 2 * PAGE, 1));
        assert_eq!(get_bitmap(&container, IOVA), Ok(1 << 2));
    });
}

#[test]
fn no_server() {
    if std::env::var_os("PRELOADED").is_some() {
        let (_container, group) = support::group(42);
        assert_eq!(support::try_get_device(&group), Err(libc::ENOENT));
        return;
    }
    let device = ("VFIO_PRELOAD_DEVICES", "42:dev0=vfio-user:/nowhere/device");
    let output = preloaded("no_server", &[device]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}"
    );
}
