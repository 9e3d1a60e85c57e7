// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is to fail, and when.

use std::cell::Cell;

use crate::op::FaultKind;

/// A countdown to one failure.
#[derive(Debug, Default)]
pub(super) struct Countdown {
    /// What is left until it fails; 0: nothing is to fail.
    left: Cell<u64>,
    fired: Cell<bool>,
}

impl Countdown {
    /// Counts `n` chances; at which of them, from 0 on, it fails, if it does.
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

    /// It did not fail yet, but will at the next chance.
    pub(super) fn postpone(&self) {
        self.left.set(1);
        self.fired.set(false);
    }
}

/// The faults that are to come, by kind.
#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) alloc: Countdown,
    pub(super) copy: Countdown,
    pub(super) pin: Countdown,
    pub(super) map: Countdown,
    pub(super) charge: Countdown,
}

impl Faults {
    fn of(&self, kind: FaultKind) -> &Countdown {
        match kind {
            FaultKind::Alloc => &self.alloc,
            FaultKind::Copy => &self.copy,
            FaultKind::Pin => &self.pin,
            FaultKind::Map => &self.map,
            FaultKind::Charge => &self.charge,
        }
    }

    pub(super) fn arm(&self, kind: FaultKind, n: u64) {
        self.of(kind).left.set(n);
    }

    /// Disarms all; which one has fired.
    pub(super) fn end(&self) -> Option<FaultKind> {
        const ALL: [FaultKind; 5] = [
            FaultKind::Alloc,
            FaultKind::Copy,
            FaultKind::Pin,
            FaultKind::Map,
            FaultKind::Charge,
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
