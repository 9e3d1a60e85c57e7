// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sending end: starts the destination process and sends pages to it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use adapter_user::GuestMemory;

use super::guest::{Guest, PAGE};
use super::link::{Link, Patience};
use super::outcome::Sent;
use super::wire::{Batch, Frame, WireError};
use crate::failure::{cannot, explain, is_file_limit, Failure};

/// The argument with which the program starts itself as the receiving process.
pub(super) const DESTINATION: &str = "migrate-destination";

pub(super) struct Destination {
    link: Link,
    process: Process,
    memory: GuestMemory,
    batch: Batch,
}

/// A process that allocates its memory.
pub(super) struct Starting {
    link: Link,
    process: Process,
    memory: u64,
}

impl Starting {
    /// Starts a process that allocates `memory` bytes for the guest. `patience` makes the patience
    /// with the process of the given id.
    pub(super) fn new(
        memory: u64,
        patience: impl FnOnce(u32) -> Patience,
    ) -> Result<Self, Failure> {
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
        let patience = patience(process.0.id());
        let mut link =
            Link::new(OwnedFd::from(ours), Some(patience)).map_err(cannot("set up the socket"))?;
        if let Err(cause) = link.send(&Frame::Hello { memory }) {
            return Err(process.explain(&mut link, cause.into()));
        }
        Ok(Self {
            link,
            process,
            memory,
        })
    }

    /// Waits until the memory is allocated.
    pub(super) fn ready(mut self) -> Result<Destination, Failure> {
        loop {
            let cause = match self.link.receive() {
                Ok(Frame::Ready) => break,
                Ok(Frame::Busy) => continue,
                Ok(Frame::Refused { reason }) => WireError::Refused(reason.to_owned()),
                Ok(_) => out_of_turn(),
                Err(cause) => cause,
            };
            return Err(self.process.explain(&mut self.link, cause));
        }
        let memory = self.link.receive_file().and_then(GuestMemory::from_fd);
        let memory = memory.map_err(cannot("map the destination's memory"))?;
        if memory.len() != self.memory {
            return Err(Failure::Runtime(
                "the destination's memory has another size than the guest's".into(),
            ));
        }
        Ok(Destination {
            link: self.link,
            process: self.process,
            memory,
            batch: Batch::new(),
        })
    }
}

fn out_of_turn() -> WireError {
    WireError::Io(io::Error::other("an answer came out of turn"))
}

impl Destination {
    /// The destination's memory itself.
    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    pub(super) fn process_id(&self) -> u32 {
        self.process.0.id()
    }

    /// Sends the contents that `pages` have now. With `skip_zero` it leaves out zero pages, which
    /// is right as long as the destination's pages are zero.
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

    /// Ends a round and waits until the destination has checked and stored all of it.
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
            Ok(_) => out_of_turn(),
            Err(error) => error,
        };
        Err(self.process.explain(&mut self.link, cause))
    }

    /// Ends the connection and waits for the process.
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

fn is_zero(bytes: &[u8]) -> bool {
    bytes == [0; PAGE as usize]
}

/// A process that does not outlive this value.
pub(super) struct Process(pub(super) Child);

impl Process {
    /// Why talking to the process failed: what it said last, how it ended, or else `cause`.
    fn explain(&mut self, link: &mut Link, cause: WireError) -> Failure {
        let reason = match &cause {
            WireError::Refused(reason) => Some(reason.clone()),
            WireError::Io(cause) if is_file_limit(cause) => {
                return Failure::Runtime(explain(cause));
            }
            _ => link.last_word(),
        };
        if let Some(reason) = reason {
            return Failure::Runtime(format!("the destination process gave up: {reason}"));
        }
        let process = self.0.id();
        if cause.is_timeout() {
            return Failure::Runtime(format!(
                "the destination process {process} was silent for too long and was ended: it was \
                 stopped, or the machine is too busy; run the command again"
            ));
        }
        Failure::Runtime(match self.end_soon() {
            Some(status) => {
                format!("the destination process ended too early ({status}); run the command again")
            }
            None => format!("the destination process {process} failed and was ended: {cause}"),
        })
    }

    /// How the process ended; a closed socket announces its end.
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
        // Both calls fail if the process has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
