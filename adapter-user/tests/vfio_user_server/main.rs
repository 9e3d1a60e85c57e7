// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vfio-user server as a client sees it, which sends bytes and reads bytes.

mod carry; // contents in the device's state
mod dma; // maps, and what the device reaches by them
mod hostile; // bad messages, and clients that go
mod log; // which pages are reported
mod migrate; // states, interrupts, regions
mod threads; // replies, deadlines, floods and storms

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use adapter_user::emulated::{
    ConfigSpace, DeviceModel, Dma, Features, Irqs, MigrationVersion, Settings,
};
use adapter_user::vfio_user::Server;
use adapter_user::Error;
use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vfio_user_wire::wire::*;
use vfio_user_wire::{
    Capabilities, Command, Feature, FeatureAnswer, FeatureCall, Header, Ranges, Reply, Request,
};

pub(crate) const PAGE: u64 = 4096;
/// Where the doorbell is in BAR 0: the device writes its first 8 bytes at the IOVA there.
pub(crate) const DOORBELL: u64 = 8;

/// A device whose DMA the test does, or a doorbell.
pub(crate) struct Toy {
    pub(crate) dma: Dma,
    pub(crate) irqs: Irqs,
    config: Mutex<ConfigSpace>,
    pub(crate) registers: Mutex<[u8; 16]>,
    /// Held shared by each write of [`Toy::write`]; whether the device runs.
    running: RwLock<bool>,
    pub(crate) early: AtomicU64,
    pub(crate) quiesced: AtomicU64,
    /// What the last doorbell came to.
    pub(crate) last: Mutex<Option<Result<(), Error>>>,
    pub(crate) busy: AtomicBool,
}

impl Toy {
    fn new(dma: Dma, irqs: Irqs) -> Toy {
        Toy {
            dma,
            irqs,
            config: Mutex::new(ConfigSpace::new(0x1234, 0x5678, 0x08_8000).with_memory_bar(0, 16)),
            registers: Mutex::default(),
            running: RwLock::new(true),
            early: AtomicU64::new(0),
            quiesced: AtomicU64::new(0),
            last: Mutex::default(),
            busy: AtomicBool::new(false),
        }
    }

    /// Writes as a thread of the device does: not while it has stopped.
    pub(crate) fn write(&self, iova: u64, data: &[u8]) -> Option<Result<(), Error>> {
        let running = self.running.read().unwrap();
        running.then(|| self.dma.write(iova, data))
    }
}

struct Model(Arc<Toy>);

impl DeviceModel for Model {
    fn region_size(&self, region: u32) -> u64 {
        match region {
            0 => 16,
            7 => 256,
            _ => 0,
        }
    }

    fn irq_count(&self, index: u32) -> u32 {
        [0, 2, 4][index as usize]
    }

    fn read(&self, region: u32, offset: u64, data: &mut [u8]) {
        let toy = &self.0;
        match region {
            7 => toy.config.lock().unwrap().read(offset, data),
            _ => {
                let registers = toy.registers.lock().unwrap();
                data.copy_from_slice(&registers[offset as usize..][..data.len()]);
            }
        }
    }

    fn write(&self, region: u32, offset: u64, data: &[u8]) {
        let toy = &self.0;
        if region == 7 {
            return toy.config.lock().unwrap().write(offset, data);
        }
        let mut registers = toy.registers.lock().unwrap();
        registers[offset as usize..][..data.len()].copy_from_slice(data);
        let registers = *registers;
        if offset == DOORBELL && data.len() == 8 {
            toy.busy.store(true, Ordering::SeqCst);
            let (value, iova) = registers.split_at(8);
            let iova = u64::from_le_bytes(iova.try_into().unwrap());
            let done = toy.write(iova, value);
            *toy.last.lock().unwrap() = done;
            toy.busy.store(false, Ordering::SeqCst);
        }
    }

    fn reset(&self) {
        *self.0.registers.lock().unwrap() = [0; 16];
        self.0.config.lock().unwrap().write(4, &[0, 0]);
    }

    fn quiesce(&self) {
        *self.0.running.write().unwrap() = false;
        self.0.quiesced.fetch_add(1, Ordering::SeqCst);
    }

    fn resume(&self) {
        *self.0.running.write().unwrap() = true;
    }

    fn state_size(&self) -> u64 {
        256 + 16
    }

    fn save(&self, stream: &mut dyn Write) -> io::Result<()> {
        assert!(!*self.0.running.read().unwrap());
        stream.write_all(self.0.config.lock().unwrap().bytes())?;
        stream.write_all(&*self.0.registers.lock().unwrap())
    }

    fn load(&self, stream: &mut dyn Read) -> io::Result<()> {
        assert!(!*self.0.running.read().unwrap());
        let mut config = [0; 256];
        stream.read_exact(&mut config)?;
        self.0.config.lock().unwrap().restore(&config);
        stream.read_exact(&mut *self.0.registers.lock().unwrap())
    }

    fn early_size(&self) -> u64 {
        self.0.early.load(Ordering::SeqCst)
    }

    fn save_early(&self, stream: &mut dyn Write) -> io::Result<()> {
        let size = self.0.early.swap(0, Ordering::SeqCst);
        stream.write_all(&vec![7; size as usize])
    }

    fn load_early(&self, stream: &mut dyn Read) -> io::Result<()> {
        stream.read_to_end(&mut Vec::new()).map(drop)
    }
}

/// A server and its client.
pub(crate) struct World {
    pub(crate) client: Client,
    pub(crate) toy: Arc<Toy>,
    serving: Option<JoinHandle<io::Result<()>>>,
}

pub(crate) fn settings() -> Settings {
    let features = Features {
        p2p: false,
        pre_copy: true,
    };
    Settings {
        migration: MigrationVersion::V2(features),
        own_log: true,
    }
}

/// Starts a server that `with` changes, and connects to it without a word.
pub(crate) fn connect(with: impl FnOnce(Server) -> Server) -> World {
    connect_as(settings(), with)
}

pub(crate) fn connect_as(settings: Settings, with: impl FnOnce(Server) -> Server) -> World {
    let slot = Arc::new(Mutex::new(None));
    let toys = Arc::clone(&slot);
    let server = with(Server::new(settings, move |dma, irqs| {
        let toy = Arc::new(Toy::new(dma, irqs));
        *toys.lock().unwrap() = Some(Arc::clone(&toy));
        Model(toy)
    }));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let serving = thread::spawn(move || server.serve(theirs));
    let toy = loop {
        if let Some(toy) = slot.lock().unwrap().take() {
            break toy;
        }
        thread::sleep(Duration::from_millis(1));
    };
    ours.set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    World {
        client: Client {
            socket: ours,
            id: 0,
            memory: vec![0; 16 * PAGE as usize],
            refuse: false,
        },
        toy,
        serving: Some(serving),
    }
}

/// A client that has agreed on a version, and lets the device do DMA.
pub(crate) fn world() -> World {
    world_with(|server| server)
}

pub(crate) fn world_with(with: impl FnOnce(Server) -> Server) -> World {
    world_as(settings(), with)
}

pub(crate) fn world_as(settings: Settings, with: impl FnOnce(Server) -> Server) -> World {
    let mut world = connect_as(settings, with);
    world.client.version(Capabilities {
        max_msg_fds: 16,
        migration: Some(Default::default()),
        ..Capabilities::default()
    });
    world.client.bus_master(true);
    world
}

impl World {
    /// The client goes. Returns how the server took it.
    pub(crate) fn end(mut self) -> io::Result<()> {
        let _ = self.client.socket.shutdown(std::net::Shutdown::Both);
        self.join()
    }

    pub(crate) fn join(&mut self) -> io::Result<()> {
        self.serving.take().unwrap().join().unwrap()
    }
}

/// A client without any library: bytes go out, bytes come in. While it waits for a reply it
/// serves DMA_READ and DMA_WRITE from its memory, at IOVA 0.
pub(crate) struct Client {
    pub(crate) socket: UnixStream,
    pub(crate) id: u16,
    pub(crate) memory: Vec<u8>,
    /// It refuses the server's commands.
    pub(crate) refuse: bool,
}

/// An error number, or that the connection has ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    Errno(u32),
    Closed,
}

pub(crate) use Failed::{Closed, Errno};

impl Client {
    pub(crate) fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let flags = SendFlags::NOSIGNAL;
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, flags);
        let Ok(sent) = sent else { return }; // the server has gone: the next read tells
        let _ = self.socket.write_all(&bytes[sent..]);
    }

    pub(crate) fn message(&mut self, command: u16, flags: u32, payload: &[u8]) -> Vec<u8> {
        self.id += 1;
        let header = Header {
            id: self.id,
            command,
            size: 16 + payload.len() as u32,
            flags,
            error: 0,
        };
        [&header.to_bytes()[..], payload].concat()
    }

    /// Reads a message.
    pub(crate) fn receive(&mut self) -> Result<(Header, Vec<u8>), Failed> {
        let mut head = [0; 16];
        self.socket.read_exact(&mut head).map_err(|_| Closed)?;
        let header = Header::from_bytes(&head);
        let mut payload = vec![0; header.payload()];
        self.socket.read_exact(&mut payload).map_err(|_| Closed)?;
        Ok((header, payload))
    }

    /// Serves a command of the server.
    pub(crate) fn serve(&mut self, header: &Header, payload: &[u8]) -> Vec<u8> {
        let command = Command::from_number(header.command).unwrap();
        if self.refuse {
            return header.refuse(19).to_bytes().to_vec();
        }
        let mut out = vec![0; 64 + (1 << 20)];
        let len = match Request::read(command, payload, 0, 1 << 20).unwrap() {
            Request::DmaRead(at) => {
                let data = &self.memory[at.iova as usize..][..at.count as usize];
                let iova = at.iova;
                Reply::DmaRead { iova, data }.write(header.id, &mut out)
            }
            Request::DmaWrite { iova, data } => {
                self.memory[iova as usize..][..data.len()].copy_from_slice(data);
                Reply::DmaWrite(None).write(header.id, &mut out)
            }
            other => panic!("{other:?}"),
        };
        out.truncate(len.unwrap());
        out
    }

    /// Reads the reply to the last command, and serves the server meanwhile.
    pub(crate) fn reply(&mut self) -> Result<(Header, Vec<u8>), Failed> {
        loop {
            let (header, payload) = self.receive()?;
            if !header.is_reply() {
                let reply = self.serve(&header, &payload);
                self.send(&reply, &[]);
                continue;
            }
            assert_eq!(header.id, self.id);
            return match header.failure() {
                Some(errno) => Err(Errno(errno)),
                None => Ok((header, payload)),
            };
        }
    }

    pub(crate) fn raw(&mut self, command: u16, payload: &[u8]) -> Result<Vec<u8>, Failed> {
        let message = self.message(command, 0, payload);
        self.send(&message, &[]);
        self.reply().map(|(_, payload)| payload)
    }

    pub(crate) fn call(
        &mut self,
        request: &Request<'_>,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u8>, Failed> {
        self.id += 1;
        let mut out = vec![0; request_room(request)];
        let len = request.write(self.id, false, &mut out).unwrap();
        self.send(&out[..len], fds);
        let (header, payload) = self.reply()?;
        let reply = Reply::read(&header, &payload).unwrap();
        reply.check(request).unwrap();
        Ok(payload)
    }

    pub(crate) fn version(&mut self, capabilities: Capabilities) -> Vec<u8> {
        let client = vfio_user_wire::Client::new(capabilities);
        self.call(&client.version(), &[]).unwrap()
    }

    pub(crate) fn write_region(&mut self, region: u32, offset: u64, data: &[u8]) {
        let write = vfio_user_wire::RegionWrite {
            offset,
            region,
            data,
        };
        self.call(&Request::RegionWrite(write), &[]).unwrap();
    }

    pub(crate) fn bus_master(&mut self, on: bool) {
        self.write_region(7, 4, &[if on { 6 } else { 2 }, 0]);
    }

    /// The device writes `value` at `iova` before the reply comes.
    pub(crate) fn doorbell(&mut self, iova: u64, value: u64) {
        self.write_region(0, 0, &value.to_le_bytes());
        self.write_region(0, DOORBELL, &iova.to_le_bytes());
    }

    /// Maps a range of IOVAs, to a file or without one.
    pub(crate) fn map(
        &mut self,
        (iova, size): (u64, u64),
        flags: u32,
        file: Option<(&OwnedFd, u64)>,
    ) -> Result<(), Failed> {
        let map = DmaMap {
            argsz: 32,
            flags,
            offset: file.map_or(0, |(_, offset)| offset),
            iova,
            size,
        };
        let fds: Vec<_> = file.iter().map(|(fd, _)| fd.as_fd()).collect();
        self.call(&Request::DmaMap(map), &fds).map(drop)
    }

    pub(crate) fn unmap(&mut self, iova: u64, size: u64) -> Result<(), Failed> {
        self.unmap_with(0, iova, size)
    }

    pub(crate) fn unmap_with(&mut self, flags: u32, iova: u64, size: u64) -> Result<(), Failed> {
        let unmap = DmaUnmap {
            argsz: 24,
            flags,
            iova,
            size,
        };
        self.call(&Request::DmaUnmap(unmap, None), &[]).map(drop)
    }

    /// DEVICE_FEATURE, of which `take` gets the answer.
    pub(crate) fn feature<T>(
        &mut self,
        call: FeatureCall<'_>,
        take: impl FnOnce(FeatureAnswer<'_>) -> T,
    ) -> Result<T, Failed> {
        let mut buffer = vec![0; 64 << 10];
        let request = call.request(&mut buffer).unwrap();
        let payload = self.call(&Request::Feature(request), &[])?;
        let (argsz, rest) = payload.split_first_chunk().unwrap();
        let (flags, data) = rest.split_first_chunk().unwrap();
        let reply = Feature {
            argsz: u32::from_ne_bytes(*argsz),
            flags: u32::from_ne_bytes(*flags),
            data,
        };
        Ok(take(reply.answer(&request).unwrap()))
    }

    pub(crate) fn state(&mut self, device_state: u32) -> Result<(), Failed> {
        let state = MigState {
            device_state,
            data_fd: 0,
        };
        self.feature(FeatureCall::SetState(state), |answer| match answer {
            FeatureAnswer::State(now) => assert_eq!(now.device_state, device_state),
            other => panic!("{other:?}"),
        })
    }

    pub(crate) fn start(&mut self, page_size: u64, ranges: &[(u64, u64)]) -> Result<u64, Failed> {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|(iova, length)| LoggingRange {
                iova: *iova,
                length: *length,
            })
            .collect();
        let mut buffer = vec![0; 16 * ranges.len()];
        let ranges = Ranges::write(&ranges, &mut buffer).unwrap();
        let call = FeatureCall::StartLogging { page_size, ranges };
        self.feature(call, |answer| match answer {
            FeatureAnswer::Started(page_size) => page_size,
            other => panic!("{other:?}"),
        })
    }

    pub(crate) fn stop(&mut self) -> Result<(), Failed> {
        self.feature(FeatureCall::StopLogging, |_| ())
    }

    /// The numbers of the dirty pages of a range, counted from its start.
    pub(crate) fn report(
        &mut self,
        iova: u64,
        length: u64,
        page_size: u64,
    ) -> Result<Vec<u64>, Failed> {
        let report = LoggingReport {
            iova,
            length,
            page_size,
        };
        let call = FeatureCall::Report {
            report,
            bitmap_bytes: bitmap_bytes(length, page_size).unwrap() as u32,
        };
        self.feature(call, |answer| match answer {
            FeatureAnswer::Report(_, bits) => dirty(bits),
            other => panic!("{other:?}"),
        })
    }

    pub(crate) fn mig_read(&mut self, size: u32) -> Result<Vec<u8>, Failed> {
        let payload = self.call(&Request::MigDataRead { size }, &[])?;
        Ok(payload[8..].to_vec())
    }

    /// All that is left of the state.
    pub(crate) fn mig_read_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let part = self.mig_read(1 << 16).unwrap();
            if part.is_empty() {
                return all;
            }
            all.extend(part);
        }
    }

    pub(crate) fn mig_write(&mut self, data: &[u8]) -> Result<(), Failed> {
        self.call(&Request::MigDataWrite(data), &[]).map(drop)
    }
}

/// The numbers of the bits that are set.
pub(crate) fn dirty(bits: &[u8]) -> Vec<u64> {
    (0..bits.len() as u64 * 8)
        .filter(|k| bits[(k / 8) as usize] >> (k % 8) & 1 != 0)
        .collect()
}

pub(crate) const RW: u32 = DMA_READABLE | DMA_WRITABLE;

/// A memory file, which can shrink or not.
pub(crate) fn memfd(len: u64, sealed: bool) -> OwnedFd {
    use nix::fcntl::{fcntl, FcntlArg, SealFlag};
    use nix::sys::memfd::{memfd_create, MFdFlags};
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(c"client", flags).unwrap();
    File::from(fd.try_clone().unwrap()).set_len(len).unwrap();
    if sealed {
        fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    }
    fd
}

pub(crate) fn bytes_at(fd: &OwnedFd, offset: u64, len: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; len];
    let file = File::from(fd.try_clone().unwrap());
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

/// Bytes that a request takes, at most.
fn request_room(request: &Request<'_>) -> usize {
    match request {
        Request::MigDataWrite(data) => 64 + data.len(),
        _ => 16 << 10,
    }
}
