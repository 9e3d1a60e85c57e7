// SPDX-License-Identifier: MIT OR Apache-2.0
//! The socket between the two processes, how long one waits for the other, and how a file goes
//! through.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    getsockname, recv, recvmsg, send, sendmsg, ControlMessage, ControlMessageOwned, MsgFlags,
    UnixAddr,
};

use super::wire::{encode, receive, Batch, Frame, WireError};

/// How long the other process may be silent while this one waits for it.
pub(super) struct Patience {
    /// After this time `tell` is called, once for each silence. Not zero.
    pub(super) notice: Duration,
    /// After this time the transfer fails; counted in steps of `notice`.
    pub(super) limit: Duration,
    pub(super) tell: Box<dyn Fn() + Send>,
}

pub(super) struct Link {
    socket: UnixStream,
    patience: Option<Patience>,
    buffer: Vec<u8>,
}

impl Link {
    /// A link over `socket`. Without `patience` it waits for as long as the other process lives.
    pub(super) fn new(socket: OwnedFd, patience: Option<Patience>) -> io::Result<Self> {
        getsockname::<UnixAddr>(socket.as_raw_fd())?; // fails if it is no such socket
        let socket = UnixStream::from(socket);
        let timeout = patience.as_ref().map(|patience| patience.notice);
        socket.set_read_timeout(timeout)?;
        socket.set_write_timeout(timeout)?;
        Ok(Self {
            socket,
            patience,
            buffer: Vec::new(),
        })
    }

    fn stream(&self) -> Stream<'_> {
        Stream {
            socket: &self.socket,
            patience: self.patience.as_ref(),
        }
    }

    pub(super) fn send(&self, frame: &Frame<'_>) -> io::Result<()> {
        self.stream().write_all(&encode(frame))
    }

    /// Sends the pages in `batch` and returns the number of bytes.
    pub(super) fn send_batch(&self, batch: &mut Batch) -> io::Result<u64> {
        let bytes = batch.seal();
        self.stream().write_all(bytes)?;
        Ok(bytes.len() as u64)
    }

    pub(super) fn receive(&mut self) -> Result<Frame<'_>, WireError> {
        let mut stream = Stream {
            socket: &self.socket,
            patience: self.patience.as_ref(),
        };
        receive(&mut stream, &mut self.buffer)
    }

    /// Why the other process gave up, if it has said so and nobody has read it yet.
    pub(super) fn last_word(&mut self) -> Option<String> {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        while recv(self.socket.as_raw_fd(), &mut [0], peek).is_ok_and(|bytes| bytes > 0) {
            match self.receive() {
                Ok(Frame::Refused { reason }) => return Some(reason.to_owned()),
                Ok(_) => {}
                Err(_) => return None,
            }
        }
        None
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
        self.stream().transfer(&mut || {
            let fd = self.socket.as_raw_fd();
            recv(fd, &mut byte, MsgFlags::MSG_PEEK) // waits for the message
        })?;
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
                    // SAFETY: the kernel has just put this descriptor into our table. There is
                    // room for no other, so none leaks.
                    return Ok(unsafe { OwnedFd::from_raw_fd(*file) });
                }
            }
        }
        if message.flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(Errno::EMFILE.into()); // there is a file, and no descriptor for it
        }
        Err(io::Error::other("no file came with the message"))
    }

    /// Ends the sending direction and waits until the other process closes its end too.
    pub(super) fn close(self) -> io::Result<()> {
        self.socket.shutdown(std::net::Shutdown::Write)?;
        match self.stream().read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::Error::other("unexpected bytes at the end")),
        }
    }
}

/// Reads and writes that wait with patience. A write to a closed socket fails instead of killing
/// this process.
struct Stream<'a> {
    socket: &'a UnixStream,
    patience: Option<&'a Patience>,
}

impl Stream<'_> {
    /// Runs a system call that moves bytes, until it has moved some or patience is at its end. The
    /// socket's timeout, which is `notice`, interrupts the call.
    fn transfer(&self, call: &mut dyn FnMut() -> nix::Result<usize>) -> io::Result<usize> {
        let mut silence = Duration::ZERO;
        loop {
            match (call(), self.patience) {
                (Err(Errno::EINTR), _) => {}
                (Err(Errno::EAGAIN), Some(patience)) => {
                    if silence.is_zero() {
                        (patience.tell)();
                    }
                    silence += patience.notice;
                    if silence >= patience.limit {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                }
                (result, _) => return Ok(result?),
            }
        }
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let fd = self.socket.as_raw_fd();
        self.transfer(&mut || recv(fd, bytes, MsgFlags::empty()))
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fd = self.socket.as_raw_fd();
        self.transfer(&mut || send(fd, bytes, MsgFlags::MSG_NOSIGNAL))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::Arc;

    use super::*;

    fn pair(patience: Patience) -> (Link, Link) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = Link::new(ours.into(), Some(patience)).unwrap();
        (ours, Link::new(theirs.into(), None).unwrap())
    }

    #[test]
    fn a_silence_is_told_once_and_then_given_up() {
        let told = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&told);
        let (mut ours, _theirs) = pair(Patience {
            notice: Duration::from_millis(5),
            limit: Duration::from_millis(20),
            tell: Box::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            }),
        });
        let error = ours.receive().unwrap_err();
        assert!(error.is_timeout(), "{error}");
        assert_eq!(told.load(Ordering::Relaxed), 1);

        // The other end reads nothing, so that the socket fills up.
        let mut batch = Batch::new();
        while !batch.is_full() {
            batch.push(0);
        }
        let error = (0..100).find_map(|_| ours.send_batch(&mut batch).err());
        assert!(WireError::from(error.unwrap()).is_timeout());
        assert_eq!(told.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn an_end_that_answers_again_is_waited_for() {
        let (told, hears) = std::sync::mpsc::channel();
        let (mut ours, theirs) = pair(Patience {
            notice: Duration::from_millis(5),
            limit: Duration::from_secs(60),
            tell: Box::new(move || told.send(()).unwrap()),
        });
        std::thread::scope(|scope| {
            scope.spawn(move || {
                hears.recv().unwrap();
                theirs.send(&Frame::Stored { round: 7 }).unwrap();
            });
            let answer = ours.receive().unwrap();
            assert_eq!(answer, Frame::Stored { round: 7 });
        });
    }
}
