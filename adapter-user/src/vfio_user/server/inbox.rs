// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who reads the client's messages, and the commands that were read and not handled yet.
//!
//! One thread reads a command and handles it, then reads the next one. So nothing is read while
//! a command is handled, and a client that sends too much waits at its socket.
//!
//! A device that waits for a reply of the client, while a command is handled, would wait in vain.
//! A second thread reads then, and keeps the commands that come before the reply.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use vfio_user_wire::Header;

/// A message of the client.
pub(super) struct Message {
    pub(super) header: Header,
    pub(super) payload: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Message {
    /// About how many bytes it takes. A descriptor keeps a file open.
    fn weight(&self) -> usize {
        size_of::<Message>() + self.payload.len() + 4096 * self.fds.len()
    }
}

/// What was read.
pub(super) enum Read {
    Command(Message),
    /// A reply, which was given to whoever awaits it.
    Reply,
    /// Nothing more can be read.
    End(io::Result<()>),
}

/// How many bytes of commands are kept while a reply is awaited.
const MOST: usize = 8 << 20;

/// The commands of a client.
#[derive(Default)]
pub(super) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    commands: VecDeque<Message>,
    weight: usize,
    /// A thread is reading.
    reading: bool,
    /// How many replies are awaited that come by the same socket.
    awaited: usize,
    /// Nothing more is read.
    ended: bool,
    /// Why.
    end: Option<io::Result<()>>,
}

impl State {
    fn drop_commands(&mut self) {
        self.commands.clear();
        self.weight = 0;
    }

    fn end(&mut self, end: io::Result<()>) {
        self.ended = true;
        self.end.get_or_insert(end);
    }
}

impl Inbox {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let waited = self.changed.wait(state);
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads one message while no other thread does.
    fn read<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        read: impl Fn() -> Read,
    ) -> (MutexGuard<'a, State>, Option<Message>) {
        state.reading = true;
        drop(state);
        let message = read();
        let mut state = self.state();
        state.reading = false;
        self.changed.notify_all();
        match message {
            Read::Command(command) => return (state, Some(command)),
            Read::Reply => {}
            Read::End(end) => state.end(end),
        }
        (state, None)
    }

    /// Returns the next command, which it reads unless the other thread does. `None` when no
    /// more can come.
    pub(super) fn next(&self, read: impl Fn() -> Read) -> Option<Message> {
        let mut state = self.state();
        loop {
            if let Some(command) = state.commands.pop_front() {
                state.weight -= command.weight();
                return Some(command);
            }
            if state.ended {
                return None;
            }
            if state.reading {
                state = self.wait(state);
                continue;
            }
            let command;
            (state, command) = self.read(state, &read);
            if command.is_some() {
                return command;
            }
        }
    }

    /// Reads whenever a reply is awaited and nobody else reads, until no more can come.
    pub(super) fn stand_in(&self, read: impl Fn() -> Read) {
        let mut state = self.state();
        while !state.ended {
            if state.awaited == 0 || state.reading {
                state = self.wait(state);
                continue;
            }
            let command;
            (state, command) = self.read(state, &read);
            if let Some(command) = command {
                state.weight += command.weight();
                state.commands.push_back(command);
                if state.weight > MOST {
                    state.drop_commands();
                    let why = "the client sends commands without end, and no reply";
                    state.end(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
                }
            }
        }
    }

    /// While what this returns lives, a reply is awaited, so that somebody must read.
    pub(super) fn await_reply(&self) -> Awaiting<'_> {
        self.state().awaited += 1;
        self.changed.notify_all();
        Awaiting(self)
    }

    /// Ends both threads. Commands that were read are dropped.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.drop_commands();
        state.end(Ok(()));
        self.changed.notify_all();
    }

    /// Why nothing more could be read.
    pub(super) fn end(&self) -> io::Result<()> {
        self.state().end.take().unwrap_or(Ok(()))
    }
}

/// A reply is awaited while this lives.
pub(super) struct Awaiting<'a>(&'a Inbox);

impl Drop for Awaiting<'_> {
    fn drop(&mut self) {
        self.0.state().awaited -= 1;
    }
}
