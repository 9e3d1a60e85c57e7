// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sending end: starts the destination process and sends it pages.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use adapter_user::GuestMemory;

use super::guest::{Guest, PAGE};
use super::link::Link;
use super::wire::{Batch, Frame, WireError};
use crate::failure::{cannot, Failure};

/// The subcommand that the program starts itself with.
pub(crate) const DESTINATION: &str = "migrate-destination";

pub(super) struct Destination {
    link: Link,
    process: Process,
    memory: GuestMemory,
    batch: Batch,
}

/// What a round put on the wire.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sent {
    pub(super) pages: u64,
    /// Pages that were not sent because they were zero.
    pub(super) zero: u64,
    pub(super) bytes: u64,
}

/// A process that is getting its memory ready.
pub(super) struct Starting {
    link: Link,
    process: Process,
    memory: u64,
}

impl Starting {
    /// Starts a process that gets itself empty memory of `memory` bytes.
    pub(super) fn new(memory: u64) -> Result<Self, Failure> {
        let (ours, theirs) = UnixStream::pair().map_err(cannot("create a socket"))?;
        let mut process = Command::new("/proc/self/exe")
            .arg0("vfio-dirty")
            .arg(DESTINATION)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map(Process)
            .map_err(cannot("start the destination process"))?;
        let mut link = Link::new(OwnedFd::from(ours)).map_err(cannot("set up the socket"))?;
        if let Err(cause) = link.send(&Frame::Hello { memory }) {
            return Err(process.explain(&mut link, cause.into()));
        }
        Ok(Self {
            link,
            process,
            memory,
        })
    }

    /// Waits until the memory stands.
    pub(super) fn ready(mut self) -> Result<Destination, Failure> {
        let memory = match receive_memory(&mut self.link, self.memory) {
            Ok(memory) => memory,
            Err(cause) => return Err(self.process.explain(&mut self.link, cause)),
        };
        Ok(Destination {
            link: self.link,
            process: self.process,
            memory,
            batch: Batch::new(),
        })
    }
}

impl Destination {
    /// The destination's memory itself.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(super) fn process_id(&self) -> u32 {
        self.process.0.id()
    }

    /// Sends the contents that `pages` have now. Zero pages may be left out when the destination
    /// has never got another content for them.
    pub(super) fn send(
        &mut self,
        guest: &Guest,
        pages: impl Iterator<Item = u64>,
        skip_zero: bool,
        mut progress: impl FnMut(),
    ) -> Result<Sent, Failure> {
        let mut sent = Sent::default();
        for page in pages {
            let bytes = self.batch.push(page);
            guest
                .cpu
                .read(page * PAGE, bytes)
                .map_err(cannot("read guest memory"))?;
            if skip_zero && is_zero(bytes) {
                self.batch.pop();
                sent.zero += 1;
            } else {
                sent.pages += 1;
            }
            if self.batch.is_full() {
                sent.bytes += self.flush()?;
            }
            progress();
        }
        sent.bytes += self.flush()?;
        Ok(sent)
    }

    fn flush(&mut self) -> Result<u64, Failure> {
        if self.batch.is_empty() {
            return Ok(0);
        }
        let result = self.link.send_batch(&mut self.batch);
        self.batch.clear();
        result.map_err(|cause| self.process.explain(&mut self.link, cause.into()))
    }

    /// Ends a round and waits until everything sent in it has been checked and stored.
    pub(super) fn end_round(&mut self, round: u32, last: bool, sent: Sent) -> Result<(), Failure> {
        let end = Frame::EndOfRound {
            round,
            last,
            pages: sent.pages,
        };
        let answer = match self.link.send(&end) {
            Ok(()) => self.link.receive(),
            Err(error) => Err(error.into()),
        };
        let cause = match answer {
            Ok(Frame::Stored { round: stored }) if stored == round => return Ok(()),
            Ok(Frame::Refused { reason }) => WireError::Refused(reason.to_owned()),
            Ok(_) => WireError::Io(io::Error::other("an answer out of turn")),
            Err(error) => error,
        };
        Err(self.process.explain(&mut self.link, cause))
    }

    /// Lets the process end.
    pub(super) fn finish(mut self) -> Result<(), Failure> {
        let closed = self.link.close();
        closed.map_err(cannot("close the connection to the destination process"))?;
        let status = self
            .process
            .0
            .wait()
            .map_err(cannot("wait for the destination process"))?;
        if !status.success() {
            return Err(Failure::Runtime(format!(
                "the destination process ended with {status}"
            )));
        }
        Ok(())
    }
}

fn receive_memory(link: &mut Link, len: u64) -> Result<GuestMemory, WireError> {
    match link.receive()? {
        Frame::Ready => {}
        Frame::Refused { reason } => return Err(WireError::Refused(reason.to_owned())),
        _ => return Err(io::Error::other("an answer out of turn").into()),
    }
    let memory = GuestMemory::from_fd(link.receive_file()?)?;
    if memory.len() != len {
        return Err(io::Error::other("its memory has another size").into());
    }
    Ok(memory)
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes == [0; PAGE as usize]
}

/// A process that does not outlive this value.
struct Process(Child);

impl Process {
    /// Why talking to the process failed: what it said last, how it ended, or else `cause`.
    fn explain(&mut self, link: &mut Link, cause: WireError) -> Failure {
        let cause = match (&cause, link.last_word()) {
            (WireError::Refused(_), _) | (_, None) => cause,
            (_, Some(reason)) => WireError::Refused(reason),
        };
        let status = match &cause {
            WireError::Refused(reason) => {
                return Failure::Runtime(format!("the destination process gave up: {reason}"));
            }
            error if error.is_timeout() => None,
            _ => self.end_soon(),
        };
        Failure::Runtime(match status {
            Some(status) => {
                format!("the destination process ended too early ({status}); run the command again")
            }
            None => format!("the destination process does not answer: {cause}"),
        })
    }

    /// How the process ended, which a closed socket announces.
    fn end_soon(&mut self) -> Option<ExitStatus> {
        for _ in 0..100 {
            if let Ok(Some(status)) = self.0.try_wait() {
                return Some(status);
            }
            thread::sleep(Duration::from_millis(10));
        }
        None
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail when it has ended by itself, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
