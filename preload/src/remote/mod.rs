// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device in another process: the file of a VFIO device over a vfio-user client.

// Each file uses only files below it.
mod irqs;
mod log; // what the device has written
mod state; // how it migrates

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapter_user::emulated::uapi::*;
use adapter_user::emulated::GroupFile;
use adapter_user::vfio_user::{Client, ClientError, ClientOptions, DmaMemory};
use adapter_user::{Container, Device, Errno, Error, GroupId, Prot};
use dirty_core::migration::uapi::VFIO_DEVICE_FEATURE;
use dirty_core::migration::{DeviceFeature, Features, Offers, State};

pub(crate) use self::irqs::Duplicate;
pub(crate) use self::log::{AnswerLogging, Log};
use self::state::Migrating;
pub(crate) use self::state::{InstallState, StateFile};
use crate::backing;
use crate::mappings::{Mapping, Mappings};
use crate::trace::trace;
use crate::user;

/// A region's bytes are at its index times this, in the device's file.
const REGION_SHIFT: u32 = 40;

/// An open device of a vfio-user server. It closes with its last handle.
pub(crate) struct Remote {
    name: String,
    client: Client,
    /// The client's socket, to end the connection that a data file may still have.
    socket: UnixStream,
    is_closed: AtomicBool,
    memory: Arc<Device>,
    /// `VFIO_DEVICE_FLAGS_*`.
    flags: u32,
    irqs: u32,
    /// The flags and the size in bytes of each region.
    regions: Vec<(u32, u64)>,
    /// What the device's migration can do, if it migrates.
    features: Option<Features>,
    /// Whether the program finds the device's own log.
    shows_log: bool,
    pub(crate) log: Log,
    migrating: Mutex<Migrating>,
    /// The file of the device's group, which the device keeps open.
    _group: Arc<GroupFile>,
}

/// What a device is opened with.
pub(crate) struct Opening<'a> {
    pub(crate) name: &'a str,
    pub(crate) socket: &'a Path,
    pub(crate) container: &'a Container,
    pub(crate) mappings: &'a Arc<Mappings>,
    pub(crate) group: GroupId,
    pub(crate) file: Arc<GroupFile>,
    /// Whether the program is to find the device's own log.
    pub(crate) shows_log: bool,
}

/// What the functions of libc do for an ioctl of a device.
pub(crate) struct Program<'a> {
    pub(crate) install: &'a InstallState,
    pub(crate) duplicate: &'a Duplicate,
    pub(crate) logging: &'a AnswerLogging<'a>,
}

/// The program's memory, as the server reaches it by messages: as a device of the container,
/// which marks it.
struct Memory(Arc<Device>);

impl DmaMemory for Memory {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.0.read(iova, data).map_err(Error::errno)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        self.0.write(iova, data).map_err(Error::errno)
    }
}

impl Remote {
    /// Connects to the server. The device has no mapping yet.
    ///
    /// Fails with EINVAL if the group is in no container with an IOMMU type, with the errno of
    /// connect(2), and with that of the client.
    pub(crate) fn open(opening: Opening<'_>) -> Result<Remote, Errno> {
        let unread = log::unread();
        let memory =
            opening
                .container
                .open_logged_device(opening.group, None, log::on_mark(unread.clone()));
        let memory = memory.map_err(Error::errno)?;
        let socket = UnixStream::connect(opening.socket).map_err(errno)?;
        let own = socket.try_clone().map_err(errno)?;
        let reached = Memory(Arc::clone(&memory));
        let connect = || Client::connect(own, reached, ClientOptions::default());
        let client = vfio_engine::without_signals(connect).map_err(said)?;
        let info = client.device_info().map_err(said)?;
        let mut regions = Vec::new();
        for index in 0..info.num_regions.min(VFIO_PCI_NUM_REGIONS) {
            let region = client.region_info(index).map_err(said)?;
            let flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
            regions.push((region.flags & flags, region.size));
        }
        // A device without a log must not migrate: nobody would know what it wrote.
        let features = match client.has_log().map_err(said)? {
            true => migration(&client)?,
            false => None,
        };
        trace!("remote {}: {features:?}", opening.name);
        Ok(Remote {
            name: opening.name.to_owned(),
            memory,
            flags: info.flags & (VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI),
            irqs: info.num_irqs,
            regions,
            features,
            shows_log: opening.shows_log && features.is_some(),
            log: Log::new(
                client.clone(),
                opening.container.clone(),
                unread,
                Arc::clone(opening.mappings),
            ),
            migrating: Mutex::new(Migrating::new(client.clone(), features)),
            client,
            socket,
            is_closed: AtomicBool::new(false),
            _group: opening.file,
        })
    }

    fn migrating(&self) -> MutexGuard<'_, Migrating> {
        self.migrating
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Ends a transfer and the device's DMA, and lets the group leave the container. A second
    /// call does nothing.
    pub(crate) fn close(&self) {
        if self.is_closed.swap(true, Ordering::AcqRel) {
            return;
        }
        self.migrating().end();
        if let Err(cause) = self.client.unmap_all() {
            trace!("remote unmap {}: {cause}", self.name);
        }
        self.log.close();
        self.memory.close();
        let _ = self.socket.shutdown(Shutdown::Both); // the server may have done so
    }

    // ---- memory

    /// Tells the device of a mapping that the container has. A device that has gone needs none.
    pub(crate) fn map(&self, mapping: &Mapping) -> Result<(), Errno> {
        let Mapping {
            iova,
            size,
            vaddr,
            prot,
        } = *mapping;
        let backing = match self.client.agreed().max_send_fds {
            0 => None,
            _ => backing::find(vaddr, size, prot.contains(Prot::WRITE)),
        };
        let file = backing.as_ref();
        let file = file.map(|backing| (backing.file.as_fd(), backing.offset));
        self.log.add(mapping)?;
        let done = self.client.map(iova, size, prot, file);
        let how = file.map_or("by messages".into(), |(_, at)| format!("file at {at:#x}"));
        trace!(
            "remote map {} iova={iova:#x} size={size:#x} {how}: {:?}",
            self.name,
            done.err()
        );
        unless_gone(done).inspect_err(|_| self.log.remove(mapping))
    }

    /// Takes a mapping from the device. What the device wrote there is in the log then, and if
    /// that cannot be known, all of it.
    pub(crate) fn unmap(&self, mapping: &Mapping) -> Result<(), Errno> {
        let done = self.client.unmap(mapping.iova, mapping.size);
        if let Err(cause) = done {
            trace!("remote unmap {} {:#x}: {cause}", self.name, mapping.iova);
        }
        unless_gone(done)?;
        self.log.unmapped(mapping)
    }

    // ---- regions

    fn region(&self, offset: u64, len: usize) -> Result<(u32, u64, usize), Errno> {
        let index = u32::try_from(offset >> REGION_SHIFT).map_err(|_| Errno::EINVAL)?;
        let (_, size) = self.regions.get(index as usize).ok_or(Errno::EINVAL)?;
        let at = offset & ((1 << REGION_SHIFT) - 1);
        let left = size.checked_sub(at).filter(|left| *left != 0);
        let left = usize::try_from(left.ok_or(Errno::EINVAL)?).unwrap_or(usize::MAX);
        Ok((index, at, left.min(len)))
    }

    /// As pread(2) of the device's file.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) -> Result<usize, Errno> {
        let (index, at, len) = self.region(offset, data.len())?;
        let data = data.get_mut(..len).unwrap_or_default();
        self.client.read_region(index, at, data).map_err(said)?;
        Ok(len)
    }

    /// As pwrite(2) of the device's file.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        let (index, at, len) = self.region(offset, data.len())?;
        let data = data.get(..len).unwrap_or_default();
        self.client.write_region(index, at, data).map_err(said)?;
        Ok(len)
    }

    // ---- ioctls

    /// Answers an ioctl of the device's file: as
    /// [`DeviceFile::ioctl`](adapter_user::emulated::DeviceFile::ioctl), or with the server's
    /// errno. ENOTCONN if the server has gone, ETIMEDOUT if it does not answer, EPROTO if it
    /// breaks the protocol.
    pub(crate) fn ioctl(&self, nr: u32, arg: u64, program: &Program<'_>) -> Result<i32, Errno> {
        match nr {
            VFIO_DEVICE_GET_INFO => {
                let [argsz, ..] = user::structure::<4>(arg)?;
                let answer = [self.flags, self.regions.len() as u32, self.irqs, 0, 0];
                let room = match argsz as usize >= size_of::<vfio_device_info>() {
                    true => &answer[..],
                    false => &answer[..3], // a program that knows no capabilities
                };
                user::put(field(arg, 4)?, room)?;
            }
            VFIO_DEVICE_GET_REGION_INFO => {
                let [_, _, index, ..] = user::structure::<8>(arg)?;
                let (flags, size) = self.regions.get(index as usize).ok_or(Errno::EINVAL)?;
                user::put(field(arg, 4)?, &[*flags, index, 0])?; // no capabilities
                let offset = u64::from(index) << REGION_SHIFT;
                user::write(field(arg, 16)?, &size.to_ne_bytes())?;
                user::write(field(arg, 24)?, &offset.to_ne_bytes())?;
            }
            VFIO_DEVICE_GET_IRQ_INFO => {
                let [_, _, index, _] = user::structure(arg)?;
                if index >= self.irqs {
                    return Err(Errno::EINVAL);
                }
                let info = self.client.irq_info(index).map_err(said)?;
                user::put(field(arg, 4)?, &[info.flags, index, info.count])?;
            }
            VFIO_DEVICE_SET_IRQS => irqs::set(&self.client, self.irqs, arg, program.duplicate)?,
            VFIO_DEVICE_RESET if self.flags & VFIO_DEVICE_FLAGS_RESET != 0 => {
                let mut migrating = self.migrating();
                // A device that has gone has nothing to reset, and QEMU ends itself when a
                // reset fails.
                unless_gone(self.client.reset())?;
                migrating.reset();
            }
            VFIO_DEVICE_FEATURE => self.feature(arg, program)?,
            _ => return Err(Errno::ENOTTY),
        }
        Ok(0)
    }

    fn feature(&self, arg: u64, program: &Program<'_>) -> Result<(), Errno> {
        let offers = Offers {
            migration: self.features,
            logging: self.shows_log,
        };
        let call = DeviceFeature::read(offers, arg, user::fetch).map_err(Error::errno)?;
        match call {
            DeviceFeature::Probe => Ok(()),
            DeviceFeature::Logging(call) => self.log.answer(call, program.logging),
            DeviceFeature::Migration(call) => self.migrating().answer(call, program.install),
        }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.close();
    }
}

/// What the device's migration can do. The client has no message that would tell how much is
/// left in the pre-copy phase, so there is none.
fn migration(client: &Client) -> Result<Option<Features>, Errno> {
    let features = match client.migration_features() {
        Ok(features) => features,
        Err(ClientError::Refused(..)) => return Ok(None),
        Err(cause) => return Err(said(cause)),
    };
    // The client before may have left it in another state.
    if client.state().map_err(said)? != State::Running {
        client.reset().map_err(said)?;
    }
    Ok(Some(Features {
        pre_copy: false,
        ..features
    }))
}

/// Traces why a call of a client failed.
fn said(cause: ClientError) -> Errno {
    trace!("remote: {cause}");
    cause.errno()
}

/// Whether the server has closed the connection, as the kernel does when its process ends. It
/// reaches no memory then.
fn is_gone(cause: ClientError) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(
        cause,
        ClientError::Lost(UnexpectedEof | BrokenPipe | ConnectionReset)
    )
}

fn unless_gone(done: Result<(), ClientError>) -> Result<(), Errno> {
    match done {
        Err(cause) if !is_gone(cause) => Err(cause.errno()),
        _ => Ok(()),
    }
}

fn errno(error: io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EIO))
}

/// The address `by` bytes after `addr`.
fn field(addr: u64, by: u64) -> Result<u64, Errno> {
    addr.checked_add(by).ok_or(Errno::EFAULT)
}
