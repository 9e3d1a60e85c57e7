// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device, the socket that it listens on, and its client.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread::{self, JoinHandle};

use adapter_user::emulated::{Features, MigrationVersion, Settings};
use adapter_user::vfio_user::Server;
use dirty_core::migration::State;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use vfio_user_wire::wire::{DmaMap, DmaUnmap};
use vfio_user_wire::{Command, FeatureCall, Header, Request, HEADROOM};

use crate::model::{Model, SharedSetup};
use crate::relay::Message;

const FEATURES: Features = Features {
    pre_copy: true,
    p2p: false,
};

/// More than any message has.
const LONGEST: usize = 2 << 20;

pub(crate) struct Context {
    pub(crate) setup: SharedSetup,
    path: PathBuf,
    listener: Option<UnixListener>,
    client: Option<Client>,
}

/// The client, the server's end, and what the client has done.
struct Client {
    socket: UnixStream,
    server: UnixStream,
    thread: JoinHandle<()>,
    /// By IOVA, their sizes.
    maps: BTreeMap<u64, u64>,
    state: State,
}

impl Context {
    pub(crate) fn new(path: PathBuf) -> Context {
        Context {
            setup: SharedSetup::default(),
            path,
            listener: None,
            client: None,
        }
    }

    /// Listens, unless it does so already.
    pub(crate) fn realize(&mut self) -> Result<(), c_int> {
        if self.listener.is_none() {
            let listener = UnixListener::bind(&self.path);
            self.listener = Some(listener.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?);
        }
        Ok(())
    }

    /// Accepts a client, and passes on its first message.
    pub(crate) fn attach(&mut self) -> Result<(), c_int> {
        let listener = self.listener.as_ref().ok_or(libc::EINVAL)?;
        let (socket, _) = listener.accept().map_err(|_| libc::EAGAIN)?;
        let (server, theirs) = UnixStream::pair().map_err(|_| libc::ENOMEM)?;
        let migrates = self.setup.lock().migration.is_some();
        let settings = Settings {
            migration: match migrates {
                true => MigrationVersion::V2(FEATURES),
                false => MigrationVersion::None,
            },
            own_log: true,
        };
        let setup = self.setup.clone();
        let device = Server::new(settings, move |dma, _irqs| {
            setup.lock().dma = Some(dma);
            Model {
                setup: setup.clone(),
                config: Mutex::new([0; 4096]),
            }
        });
        let thread = thread::spawn(move || {
            let _ = device.serve(theirs); // how it ends the client sees
        });
        self.client = Some(Client {
            socket,
            server,
            thread,
            maps: BTreeMap::new(),
            state: State::Running,
        });
        match self.pass_on(HEADROOM as usize) {
            Ok(0) => Ok(()),
            Ok(errno) | Err(errno) => {
                self.end();
                Err(errno)
            }
        }
    }

    /// Passes on one message of the client, if there is one. ENOTCONN when the client has gone.
    pub(crate) fn run(&mut self) -> Result<(), c_int> {
        if let Some(client) = &self.client {
            let mut ready = [PollFd::new(client.socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::ZERO) == Ok(0) {
                return Ok(());
            }
        }
        let passed = self.pass_on(LONGEST);
        if passed.is_err() {
            self.end();
        }
        passed.map(|_| ())
    }

    /// Passes on one message, of at most `most` bytes. Returns the error number of its reply, or 0.
    fn pass_on(&mut self, most: usize) -> Result<c_int, c_int> {
        let client = self.client.as_mut().ok_or(libc::ENOTCONN)?;
        let message = Message::receive(&client.socket, most).map_err(|_| libc::ENOTCONN)?;
        let message = message.ok_or(libc::ENOTCONN)?;
        message.send(&client.server).map_err(|_| libc::EINVAL)?;
        if !message.header.wants_reply() {
            return Ok(0);
        }
        let reply = Message::receive(&client.server, LONGEST).map_err(|_| libc::EINVAL)?;
        let reply = reply.ok_or(libc::EINVAL)?;
        let errno = reply.header.failure().unwrap_or(0);
        let path = match errno {
            0 => client.learn(&message),
            _ => {
                client.revive(&message)?;
                Vec::new()
            }
        };
        self.tell(&path);
        let client = self.client.as_mut().ok_or(libc::ENOTCONN)?;
        reply.send(&client.socket).map_err(|_| libc::ENOTCONN)?;
        Ok(errno as c_int)
    }

    /// Calls the test's callback for each state that the device took.
    fn tell(&self, path: &[State]) {
        let (callbacks, context) = {
            let setup = self.setup.lock();
            (setup.migration, setup.context as *mut c_void)
        };
        if let Some(callbacks) = callbacks {
            for state in path {
                let number = match state {
                    State::Stop => 0,
                    State::Running => 1,
                    State::StopCopy => 2,
                    State::PreCopy => 3,
                    State::Resuming => 4,
                    _ => return, // unreachable: the device has no P2P
                };
                (callbacks.transition)(context, number);
            }
        }
    }

    /// Whether a client has mapped these addresses.
    pub(crate) fn is_mapped(&self, iova: u64, size: u64) -> bool {
        let Some(client) = &self.client else {
            return false;
        };
        let map = client.maps.range(..=iova).next_back();
        map.is_some_and(|(start, len)| iova - start + size <= *len)
    }

    fn end(&mut self) {
        if let Some(client) = self.client.take() {
            drop(client.socket);
            drop(client.server);
            let _ = client.thread.join();
        }
        self.setup.lock().dma = None;
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.end();
    }
}

impl Client {
    /// Learns from a message that was answered. Returns the states that the device took.
    fn learn(&mut self, message: &Message) -> Vec<State> {
        let Some(command) = Command::from_number(message.header.command) else {
            return Vec::new();
        };
        let request = Request::read(command, &message.payload, message.fds.len(), u32::MAX);
        match request {
            Ok(Request::DmaMap(DmaMap { iova, size, .. })) => {
                self.maps.insert(iova, size);
            }
            Ok(Request::DmaUnmap(DmaUnmap { iova, size, .. }, _)) => match size {
                0 => self.maps.clear(),
                _ => drop(self.maps.remove(&iova)),
            },
            Ok(Request::Feature(feature)) => {
                if let Ok(FeatureCall::SetState(to)) = feature.call(u32::MAX) {
                    return State::from_raw(to.device_state)
                        .map_or_else(Vec::new, |to| self.go(to));
                }
            }
            _ => {}
        }
        Vec::new()
    }

    /// Resets a device that has failed to load its state. libvfio-user knows no state ERROR, and
    /// one test would make all later ones fail.
    fn revive(&mut self, message: &Message) -> Result<(), c_int> {
        let command = Command::from_number(message.header.command);
        if command != Some(Command::Feature) || self.state != State::Resuming {
            return Ok(());
        }
        let mut bytes = [0; Header::SIZE];
        let written = Request::Reset.write(message.header.id, false, &mut bytes);
        written.map_err(|_| libc::EINVAL)?; // unreachable: a reset is a header
        let reset = Message {
            header: Header::from_bytes(&bytes),
            payload: Vec::new(),
            fds: Vec::new(),
        };
        reset.send(&self.server).map_err(|_| libc::EINVAL)?;
        let reply = Message::receive(&self.server, LONGEST).map_err(|_| libc::EINVAL)?;
        self.state = State::Running;
        reply.map(drop).ok_or(libc::EINVAL)
    }

    fn go(&mut self, to: State) -> Vec<State> {
        let mut path = Vec::new();
        while self.state != to {
            let Ok(next) = FEATURES.next(self.state, to) else {
                break;
            };
            self.state = next;
            path.push(next);
        }
        path
    }
}
