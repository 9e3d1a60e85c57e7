// SPDX-License-Identifier: MIT OR Apache-2.0
//! A program with the library preloaded: this one. Each test starts itself again with
//! LD_PRELOAD, and there runs the part that it is for.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::thread;

use support::{device, ioctl, open, preloaded, API_VERSION};

/// Runs `part` in a process that has the library.
fn with_library(name: &str, part: fn()) {
    if std::env::var_os("PRELOADED").is_some() {
        return part();
    }
    let output = preloaded(name, &[]);
    assert!(
        output.status.success(),
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The PCI IDs, by pread of the configuration space.
fn ids(fd: RawFd) -> Result<[u8; 4], i32> {
    let mut ids = [0; 4];
    // SAFETY: the buffer has 4 bytes.
    let done = unsafe { libc::pread64(fd, ids.as_mut_ptr().cast(), 4, 7 << 40) };
    match done {
        4 => Ok(ids),
        _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)),
    }
}

const IDS: [u8; 4] = [0x34, 0x12, 0x3a, 0x0d];

#[test]
fn a_device_is_there() {
    with_library("a_device_is_there", || {
        let (container, group, device) = device();
        assert_eq!(ioctl(container.as_raw_fd(), API_VERSION, 0), Ok(0));
        assert_eq!(ids(device.as_raw_fd()), Ok(IDS));
        assert!(open("/dev/vfio/42").is_err(), "a group is opened once");
        drop((group, device));
        let group = open("/dev/vfio/42").unwrap();
        assert_eq!(ioctl(group.as_raw_fd(), API_VERSION, 0), Err(libc::ENOTTY));
    });
}

#[test]
fn what_is_not_ours_passes_through() {
    with_library("what_is_not_ours_passes_through", || {
        assert_eq!(
            open("/dev/vfio/41").unwrap_err().raw_os_error(),
            Some(libc::ENOENT)
        );
        assert_eq!(
            open("/dev/vfio/x").unwrap_err().raw_os_error(),
            Some(libc::ENOENT)
        );
        let mut zeros = [1; 8];
        open("/dev/zero").unwrap().read_exact(&mut zeros).unwrap();
        assert_eq!(zeros, [0; 8]);
        let null = open("/dev/null").unwrap();
        (&null).write_all(b"text").unwrap();
        assert_eq!(ioctl(null.as_raw_fd(), API_VERSION, 0), Err(libc::ENOTTY));
        assert_eq!(ioctl(-1, API_VERSION, 0), Err(libc::EBADF));
        let mut text = String::new();
        File::open("/proc/self/maps")
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert!(text.contains("libvfio_preload.so"));
    });
}

#[test]
fn copies_of_a_descriptor() {
    with_library("copies_of_a_descriptor", || {
        let (_container, _group, device) = device();
        let copy = device.try_clone().unwrap(); // by fcntl
                                                // SAFETY: it accesses no memory.
        let second = unsafe { libc::dup(copy.as_raw_fd()) };
        // SAFETY: it accesses no memory, and nobody has descriptor 200.
        let third = unsafe { libc::dup2(copy.as_raw_fd(), 200) };
        drop((device, copy));
        for fd in [second, third] {
            assert_eq!(ids(fd), Ok(IDS));
            // SAFETY: nobody else has the descriptor.
            assert_eq!(unsafe { libc::close(fd) }, 0);
            assert_eq!(ids(fd), Err(libc::EBADF));
        }
        assert!(open("/dev/vfio/42").is_err(), "its file is still open");
        // A descriptor that becomes that of another file is not ours any more.
        let null = open("/dev/null").unwrap();
        let group = _group.as_raw_fd();
        // SAFETY: the descriptor is that of `_group`, which is used as a file only.
        assert_eq!(unsafe { libc::dup2(null.as_raw_fd(), group) }, group);
        assert!(open("/dev/vfio/42").is_ok());
    });
}

#[test]
fn a_range_of_descriptors_is_closed() {
    with_library("a_range_of_descriptors_is_closed", || {
        let (container, group, device) = device();
        let device = std::mem::ManuallyDrop::new(device);
        let _kept = std::mem::ManuallyDrop::new((container, group));
        // SAFETY: it closes files that nobody uses from now on.
        let done = unsafe { libc::syscall(libc::SYS_close_range, 1000, 1001, 0) };
        assert_eq!(done, 0);
        // SAFETY: as above.
        assert_eq!(unsafe { libc::close_range(3, libc::c_uint::MAX, 0) }, 0);
        assert_eq!(ids(device.as_raw_fd()), Err(libc::EBADF));
        assert!(open("/dev/vfio/42").is_ok(), "the group was closed");
    });
}

#[test]
fn a_fork_does_not_touch_the_parent_s_device() {
    with_library("a_fork_does_not_touch_the_parent_s_device", || {
        let (_container, _group, device) = device();
        // SAFETY: the child makes system calls only, and then ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let fd = device.as_raw_fd();
            // SAFETY: the child's own descriptor, of an empty file.
            let answer = unsafe { libc::ioctl(fd, API_VERSION, 0) };
            // SAFETY: as above.
            let gone = answer == -1 && unsafe { libc::close(fd) } == 0;
            // SAFETY: ends the child.
            unsafe { libc::_exit(if gone { 0 } else { 1 }) };
        }
        let mut status = 0;
        // SAFETY: the status has a place.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        assert_eq!(std::process::ExitStatus::from_raw(status).code(), Some(0));
        assert_eq!(ids(device.as_raw_fd()), Ok(IDS));
        let output = Command::new("ls")
            .arg("-l")
            .arg("/proc/self/fd")
            .output()
            .unwrap();
        let files = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && !files.contains("vfio"),
            "{files}"
        );
    });
}

#[test]
fn threads() {
    with_library("threads", || {
        let all: Vec<_> = (0..8)
            .map(|_| {
                thread::spawn(|| {
                    for _ in 0..300 {
                        let container = open("/dev/vfio/vfio").unwrap();
                        let null = open("/dev/null").unwrap();
                        assert_eq!(ioctl(container.as_raw_fd(), API_VERSION, 0), Ok(0));
                        assert_eq!(ioctl(null.as_raw_fd(), API_VERSION, 0), Err(libc::ENOTTY));
                    }
                })
            })
            .collect();
        all.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

#[test]
fn a_wrong_variable_is_named() {
    if std::env::var_os("PRELOADED").is_some() {
        assert_eq!(
            open("/dev/vfio/42").unwrap_err().raw_os_error(),
            Some(libc::ENOENT)
        );
        return;
    }
    for (name, value) in [
        ("VFIO_PRELOAD_DEVICES", "dev0"),
        ("VFIO_PRELOAD_DEVICES", "42:dev0=/tmp/socket"),
        ("VFIO_PRELOAD_TRACKING", "both"),
        ("VFIO_PRELOAD_MIGRATION", "v2+later"),
        ("VFIO_PRELOAD_GROUP", "real"),
    ] {
        let output = preloaded("a_wrong_variable_is_named", &[(name, value)]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(said.contains(name) && said.contains(value), "{said}");
    }
}
