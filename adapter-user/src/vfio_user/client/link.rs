// SPDX-License-Identifier: MIT OR Apache-2.0
//! The connection: commands go out, and each waits for its reply.

use std::io::{self, ErrorKind};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use dirty_core::Errno;
use vfio_user_wire::{Error as WireError, Header, Reply, Request};

use super::error::ClientError;
use crate::vfio_user::calls::{Calls, NoReply};
use crate::vfio_user::socket::Socket;

/// Room for a command without its data.
const ROOM: usize = 512;

/// A message that was received.
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// What the callers and the readers share.
pub(super) struct Link {
    pub(super) socket: Socket,
    /// The second socket, if the server has made one.
    pub(super) twin: OnceLock<Socket>,
    pub(super) calls: Calls<Message>,
    /// Why the connection has ended.
    cause: OnceLock<ClientError>,
    deadline: Duration,
}

impl Link {
    pub(super) fn new(socket: Socket, deadline: Duration) -> Self {
        Link {
            socket,
            twin: OnceLock::new(),
            calls: Calls::new(),
            cause: OnceLock::new(),
            deadline,
        }
    }

    /// Ends the connection. Whoever waits fails with `cause` at once, unless there was another
    /// one before. Returns the cause that counts.
    pub(super) fn fail(&self, cause: ClientError) -> ClientError {
        let cause = *self.cause.get_or_init(|| cause);
        self.socket.shutdown();
        if let Some(twin) = self.twin.get() {
            twin.shutdown();
        }
        self.calls.close();
        cause
    }

    /// Why the connection has ended, if it has.
    pub(super) fn cause(&self) -> Option<ClientError> {
        self.cause.get().copied()
    }

    /// When something that begins now is late.
    pub(super) fn deadline(&self) -> Instant {
        let now = Instant::now();
        // A deadline beyond what the clock can say is some centuries from now.
        now.checked_add(self.deadline)
            .unwrap_or(now + Duration::from_secs(1 << 32))
    }

    /// Sends a command, and waits for the reply. `read` gets it, and the descriptors that came
    /// with it.
    pub(super) fn call<R>(
        &self,
        request: &Request<'_>,
        fds: &[BorrowedFd<'_>],
        read: impl FnOnce(Reply<'_>, Vec<OwnedFd>) -> Option<R>,
    ) -> Result<R, ClientError> {
        let deadline = self.deadline();
        let mut call = self.calls.begin().map_err(|why| self.no_reply(why))?;
        let message = encode(request, call.id(), false)?;
        call.sending();
        self.socket
            .send(&message, fds, Some(deadline))
            .map_err(|cause| self.send_failed(&cause))?;
        drop(message);
        let Message {
            header,
            payload,
            fds,
        } = call.wait(deadline).map_err(|why| self.no_reply(why))?;
        let reply = Reply::read(&header, &payload)
            .and_then(|reply| reply.check(request).map(|()| reply))
            .map_err(|cause| self.fail(ClientError::Protocol(cause)))?;
        if let Reply::Failure(command, errno) = reply {
            return Err(ClientError::Refused(command, Errno(errno as i32)));
        }
        // unreachable: `check` has compared the commands
        read(reply, fds).ok_or_else(|| self.fail(ClientError::Protocol(WireError::WrongReply)))
    }

    /// Sends a command that asks for no reply.
    pub(super) fn post(&self, request: &Request<'_>) -> Result<(), ClientError> {
        // The id is that of no command that awaits a reply.
        let call = self.calls.begin().map_err(|why| self.no_reply(why))?;
        let message = encode(request, call.id(), true)?;
        self.socket
            .send(&message, &[], Some(self.deadline()))
            .map_err(|cause| self.send_failed(&cause))
    }

    fn no_reply(&self, why: NoReply) -> ClientError {
        match why {
            NoReply::Closed => self.fail(ClientError::Lost(ErrorKind::NotConnected)),
            NoReply::TimedOut => self.fail(ClientError::Silent),
            NoReply::NoId => ClientError::Argument("65,536 commands await their replies"),
        }
    }

    /// Ends the connection after a message that was not sent, or not all of it.
    pub(super) fn send_failed(&self, cause: &io::Error) -> ClientError {
        match cause.kind() {
            ErrorKind::TimedOut => {
                // A message that was sent in part has shut the socket down already, so the
                // reader may have found another cause.
                self.fail(ClientError::Silent);
                ClientError::Silent
            }
            ErrorKind::InvalidInput => ClientError::Argument("too many descriptors"),
            kind => self.fail(ClientError::Lost(kind)),
        }
    }
}

/// The bytes of a command.
pub(super) fn encode(
    request: &Request<'_>,
    id: u16,
    no_reply: bool,
) -> Result<Vec<u8>, ClientError> {
    let data = match request {
        Request::SetIrqs(_, data) | Request::MigDataWrite(data) => data.len(),
        Request::RegionWrite(write) => write.data.len(),
        Request::Feature(feature) => feature.data.len(),
        _ => 0,
    };
    let mut message = vec![0; data.saturating_add(ROOM)];
    let len = request.write(id, no_reply, &mut message);
    message.truncate(len.map_err(|_| ClientError::Argument("the message is too large"))?);
    Ok(message)
}
