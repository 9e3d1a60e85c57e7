// SPDX-License-Identifier: MIT OR Apache-2.0
//! A test that starts itself again with the library, and what VFIO is called by there.
#![allow(dead_code)] // each test uses a part

use std::ffi::{c_ulong, CString};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::{Command, Output};

pub(crate) const API_VERSION: c_ulong = 0x3b64;
pub(crate) const SET_IOMMU: c_ulong = 0x3b66;
pub(crate) const SET_CONTAINER: c_ulong = 0x3b68;
pub(crate) const GET_DEVICE_FD: c_ulong = 0x3b6a;

/// The library, which cargo has built for this test.
fn library() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    let folders = program.ancestors().skip(1).take(2);
    let names = folders.map(|folder| folder.join("libvfio_preload.so"));
    names
        .into_iter()
        .find(|path| path.exists())
        .expect("libvfio_preload.so")
}

/// Runs test `name` of this program with the library, which calls `part`.
pub(crate) fn preloaded(name: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command.env("LD_PRELOAD", library()).env("PRELOADED", "1");
    command.envs(variables.iter().copied());
    command.output().unwrap()
}

pub(crate) fn open(path: &str) -> std::io::Result<File> {
    File::options().read(true).write(true).open(path)
}

pub(crate) fn ioctl(fd: RawFd, nr: c_ulong, arg: c_ulong) -> Result<i32, i32> {
    // SAFETY: each `arg` of this file is what the ioctl takes.
    match unsafe { libc::ioctl(fd, nr, arg) } {
        done if done < 0 => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
        done => Ok(done),
    }
}

/// Opens a container with group `number` and an IOMMU type.
pub(crate) fn group(number: u64) -> (File, File) {
    let container = open("/dev/vfio/vfio").unwrap();
    let group = open(&format!("/dev/vfio/{number}")).unwrap();
    join(&container, &group);
    ioctl(container.as_raw_fd(), SET_IOMMU, 3).unwrap();
    (container, group)
}

fn join(container: &File, group: &File) {
    let mut fd = container.as_raw_fd();
    ioctl(group.as_raw_fd(), SET_CONTAINER, &raw mut fd as c_ulong).unwrap();
}

/// Opens device dev0 of a group.
pub(crate) fn try_get_device(group: &File) -> Result<i32, i32> {
    let name = CString::new("dev0").unwrap();
    ioctl(group.as_raw_fd(), GET_DEVICE_FD, name.as_ptr() as c_ulong)
}

pub(crate) fn get_device(group: &File) -> OwnedFd {
    let fd = try_get_device(group).unwrap();
    // SAFETY: the descriptor is new, and nobody else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Opens the device of group 42: its container, its group and itself.
pub(crate) fn device() -> (File, File, OwnedFd) {
    let (container, group) = group(42);
    let device = get_device(&group);
    (container, group, device)
}

/// Opens the device of another group, in the same container.
pub(crate) fn other_device(container: &File, number: u64) -> (File, OwnedFd) {
    let group = open(&format!("/dev/vfio/{number}")).unwrap();
    join(container, &group);
    let device = get_device(&group);
    (group, device)
}
