// SPDX-License-Identifier: MIT OR Apache-2.0
//! A stream socket that carries messages with file descriptors.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// The most descriptors that the kernel passes with one call.
pub(crate) const MOST_FDS: usize = 253;

/// One end of a connection. Any thread may send; one thread receives.
#[derive(Debug)]
pub(crate) struct Socket {
    stream: UnixStream,
    /// Whether a thread is sending. A lock that is waited for until a deadline.
    sending: Mutex<bool>,
    sent: Condvar,
}

impl Socket {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Socket {
            stream,
            sending: Mutex::new(false),
            sent: Condvar::new(),
        }
    }

    fn sending(&self) -> MutexGuard<'_, bool> {
        self.sending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message: all of `bytes`, and `fds` with the first of them. Messages of several
    /// threads do not mix. It waits for room in the socket until `deadline`, or for as long as
    /// it takes, and raises no SIGPIPE.
    ///
    /// # Errors
    ///
    /// - [`ErrorKind::InvalidInput`] for more than [`MOST_FDS`] descriptors, and for
    ///   descriptors without bytes. Nothing was sent then.
    /// - [`ErrorKind::TimedOut`] at the deadline. If a part of the message was sent, the
    ///   connection is shut down, since its other end could not tell where the next message
    ///   begins.
    /// - [`ErrorKind::BrokenPipe`] if the connection has ended, and other errors of
    ///   sendmsg(2). The connection is shut down then, too.
    pub(crate) fn send(
        &self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Option<Instant>,
    ) -> io::Result<()> {
        if fds.len() > MOST_FDS || (bytes.is_empty() && !fds.is_empty()) {
            return Err(ErrorKind::InvalidInput.into());
        }
        let _turn = self.turn(deadline)?;
        let mut left = bytes;
        while !left.is_empty() {
            let first = left.len() == bytes.len();
            match send_some(&self.stream, left, if first { fds } else { &[] }) {
                Ok(n) => left = left.get(n..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let ready = wait(&self.stream, PollFlags::OUT, deadline);
                    ready.inspect_err(|error| {
                        if !first || error.kind() != ErrorKind::TimedOut {
                            self.shutdown();
                        }
                    })?;
                }
                Err(error) => {
                    self.shutdown();
                    return Err(error.into());
                }
            }
        }
        Ok(())
    }

    /// Waits until no other thread sends.
    fn turn(&self, deadline: Option<Instant>) -> io::Result<Turn<'_>> {
        let mut sending = self.sending();
        while *sending {
            sending = match deadline {
                None => {
                    let waited = self.sent.wait(sending);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(ErrorKind::TimedOut.into());
                    }
                    let waited = self.sent.wait_timeout(sending, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        *sending = true;
        Ok(Turn(self))
    }

    /// Fills `bytes`, and adds the descriptors that come with them to `fds`, which may then
    /// have at most `most_fds` (no more than [`MOST_FDS`]). exec closes them. Returns false at
    /// the end of the stream, if not one byte came.
    ///
    /// # Errors
    ///
    /// - [`ErrorKind::UnexpectedEof`] if the stream ends among the bytes.
    /// - [`ErrorKind::InvalidData`] if there are more descriptors, or the kernel could not
    ///   pass all of them, as for a process that has too many open. Those that came with the
    ///   last bytes are closed; `fds` has the others.
    /// - Other errors of recvmsg(2).
    pub(crate) fn receive(
        &self,
        bytes: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        most_fds: usize,
    ) -> io::Result<bool> {
        let mut done = 0;
        while let Some(left) = bytes.get_mut(done..).filter(|left| !left.is_empty()) {
            match receive_some(&self.stream, left, fds, most_fds) {
                Ok(0) if done == 0 => return Ok(false),
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => done += n,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    wait(&self.stream, PollFlags::IN, None)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Ends the connection for both sides, and wakes every thread that sends or receives.
    pub(crate) fn shutdown(&self) {
        // It fails only if the other side has ended the connection already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// The right to send, until this is dropped.
struct Turn<'a>(&'a Socket);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.sending() = false;
        self.0.sent.notify_one();
    }
}

/// Sends what fits into the socket now.
fn send_some(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<usize, Errno> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let bytes = [IoSlice::new(bytes)];
    if fds.is_empty() {
        return sendmsg(stream, &bytes, &mut SendAncillaryBuffer::default(), flags);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL); // unreachable: there are no more than MOST_FDS
    }
    sendmsg(stream, &bytes, &mut control, flags)
}

/// Receives what is there, or waits for the first byte.
fn receive_some(
    stream: &UnixStream,
    bytes: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    most_fds: usize,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    // It closes the descriptors that nobody takes out of it.
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(bytes)];
    let message = recvmsg(stream, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(ErrorKind::InvalidData.into());
    }
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = part {
            for fd in passed {
                if fds.len() >= most_fds {
                    return Err(ErrorKind::InvalidData.into());
                }
                fds.push(fd);
            }
        }
    }
    Ok(message.bytes)
}

/// Waits until the socket is ready, or the other side has gone.
fn wait(stream: &UnixStream, what: PollFlags, deadline: Option<Instant>) -> io::Result<()> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(ErrorKind::TimedOut.into());
        }
        let left = left.map(Timespec::try_from).transpose();
        let left = left.map_err(|_| ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(stream, what)], left.as_ref()) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, AsRawFd};
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn pair() -> (Socket, Socket) {
        let (one, other) = UnixStream::pair().unwrap();
        (Socket::new(one), Socket::new(other))
    }

    /// The descriptors are usable, and exec closes them.
    #[test]
    fn a_message_and_its_descriptors_arrive() {
        let (one, other) = pair();
        let file = tempfile::tempfile().unwrap();
        one.send(b"message", &[file.as_fd(), file.as_fd()], None)
            .unwrap();
        let (mut bytes, mut fds) = ([0; 3], Vec::new());
        assert!(other.receive(&mut bytes, &mut fds, 2).unwrap());
        assert_eq!((&bytes, fds.len()), (b"mes", 2));
        let mut rest = [0; 4];
        assert!(other.receive(&mut rest, &mut fds, 2).unwrap());
        assert_eq!((&rest, fds.len()), (b"sage", 2));
        File::from(fds.remove(0)).write_all(b"x").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 1);
        let flags = nix::fcntl::fcntl(&fds[0], nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
    }

    /// The other end of a pipe sees when the last descriptor of it is closed.
    #[test]
    fn too_many_descriptors_are_closed() {
        let (one, other) = pair();
        let (mut end, pipe) = std::io::pipe().unwrap();
        one.send(b"x", &[pipe.as_fd(), pipe.as_fd()], None).unwrap();
        drop(pipe);
        let mut fds = Vec::new();
        let error = other.receive(&mut [0], &mut fds, 1).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData);
        drop(fds);
        assert_eq!(end.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_stream_ends_between_messages_or_among_their_bytes() {
        for (sent, clean) in [(&b""[..], true), (b"abc", false)] {
            let (one, other) = pair();
            one.send(sent, &[], None).unwrap();
            drop(one);
            let end = other.receive(&mut [0; 4], &mut Vec::new(), 0);
            match clean {
                true => assert!(!end.unwrap()),
                false => assert_eq!(end.unwrap_err().kind(), ErrorKind::UnexpectedEof),
            }
        }
    }

    /// They are far larger than the socket's buffer, so the kernel takes them in parts.
    #[test]
    fn large_messages_of_several_threads_do_not_mix() {
        const LEN: usize = 3 << 20;
        let (one, other) = pair();
        let one = Arc::new(one);
        let senders: Vec<_> = (1..=3u8)
            .map(|byte| {
                let one = Arc::clone(&one);
                thread::spawn(move || {
                    let deadline = (byte == 1).then(|| Instant::now() + Duration::from_secs(600));
                    one.send(&vec![byte; LEN], &[], deadline).unwrap();
                })
            })
            .collect();
        let mut bytes = vec![0; LEN];
        for _ in 1..=3 {
            assert!(other.receive(&mut bytes, &mut Vec::new(), 0).unwrap());
            assert!(bytes.iter().all(|byte| *byte == bytes[0]));
        }
        for sender in senders {
            sender.join().unwrap();
        }
    }

    /// A message that was sent in part leaves no connection behind, and one that was not sent
    /// at all does.
    #[test]
    fn a_deadline_ends_the_wait_for_room() {
        let (one, other) = pair();
        let soon = || Some(Instant::now() + Duration::from_millis(20));
        let error = one.send(&vec![1; 8 << 20], &[], soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        let error = one.send(b"more", &[], soon()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        drop(other);

        let (one, other) = pair();
        let mut sent = 0usize;
        while one.send(&[2; 1024], &[], soon()).is_ok() {
            sent += 1024;
        }
        let mut bytes = vec![0; sent];
        assert!(other.receive(&mut bytes, &mut Vec::new(), 0).unwrap());
        one.send(b"more", &[], soon()).unwrap();
    }

    #[test]
    fn shutdown_wakes_both_sides() {
        let (one, other) = pair();
        let (one, other) = (Arc::new(one), Arc::new(other));
        let receiver = thread::spawn({
            let other = Arc::clone(&other);
            move || other.receive(&mut [0; 4], &mut Vec::new(), 0)
        });
        let sender = thread::spawn({
            let other = Arc::clone(&other);
            move || other.send(&vec![1; 8 << 20], &[], None)
        });
        thread::sleep(Duration::from_millis(20));
        one.shutdown();
        assert!(!receiver.join().unwrap().unwrap());
        let error = sender.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_stream_that_does_not_block_is_waited_for() {
        let (one, other) = UnixStream::pair().unwrap();
        other.set_nonblocking(true).unwrap();
        let (one, other) = (Socket::new(one), Socket::new(other));
        let receiver = thread::spawn(move || {
            let mut bytes = [0; 4];
            other.receive(&mut bytes, &mut Vec::new(), 0).unwrap();
            bytes
        });
        thread::sleep(Duration::from_millis(20));
        one.send(b"late", &[], None).unwrap();
        assert_eq!(&receiver.join().unwrap(), b"late");
        assert!(one.stream.as_raw_fd() >= 0);
    }
}
