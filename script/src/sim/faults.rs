// SPDX-License-Identifier: MIT OR Apache-2.0
//! The faults that scripts order: what fails, and when.

use std::cell::Cell;

use crate::op::FaultKind;

/// A countdown to one failure.
#[derive(Debug, Default)]
pub(super) struct Countdown {
    /// Chances up to and including the one that fails; 0 for none.
    left: Cell<u64>,
    /// Whether it has failed since it was last asked.
    fired: Cell<bool>,
}

impl Countdown {
    /// Counts `n` chances to fail. Returns which of them fails, from 0, if one
    /// does.
    pub(super) fn strikes(&self, n: u64) -> Option<u64> {
        let left = self.left.get();
        if left == 0 || left > n {
            self.left.set(left.saturating_sub(n));
            return None;
        }
        self.left.set(0);
        self.fired.set(true);
        Some(left - 1)
    }

    /// Takes a failure back: the next chance fails instead.
    pub(super) fn postpone(&self) {
        self.left.set(1);
        self.fired.set(false);
    }
}

/// A countdown for each kind of fault.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) alloc: Countdown,
    pub(super) copy: Countdown,
    pub(super) pin: Countdown,
    pub(super) map: Countdown,
    pub(super) charge: Countdown,
    pub(super) track: Countdown,
}

impl Faults {
    fn of(&self, kind: FaultKind) -> &Countdown {
        match kind {
            FaultKind::Alloc => &self.alloc,
            FaultKind::Copy => &self.copy,
            FaultKind::Pin => &self.pin,
            FaultKind::Map => &self.map,
            FaultKind::Charge => &self.charge,
            FaultKind::Track => &self.track,
        }
    }

    /// Makes the `n`-th chance from now on fail.
    pub(super) fn arm(&self, kind: FaultKind, n: u64) {
        self.of(kind).left.set(n);
    }

    /// Disarms all countdowns, and returns one that has fired.
    pub(super) fn end(&self) -> Option<FaultKind> {
        const ALL: [FaultKind; 6] = [
            FaultKind::Alloc,
            FaultKind::Copy,
            FaultKind::Pin,
            FaultKind::Map,
            FaultKind::Charge,
            FaultKind::Track,
        ];
        let mut fired = None;
        for kind in ALL {
            self.of(kind).left.set(0);
            if self.of(kind).fired.take() {
                fired = Some(kind);
            }
        }
        fired
    }
}
