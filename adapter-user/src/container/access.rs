// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads that access something, and one that takes it away from them.

use crate::atomic::{AtomicU64, Ordering};

/// Set when nobody may enter any more. The other bits count the threads inside.
const CLOSED: u64 = 1 << 63;

/// Who is inside now, and whether more threads may enter.
pub(crate) struct Access(AtomicU64);

impl Access {
    pub(crate) fn new() -> Self {
        Access(AtomicU64::new(0))
    }

    /// Lets a thread in, until what this returns is dropped. `None` if it is closed.
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        if self.0.load(Ordering::Relaxed) & CLOSED != 0 {
            return None; // those who come too late do not keep `is_empty` false
        }
        let inside = Inside(self);
        // All changes of the word have one order. Either this one comes before that of
        // `close`, and `is_empty` is false until `inside` is dropped, or it sees the
        // bit.
        let before = self.0.fetch_add(1, Ordering::Relaxed);
        (before & CLOSED == 0).then_some(inside)
    }

    /// Lets nobody in from now on.
    pub(crate) fn close(&self) {
        self.0.fetch_or(CLOSED, Ordering::Relaxed);
    }

    /// After `close`: whether everybody has left, and whether this thread sees what
    /// they did.
    pub(crate) fn is_empty(&self) -> bool {
        // Acquire, with the Release of the last who left. The changes in between are
        // part of its release sequence, as of those who left before.
        self.0.load(Ordering::Acquire) == CLOSED
    }
}

/// A thread that is inside.
pub(crate) struct Inside<'a>(&'a Access);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0 .0.fetch_sub(1, Ordering::Release);
    }
}
