// SPDX-License-Identifier: MIT OR Apache-2.0
//! The pages that the device wrote, and nobody has told the client of.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dirty_core::Errno;

/// Bytes of a page, in which this counts.
pub(super) const PAGE: u64 = 4096;

/// The pages whose contents must go with the device's state, because the client does not know
/// that they were written.
///
/// It counts no page that a report has told, or that the client copies anyway because it has
/// started the device's log after the write.
pub(super) struct Carry {
    /// How many pages there may be.
    most: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The numbers of the pages.
    pages: BTreeSet<u64>,
    /// Those whose mapping has gone, so that nobody can read them any more.
    lost: BTreeSet<u64>,
    /// There were more than may be.
    exceeded: bool,
}

/// Pages that were taken out, for [`Carry::put_back`].
pub(super) struct Taken {
    pages: BTreeSet<u64>,
    lost: BTreeSet<u64>,
}

impl Carry {
    /// The pages may take `budget` bytes.
    pub(super) fn new(budget: u64) -> Self {
        Carry {
            most: budget / PAGE,
            state: Mutex::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device wrote `size` bytes at `iova`.
    pub(super) fn wrote(&self, iova: u64, size: u64) {
        let Some(more) = size.checked_sub(1) else {
            return;
        };
        let mut state = self.state();
        let pages = iova / PAGE..=iova.saturating_add(more) / PAGE;
        if state.exceeded || pages.end() - pages.start() >= self.most {
            state.exceed();
        } else {
            state.pages.extend(pages);
            self.check_budget(&mut state);
        }
    }

    fn check_budget(&self, state: &mut State) {
        if (state.pages.len() + state.lost.len()) as u64 > self.most {
            state.exceed();
        }
    }

    /// The mapping from IOVA `first` to IOVA `last` has gone.
    pub(super) fn unmapped(&self, first: u64, last: u64) {
        let mut state = self.state();
        let mut gone = take(&mut state.pages, first / PAGE, last / PAGE);
        state.lost.append(&mut gone);
    }

    /// The client has started the log for everything: it copies all memory.
    pub(super) fn started_all(&self) {
        *self.state() = State::default();
    }

    /// Takes the pages that are wholly among the `size` bytes from `iova` on, before the client
    /// is told of them. A page that is written from now on is counted again.
    pub(super) fn take(&self, iova: u64, size: u64) -> Taken {
        let first = iova.div_ceil(PAGE);
        let end = match iova.checked_add(size) {
            Some(end) => end / PAGE,
            None => u64::MAX / PAGE + 1,
        };
        let mut state = self.state();
        let mut taken = |pages: fn(&mut State) -> &mut BTreeSet<u64>| match end.checked_sub(1) {
            Some(last) if first <= last => take(pages(&mut state), first, last),
            _ => BTreeSet::new(),
        };
        Taken {
            pages: taken(|state| &mut state.pages),
            lost: taken(|state| &mut state.lost),
        }
    }

    /// The client was not told.
    pub(super) fn put_back(&self, mut taken: Taken) {
        let mut state = self.state();
        if !state.exceeded {
            state.pages.append(&mut taken.pages);
            state.lost.append(&mut taken.lost);
            self.check_budget(&mut state);
        }
    }

    /// The IOVAs of the pages whose contents must go with the device's state.
    ///
    /// # Errors
    ///
    /// ENOSPC if they exceed the budget, EFAULT if the mapping of one has gone.
    pub(super) fn pages(&self) -> Result<Vec<u64>, Errno> {
        let state = self.state();
        if state.exceeded {
            return Err(Errno::ENOSPC);
        }
        if !state.lost.is_empty() {
            return Err(Errno::EFAULT);
        }
        Ok(state.pages.iter().map(|page| page * PAGE).collect())
    }
}

impl State {
    fn exceed(&mut self) {
        *self = State {
            exceeded: true,
            ..State::default()
        };
    }
}

/// Takes the numbers from `first` to `last` out of a set.
fn take(pages: &mut BTreeSet<u64>, first: u64, last: u64) -> BTreeSet<u64> {
    if pages.range(first..=last).next().is_none() {
        return BTreeSet::new();
    }
    let mut taken = pages.split_off(&first);
    if let Some(next) = last.checked_add(1) {
        pages.append(&mut taken.split_off(&next));
    }
    taken
}
