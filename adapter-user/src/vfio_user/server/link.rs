// SPDX-License-Identifier: MIT OR Apache-2.0
//! A client behind a socket: commands to it, and their replies.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use dirty_core::Error;
use vfio_user_wire::wire::DmaAccess;
use vfio_user_wire::{Header, Reply, Request};

use super::inbox::Inbox;
use super::memory::Remote;
use crate::vfio_user::calls::{Calls, UnknownId};
use crate::vfio_user::socket::Socket;

/// A reply of the client.
pub(super) struct Answer {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
}

/// The sockets of a connection, and the commands that the server has sent.
pub(super) struct Link {
    pub(super) main: Socket,
    /// The second socket, if both sides use one: the server's commands and their replies.
    pub(super) twin: OnceLock<Socket>,
    pub(super) inbox: Inbox,
    calls: Calls<Answer>,
    /// How long a reply may take.
    deadline: Duration,
}

impl Link {
    pub(super) fn new(main: UnixStream, deadline: Duration) -> Self {
        Link {
            main: Socket::new(main),
            twin: OnceLock::new(),
            inbox: Inbox::default(),
            calls: Calls::new(),
            deadline,
        }
    }

    /// Gives a reply to whoever awaits it.
    ///
    /// # Errors
    ///
    /// [`UnknownId`] if nobody has sent such a command.
    pub(super) fn answer(&self, answer: Answer) -> Result<(), UnknownId> {
        self.calls.complete(answer.header.id, answer)
    }

    /// The client has gone, or is not heard any more.
    pub(super) fn close_calls(&self) {
        self.calls.close();
    }

    /// Ends the connection, and wakes every thread that uses it.
    pub(super) fn shutdown(&self) {
        self.main.shutdown();
        if let Some(twin) = self.twin.get() {
            twin.shutdown();
        }
    }

    /// Sends a command and waits for the reply, which `take` gets if it belongs to the command.
    fn call(
        &self,
        request: &Request<'_>,
        data: usize,
        take: impl FnOnce(Reply<'_>) -> Option<()>,
    ) -> Result<(), Error> {
        let failed = Error::BadAddress;
        let deadline = Instant::now() + self.deadline;
        let mut call = self.calls.begin().map_err(|_| failed)?;
        let mut message = vec![0; Header::SIZE + DmaAccess::SIZE + data];
        // unreachable error: there is room
        let len = request.write(call.id(), false, &mut message);
        let message = message.get(..len.map_err(|_| failed)?).ok_or(failed)?;
        // By the main socket a reply comes behind the client's commands, which must be read.
        let alone = self.twin.get().is_none();
        let _awaiting = alone.then(|| self.inbox.await_reply());
        let socket = self.twin.get().unwrap_or(&self.main);
        call.sending();
        socket
            .send(message, &[], Some(deadline))
            .map_err(|_| failed)?;
        let answer = call.wait(deadline).map_err(|_| failed)?;
        let reply = Reply::read(&answer.header, &answer.payload).map_err(|_| failed)?;
        reply.check(request).map_err(|_| failed)?;
        take(reply).ok_or(failed)
    }
}

impl Remote for Arc<Link> {
    fn dma_read(&self, iova: u64, data: &mut [u8]) -> Result<(), Error> {
        let access = DmaAccess {
            iova,
            count: data.len() as u64,
        };
        self.call(&Request::DmaRead(access), 0, |reply| match reply {
            Reply::DmaRead { data: read, .. } if read.len() == data.len() => {
                data.copy_from_slice(read);
                Some(())
            }
            _ => None, // an error number
        })
    }

    fn dma_write(&self, iova: u64, data: &[u8]) -> Result<(), Error> {
        let request = Request::DmaWrite { iova, data };
        self.call(&request, data.len(), |reply| match reply {
            Reply::DmaWrite(_) => Some(()),
            _ => None, // an error number
        })
    }

    fn open_twin(&self) -> Option<OwnedFd> {
        let (ours, theirs) = UnixStream::pair().ok()?;
        self.twin.set(Socket::new(ours)).ok()?;
        Some(theirs.into())
    }
}
