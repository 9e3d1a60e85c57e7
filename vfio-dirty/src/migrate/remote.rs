// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device in another process: `vfio-dirty serve`, once for the source and once for the
//! destination. It writes when it is told to, and also by itself until it is stopped.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use adapter_user::vfio_user::{Client, ClientError, ClientOptions, DmaMemory};
use adapter_user::{Errno, GuestMemory, PageSize, Prot};
use dirty_core::migration::State;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::guest::{Guest, Writer, BLOCK, PAGE};
use super::source::Process;
use super::tracking::Tracking;
use super::writers::{Work, Written};
use crate::failure::{cannot, Failure};
use crate::serve::registers::*;
use crate::serve::SERVER;

/// No state of the device is larger.
const MAX_STATE: usize = 1 << 20;

/// The device writes all its memory by the file, and none by messages.
struct NoMessages;

impl DmaMemory for NoMessages {
    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }
}

/// A server, and its device.
struct Device {
    client: Client,
    _server: Process,
}

impl Device {
    /// Starts a server whose device sees all of `memory`.
    fn start(memory: &GuestMemory) -> Result<Self, Failure> {
        let (ours, theirs) = UnixStream::pair().map_err(cannot("create a socket"))?;
        let server = Command::new("/proc/self/exe")
            .arg0("vfio-dirty")
            .arg(SERVER)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map(Process)
            .map_err(cannot("start the process of a vfio-user device"))?;
        let client = Client::connect(ours, NoMessages, ClientOptions::default())
            .map_err(cannot("connect to the process of a vfio-user device"))?;
        let mapped = client.map(0, memory.len(), Prot::READ_WRITE, Some((memory.as_fd(), 0)));
        mapped.map_err(cannot("map guest memory for the vfio-user device"))?;
        Ok(Device {
            client,
            _server: server,
        })
    }

    fn set(&self, register: u64, value: u64) -> Result<(), ClientError> {
        self.client.write_region(0, register, &value.to_le_bytes())
    }

    fn get(&self, register: u64) -> Result<u64, ClientError> {
        let mut bytes = [0; 8];
        self.client.read_region(0, register, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Gives a command, with its registers.
    fn command(&self, registers: &[(u64, u64)], command: u64) -> Result<(), Failure> {
        let told = registers.iter().try_for_each(|(register, value)| {
            // It has them before the command.
            self.client.post_region(0, *register, &value.to_le_bytes())
        });
        let status = told
            .and_then(|()| self.set(COMMAND, command))
            .and_then(|()| self.get(STATUS))
            .map_err(cannot("tell the vfio-user device what to write"))?;
        match status {
            DONE => Ok(()),
            _ => Err(Failure::Runtime(
                "the vfio-user device could not write guest memory".into(),
            )),
        }
    }
}

/// The device as a writer of the guest.
pub(super) struct Remote {
    guest: Arc<Guest>,
    source: Device,
    destination: Device,
    random: SmallRng,
}

impl Remote {
    /// Starts both servers. The source's device begins to write to the first page of each of its
    /// blocks.
    pub(super) fn new(
        guest: &Arc<Guest>,
        destination: &GuestMemory,
        rate: u32,
    ) -> Result<Self, Failure> {
        let this = Self {
            guest: Arc::clone(guest),
            source: Device::start(&guest.dma)?,
            destination: Device::start(destination)?,
            random: SmallRng::from_os_rng(),
        };
        for number in 0..guest.remote_blocks() {
            let first = guest.remote_block(number).start;
            guest.note(Writer::VfioUser, first * PAGE, 1);
        }
        let client = &this.source.client;
        client
            .write_region(7, 4, &[6, 0]) // memory, and bus master
            .map_err(cannot("switch the vfio-user device on"))?;
        let places = [
            (IOVA, guest.remote_block(0).start * PAGE),
            (STRIDE, Guest::REMOTE_STRIDE),
            (COUNT, guest.remote_blocks()),
            (LENGTH, 64),
            (RATE, rate.into()),
        ];
        this.source.command(&places, STREAM)?;
        Ok(this)
    }

    /// Starts the device's log, and adds it to `tracking`. If `lost`, what it has is thrown away.
    pub(super) fn track(&self, tracking: &Tracking, lost: bool) -> Result<(), Failure> {
        let client = &self.source.client;
        let page = PageSize::new(PAGE).ok_or_else(|| Failure::Runtime("no page size".into()))?;
        client
            .start_logging(&[], page)
            .map_err(cannot("start the log of the vfio-user device"))?;
        tracking.add_remote(client, self.guest.len(), lost)
    }
}

impl Work for Remote {
    /// Lets the device write all pages of a block but the first.
    fn step(&mut self) -> Result<Written, Failure> {
        let number = self.random.random_range(0..self.guest.remote_blocks());
        let first = self.guest.remote_block(number).start + 1;
        let pages = BLOCK - 1;
        let bytes = (pages * PAGE) as usize;
        self.guest.note(Writer::VfioUser, first * PAGE, bytes);
        let places = [
            (IOVA, first * PAGE),
            (STRIDE, PAGE),
            (COUNT, pages),
            (LENGTH, PAGE),
            (SEED, self.random.random()),
        ];
        self.source.command(&places, WRITE)?;
        Ok(Written::pages(pages))
    }

    /// Writes some more, and stops the device. Only then it writes no longer by itself.
    fn drain(&mut self) -> Result<Written, Failure> {
        let mut written = Written::default();
        for _ in 0..4 {
            written += self.step()?;
        }
        self.source
            .client
            .set_state(State::StopCopy)
            .map_err(cannot("stop the vfio-user device"))?;
        Ok(written)
    }

    fn move_state(&mut self) -> Result<(), Failure> {
        let (from, to) = (&self.source.client, &self.destination.client);
        let mut state = vec![0; MAX_STATE];
        let size = from
            .read_state(&mut state)
            .map_err(cannot("read the state of the vfio-user device"))?;
        if size == state.len() {
            return Err(Failure::Runtime(
                "the state of the vfio-user device is larger than 1 MiB".into(),
            ));
        }
        // It stays stopped, so that the memories can be compared.
        to.set_state(State::Resuming)
            .and_then(|()| to.write_state(&state[..size]))
            .and_then(|()| to.set_state(State::Stop))
            .map_err(cannot("load the state of the vfio-user device"))?;
        let count = |device: &Device| {
            let count = device.get(SEQUENCE);
            count.map_err(cannot("read the registers of the vfio-user device"))
        };
        match count(&self.source)? == count(&self.destination)? {
            true => Ok(()),
            false => Err(Failure::Runtime(
                "the vfio-user device at the destination has another state than the source's"
                    .into(),
            )),
        }
    }
}
