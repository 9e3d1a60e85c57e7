// SPDX-License-Identifier: MIT OR Apache-2.0
//! The commands that were read and not handled yet.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use vfio_user_wire::Header;

/// A command of the client.
pub(super) struct Command {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Command {
    /// About how many bytes it takes. A descriptor keeps a file open.
    fn weight(&self) -> usize {
        size_of::<Command>() + self.payload.len() + 4096 * self.fds.len()
    }
}

/// From this on nothing is read, unless a reply is awaited.
const SOFT: usize = 1 << 20;
/// Beyond this the client floods a server that waits for it.
const HARD: usize = 8 << 20;

/// The commands between the thread that reads them and the one that handles them.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    commands: VecDeque<Command>,
    weight: usize,
    /// How many replies are awaited that come by the same socket.
    awaited: usize,
    /// Nothing comes any more.
    ended: bool,
    /// Nobody takes anything any more.
    closed: bool,
}

/// Why a command was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// Nobody handles commands any more.
    Closed,
    /// The client sends more and more commands, and no reply.
    Flooded,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a command, then waits until the next one may be read.
    ///
    /// # Errors
    ///
    /// [`Full`].
    pub(super) fn push(&self, command: Command) -> Result<(), Full> {
        let mut state = self.state();
        state.weight += command.weight();
        state.commands.push_back(command);
        self.changed.notify_all();
        loop {
            if state.closed {
                return Err(Full::Closed);
            }
            if state.weight > HARD && state.awaited > 0 {
                return Err(Full::Flooded);
            }
            if state.weight <= SOFT || state.awaited > 0 {
                return Ok(());
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the next command. `None` when there is none left, and none comes.
    pub(super) fn pop(&self) -> Option<Command> {
        let mut state = self.state();
        loop {
            if let Some(command) = state.commands.pop_front() {
                state.weight -= command.weight();
                if state.weight <= SOFT {
                    self.changed.notify_all();
                }
                return Some(command);
            }
            if state.ended {
                return None;
            }
            let waited = self.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// While what this returns lives, replies are awaited, and reading must go on.
    pub(super) fn await_reply(&self) -> Awaiting<'_> {
        self.state().awaited += 1;
        self.changed.notify_all();
        Awaiting(self)
    }

    /// No command comes any more.
    pub(super) fn end(&self) {
        self.state().ended = true;
        self.changed.notify_all();
    }

    /// No command is taken any more.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.commands.clear();
        state.weight = 0;
        self.changed.notify_all();
    }
}

/// A reply is awaited while this lives.
pub(super) struct Awaiting<'a>(&'a Queue);

impl Drop for Awaiting<'_> {
    fn drop(&mut self) {
        self.0.state().awaited -= 1;
    }
}
