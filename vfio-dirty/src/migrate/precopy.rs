// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rounds of a pre-copy migration.
//!
//! Each round takes a report first and reads the pages after. So a write that comes too late for
//! the page's contents is in time for the next report.

use std::time::{Duration, Instant};

use adapter_user::guest::Report;
use adapter_user::DirtyRate;

use super::guest::{Guest, PAGE};
use super::outcome::{Forecast, Found, Outcome, Round};
use super::report::Reporter;
use super::source::Destination;
use super::tracking::Tracking;
use super::wire::BYTES_PER_PAGE;
use super::writers::Writers;
use crate::failure::{cannot, Failure};

/// Over which time the dirty rate is measured.
const WINDOW: Duration = Duration::from_secs(10);

/// When to stop the guest.
pub(super) struct Goals {
    pub(super) downtime: Duration,
    pub(super) max_rounds: u32,
}

/// Migrates `guest`, whose writes are tracked already.
pub(super) fn migrate(
    guest: &Guest,
    tracking: &Tracking,
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
    let mut report = Report::new();
    tracking.take(&mut report)?; // gives the report its slot
    report.set_all();
    let mut rate = DirtyRate::new(WINDOW);
    rate.record(started.elapsed(), 0);
    let mut forecast = Forecast::default();
    tracking.found(); // of no interest: the first round sends all pages
    sender.round(&report, None, false)?;
    let converged = loop {
        report.clear(); // its pages have arrived
        let asked = Instant::now();
        tracking.take(&mut report)?;
        let left = report.pages() * BYTES_PER_PAGE;
        rate.record(started.elapsed(), left);
        forecast.last = rate.estimate(left, sender.bytes_per_second(), goals.downtime);
        forecast.first = forecast.first.or(forecast.last);
        // The rest will be asked for and sent once more while the guest is stopped.
        let converged = asked.elapsed() + sender.time_for(&report) <= goals.downtime;
        if converged || sender.rounds.len() >= goals.max_rounds as usize {
            break converged;
        }
        sender.round(&report, Some(tracking.found()), false)?;
    };

    let tracked = started.elapsed();
    let paused = Instant::now();
    let written = writers.pause()?;
    tracking.take(&mut report)?;
    sender.round(&report, Some(tracking.found()), true)?;
    writers.move_states()?;
    Ok(Outcome {
        rounds: sender.rounds,
        forecast,
        converged,
        downtime: paused.elapsed(),
        tracked,
        pages_written: written.pages,
        unmaps: written.unmaps,
    })
}

struct Sender<'a> {
    guest: &'a Guest,
    destination: &'a mut Destination,
    reporter: &'a Reporter,
    rounds: Vec<Round>,
}

impl Sender<'_> {
    /// How long it will take to send the pages of `report`, at the speed of all rounds so far.
    fn time_for(&self, report: &Report) -> Duration {
        let bytes: u64 = self.rounds.iter().map(|round| round.sent.bytes).sum();
        let time: Duration = self.rounds.iter().map(|round| round.time).sum();
        time.mul_f64((report.pages() * BYTES_PER_PAGE) as f64 / bytes.max(1) as f64)
    }

    /// The speed of all rounds so far.
    fn bytes_per_second(&self) -> u64 {
        let bytes: u64 = self.rounds.iter().map(|round| round.sent.bytes).sum();
        let time: Duration = self.rounds.iter().map(|round| round.time).sum();
        (bytes as f64 / time.as_secs_f64().max(1e-9)) as u64
    }

    /// Sends the pages of `report`.
    fn round(&mut self, report: &Report, found: Option<Found>, last: bool) -> Result<(), Failure> {
        let start = Instant::now();
        let number = self.rounds.len() as u32 + 1;
        let dirty = report.pages();
        self.reporter.begin(&format!("round {number}"), dirty);
        let ranges = report.ranges(PAGE).map_err(cannot("read the report"))?;
        let pages = ranges.flat_map(|range| range.gpa / PAGE..(range.gpa + range.size) / PAGE);
        let first = number == 1;
        let sent = self
            .destination
            .send(self.guest, pages, first, || self.reporter.progress(1))?;
        self.destination.end_round(number, last, sent)?;
        let round = Round {
            number,
            last,
            dirty,
            found,
            sent,
            time: start.elapsed(),
        };
        self.reporter.round(&round)?;
        self.rounds.push(round);
        Ok(())
    }
}
