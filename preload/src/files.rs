// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which descriptors of the program are ours, and what they stand for.
//!
//! Each has a descriptor of the kernel beside it, of an empty memory file, so that the
//! numbers are the program's own. It belongs to this process: after a fork the child's
//! descriptors are those empty files.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::fd::IntoRawFd;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use adapter_user::emulated::uapi::VFIO_GROUP_GET_DEVICE_FD;
use adapter_user::emulated::{DataDescriptors, DataFile, Descriptors, DeviceFile, GroupFile};
use adapter_user::{charged_pages, Container, Errno};
use nix::sys::memfd::{memfd_create, MFdFlags};

use crate::container::Held;
use crate::control::Driven;
use crate::remote::{Remote, StateFile};
use crate::trace::trace;
use crate::user;
use crate::world;

/// A group's file and its number.
#[derive(Clone)]
pub(crate) struct OpenGroup {
    pub(crate) number: u64,
    pub(crate) file: Arc<GroupFile>,
}

/// What a descriptor stands for.
#[derive(Clone)]
pub(crate) enum File {
    Container(Arc<Held>),
    Group(OpenGroup),
    Device(Arc<DeviceFile>),
    Data(DataFile),
    /// A device in another process.
    Remote(Arc<Remote>),
    /// The state of one.
    State(StateFile),
}

/// Descriptors from this number on are not ours.
const LIMIT: usize = 1 << 16;
/// A bit for each descriptor, which is set if it is ours. A call for another one looks here
/// and takes no lock.
static OURS: [AtomicU64; LIMIT / 64] = [const { AtomicU64::new(0) }; LIMIT / 64];
static FILES: RwLock<BTreeMap<i32, File>> = RwLock::new(BTreeMap::new());
/// The process that the descriptors belong to.
static OWNER: AtomicI32 = AtomicI32::new(0);

fn files() -> RwLockReadGuard<'static, BTreeMap<i32, File>> {
    FILES.read().unwrap_or_else(PoisonError::into_inner)
}

fn files_mut() -> RwLockWriteGuard<'static, BTreeMap<i32, File>> {
    FILES.write().unwrap_or_else(PoisonError::into_inner)
}

fn this_process() -> i32 {
    nix::unistd::getpid().as_raw()
}

fn place(fd: i32) -> Option<(&'static AtomicU64, u64)> {
    let fd = usize::try_from(fd).ok()?;
    Some((OURS.get(fd / 64)?, 1 << (fd % 64)))
}

/// Whether a descriptor is ours. In another process none is: neither in a fork, nor in a
/// child that shares this memory until it executes a program.
fn is_ours(fd: i32) -> bool {
    place(fd).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
        && OWNER.load(Ordering::Relaxed) == this_process()
}

/// Returns what a descriptor stands for, if it is ours.
pub(crate) fn get(fd: i32) -> Option<File> {
    if !is_ours(fd) {
        return None;
    }
    files().get(&fd).cloned()
}

/// Returns the device that a descriptor stands for, if it is one.
pub(crate) fn device(fd: i32) -> Option<Arc<dyn Driven>> {
    match get(fd)? {
        File::Device(device) => Some(device),
        File::Remote(remote) => Some(remote),
        _ => None,
    }
}

/// Opens a path of VFIO. `None` if it is not ours.
pub(crate) fn open(path: &CStr) -> Option<Result<File, Errno>> {
    let name = path.to_bytes().strip_prefix(b"/dev/vfio/")?;
    if name == b"vfio" {
        trace!("open container");
        return Some(Ok(File::Container(Arc::new(Held::new()))));
    }
    let number = std::str::from_utf8(name).ok()?.parse().ok()?;
    let group = world::group(number)?;
    let file = group.open();
    trace!("open group {number}: {:?}", file.as_ref().err());
    Some(file.map(|file| File::Group(OpenGroup { number, file })))
}

/// Gives a file a descriptor.
pub(crate) fn install(file: File, close_on_exec: bool) -> Result<i32, Errno> {
    let flags = match close_on_exec {
        true => MFdFlags::MFD_CLOEXEC,
        false => MFdFlags::empty(),
    };
    let fd = memfd_create(c"vfio", flags).map_err(|errno| Errno(errno as i32))?;
    if usize::try_from(std::os::fd::AsRawFd::as_raw_fd(&fd)).map_or(true, |fd| fd >= LIMIT) {
        return Err(Errno(libc::EMFILE));
    }
    let fd = fd.into_raw_fd();
    add(fd, file);
    Ok(fd)
}

fn add(fd: i32, file: File) {
    let Some((word, bit)) = place(fd) else { return };
    OWNER.store(this_process(), Ordering::Relaxed);
    let before = files_mut().insert(fd, file);
    word.fetch_or(bit, Ordering::AcqRel);
    drop(before); // without the lock: it may be the last handle to a device
}

/// The program closes a descriptor. What it stood for is to be dropped when the descriptor
/// is closed.
pub(crate) fn forget(fd: i32) -> Option<File> {
    if !is_ours(fd) {
        return None;
    }
    let (word, bit) = place(fd)?;
    word.fetch_and(!bit, Ordering::AcqRel);
    files_mut().remove(&fd)
}

/// The program closes all descriptors from `first` to `last`.
pub(crate) fn forget_range(first: u32, last: u32) -> Vec<File> {
    let known: Vec<i32> = match OWNER.load(Ordering::Relaxed) == this_process() {
        true => files().keys().copied().collect(),
        false => Vec::new(),
    };
    let inside = |fd: &i32| u32::try_from(*fd).is_ok_and(|fd| (first..=last).contains(&fd));
    known
        .into_iter()
        .filter(inside)
        .filter_map(forget)
        .collect()
}

/// `new` is a copy of `old` from now on, unless it is negative.
pub(crate) fn duplicate(old: i32, new: i32) {
    if old == new || new < 0 {
        return;
    }
    match get(old) {
        Some(file) => add(new, file),
        None => drop(forget(new)),
    }
}

/// The program exits: closes what it left open, and says what then remains.
pub(crate) fn close_all() {
    if OWNER.load(Ordering::Relaxed) != this_process() {
        return;
    }
    let mut all = forget_range(0, u32::MAX);
    let rank = |file: &File| match file {
        File::Data(_) | File::State(_) => 0,
        File::Device(_) | File::Remote(_) => 1,
        File::Group(_) => 2,
        File::Container(_) => 3,
    };
    all.sort_by_key(rank);
    let mut busy = 0;
    let mut containers = Vec::new();
    for file in all {
        match file {
            File::Device(device) => device.close(),
            File::Remote(remote) => remote.close(),
            File::Group(group) => {
                busy += i32::from(group.file.unset_container() == Err(Errno::EBUSY))
            }
            File::Container(held) => containers.push(Arc::downgrade(&held)),
            File::Data(_) | File::State(_) => {}
        }
    }
    let open = containers
        .iter()
        .filter(|held| held.strong_count() != 0)
        .count();
    trace!("exit busy={busy} open={open} charged={}", charged_pages());
}

/// The descriptors of this program, for the data files of devices.
pub(crate) struct DataTable;

impl DataDescriptors for DataTable {
    fn install_data(&self, file: DataFile) -> Result<i32, Errno> {
        install(File::Data(file), true)
    }

    fn remove(&self, fd: i32) {
        drop(forget(fd));
        let _ = nix::unistd::close(fd); // it is open: it was installed just now
    }
}

/// The descriptors of this program, for the ioctls of a group.
pub(crate) struct Program {
    pub(crate) group: u64,
}

impl DataDescriptors for Program {
    fn install_data(&self, file: DataFile) -> Result<i32, Errno> {
        DataTable.install_data(file)
    }

    fn remove(&self, fd: i32) {
        DataTable.remove(fd);
    }
}

impl Descriptors for Program {
    fn container(&self, fd: i32) -> Option<Container> {
        let Some(File::Container(held)) = get(fd) else {
            return None;
        };
        world::set_container(self.group, &held);
        Some(held.container.clone())
    }

    fn install(&self, device: Arc<DeviceFile>) -> Result<i32, Errno> {
        let opened = Arc::downgrade(&device);
        world::opened(opened);
        trace!("open device {}", device.name());
        install(File::Device(device), true)
    }
}

/// Answers an ioctl of a group if it opens a device in another process.
pub(crate) fn open_elsewhere(group: &OpenGroup, nr: u32, arg: u64) -> Option<Result<i32, Errno>> {
    if nr != VFIO_GROUP_GET_DEVICE_FD {
        return None;
    }
    let name = user::string(arg)?;
    let remote = world::open_elsewhere(group.number, &name, &group.file)?;
    trace!("open device {name}: {:?}", remote.as_ref().err());
    Some(remote.and_then(|remote| {
        let opened = Arc::downgrade(&remote);
        world::opened(opened);
        install(File::Remote(remote), true)
    }))
}
