// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands that this side has sent, and whose replies it awaits.

use std::collections::hash_map::{Entry, HashMap};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The commands that wait for a reply. `T` is what the receiver of replies makes of one.
///
/// The sender of a command [`begin`](Calls::begin)s a call, sends its message with the call's
/// id, and [`wait`](Call::wait)s. The thread that receives messages calls
/// [`complete`](Calls::complete), and [`close`](Calls::close) when the connection ends.
pub(crate) struct Calls<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    /// Where the search for a free id starts.
    next: u16,
    /// The ids that are in use.
    calls: HashMap<u16, Slot<T>>,
    closed: bool,
}

enum Slot<T> {
    Waiting,
    Done(T),
    /// Nobody waits any more. The id stays in use until the reply comes.
    Abandoned,
}

/// Why there is no reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoReply {
    /// The connection has ended.
    Closed,
    /// The deadline has come.
    TimedOut,
    /// All ids are in use.
    NoId,
}

/// The other side has answered a command that nobody sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UnknownId;

impl<T> Calls<T> {
    pub(crate) fn new() -> Self {
        let state = State {
            next: 0,
            calls: HashMap::new(),
            closed: false,
        };
        Calls {
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a call. Its id differs from those of all commands whose reply has not come.
    ///
    /// # Errors
    ///
    /// [`NoReply::Closed`], [`NoReply::NoId`].
    pub(crate) fn begin(&self) -> Result<Call<'_, T>, NoReply> {
        let mut state = self.state();
        if state.closed {
            return Err(NoReply::Closed);
        }
        if state.calls.len() > usize::from(u16::MAX) {
            return Err(NoReply::NoId);
        }
        let mut id = state.next;
        while state.calls.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        state.next = id.wrapping_add(1);
        state.calls.insert(id, Slot::Waiting);
        Ok(Call {
            calls: self,
            id,
            sent: false,
            done: false,
        })
    }

    /// Gives a reply to the call that waits for it. A reply to a call that was abandoned is
    /// dropped.
    ///
    /// # Errors
    ///
    /// [`UnknownId`] if no command with this id waits for a reply.
    pub(crate) fn complete(&self, id: u16, reply: T) -> Result<(), UnknownId> {
        let mut state = self.state();
        match state.calls.get_mut(&id) {
            Some(slot @ Slot::Waiting) => *slot = Slot::Done(reply),
            Some(Slot::Abandoned) => {
                state.calls.remove(&id);
            }
            Some(Slot::Done(_)) | None => return Err(UnknownId),
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Ends every call: whoever waits gets [`NoReply::Closed`] at once, and no call begins any
    /// more. A reply that has come is still received.
    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.changed.notify_all();
    }
}

/// A command that is sent, or about to be.
pub(crate) struct Call<'a, T> {
    calls: &'a Calls<T>,
    id: u16,
    /// Whether a reply may come.
    sent: bool,
    /// Whether the reply was taken, and the id is free.
    done: bool,
}

impl<T> Call<'_, T> {
    /// The id for the message's header.
    pub(crate) fn id(&self) -> u16 {
        self.id
    }

    /// The message is about to be sent. If the call is dropped without this, its id is free
    /// again, because no reply can come.
    pub(crate) fn sending(&mut self) {
        self.sent = true;
    }

    /// Waits for the reply.
    ///
    /// # Errors
    ///
    /// - [`NoReply::Closed`] if the connection ends.
    /// - [`NoReply::TimedOut`] at the deadline. A reply that comes later is dropped.
    pub(crate) fn wait(mut self, deadline: Instant) -> Result<T, NoReply> {
        let mut state = self.calls.state();
        loop {
            if let Entry::Occupied(slot) = state.calls.entry(self.id) {
                if matches!(slot.get(), Slot::Done(_)) {
                    if let Slot::Done(reply) = slot.remove() {
                        self.done = true;
                        return Ok(reply);
                    }
                }
            }
            if state.closed {
                return Err(NoReply::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(NoReply::TimedOut);
            }
            let waited = self.calls.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<T> Drop for Call<'_, T> {
    fn drop(&mut self) {
        if self.done {
            return; // another call may have the id by now
        }
        let mut state = self.calls.state();
        match state.calls.get_mut(&self.id) {
            Some(slot @ Slot::Waiting) if self.sent => *slot = Slot::Abandoned,
            _ => {
                state.calls.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn now() -> Instant {
        Instant::now()
    }

    fn late() -> Instant {
        now() + Duration::from_secs(600)
    }

    fn sent(calls: &Calls<u32>) -> Call<'_, u32> {
        let mut call = calls.begin().unwrap();
        call.sending();
        call
    }

    #[test]
    fn replies_come_in_any_order() {
        let calls = Calls::new();
        let (one, other) = (sent(&calls), sent(&calls));
        assert_ne!(one.id(), other.id());
        calls.complete(other.id(), 2).unwrap();
        calls.complete(one.id(), 1).unwrap();
        assert_eq!(calls.complete(one.id(), 3), Err(UnknownId));
        assert_eq!((one.wait(now()), other.wait(now())), (Ok(1), Ok(2)));
        assert_eq!(calls.complete(0, 4), Err(UnknownId));
    }

    #[test]
    fn an_id_is_in_use_until_its_reply_comes() {
        let calls = Calls::new();
        let abandoned = sent(&calls);
        let id = abandoned.id();
        assert_eq!(abandoned.wait(now()), Err(NoReply::TimedOut));
        let others: Vec<_> = (0..u16::MAX).map(|_| sent(&calls)).collect();
        assert!(others.iter().all(|call| call.id() != id));
        assert_eq!(calls.begin().err(), Some(NoReply::NoId));
        calls.complete(id, 7).unwrap(); // too late: dropped
        let again = sent(&calls);
        assert_eq!(again.id(), id);
        calls.complete(id, 8).unwrap();
        assert_eq!(again.wait(now()), Ok(8));
    }

    #[test]
    fn a_command_that_was_not_sent_leaves_its_id_free() {
        let calls = Calls::<u32>::new();
        let id = calls.begin().unwrap().id();
        assert_eq!(calls.complete(id, 1), Err(UnknownId));
    }

    #[test]
    fn close_ends_every_wait() {
        let calls = Arc::new(Calls::new());
        let has_reply = sent(&calls);
        calls.complete(has_reply.id(), 5).unwrap();
        thread::scope(|scope| {
            let waiting: Vec<_> = (0..4)
                .map(|_| scope.spawn(|| sent(&calls).wait(late())))
                .collect();
            thread::sleep(Duration::from_millis(20));
            calls.close();
            for waiting in waiting {
                assert!(matches!(waiting.join().unwrap(), Err(NoReply::Closed)));
            }
        });
        assert_eq!(has_reply.wait(late()), Ok(5));
        assert_eq!(calls.begin().err(), Some(NoReply::Closed));
    }

    /// Replies that cross the end of a wait neither get lost nor reach another call.
    #[test]
    fn many_threads_each_get_their_own_reply() {
        let calls = Calls::new();
        let (to, from) = std::sync::mpsc::channel::<u16>();
        thread::scope(|scope| {
            for _ in 0..4 {
                let (to, calls) = (to.clone(), &calls);
                scope.spawn(move || {
                    for k in 0..20_000u32 {
                        let call = sent(calls);
                        let id = call.id();
                        to.send(id).unwrap();
                        let deadline = if k % 16 == 0 { now() } else { late() };
                        match call.wait(deadline) {
                            Ok(reply) => assert_eq!(reply, u32::from(id)),
                            Err(error) => assert_eq!((error, k % 16), (NoReply::TimedOut, 0)),
                        }
                    }
                });
            }
            drop(to);
            for id in from {
                calls.complete(id, u32::from(id)).unwrap();
            }
        });
        assert!(calls.state().calls.is_empty());
    }
}
