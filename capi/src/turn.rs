// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls that wait for a tracker's sources, and refuse to wait for themselves.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::failure::Failure;

/// The number of a tracker, whose calls that wait for its sources refuse to wait for
/// themselves.
#[derive(Clone, Copy)]
pub(crate) struct Turn(u64);

thread_local! {
    /// The trackers that this thread is in a call of, which waits for their sources.
    static INSIDE: RefCell<Vec<u64>> = RefCell::default();
}

/// A call that is under way.
pub(crate) struct Inside(u64);

impl Turn {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Turn(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// Begins a call that waits for the tracker's sources. EDEADLK in a callback of one.
    pub(crate) fn begin(self) -> Result<Inside, Failure> {
        let begun = INSIDE.try_with(|inside| {
            let mut inside = inside.borrow_mut();
            let free = !inside.contains(&self.0);
            if free {
                inside.push(self.0);
            }
            free
        });
        match begun {
            Ok(true) => Ok(Inside(self.0)),
            Ok(false) => Err(Failure::new(
                libc::EDEADLK,
                "a callback of a source calls what waits for the source",
            )),
            Err(_) => Err(Failure::new(libc::EDEADLK, "the thread is about to end")),
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // It fails only on a thread that has ended.
        let _ = INSIDE.try_with(|inside| inside.borrow_mut().retain(|at| *at != self.0));
    }
}
