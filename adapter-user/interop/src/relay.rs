// SPDX-License-Identifier: MIT OR Apache-2.0
//! One message from a client to the server, and the reply back.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{recvmsg, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags};
use vfio_user_wire::Header;

/// A message with its descriptors.
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// Reads a message. `None` at the end of the stream. If there are to be more than `most`
    /// bytes after its header, it has its header only.
    pub(crate) fn receive(socket: &UnixStream, most: usize) -> io::Result<Option<Message>> {
        let mut head = [0; Header::SIZE];
        let mut fds = Vec::new();
        let done = receive(socket, &mut head, &mut fds)?;
        if done == 0 {
            return Ok(None);
        }
        (&mut &*socket).read_exact(&mut head[done..])?;
        let header = Header::from_bytes(&head);
        let mut payload = vec![0; header.payload()];
        if payload.len() > most {
            payload.clear();
        }
        (&mut &*socket).read_exact(&mut payload)?;
        Ok(Some(Message {
            header,
            payload,
            fds,
        }))
    }

    /// Sends the message.
    pub(crate) fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let mut bytes = Vec::from(self.header.to_bytes());
        bytes.extend_from_slice(&self.payload);
        let fds: Vec<RawFd> = self.fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = match fds.is_empty() {
            true => &[][..],
            false => &rights[..],
        };
        let fd = socket.as_raw_fd();
        let parts = [IoSlice::new(&bytes)];
        let sent = sendmsg::<()>(fd, &parts, control, MsgFlags::MSG_NOSIGNAL, None)?;
        (&mut &*socket).write_all(&bytes[sent..])
    }
}

/// Reads bytes, and the descriptors that come with them.
fn receive(socket: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = nix::cmsg_space!([RawFd; 64]);
    let mut parts = [IoSliceMut::new(bytes)];
    let fd = socket.as_raw_fd();
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(fd, &mut parts, Some(&mut space), flags)?;
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(new) = message {
            for fd in new {
                // SAFETY: the kernel has just opened it for this process.
                fds.push(unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
    }
    Ok(received.bytes)
}
