// SPDX-License-Identifier: MIT OR Apache-2.0
//! The client of a vfio-user server: what a VMM uses a device in another process with.

// Each file uses only files below it.
mod log; // the device's log, and how a tracker reads it
mod migration; // the device's state

mod irqs;
mod maps;
mod regions;

mod reader; // the threads that receive

mod link; // commands and their replies
mod memory;

mod error;

use std::fmt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vfio_user_wire::wire::DeviceInfo;
use vfio_user_wire::{Agreed, Capabilities, Client as Session, Migration, Reply, Request};

pub use self::error::ClientError;
pub use self::log::ClientLog;
pub use self::memory::DmaMemory;
pub use self::regions::Region;

use self::link::Link;
use self::log::LogState;
use self::maps::Maps;
use self::reader::{Readers, MOST_FDS};
use crate::vfio_user::socket::Socket;

/// What a client asks of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// How long a command, or its reply, may take. Afterwards the connection ends. A device
    /// that takes long to stop, or that sends memory with its state, needs more than others.
    /// 60 s by default.
    pub deadline: Duration,
    /// The most bytes of data in a message, from either side, not 0. It bounds the memory
    /// that a server can make this process allocate. 1 MiB by default.
    pub max_data_xfer_size: u32,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            deadline: Duration::from_secs(60),
            max_data_xfer_size: 1 << 20,
        }
    }
}

/// A device of a vfio-user server.
///
/// A clone is another handle to the same connection, and any thread may call it. The
/// connection ends with the last handle.
///
/// A thread of the client's own receives. It completes calls, and serves the server's
/// DMA_READ and DMA_WRITE from the [`DmaMemory`] at any time. There are two such threads if
/// the server has a second socket for its commands.
///
/// # Errors
///
/// Every call may fail with one of these, and says so if there is another one:
///
/// - [`ClientError::Refused`] if the server answers with an error number.
/// - [`ClientError::Protocol`], [`ClientError::Silent`] and [`ClientError::Lost`]. The
///   connection has ended then. All calls that wait fail at once, and so do all later ones.
///
/// A server that does not answer cannot be told from a slow one before
/// [`ClientOptions::deadline`]. If the server's process ends, calls fail at once.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    link: Arc<Link>,
    agreed: Agreed,
    maps: Maps,
    log: LogState,
    /// Ends the connection when the last handle goes.
    _readers: Readers,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("agreed", &self.inner.agreed)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the server at the other end of `socket`. `memory` is what the server
    /// reaches by messages.
    ///
    /// # Errors
    ///
    /// As every call of a client. [`ClientError::Lost`] also if no thread can be started.
    pub fn connect(
        socket: UnixStream,
        memory: impl DmaMemory + 'static,
        options: ClientOptions,
    ) -> Result<Client, ClientError> {
        let session = Session::new(Capabilities {
            max_msg_fds: MOST_FDS,
            max_data_xfer_size: options.max_data_xfer_size,
            migration: Some(Migration::default()),
            twin_socket: true,
            ..Capabilities::default()
        });
        let link = Arc::new(Link::new(Socket::new(socket), options.deadline));
        let (readers, agreed) = Readers::start(&link, session, Arc::new(memory))?;
        Ok(Client {
            inner: Arc::new(Inner {
                link,
                agreed,
                maps: Maps::default(),
                log: LogState::default(),
                _readers: readers,
            }),
        })
    }

    /// Returns what the two sides have agreed on.
    #[must_use]
    pub fn agreed(&self) -> &Agreed {
        &self.inner.agreed
    }

    /// Returns why the connection has ended, if it has. A VMM that does not call the device for
    /// a while, as that of a migration's destination, learns by it that the server has died.
    #[must_use]
    pub fn ended(&self) -> Option<ClientError> {
        self.link().cause()
    }

    fn link(&self) -> &Link {
        &self.inner.link
    }

    /// The most bytes of data in a message.
    fn max_data(&self) -> usize {
        self.inner.agreed.max_data_xfer_size as usize
    }

    /// Returns how many regions and kinds of interrupts the device has, and whether it can be
    /// reset.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`].
    pub fn device_info(&self) -> Result<DeviceInfo, ClientError> {
        let request = Request::GetInfo(DeviceInfo {
            argsz: DeviceInfo::SIZE as u32,
            ..DeviceInfo::default()
        });
        self.link().call(&request, &[], |reply, _| match reply {
            Reply::GetInfo(info) => Some(info),
            _ => None,
        })
    }

    /// Resets the device.
    ///
    /// # Errors
    ///
    /// As every call of a [`Client`].
    pub fn reset(&self) -> Result<(), ClientError> {
        self.link().call(&Request::Reset, &[], |_, _| Some(()))
    }
}
