// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rounds of a pre-copy migration.
//!
//! In each round the trackers are asked first and pages are read after: a write that comes too
//! late for the page's contents is then in time for the next report.

use std::sync::Arc;
use std::time::{Duration, Instant};

use adapter_user::Container;

use super::cpu_tracker::CpuTracker;
use super::guest::{Guest, PAGE};
use super::page_set::PageSet;
use super::report::Reporter;
use super::source::{Destination, Sent};
use super::viommu::Viommu;
use super::wire::BYTES_PER_PAGE;
use super::writers::Writers;
use super::Lose;
use crate::failure::{cannot, Failure};

/// Everything that knows which pages were written.
pub(super) struct Trackers {
    pub(super) container: Container,
    pub(super) viommu: Arc<Viommu>,
    pub(super) cpu: Option<CpuTracker>,
    /// The one whose answers are thrown away.
    pub(super) lose: Option<Lose>,
}

/// How many pages each tracker found; a page may be found by several.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Found {
    pub(super) cpu: u64,
    /// By GET_BITMAP over guest RAM.
    pub(super) device: u64,
    /// By GET_BITMAP over the windows, translated.
    pub(super) windows: u64,
    /// By unmaps of windows, translated.
    pub(super) unmap: u64,
}

impl Trackers {
    /// Adds what was written since the last call to `dirty`.
    fn collect(&mut self, dirty: &mut PageSet) -> Result<Found, Failure> {
        let mut found = Found::default();
        let mut set = PageSet::new(dirty.pages());
        let mut merge = |set: &mut PageSet, lost: bool| {
            let pages = set.len();
            if !lost {
                dirty.union(set);
            }
            set.clear();
            pages
        };

        if let Some(cpu) = &mut self.cpu {
            cpu.collect(&mut set)
                .map_err(cannot("ask the kernel which pages the CPUs wrote"))?;
            found.cpu = merge(&mut set, self.lose == Some(Lose::Cpu));
        }
        let size = set.pages() * PAGE;
        self.container
            .dirty_bitmap(0, size, PAGE, set.words_mut())
            .map_err(cannot("get the dirty pages of guest RAM"))?;
        found.device = merge(&mut set, self.lose == Some(Lose::Device));
        self.viommu.collect_windows(&mut set)?;
        found.windows = merge(&mut set, false);
        self.viommu.collect_harvest(&mut set);
        found.unmap = merge(&mut set, self.lose == Some(Lose::Unmap));
        Ok(found)
    }
}

/// When to stop the guest.
pub(super) struct Goals {
    pub(super) downtime: Duration,
    pub(super) max_rounds: u32,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Round {
    pub(super) number: u32,
    /// The guest was paused.
    pub(super) last: bool,
    /// Pages to send, and who found them; in the first round nobody is asked.
    pub(super) dirty: u64,
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

pub(super) struct Outcome {
    pub(super) rounds: Vec<Round>,
    /// The rest fitted the downtime goal before the rounds ran out.
    pub(super) converged: bool,
    /// From the pause of the guest to the destination's last answer.
    pub(super) downtime: Duration,
    /// From the start of tracking to the pause.
    pub(super) tracked: Duration,
    pub(super) pages_written: u64,
    pub(super) unmaps: u64,
}

impl Outcome {
    pub(super) fn pages_sent(&self) -> u64 {
        self.rounds.iter().map(|round| round.sent.pages).sum()
    }

    pub(super) fn bytes_sent(&self) -> u64 {
        self.rounds.iter().map(|round| round.sent.bytes).sum()
    }

    /// Pages that were dirtied in a second, counted once a round.
    pub(super) fn dirty_rate(&self) -> f64 {
        let dirty: u64 = self.rounds.iter().skip(1).map(|round| round.dirty).sum();
        dirty as f64 / self.tracked.as_secs_f64().max(1e-9)
    }
}

pub(super) fn migrate(
    guest: &Guest,
    trackers: &mut Trackers,
    writers: &mut Writers,
    destination: &mut Destination,
    goals: &Goals,
    reporter: &Reporter,
) -> Result<Outcome, Failure> {
    let started = Instant::now();
    let mut sender = Sender {
        guest,
        destination,
        reporter,
        rounds: Vec::new(),
    };
    sender.round(&PageSet::full(guest.pages()), None, false)?;
    let mut dirty = PageSet::new(guest.pages());
    let (found_before_pause, converged) = loop {
        let asked = Instant::now();
        dirty.clear();
        let found = trackers.collect(&mut dirty)?;
        // What is left must be asked for and sent once more, all while the guest stands still.
        let converged = asked.elapsed() + sender.time_for(&dirty) <= goals.downtime;
        if converged || sender.rounds.len() >= goals.max_rounds as usize {
            break (found, converged);
        }
        sender.round(&dirty, Some(found), false)?;
    };

    let tracked = started.elapsed();
    let paused = Instant::now();
    let pages_written = writers.pause()?;
    let found = trackers.collect(&mut dirty)?.plus(found_before_pause);
    sender.round(&dirty, Some(found), true)?;
    Ok(Outcome {
        rounds: sender.rounds,
        converged,
        downtime: paused.elapsed(),
        tracked,
        pages_written,
        unmaps: trackers.viommu.unmaps(),
    })
}

impl Found {
    fn plus(self, other: Self) -> Self {
        Self {
            cpu: self.cpu + other.cpu,
            device: self.device + other.device,
            windows: self.windows + other.windows,
            unmap: self.unmap + other.unmap,
        }
    }
}

struct Sender<'a> {
    guest: &'a Guest,
    destination: &'a mut Destination,
    reporter: &'a Reporter,
    rounds: Vec<Round>,
}

impl Sender<'_> {
    /// How long it takes to send `dirty`, judged by all that was sent so far.
    fn time_for(&self, dirty: &PageSet) -> Duration {
        let bytes: u64 = self.rounds.iter().map(|round| round.sent.bytes).sum();
        let time: Duration = self.rounds.iter().map(|round| round.time).sum();
        time.mul_f64((dirty.len() * BYTES_PER_PAGE) as f64 / bytes.max(1) as f64)
    }

    fn round(&mut self, dirty: &PageSet, found: Option<Found>, last: bool) -> Result<(), Failure> {
        let start = Instant::now();
        let number = self.rounds.len() as u32 + 1;
        let pages = dirty.len();
        self.reporter.begin(number, pages);
        let fresh = number == 1;
        let sent = self
            .destination
            .send(self.guest, dirty.iter(), fresh, || self.reporter.progress())?;
        self.destination.end_round(number, last, sent)?;
        let round = Round {
            number,
            last,
            dirty: pages,
            found,
            sent,
            time: start.elapsed(),
        };
        self.reporter.round(&round);
        self.rounds.push(round);
        Ok(())
    }
}
