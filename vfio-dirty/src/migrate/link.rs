// SPDX-License-Identifier: MIT OR Apache-2.0
//! The socket between the two processes, and how a file goes through it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{
    getsockname, recvmsg, send, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr,
};

use super::wire::{encode, receive, Batch, Frame, WireError};

/// Longer silence than this means that the other side is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Link {
    socket: UnixStream,
    buffer: Vec<u8>,
}

impl Link {
    pub(super) fn new(socket: OwnedFd) -> io::Result<Self> {
        getsockname::<UnixAddr>(socket.as_raw_fd())?; // it is one
        let socket = UnixStream::from(socket);
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self {
            socket,
            buffer: Vec::new(),
        })
    }

    pub(super) fn send(&self, frame: &Frame<'_>) -> io::Result<()> {
        NoSignal(&self.socket).write_all(&encode(frame))
    }

    /// Sends a full or partly filled batch and tells its size in bytes.
    pub(super) fn send_batch(&self, batch: &mut Batch) -> io::Result<u64> {
        let bytes = batch.seal();
        NoSignal(&self.socket).write_all(bytes)?;
        Ok(bytes.len() as u64)
    }

    pub(super) fn receive(&mut self) -> Result<Frame<'_>, WireError> {
        receive(&mut self.socket, &mut self.buffer)
    }

    /// Why the other side gave up, if that is what it has said and nobody has read yet.
    pub(super) fn last_word(&mut self) -> Option<String> {
        self.socket.set_nonblocking(true).ok()?;
        let reason = match self.receive() {
            Ok(Frame::Refused { reason }) => Some(reason.to_owned()),
            _ => None,
        };
        self.socket.set_nonblocking(false).ok()?;
        reason
    }

    /// Sends a file, which [`Self::receive_file`] takes.
    pub(super) fn send_file(&self, file: BorrowedFd<'_>) -> io::Result<()> {
        let files = [file.as_raw_fd()];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&[0])],
            &[ControlMessage::ScmRights(&files)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }

    pub(super) fn receive_file(&self) -> io::Result<OwnedFd> {
        let mut byte = [0];
        let mut bytes = [IoSliceMut::new(&mut byte)];
        let mut space = nix::cmsg_space!(RawFd);
        let message = recvmsg::<()>(
            self.socket.as_raw_fd(),
            &mut bytes,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(files) = control {
                if let Some(file) = files.first() {
                    // SAFETY: the kernel has just put it into our table, and there is room for
                    // no other, so none leaks either.
                    return Ok(unsafe { OwnedFd::from_raw_fd(*file) });
                }
            }
        }
        Err(io::Error::other("no file came with the message"))
    }

    /// Says that nothing more will be sent and waits until the other side is done too.
    pub(super) fn close(mut self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Write)?;
        match self.socket.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::Error::other("more came than was asked for")),
        }
    }
}

/// Writes that fail, rather than kill, when the other side is gone.
struct NoSignal<'a>(&'a UnixStream);

impl Write for NoSignal<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(send(self.0.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
