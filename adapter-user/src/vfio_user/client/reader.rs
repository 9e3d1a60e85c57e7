// SPDX-License-Identifier: MIT OR Apache-2.0
//! The threads that receive: they complete calls, and do what the server asks for.

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use dirty_core::Errno;
use vfio_user_wire::{
    wire::DmaAccess, Agreed, Client as Session, Error as WireError, Header, Reply, Request, Verdict,
};

use super::error::ClientError;
use super::link::{encode, Link, Message};
use super::memory::DmaMemory;
use crate::vfio_user::socket::Socket;

/// How many descriptors the server may send with a message.
pub(super) const MOST_FDS: u32 = 8;

/// The threads of a connection. When this is dropped, the connection ends, and no thread
/// reaches the memory any more.
pub(super) struct Readers {
    link: Arc<Link>,
    threads: Vec<JoinHandle<()>>,
}

/// What the reply to VERSION brought.
type Ready = (Session, Option<OwnedFd>);

impl Readers {
    /// Agrees with the server on a version, and starts the threads.
    pub(super) fn start(
        link: &Arc<Link>,
        session: Session,
        memory: Arc<dyn DmaMemory>,
    ) -> Result<(Readers, Agreed), ClientError> {
        let mut readers = Readers {
            link: Arc::clone(link),
            threads: Vec::new(),
        };
        let deadline = link.deadline();
        let version = encode(&session.version(), 0, false)?;
        link.socket
            .send(&version, &[], Some(deadline))
            .map_err(|cause| link.send_failed(&cause))?;
        let (ready, is_ready) = mpsc::sync_channel(1);
        let reader = Reader {
            link: Arc::clone(link),
            memory: Arc::clone(&memory),
        };
        readers.spawn("vfio-user", move || {
            reader.run(|reader| {
                let session = reader.agree(session, &ready)?;
                reader.receive(&reader.link.socket, &session)
            });
        })?;
        let left = deadline.saturating_duration_since(Instant::now());
        let (session, twin) = is_ready.recv_timeout(left).map_err(|why| {
            link.fail(match why {
                RecvTimeoutError::Timeout => ClientError::Silent,
                RecvTimeoutError::Disconnected => ClientError::Lost(ErrorKind::NotConnected),
            })
        })?;
        let agreed = *session.agreed().ok_or(ClientError::Silent)?; // unreachable: it is ready
        if let Some(twin) = twin {
            let twin = Socket::new(UnixStream::from(twin));
            let _ = link.twin.set(twin); // unreachable: it is set once
            let reader = Reader {
                link: Arc::clone(link),
                memory,
            };
            readers.spawn("vfio-user-dma", move || {
                reader.run(|reader| match reader.link.twin.get() {
                    Some(twin) => reader.receive(twin, &session),
                    None => Ok(()), // unreachable: it was set
                });
            })?;
        }
        Ok((readers, agreed))
    }

    fn spawn(
        &mut self,
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), ClientError> {
        let thread = thread::Builder::new().name(name.into()).spawn(body);
        let thread = thread.map_err(|cause| self.link.fail(ClientError::Lost(cause.kind())))?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        self.link.fail(ClientError::Lost(ErrorKind::NotConnected));
        for thread in self.threads.drain(..) {
            // The memory may have the last handle, and drop it on a thread of these.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join(); // a panic has failed the connection already
            }
        }
    }
}

/// One of the threads.
struct Reader {
    link: Arc<Link>,
    memory: Arc<dyn DmaMemory>,
}

/// Fails the connection when a thread ends, also by a panic of the memory.
struct Ends<'a>(&'a Link);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.fail(ClientError::Lost(ErrorKind::ConnectionAborted));
    }
}

impl Reader {
    fn run(&self, body: impl FnOnce(&Reader) -> Result<(), ClientError>) {
        let _ends = Ends(&self.link);
        if let Err(cause) = body(self) {
            self.link.fail(cause);
        }
    }

    /// Takes the reply to VERSION.
    fn agree(
        &self,
        mut session: Session,
        ready: &SyncSender<Ready>,
    ) -> Result<Session, ClientError> {
        let mut message = next(&self.link.socket, &session)?;
        let reply = Reply::read(&message.header, &message.payload).map_err(protocol)?;
        if let Reply::Failure(command, errno) = reply {
            return Err(ClientError::Refused(command, Errno(errno as i32)));
        }
        if message.header.id != 0 {
            return Err(protocol(WireError::WrongReply));
        }
        let twin = session.accept(&reply, message.fds.len());
        let twin = twin
            .map_err(protocol)?
            .map(|index| message.fds.swap_remove(index));
        // Nobody may wait any more.
        let _ = ready.send((session.clone(), twin));
        Ok(session)
    }

    /// Receives messages until the connection ends.
    fn receive(&self, socket: &Socket, session: &Session) -> Result<(), ClientError> {
        loop {
            let message = next(socket, session)?;
            if !message.header.is_reply() {
                self.serve(socket, session, &message)?;
                continue;
            }
            let done = self.link.calls.complete(message.header.id, message);
            done.map_err(|_| protocol(WireError::WrongReply))?;
        }
    }

    /// Does what the server asks for.
    fn serve(
        &self,
        socket: &Socket,
        session: &Session,
        message: &Message,
    ) -> Result<(), ClientError> {
        let Message {
            header, payload, ..
        } = message;
        let done = match session.request(header, payload) {
            Ok(Request::DmaRead(DmaAccess { iova, count })) => {
                let mut data = vec![0; count as usize];
                let read = self.memory.read(iova, &mut data);
                read.map(|()| reply(header, &Reply::DmaRead { iova, data: &data }, data.len()))
            }
            Ok(Request::DmaWrite { iova, data }) => self.memory.write(iova, data).map(|()| {
                let count = data.len() as u64;
                reply(header, &Reply::DmaWrite(Some(DmaAccess { iova, count })), 0)
            }),
            Ok(_) => Err(Errno::EINVAL), // unreachable: a server has no other commands
            Err(cause) if cause.verdict() == Verdict::Answer => Err(Errno(cause.errno() as i32)),
            Err(cause) => return Err(protocol(cause)),
        };
        if !header.wants_reply() {
            return Ok(());
        }
        let refused = |errno: Errno| {
            let number = u32::try_from(errno.0).unwrap_or(libc::EIO as u32);
            header.refuse(number).to_bytes().to_vec()
        };
        let answer = done.unwrap_or_else(refused);
        socket
            .send(&answer, &[], Some(self.link.deadline()))
            .map_err(|cause| self.link.send_failed(&cause))
    }
}

fn protocol(cause: WireError) -> ClientError {
    ClientError::Protocol(cause)
}

/// The bytes of a reply that has `data` bytes of data.
fn reply(header: &Header, reply: &Reply<'_>, data: usize) -> Vec<u8> {
    let mut message = vec![0; data.saturating_add(64)];
    let len = reply.write(header.id, &mut message).unwrap_or_default(); // unreachable: it fits
    message.truncate(len);
    message
}

/// Receives a message.
fn next(socket: &Socket, session: &Session) -> Result<Message, ClientError> {
    let lost = |cause: io::Error| ClientError::Lost(cause.kind());
    let (mut head, mut fds) = ([0; Header::SIZE], Vec::new());
    let most = MOST_FDS as usize;
    if !socket.receive(&mut head, &mut fds, most).map_err(lost)? {
        return Err(ClientError::Lost(ErrorKind::UnexpectedEof));
    }
    let header = session.header(&head).map_err(protocol)?;
    let mut payload = vec![0; header.payload()];
    let complete = socket.receive(&mut payload, &mut fds, most).map_err(lost)?;
    if !complete {
        return Err(ClientError::Lost(ErrorKind::UnexpectedEof));
    }
    Ok(Message {
        header,
        payload,
        fds,
    })
}
