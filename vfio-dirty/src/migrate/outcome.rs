// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happened in a migration, for the table, the picture and the JSON document.

use std::time::Duration;

use adapter_user::Estimate;

use super::args::{Args, Lose};
use super::verdict::Verdict;

/// How many pages each source reported. Sources may report the same page.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Found {
    /// By PAGEMAP_SCAN.
    pub(super) cpu: u64,
    /// By GET_BITMAP of guest RAM.
    pub(super) device: u64,
    /// By GET_BITMAP of the windows.
    pub(super) windows: u64,
    /// By UNMAP_DMA of windows.
    pub(super) unmaps: u64,
    /// By the log of a device in another process.
    pub(super) vfio_user: u64,
}

impl Found {
    /// The columns of the table and the lines of the picture.
    pub(super) const NAMES: [&'static str; 4] = ["CPU", "device", "windows", "unmaps"];

    /// The counts, in the order of [`Self::NAMES`]. All devices that write guest RAM are one.
    pub(super) fn counts(&self) -> [u64; 4] {
        let device = self.device.saturating_add(self.vfio_user);
        [self.cpu, device, self.windows, self.unmaps]
    }

    /// The place among [`Self::NAMES`] of what `lose` throws away.
    pub(super) fn place(lose: Lose) -> Option<usize> {
        match lose {
            Lose::Cpu => Some(0),
            Lose::Device => Some(1),
            Lose::Unmap => Some(3),
            // The column has what other devices wrote, too.
            Lose::Vmm | Lose::VfioUser => None,
        }
    }
}

/// What a round put on the wire.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sent {
    pub(super) pages: u64,
    /// Pages that were not sent, because they are zero at both ends.
    pub(super) zero: u64,
    pub(super) bytes: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    pub(super) number: u32,
    /// Whether the guest was stopped.
    pub(super) last: bool,
    /// Pages that had to be sent.
    pub(super) dirty: u64,
    /// Who reported them; nobody in the first round, which sends all pages.
    pub(super) found: Option<Found>,
    pub(super) sent: Sent,
    /// From the first byte of the round to the destination's answer.
    pub(super) time: Duration,
}

impl Round {
    pub(super) fn bytes_per_second(&self) -> f64 {
        self.sent.bytes as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// What was expected of a migration while it went on.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Forecast {
    /// After the first round. The estimate's rounds are those that were still to come.
    pub(super) first: Option<Estimate>,
    /// Right before the guest was stopped.
    pub(super) last: Option<Estimate>,
}

impl Forecast {
    /// How many rounds were expected in all, with the first and with the one while the
    /// guest is stopped.
    pub(super) fn rounds(&self) -> Option<u32> {
        self.first?.rounds?.checked_add(2)
    }
}

pub(super) struct Outcome {
    pub(super) rounds: Vec<Round>,
    pub(super) forecast: Forecast,
    /// Whether the rest fitted the downtime goal before the rounds ran out.
    pub(super) converged: bool,
    /// From the pause of the guest to the destination's last answer.
    pub(super) downtime: Duration,
    /// From the start of tracking to the pause.
    pub(super) tracked: Duration,
    pub(super) pages_written: u64,
    /// Windows that were unmapped while they were tracked.
    pub(super) unmaps: u64,
}

impl Outcome {
    pub(super) fn pages_sent(&self) -> u64 {
        self.rounds.iter().map(|round| round.sent.pages).sum()
    }

    pub(super) fn bytes_sent(&self) -> u64 {
        self.rounds.iter().map(|round| round.sent.bytes).sum()
    }

    /// Pages that became dirty in a second; a page counts once a round.
    pub(super) fn dirty_rate(&self) -> f64 {
        let dirty: u64 = self.rounds.iter().skip(1).map(|round| round.dirty).sum();
        dirty as f64 / self.tracked.as_secs_f64().max(1e-9)
    }
}

/// Everything there is to say about a migration that ran to its end.
pub(super) struct Summary<'a> {
    pub(super) args: &'a Args,
    pub(super) outcome: &'a Outcome,
    pub(super) verdict: &'a Verdict,
}
