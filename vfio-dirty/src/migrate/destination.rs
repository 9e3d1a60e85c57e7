// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process that receives the guest.

use std::io;
use std::os::fd::AsFd;
use std::sync::mpsc::{channel, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use adapter_user::GuestMemory;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::guest::PAGE;
use super::link::Link;
use super::wire::{Frame, WireError};
use crate::failure::{explain, Failure};

/// How often the source hears that the memory is being allocated.
const BUSY: Duration = Duration::from_millis(500);

/// Receives one guest through the socket that is standard input.
pub(super) fn receive() -> Result<(), Failure> {
    // The kernel kills this process when the source dies. Without that, the closed socket ends it.
    let _ = set_pdeathsig(Signal::SIGKILL);
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let mut link = stdin
        .and_then(|stdin| Link::new(stdin, None))
        .map_err(|_| Failure::Usage("this is a part of `migrate`: run that instead".into()))?;
    receive_guest(&mut link).map_err(|reason| {
        // The source tells the user. If it is gone, there is nobody to tell.
        let _ = link.send(&Frame::Refused { reason: &reason });
        Failure::Runtime(reason)
    })
}

fn receive_guest(link: &mut Link) -> Result<(), String> {
    let Frame::Hello { memory: len } = link.receive().map_err(|e| e.to_string())? else {
        return Err("the first frame is not a greeting".into());
    };
    let memory = allocate(link, len).map_err(|cause| {
        let cause = explain(&cause);
        format!("cannot get {len} bytes of memory for the guest: {cause}")
    })?;
    link.send(&Frame::Ready)
        .and_then(|()| link.send_file(memory.as_fd()))
        .map_err(|e| format!("cannot hand over the memory file: {e}"))?;
    let mut received = 0;
    let mut complete = false;
    loop {
        let stored = match link.receive() {
            Ok(Frame::Pages(pages)) => {
                for (page, bytes) in pages.iter() {
                    page.checked_mul(PAGE)
                        .filter(|_| !complete)
                        .and_then(|gpa| memory.write(gpa, bytes).ok())
                        .ok_or_else(|| format!("page {page} came, which is not expected"))?;
                    received += 1;
                }
                continue;
            }
            Ok(Frame::EndOfRound { round, last, pages }) if pages == received => {
                received = 0;
                complete |= last;
                Frame::Stored { round }
            }
            Ok(Frame::EndOfRound { pages, .. }) => {
                return Err(format!("only {received} of {pages} pages came"));
            }
            Ok(_) => return Err("a frame came out of turn".into()),
            Err(WireError::Closed) if complete => return Ok(()),
            Err(error) => return Err(error.to_string()),
        };
        link.send(&stored).map_err(|e| e.to_string())?;
    }
}

/// Allocates the memory now, so that the first round does not wait for it. Meanwhile it sends a
/// sign of life, so that the source does not take it for dead.
fn allocate(link: &Link, len: u64) -> io::Result<GuestMemory> {
    let memory = GuestMemory::new(len)?;
    let (done, is_done) = channel();
    thread::scope(|scope| {
        let memory = &memory;
        scope.spawn(move || done.send(memory.populate()));
        loop {
            match is_done.recv_timeout(BUSY) {
                Ok(populated) => return populated,
                Err(RecvTimeoutError::Timeout) => link.send(&Frame::Busy)?,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the thread that allocates it panicked"));
                }
            }
        }
    })?;
    Ok(memory)
}
