// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs operations on a session and on the model.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use adapter_user::emulated::{Features, MigrationVersion, Settings};
use adapter_user::vfio_user::{Server, Session};
use vfio_user_wire::wire::*;
use vfio_user_wire::{
    Capabilities, Client as Wire, Feature, FeatureAnswer, FeatureCall, Header, Ranges, RegionWrite,
    Reply, Request,
};

use super::device::{pattern, Client, Device, Done};
use super::naive::{Naive, EINVAL, ENOENT};
use super::ops::{Access, Backing, Op, CARRY, FILE, IOVAS, MAPS, PAGE};

const ERROR: u32 = 0;
const STOP: u32 = 1;
const RUNNING: u32 = 2;
const STOP_COPY: u32 = 3;
const RESUMING: u32 = 4;
const PRE_COPY: u32 = 6;

/// The client's descriptors.
struct Files {
    files: [File; 2],
    read_only: OwnedFd,
    pipe: OwnedFd,
}

thread_local! {
    static FILES: RefCell<Option<Arc<Files>>> = const { RefCell::new(None) };
}

impl Files {
    fn new() -> io::Result<Files> {
        // The core's own memory file cannot shrink, and an ordinary one can.
        let sealed = adapter_user::GuestMemory::new(FILE * PAGE)?;
        let sealed = File::from(sealed.as_fd().try_clone_to_owned()?);
        let path = std::env::temp_dir().join(format!(
            "vfio-user-model-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(true);
        let plain = options.open(&path)?;
        plain.set_len(FILE * PAGE)?;
        let read_only = File::open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Files {
            files: [sealed, plain],
            read_only: read_only.into(),
            pipe: io::pipe()?.0.into(),
        })
    }

    /// The files of this thread, all zero.
    fn zeroed() -> io::Result<Arc<Files>> {
        let files = FILES.with_borrow_mut(|files| match files {
            Some(files) => Ok(Arc::clone(files)),
            None => {
                let new = Arc::new(Files::new()?);
                *files = Some(Arc::clone(&new));
                Ok::<_, io::Error>(new)
            }
        })?;
        for file in &files.files {
            file.write_all_at(&[0; (FILE * PAGE) as usize], 0)?;
        }
        Ok(files)
    }
}

/// A stream that was read, as the model knows it.
struct Saved {
    stream: Vec<u8>,
    pages: Vec<(u64, Vec<u8>)>,
    master: bool,
}

struct Run {
    session: Session,
    naive: Naive,
    client: Arc<Client>,
    last: Arc<Mutex<Done>>,
    files: Arc<Files>,
    id: u16,
    out: Vec<u8>,
    saved: Option<Saved>,
    /// What was written in RESUMING.
    loaded: Vec<bool>,
}

/// Runs operations. The first byte of a script says whether the device's state carries pages.
///
/// # Errors
///
/// Says which operation went wrong, and how.
pub fn run(carries: bool, ops: &[Op]) -> Result<(), String> {
    let mut run = Run::new(carries)?;
    for (at, op) in ops.iter().enumerate() {
        run.step(*op)
            .map_err(|what| format!("operation {at}, {op:?}: {what}"))?;
    }
    run.check_memory()
}

fn expect<T: PartialEq + std::fmt::Debug>(what: &str, got: T, want: T) -> Result<(), String> {
    match got == want {
        true => Ok(()),
        false => Err(format!("{what}: {got:?}, but the model says {want:?}")),
    }
}

fn text(error: impl std::fmt::Debug) -> String {
    format!("{error:?}")
}

impl Run {
    fn new(carries: bool) -> Result<Run, String> {
        let settings = Settings {
            migration: MigrationVersion::V2(Features {
                p2p: false,
                pre_copy: true,
            }),
            own_log: true,
        };
        let last = Arc::new(Mutex::new(None));
        let done = Arc::clone(&last);
        let mut server = Server::new(settings, move |dma, _| Device::new(dma, Arc::clone(&done)));
        if carries {
            server = server.with_carry(CARRY * PAGE);
        }
        let client = Arc::new(Client::new());
        let mut run = Run {
            session: server.session(Arc::clone(&client) as _).map_err(text)?,
            naive: Naive::new(carries),
            client,
            last,
            files: Files::zeroed().map_err(text)?,
            id: 0,
            out: Vec::new(),
            saved: None,
            loaded: Vec::new(),
        };
        let wire = Wire::new(Capabilities {
            max_dma_maps: MAPS,
            migration: Some(Default::default()),
            ..Capabilities::default()
        });
        run.call(&wire.version(), Vec::new(), |_| ())?
            .map_err(text)?;
        Ok(run)
    }

    /// Sends a message, and gives the reply to `take`, or returns its error number.
    fn send<T>(
        &mut self,
        message: &[u8],
        fds: Vec<OwnedFd>,
        take: impl FnOnce(&Header, &[u8]) -> Result<T, String>,
    ) -> Result<Result<T, u32>, String> {
        let (head, payload) = message.split_first_chunk().ok_or("a short message")?;
        let header = Header::from_bytes(head);
        let handled = self.session.handle(&header, payload, fds, &mut self.out);
        if handled.close.is_some() {
            return Err(format!("the connection ends: {:?}", handled.close));
        }
        let (head, payload) = self.out.split_first_chunk().ok_or("no reply")?;
        let reply = Header::from_bytes(head);
        expect(
            "the reply's id",
            (reply.id, reply.command),
            (header.id, header.command),
        )?;
        expect("the reply's size", reply.size as usize, self.out.len())?;
        match reply.failure() {
            Some(errno) => Ok(Err(errno)),
            None => take(&reply, payload).map(Ok),
        }
    }

    fn call<T>(
        &mut self,
        request: &Request<'_>,
        fds: Vec<OwnedFd>,
        take: impl FnOnce(Reply<'_>) -> T,
    ) -> Result<Result<T, u32>, String> {
        self.id = self.id.wrapping_add(1);
        let data = match request {
            Request::MigDataWrite(data) => data.len(),
            _ => 0,
        };
        let mut message = vec![0; 1024 + data];
        let len = request.write(self.id, false, &mut message).map_err(text)?;
        message.truncate(len);
        self.send(&message, fds, |header, payload| {
            let reply = Reply::read(header, payload).map_err(text)?;
            reply.check(request).map_err(text)?;
            Ok(take(reply))
        })
    }

    fn feature<T>(
        &mut self,
        call: FeatureCall<'_>,
        take: impl FnOnce(FeatureAnswer<'_>) -> T,
    ) -> Result<Result<T, u32>, String> {
        let mut buffer = [0; 512];
        let request: Feature<'_> = call.request(&mut buffer).map_err(text)?;
        self.call(
            &Request::Feature(request),
            Vec::new(),
            |reply| match reply {
                Reply::Feature(reply) => reply.answer(&request).map(take).map_err(text),
                other => Err(format!("{other:?}")),
            },
        )
        .and_then(|answer| match answer {
            Ok(answer) => answer.map(Ok),
            Err(errno) => Ok(Err(errno)),
        })
    }

    fn write_region(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), String> {
        let write = RegionWrite {
            offset,
            region,
            data,
        };
        let done = self.call(&Request::RegionWrite(write), Vec::new(), |_| ())?;
        expect("REGION_WRITE", done, Ok(()))
    }

    fn state(&self) -> u32 {
        self.session.device().state().raw()
    }

    fn step(&mut self, op: Op) -> Result<(), String> {
        match op {
            Op::Map {
                iova,
                n,
                flags,
                backing,
                offset,
                skew,
            } => {
                let map = DmaMap {
                    argsz: 32,
                    flags,
                    offset: offset * PAGE,
                    iova: iova * PAGE + skew,
                    size: n * PAGE,
                };
                let files = Arc::clone(&self.files);
                let fd = match backing {
                    Backing::Remote => None,
                    Backing::File(file) => Some(files.files[file].as_fd()),
                    Backing::ReadOnly => Some(files.read_only.as_fd()),
                    Backing::Pipe => Some(files.pipe.as_fd()),
                };
                let fd = fd.map(|fd| fd.try_clone_to_owned());
                let fds = fd.transpose().map_err(text)?.into_iter().collect();
                let got = self.call(&Request::DmaMap(map), fds, |_| ())?;
                let want = self.naive.map((iova, n), flags, backing, offset, skew);
                expect("DMA_MAP", got, want)
            }
            Op::Unmap { iova, n } => self.unmap(iova, n),
            Op::UnmapAt { iova, pgsize } => {
                let (iova, n) = self.naive.bounds(iova).unwrap_or((iova, 1));
                match pgsize {
                    Some(pgsize) if pgsize.is_power_of_two() => self.unmap_dirty(iova, n, pgsize),
                    _ => self.unmap(iova, n),
                }
            }
            Op::UnmapAll => {
                let unmap = DmaUnmap {
                    argsz: 24,
                    flags: UNMAP_ALL,
                    iova: 0,
                    size: 0,
                };
                let got = self.call(&Request::DmaUnmap(unmap, None), Vec::new(), |_| ())?;
                self.naive.unmap_all();
                expect("DMA_UNMAP", got, Ok(()))
            }
            Op::Doorbell { access, iova, len } => self.doorbell(access, iova, len),
            Op::BusMaster { on } => {
                self.write_region(7, 4, &[if on { 6 } else { 2 }, 0])?;
                self.naive.master = on;
                Ok(())
            }
            Op::Refuse { on } => {
                self.client.refuse.store(on, Ordering::SeqCst);
                self.naive.refuse = on;
                Ok(())
            }
            Op::Start { pgsize, ranges } => {
                let ranges: Vec<_> = ranges.into_iter().flatten().collect();
                let bytes: Vec<_> = ranges
                    .iter()
                    .map(|(iova, n)| LoggingRange {
                        iova: iova * PAGE,
                        length: n * PAGE,
                    })
                    .collect();
                let mut buffer = [0; 64];
                let call = FeatureCall::StartLogging {
                    page_size: pgsize,
                    ranges: Ranges::write(&bytes, &mut buffer).map_err(text)?,
                };
                let got = self.feature(call, |answer| match answer {
                    FeatureAnswer::Started(pgsize) => pgsize,
                    _ => 0,
                })?;
                expect("START", got, self.naive.start(pgsize, &ranges))
            }
            Op::Stop => {
                self.naive.log = None;
                let got = self.feature(FeatureCall::StopLogging, |_| ())?;
                expect("STOP", got, Ok(()))
            }
            Op::Report { iova, len, pgsize } => self.report(iova * 1024, len * 1024, pgsize),
            Op::State { to } => self.change(to),
            Op::Load { good } => self.load(good),
            Op::Reset => {
                self.naive.master = false;
                self.loaded.clear();
                let got = self.call(&Request::Reset, Vec::new(), |_| ())?;
                expect("RESET", got, Ok(()))?;
                expect("the state", self.state(), RUNNING)
            }
            Op::Bad { command, len } => {
                self.id = self.id.wrapping_add(1);
                let header = Header {
                    id: self.id,
                    command,
                    size: 16 + len as u32,
                    ..Header::default()
                };
                let message = [&header.to_bytes()[..], &vec![0; len]].concat();
                let got = self.send(&message, Vec::new(), |_, _| Ok(()))?;
                expect("a bad message", got, Err(EINVAL))
            }
        }
    }

    fn unmap(&mut self, iova: u64, n: u64) -> Result<(), String> {
        let unmap = DmaUnmap {
            argsz: 24,
            flags: 0,
            iova: iova * PAGE,
            size: n * PAGE,
        };
        let got = self.call(&Request::DmaUnmap(unmap, None), Vec::new(), |_| ())?;
        expect("DMA_UNMAP", got, self.naive.unmap(iova, n))
    }

    fn unmap_dirty(&mut self, iova: u64, n: u64, pgsize: u64) -> Result<(), String> {
        let (start, size) = (iova * PAGE, n * PAGE);
        let bytes = bitmap_bytes(size, pgsize).ok_or("a bad page size")?;
        let head = BitmapHead {
            pgsize,
            size: bytes,
        };
        let unmap = DmaUnmap {
            argsz: 40 + bytes as u32,
            flags: UNMAP_GET_DIRTY_BITMAP,
            iova: start,
            size,
        };
        let request = Request::DmaUnmap(unmap, Some(head));
        let got = self.call(&request, Vec::new(), |reply| match reply {
            Reply::DmaUnmap(_, Some((_, bits))) => bits.to_vec(),
            _ => Vec::new(),
        })?;
        let want = match self.naive.bounds(iova) == Some((iova, n)) {
            true => self.naive.can_report(start, size, pgsize),
            false => Err(ENOENT),
        };
        match got {
            Err(errno) => expect("DMA_UNMAP with its dirty pages", Err(errno), want),
            Ok(bits) => {
                expect("DMA_UNMAP with its dirty pages", Ok(()), want)?;
                self.naive
                    .reported((start, size), pgsize, |k| bit(&bits, k))?;
                expect("DMA_UNMAP", Ok(()), self.naive.unmap(iova, n))
            }
        }
    }

    fn doorbell(&mut self, access: Access, iova: u64, len: u64) -> Result<(), String> {
        let seed = (self.id as u8) | 1;
        let kind = match access {
            Access::Read => 0u64,
            Access::Write => 1,
            Access::Pin => 2,
        };
        let words = [kind, iova, len, seed.into()];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let running = matches!(self.state(), RUNNING | PRE_COPY);
        self.write_region(0, 0, &bytes)?;
        let got = self.last.lock().map_err(text)?.take();
        let want = running.then(|| {
            let data = pattern(seed, len as usize);
            self.naive.access(access, iova, &data)
        });
        self.naive.check_budget();
        expect("the device's access", got, want)
    }

    fn report(&mut self, iova: u64, length: u64, page_size: u64) -> Result<(), String> {
        if !page_size.is_power_of_two() {
            return Ok(()); // the protocol's crate refuses it
        }
        let report = LoggingReport {
            iova,
            length,
            page_size,
        };
        let bitmap_bytes = bitmap_bytes(length, page_size).ok_or("a bad page size")? as u32;
        let call = FeatureCall::Report {
            report,
            bitmap_bytes,
        };
        let got = self.feature(call, |answer| match answer {
            FeatureAnswer::Report(_, bits) => bits.to_vec(),
            _ => Vec::new(),
        })?;
        let want = self.naive.can_report(iova, length, page_size);
        match got {
            Err(errno) => expect("REPORT", Err(errno), want),
            Ok(bits) => {
                expect("REPORT", Ok(()), want)?;
                self.naive
                    .reported((iova, length), page_size, |k| bit(&bits, k))
            }
        }
    }

    fn change(&mut self, to: u32) -> Result<(), String> {
        let from = self.state();
        let to = match from {
            // From there the way leads through a load, and that is enough at a time.
            RESUMING if to != RESUMING => STOP + to % 2,
            _ => to,
        };
        let state = MigState {
            device_state: to,
            data_fd: 0,
        };
        let got = self.feature(FeatureCall::SetState(state), |_| ())?;
        let want = match (from, to) {
            _ if from == to => Ok(()),
            _ if to == 0 || to == 5 || to > 6 => Err(EINVAL),
            (ERROR, _) => Err(EINVAL),
            (STOP | RUNNING | PRE_COPY, STOP_COPY) => {
                let saved = self.naive.save();
                if let (Ok(()), Ok(pages)) = (got, &saved) {
                    self.read_state(pages.clone().unwrap_or_default())?;
                }
                saved.map(drop)
            }
            (STOP_COPY, PRE_COPY) => Err(EINVAL),
            (RESUMING, _) => self.naive_load(),
            (_, _) => Ok(()),
        };
        expect("MIG_DEVICE_STATE", got, want)?;
        let now = match (from, want) {
            (_, Ok(())) => to,
            (RESUMING, _) => ERROR,
            (RUNNING, _) if to == STOP_COPY => STOP, // as far as it came
            _ => from,
        };
        if now == RESUMING {
            self.loaded.retain(|_| from == RESUMING);
        }
        expect("the state", self.state(), now)
    }

    /// Leaves RESUMING in the model.
    fn naive_load(&mut self) -> Result<(), u32> {
        match (&self.saved, &self.loaded[..]) {
            (Some(saved), [true]) => {
                self.naive.load(&saved.pages)?;
                self.naive.master = saved.master;
                Ok(())
            }
            _ => Err(EINVAL),
        }
    }

    /// Reads the state of the device, which has the contents of `pages`.
    fn read_state(&mut self, pages: Vec<(u64, Vec<u8>)>) -> Result<(), String> {
        let mut stream = Vec::new();
        loop {
            let request = Request::MigDataRead { size: 10_000 };
            let part = self.call(&request, Vec::new(), |reply| match reply {
                Reply::MigDataRead(data) => data.to_vec(),
                _ => Vec::new(),
            })?;
            let part = part.map_err(|errno| format!("MIG_DATA_READ: {errno}"))?;
            if part.is_empty() {
                break;
            }
            stream.extend(part);
        }
        let carried: Vec<u8> = pages
            .iter()
            .flat_map(|(page, bytes)| [&(page * PAGE).to_le_bytes()[..], bytes].concat())
            .collect();
        if !stream.ends_with(&carried) {
            return Err("the state does not end with the contents of the pages".into());
        }
        self.saved = Some(Saved {
            stream,
            pages,
            master: self.naive.master,
        });
        Ok(())
    }

    fn load(&mut self, good: bool) -> Result<(), String> {
        let stream = match &self.saved {
            Some(saved) if good => saved.stream.clone(),
            _ => vec![1; 20],
        };
        let good = good && self.saved.is_some();
        let got = self.call(&Request::MigDataWrite(&stream), Vec::new(), |_| ())?;
        if self.state() == RESUMING {
            self.loaded.push(good);
            return expect("MIG_DATA_WRITE", got, Ok(()));
        }
        // EINVAL, or ENODEV after a transfer.
        expect("MIG_DATA_WRITE", got.is_err(), true)
    }

    fn check_memory(&self) -> Result<(), String> {
        for (file, want) in self.files.files.iter().zip(&self.naive.files) {
            let mut bytes = vec![0; want.len()];
            file.read_exact_at(&mut bytes, 0).map_err(text)?;
            if bytes != *want {
                return Err("a file has other bytes than the model".into());
            }
        }
        match *self.client.memory.lock().map_err(text)? == self.naive.remote {
            true => Ok(()),
            false => Err("the client's memory has other bytes than the model".into()),
        }
    }
}

fn bit(bits: &[u8], k: u64) -> bool {
    let byte = bits.get((k / 8) as usize);
    byte.is_some_and(|byte| byte >> (k % 8) & 1 != 0)
}

const _: () = assert!(IOVAS * PAGE < 1 << 20);
