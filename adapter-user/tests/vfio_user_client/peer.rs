// SPDX-License-Identifier: MIT OR Apache-2.0
//! A scripted server: a test says message by message what it answers.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use adapter_user::vfio_user::wire::{self, Capabilities, Header, Migration, Reply, Request};
use adapter_user::vfio_user::{Client, ClientError, ClientOptions, DmaMemory};
use adapter_user::Errno;
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

/// The server's end of a connection.
pub(crate) struct Peer {
    pub(crate) stream: UnixStream,
    /// The descriptors that have come.
    pub(crate) fds: Vec<OwnedFd>,
}

impl Peer {
    pub(crate) fn new(stream: UnixStream) -> Peer {
        let fds = Vec::new();
        Peer { stream, fds }
    }

    /// Agrees on a version. Its reply has `fds`.
    pub(crate) fn agree(&mut self, capabilities: Capabilities, fds: &[BorrowedFd<'_>]) {
        let (header, payload) = self.receive();
        let mut server = wire::Server::new(capabilities);
        server.request(&header, &payload, 0).unwrap();
        let twin = capabilities.twin_socket_fd;
        let reply = Reply::Version(server.agreed().unwrap().reply(twin));
        self.reply_with(&header, &reply, fds);
    }

    pub(crate) fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut head = [0; Header::SIZE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [IoSliceMut::new(&mut head)];
        let got = recvmsg(&self.stream, &mut bytes, &mut control, RecvFlags::WAITALL).unwrap();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = part {
                self.fds.extend(fds);
            }
        }
        assert_eq!(got.bytes, Header::SIZE, "the client has gone");
        let header = Header::from_bytes(&head);
        let mut payload = vec![0; header.payload()];
        self.stream.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    /// Receives a command, which must be of this kind.
    pub(crate) fn expect(&mut self, command: wire::Command) -> (Header, Vec<u8>) {
        let (header, payload) = self.receive();
        assert_eq!(header.command, command as u16);
        assert!(!header.is_reply());
        (header, payload)
    }

    pub(crate) fn reply(&mut self, header: &Header, reply: &Reply<'_>) {
        self.reply_with(header, reply, &[]);
    }

    pub(crate) fn reply_with(&mut self, to: &Header, reply: &Reply<'_>, fds: &[BorrowedFd<'_>]) {
        let mut bytes = vec![0; 2 << 20];
        let len = reply.write(to.id, &mut bytes).unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let message = [IoSlice::new(&bytes[..len])];
        let sent = sendmsg(&self.stream, &message, &mut control, SendFlags::empty());
        self.stream.write_all(&bytes[sent.unwrap()..len]).unwrap();
    }

    pub(crate) fn refuse(&mut self, header: &Header, errno: u32) {
        self.stream
            .write_all(&header.refuse(errno).to_bytes())
            .unwrap();
    }

    /// Sends a command of the server's.
    pub(crate) fn send(&mut self, request: &Request<'_>, id: u16, no_reply: bool) {
        let mut bytes = vec![0; 2 << 20];
        let len = request.write(id, no_reply, &mut bytes).unwrap();
        self.stream.write_all(&bytes[..len]).unwrap();
    }
}

/// What a server can do that migrates and logs.
pub(crate) fn able() -> Capabilities {
    Capabilities {
        max_msg_fds: 8,
        migration: Some(Migration::default()),
        ..Capabilities::default()
    }
}

/// 64 KiB of memory from IOVA 0 on.
pub(crate) struct Memory(pub(crate) Mutex<Vec<u8>>);

impl Memory {
    pub(crate) fn new() -> Arc<Memory> {
        Arc::new(Memory(Mutex::new(vec![0; 64 << 10])))
    }
}

impl DmaMemory for Memory {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let memory = self.0.lock().unwrap();
        let from = memory.get(iova as usize..).unwrap_or_default();
        let from = from.get(..data.len()).ok_or(Errno::EFAULT)?;
        data.copy_from_slice(from);
        Ok(())
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let mut memory = self.0.lock().unwrap();
        let to = memory.get_mut(iova as usize..).unwrap_or_default();
        let to = to.get_mut(..data.len()).ok_or(Errno::EFAULT)?;
        to.copy_from_slice(data);
        Ok(())
    }
}

/// Runs `script` as the server of a client, which has agreed with it on `capabilities`. The
/// thread ends with the script.
pub(crate) fn with(
    capabilities: Capabilities,
    options: ClientOptions,
    memory: &Arc<Memory>,
    script: impl FnOnce(&mut Peer) + Send + 'static,
) -> (Result<Client, ClientError>, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let mut peer = Peer::new(theirs);
        peer.agree(capabilities, &[]);
        script(&mut peer);
    });
    (Client::connect(ours, Arc::clone(memory), options), server)
}

/// A client of a server that follows `script`.
pub(crate) fn client(script: impl FnOnce(&mut Peer) + Send + 'static) -> (Client, JoinHandle<()>) {
    let (client, server) = with(able(), ClientOptions::default(), &Memory::new(), script);
    (client.unwrap(), server)
}

/// Options with a short deadline.
pub(crate) fn impatient() -> ClientOptions {
    ClientOptions {
        deadline: Duration::from_millis(100),
        ..ClientOptions::default()
    }
}
