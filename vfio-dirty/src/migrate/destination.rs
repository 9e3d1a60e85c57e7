// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process that receives the guest.

use std::io;
use std::os::fd::AsFd;

use adapter_user::GuestMemory;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;

use super::guest::PAGE;
use super::link::Link;
use super::wire::{Frame, WireError};
use crate::failure::Failure;

/// Receives one guest through the socket that is the standard input.
pub(super) fn receive() -> Result<(), Failure> {
    // A source that is killed takes this process with it. If that fails, it ends a little later.
    let _ = set_pdeathsig(Signal::SIGKILL);
    let stdin = io::stdin().as_fd().try_clone_to_owned();
    let mut link = stdin
        .and_then(Link::new)
        .map_err(|_| Failure::Usage("this is a part of `migrate`: run that instead".into()))?;
    receive_guest(&mut link).map_err(|reason| {
        // The source tells the user. If it is gone, nobody is there to be told.
        let _ = link.send(&Frame::Refused { reason: &reason });
        Failure::Runtime(reason)
    })
}

fn receive_guest(link: &mut Link) -> Result<(), String> {
    let Frame::Hello { memory: len } = link.receive().map_err(|e| e.to_string())? else {
        return Err("the first frame is no greeting".into());
    };
    let no_memory = |e: io::Error| format!("cannot get {len} bytes of memory for the guest: {e}");
    let memory = GuestMemory::new(len).map_err(no_memory)?;
    memory.populate().map_err(no_memory)?; // now, not in the first round
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
                        .ok_or_else(|| format!("page {page} does not belong here"))?;
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
                return Err(format!("{received} of {pages} pages came"));
            }
            Ok(_) => return Err("a frame came out of turn".into()),
            Err(WireError::Closed) if complete => return Ok(()),
            Err(error) => return Err(error.to_string()),
        };
        link.send(&stored).map_err(|e| e.to_string())?;
    }
}
