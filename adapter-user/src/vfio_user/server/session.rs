// SPDX-License-Identifier: MIT OR Apache-2.0
//! One client's device: each message becomes a call of the device, and its result the reply.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use dirty_core::host::GroupId;
use dirty_core::migration::uapi::{
    VFIO_DEVICE_FEATURE_MIGRATION, VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
};
use dirty_core::{Errno, Error, IommuType};
use vfio_user_wire::wire::*;
use vfio_user_wire::{
    Agreed, Capabilities, Error as Refused, Feature, FeatureAnswer, FeatureCall, Header, Reply,
    Request, Verdict, Writes,
};

use super::carry::Carry;
use super::logging::Logging;
use super::memory::{Limits, Memory, Remote};
use super::Server;
use crate::container::group::Group;
use crate::container::Container;
use crate::emulated::uapi::*;
use crate::emulated::{irq_flags, region_flags, DEVICE_FLAGS, REGION_SHIFT};
use crate::emulated::{DataFile, DeviceFile, IrqData, Opening};
use crate::host_page::{host_options, host_page};

/// One client's connection without its socket: messages go in, and replies come out.
///
/// [`Server::serve`] drives one for each client. It is public for servers with a transport of
/// their own, and for tests.
///
/// The device closes, and all mappings go, when this is dropped.
pub struct Session {
    wire: vfio_user_wire::Server,
    agreed: Option<Agreed>,
    container: Container,
    memory: Arc<Memory>,
    device: Arc<DeviceFile>,
    logging: Logging,
    /// The file of a transfer of the device's state.
    data: Option<DataFile>,
    remote: Arc<dyn Remote>,
}

/// What follows a message.
#[derive(Debug)]
pub struct Handled {
    /// The descriptor to send with the reply: the second socket.
    pub fd: Option<OwnedFd>,
    /// The connection must be closed, after the reply if there is one.
    pub close: Option<Refused>,
}

/// Bytes of a reply without its data, at most. VERSION has the longest.
const REPLY: usize = 1024;

/// Writes the reply into `out`, whose data have `data` bytes.
fn put(reply: &Reply<'_>, id: u16, data: usize, out: &mut Vec<u8>) {
    out.resize(REPLY + data, 0);
    let len = reply.write(id, out);
    out.truncate(len.unwrap_or(0)); // unreachable error: there is room
}

impl Session {
    pub(super) fn open(server: &Server, remote: Arc<dyn Remote>) -> Result<Session, Errno> {
        let mut options = host_options();
        options.dma_entry_limit = u32::MAX; // the table of maps has the client's limit
        let container = Container::new(options);
        let group = GroupId(1);
        let joined = container.add_group(Group::emulated(group));
        joined
            .and_then(|()| container.set_iommu(IommuType::Type1v2))
            .map_err(Error::errno)?;
        let carry = server.carry.map(Carry::new);
        let memory = Arc::new(Memory::new(Arc::clone(&remote), carry));
        let device = DeviceFile::open(Opening {
            container: &container,
            id: group,
            name: "vfio-user",
            settings: server.settings,
            make: &*server.make,
            group: Arc::new(()),
            bus: Some(Arc::clone(&memory) as _),
        })?;
        Ok(Session {
            wire: vfio_user_wire::Server::new(server.capabilities()),
            agreed: None,
            container,
            memory,
            device: Arc::new(device),
            logging: Logging::default(),
            data: None,
            remote,
        })
    }

    /// Returns the device.
    #[must_use]
    pub fn device(&self) -> &Arc<DeviceFile> {
        &self.device
    }

    /// The protocol's state, which says how large the next message may be.
    pub(super) fn wire(&self) -> &vfio_user_wire::Server {
        &self.wire
    }

    /// Handles a command of the client, whose header [`vfio_user_wire::Server::header`] took.
    /// `out` gets the reply, or is left empty. Descriptors that the command does not use are
    /// closed.
    pub fn handle(
        &mut self,
        header: &Header,
        payload: &[u8],
        fds: Vec<OwnedFd>,
        out: &mut Vec<u8>,
    ) -> Handled {
        out.clear();
        // The request borrows the payload only, so that the session is free for the call.
        let request = self.wire.request(header, payload, fds.len());
        let request = match request {
            Ok(request) => request,
            Err(error) => return refuse(header, error, out),
        };
        let mut handled = Handled {
            fd: None,
            close: None,
        };
        let done = match request {
            Request::Version(_) => {
                handled.fd = self.negotiated(header.id, out);
                Ok(())
            }
            request => self.call(&request, fds, header.id, out),
        };
        if let Err(errno) = done {
            out.clear();
            out.extend_from_slice(&header.refuse(errno.0.unsigned_abs()).to_bytes());
        }
        if !header.wants_reply() {
            out.clear();
        }
        handled
    }

    /// The reply to VERSION, and the second socket that it comes with.
    fn negotiated(&mut self, id: u16, out: &mut Vec<u8>) -> Option<OwnedFd> {
        self.agreed = self.wire.agreed().copied();
        let agreed = self.agreed?;
        self.memory.set_transfer(agreed.max_data_xfer_size);
        let twin = match agreed.twin_socket && agreed.max_send_fds > 0 {
            true => self.remote.open_twin(),
            false => None,
        };
        let reply = Reply::Version(agreed.reply(twin.as_ref().map(|_| 0)));
        put(&reply, id, 0, out);
        twin
    }

    /// Does what a command asks for, and writes the reply.
    fn call(
        &mut self,
        request: &Request<'_>,
        fds: Vec<OwnedFd>,
        id: u16,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        match request {
            Request::Version(_) | Request::DmaRead(_) | Request::DmaWrite { .. } => {
                return Err(Errno::EINVAL); // unreachable: the protocol has refused them
            }
            Request::DmaMap(map) => {
                let (container, log) = (&self.container, self.device.log());
                let limits = self.limits();
                self.memory.map(container, log, map, fds.first(), limits)?;
                put(&Reply::DmaMap, id, 0, out);
            }
            Request::DmaUnmap(unmap, bitmap) => return self.unmap(unmap, *bitmap, id, out),
            Request::GetInfo(_) => {
                let info = DeviceInfo {
                    argsz: DeviceInfo::SIZE as u32,
                    flags: DEVICE_FLAGS,
                    num_regions: self.device.regions(),
                    num_irqs: VFIO_PCI_NUM_IRQS,
                };
                put(&Reply::GetInfo(info), id, 0, out);
            }
            Request::GetRegionInfo(asked) => {
                let size = self.device.region_size(asked.index)?;
                let info = RegionInfo {
                    flags: region_flags(size),
                    index: asked.index,
                    size,
                    ..RegionInfo::default()
                };
                put(&Reply::region_info(asked, info, &[]), id, 0, out);
            }
            Request::GetRegionIoFds(asked) => {
                self.device.region_size(asked.index)?;
                let io = RegionIoFds {
                    argsz: RegionIoFds::SIZE as u32,
                    index: asked.index,
                    ..RegionIoFds::default()
                };
                put(&Reply::GetRegionIoFds(io, Default::default()), id, 0, out);
            }
            Request::GetIrqInfo(asked) => {
                let count = self.device.irq_count(asked.index)?;
                let info = IrqInfo {
                    argsz: IrqInfo::SIZE as u32,
                    flags: irq_flags(count),
                    index: asked.index,
                    count,
                };
                put(&Reply::GetIrqInfo(info), id, 0, out);
            }
            Request::SetIrqs(set, signals) => {
                self.set_irqs(set, signals, &fds)?;
                put(&Reply::SetIrqs, id, 0, out);
            }
            Request::RegionRead(at) => {
                let place = self.place(at.region, at.offset, at.count as usize)?;
                let mut data = vec![0; at.count as usize];
                if !data.is_empty() {
                    self.device.read(place, &mut data)?;
                }
                let reply = Reply::RegionRead {
                    offset: at.offset,
                    region: at.region,
                    data: &data,
                };
                put(&reply, id, data.len(), out);
            }
            Request::RegionWrite(write) => {
                self.write(write.region, write.offset, write.data)?;
                let done = RegionAccess {
                    offset: write.offset,
                    region: write.region,
                    count: write.data.len() as u32, // the request had this number in 32 bits
                };
                put(&Reply::RegionWrite(done), id, 0, out);
            }
            Request::RegionWriteMulti(writes) => {
                self.write_multiple(writes)?;
                put(&Reply::RegionWriteMulti(writes.len() as u64), id, 0, out);
            }
            Request::Reset => {
                self.device.reset();
                self.data = None;
                put(&Reply::Reset, id, 0, out);
            }
            Request::Feature(feature) => return self.feature(feature, id, out),
            Request::MigDataRead { size } => {
                let mut data = vec![0; *size as usize];
                let len = match self.data()?.read(&mut data) {
                    Ok(len) => len,
                    Err(Errno(libc::ENOMSG)) => 0, // nothing more before the device stops
                    Err(Errno(libc::EBADF)) => return Err(Errno::EINVAL), // it is written to
                    Err(errno) => return Err(errno),
                };
                let data = data.get(..len).unwrap_or_default();
                put(&Reply::MigDataRead(data), id, len, out);
            }
            Request::MigDataWrite(data) => {
                match self.data()?.write(data) {
                    Ok(_) => put(&Reply::MigDataWrite, id, 0, out),
                    Err(Errno(libc::EBADF)) => return Err(Errno::EINVAL), // it is read from
                    Err(errno) => return Err(errno),
                }
            }
        }
        Ok(())
    }

    fn limits(&self) -> Limits {
        let agreed = self.agreed.as_ref();
        let pgsizes = agreed.map_or(4096, |agreed| agreed.pgsizes);
        Limits {
            maps: agreed.map_or(0, |agreed| agreed.max_dma_maps as usize),
            page: pgsizes & pgsizes.wrapping_neg(),
        }
    }

    fn unmap(
        &mut self,
        unmap: &DmaUnmap,
        bitmap: Option<BitmapHead>,
        id: u16,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let log = self.device.log();
        if unmap.flags & UNMAP_ALL != 0 {
            self.memory.unmap_all(log)?;
            put(&Reply::DmaUnmap(*unmap, None), id, 0, out);
            return Ok(());
        }
        let Some(head) = bitmap else {
            self.memory.unmap(log, unmap.iova, unmap.size)?;
            put(&Reply::DmaUnmap(*unmap, None), id, 0, out);
            return Ok(());
        };
        if !self.memory.has(unmap.iova, unmap.size) {
            return Err(Errno::ENOENT);
        }
        let needed = bitmap_bytes(unmap.size, head.pgsize).ok_or(Errno::EINVAL)?;
        let size = usize::try_from(head.size).map_err(|_| Errno::EINVAL)?;
        if needed > head.size || !log.is_on() {
            return Err(Errno::EINVAL);
        }
        let report = LoggingReport {
            iova: unmap.iova,
            length: unmap.size,
            page_size: head.pgsize,
        };
        let (memory, logging) = (&self.memory, &self.logging);
        let carry = memory.carry.as_ref();
        // What fails, fails before anything is unmapped.
        let mut bits = logging.report(log, carry, &report)?;
        if let Err(errno) = memory.unmap(log, unmap.iova, unmap.size) {
            // The client does not get the report, so all counts as dirty. unreachable error: the
            // log is on.
            let _ = log.mark(unmap.iova, unmap.size);
            return Err(errno);
        }
        // What the device wrote in between. unreachable error: as the first report.
        let more = logging.report(log, carry, &report);
        let more = more.unwrap_or_else(|_| vec![0xff; needed as usize]);
        bits.iter_mut().zip(more).for_each(|(a, b)| *a |= b);
        bits.resize(size, 0);
        let reply = Reply::DmaUnmap(*unmap, Some((head, &bits)));
        put(&reply, id, bits.len(), out);
        Ok(())
    }

    fn set_irqs(&self, set: &IrqSet, signals: &[u8], fds: &[OwnedFd]) -> Result<(), Errno> {
        let action = set.flags & (IRQ_ACTION_MASK | IRQ_ACTION_UNMASK | IRQ_ACTION_TRIGGER);
        let there = self.device.irq_count(set.index)?;
        let eventfds: Vec<_>;
        let data = if set.flags & IRQ_DATA_BOOL != 0 {
            IrqData::Bool(signals)
        } else if set.flags & IRQ_DATA_EVENTFD != 0 {
            if set.count > there {
                return Err(Errno::EINVAL);
            }
            // A message without descriptors disables the interrupts.
            eventfds = (0..set.count as usize)
                .map(|k| fds.get(k).map(AsFd::as_fd))
                .collect();
            IrqData::Eventfds(&eventfds)
        } else {
            IrqData::None
        };
        self.device
            .set_irqs(action, set.index, set.start, set.count, data)
    }

    /// Where the `len` bytes of a region are in the device's file.
    fn place(&self, region: u32, offset: u64, len: usize) -> Result<u64, Errno> {
        let size = self.device.region_size(region)?;
        match offset.checked_add(len as u64) {
            // A region is smaller than the part of the file that it has.
            Some(end) if end <= size => Ok((u64::from(region) << REGION_SHIFT) | offset),
            _ => Err(Errno::EINVAL),
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let place = self.place(region, offset, data.len())?;
        if !data.is_empty() {
            self.device.write(place, data)?;
        }
        Ok(())
    }

    /// Does the writes up to the first that fails.
    fn write_multiple(&self, writes: &Writes<'_>) -> Result<(), Errno> {
        let mut writes = writes.iter();
        writes.try_for_each(|write| self.write(write.region, write.offset, write.data))
    }

    fn data(&self) -> Result<&DataFile, Errno> {
        self.data.as_ref().ok_or(Errno::EINVAL)
    }

    fn feature(&mut self, feature: &Feature<'_>, id: u16, out: &mut Vec<u8>) -> Result<(), Errno> {
        let max = self.agreed.map_or(0, |agreed| agreed.max_data_xfer_size);
        // unreachable error: the protocol has read it
        let call = feature.call(max).map_err(|_| Errno::EINVAL)?;
        let offers = self.device.offers();
        let offered = |migration| match migration {
            true => offers.migration.is_some(),
            false => offers.logging,
        };
        let is_migration = match call {
            FeatureCall::Probe { feature } => matches!(
                feature,
                VFIO_DEVICE_FEATURE_MIGRATION | VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
            ),
            FeatureCall::GetMigration | FeatureCall::GetState | FeatureCall::SetState(_) => true,
            _ => false,
        };
        if !offered(is_migration) {
            return Err(Errno::ENOTTY);
        }
        let (log, carry) = (self.device.log(), self.memory.carry.as_ref());
        let bits: Vec<u8>;
        let answer = match call {
            FeatureCall::Probe { .. } => FeatureAnswer::Done,
            FeatureCall::GetMigration => {
                let features = offers.migration.unwrap_or_default();
                FeatureAnswer::Migration(features.bits())
            }
            FeatureCall::GetState => FeatureAnswer::State(self.state()),
            FeatureCall::SetState(to) => {
                if let Some(file) = self.device.set_state(to.device_state)? {
                    self.data = Some(file);
                }
                FeatureAnswer::State(self.state())
            }
            FeatureCall::StartLogging { page_size, ranges } => {
                FeatureAnswer::Started(self.logging.start(log, carry, page_size, ranges)?)
            }
            FeatureCall::StopLogging => {
                self.logging.stop(log);
                FeatureAnswer::Done
            }
            FeatureCall::Report { report, .. } => {
                bits = self.logging.report(log, carry, &report)?;
                FeatureAnswer::Report(report, &bits)
            }
        };
        let room = match &answer {
            FeatureAnswer::Report(_, bits) => bits.len(),
            _ => feature.data.len(),
        };
        let mut buffer = vec![0; room + LoggingReport::SIZE];
        // unreachable error: there is room
        let reply = feature.reply(answer, &mut buffer);
        let reply = reply.map_err(|_| Errno::EINVAL)?;
        put(&Reply::Feature(reply), id, reply.data.len(), out);
        Ok(())
    }

    fn state(&self) -> MigState {
        MigState {
            device_state: self.device.state().raw(),
            data_fd: u32::MAX, // there is no descriptor: MIG_DATA_READ and WRITE transfer
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.device.close();
        self.memory.close();
    }
}

/// What the receiver of a bad message does.
fn refuse(header: &Header, error: Refused, out: &mut Vec<u8>) -> Handled {
    let answer = match error.verdict() {
        Verdict::Answer => header.wants_reply(),
        Verdict::AnswerAndClose => true,
        Verdict::Close => false,
    };
    if answer {
        out.extend_from_slice(&header.refuse(error.errno()).to_bytes());
    }
    Handled {
        fd: None,
        close: (error.verdict() != Verdict::Answer).then_some(error),
    }
}

/// What a server says of itself.
pub(super) fn capabilities(migrates: bool) -> Capabilities {
    Capabilities {
        max_msg_fds: 16, // QEMU refuses a server that takes more
        pgsizes: !(host_page().bytes() - 1),
        migration: migrates.then(Default::default),
        write_multiple: true,
        twin_socket: true,
        ..Capabilities::default()
    }
}
