// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the user sees: progress, a line for each round, and the verdict. No line is wider than 80
//! columns.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{json, Value};

use super::args::Args;
use super::guest::PAGE;
use super::outcome::{Forecast, Found, Round, Summary};
use super::units::{count, narrow, plural, size, MIB};
use super::verdict::Verdict;
use crate::failure::{cannot, Failure};

pub(super) struct Reporter {
    json: bool,
    /// On standard error, and only if that is a terminal.
    bar: ProgressBar,
}

impl Reporter {
    pub(super) fn new(json: bool) -> Self {
        let style = ProgressStyle::with_template("{msg:>16} [{bar:30}] {pos}/{len} pages");
        let bar = ProgressBar::new(0);
        bar.set_style(
            style
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> "),
        );
        Self { json, bar }
    }

    /// Says that both processes allocate and fill their memory.
    pub(super) fn preparing(&self, args: &Args) -> Result<(), Failure> {
        self.line(&format!(
            "preparing memory: {} for the guest, as much for the destination",
            size(args.memory)
        ))?;
        self.begin("preparing memory", args.memory / PAGE);
        self.bar.tick(); // shows the bar before its first page
        Ok(())
    }

    /// Says what is about to run, and prints the head of the table.
    pub(super) fn started(&self, args: &Args, process: u32) -> Result<(), Failure> {
        self.bar.finish_and_clear();
        let threads = match args.no_cpu {
            true => String::new(),
            false => plural(args.cpu_threads.into(), "CPU thread") + " and ",
        };
        self.line(&format!(
            "{threads}{} devices write {} a second each",
            devices(args),
            plural(args.rate.into(), "page"),
        ))?;
        self.line(&format!("process {process} receives them"))?;
        self.line("")?;
        self.line(&format!("{:13} {:-^31}", "", " found by "))?;
        let [cpu, device, windows, unmaps] = Found::NAMES;
        self.line(&row([
            "round", "dirty", cpu, device, windows, unmaps, "zero", "sent", "MiB", "ms",
        ]))
    }

    /// Starts a new bar.
    pub(super) fn begin(&self, what: &str, pages: u64) {
        self.bar.reset();
        self.bar.set_message(what.to_owned());
        self.bar.set_length(pages);
        self.bar.set_position(0);
    }

    pub(super) fn progress(&self, pages: u64) {
        self.bar.inc(pages);
    }

    pub(super) fn round(&self, round: &Round) -> Result<(), Failure> {
        let found = match &round.found {
            Some(found) => found.counts().map(narrow),
            None => Found::NAMES.map(|_| "-".to_owned()),
        };
        let [cpu, device, windows, unmaps] = &found;
        let number = match round.last {
            true => "stop".into(),
            false => round.number.to_string(),
        };
        self.line(&row([
            &number,
            &narrow(round.dirty),
            cpu,
            device,
            windows,
            unmaps,
            &narrow(round.sent.zero),
            &narrow(round.sent.pages),
            &decimal(round.sent.bytes as f64 / MIB as f64),
            &decimal(milliseconds(round.time)),
        ]))
    }

    /// Returns a function that says on standard error that the destination process is silent.
    pub(super) fn silence(&self, process: u32, limit: Duration) -> Box<dyn Fn() + Send> {
        let bar = self.bar.clone();
        Box::new(move || {
            bar.suspend(|| {
                // If nobody can read this, the migration goes on all the same.
                let _ = writeln!(
                    io::stderr(),
                    "vfio-dirty: the destination process {process} does not answer; waiting for at \
                     most {} s",
                    limit.as_secs()
                );
            });
        })
    }

    /// Prints the result.
    pub(super) fn finish(&self, summary: &Summary<'_>) -> Result<(), Failure> {
        self.bar.finish_and_clear();
        if !self.json {
            return self.line(&summary.text());
        }
        let mut out = io::stdout().lock();
        writeln!(out, "{:#}", summary.json())
            .and_then(|()| out.flush())
            .map_err(cannot("print the JSON document"))
    }

    fn line(&self, text: &str) -> Result<(), Failure> {
        if self.json {
            return Ok(());
        }
        let printed = self.bar.suspend(|| writeln!(io::stdout(), "{text}"));
        match printed {
            // A reader who has seen enough does not need the rest; the exit status still tells.
            Err(cause) if cause.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(cannot("print the table")),
        }
    }
}

fn row(cells: [&str; 10]) -> String {
    let [round, rest @ ..] = cells;
    let mut line = format!("{round:>5}");
    for cell in rest {
        line += &format!(" {cell:>7}");
    }
    line
}

/// A number in at most 7 columns.
fn decimal(value: f64) -> String {
    match value < 99_999.0 {
        true => format!("{value:.1}"),
        false => narrow(value as u64),
    }
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Summary<'_> {
    fn text(&self) -> String {
        let (args, outcome, verdict) = (self.args, self.outcome, self.verdict);
        let mut text = String::from("\n");
        if !outcome.converged {
            text += &format!(
                "after {} the rest took too long; the guest was stopped anyway\n\
                 (allow more --downtime or --max-rounds, or write less with --rate)\n",
                plural(args.max_rounds.into(), "round"),
            );
        }
        text += &format!(
            "{} sent in {}, {}\n",
            plural(outcome.pages_sent(), "page"),
            plural(outcome.rounds.len() as u64, "round"),
            size(outcome.bytes_sent()),
        );
        text += &format!(
            "{} pages/s reported dirty, {}\n",
            count(outcome.dirty_rate() as u64),
            plural(outcome.unmaps, "unmap"),
        );
        text += &format!(
            "downtime {:.1} ms (goal {} ms)\n",
            milliseconds(outcome.downtime),
            args.downtime,
        );
        text += &forecast_text(outcome.forecast);
        if let Some(lose) = args.lose {
            text += &format!("{}\n", lose.sentence());
        }
        if !verdict.is_equal() {
            text += "first differing pages and their last writers:\n";
            for (address, writer) in &verdict.first {
                text += &format!("  {address:#014x}  {}\n", writer.name());
            }
        }
        text + "verdict: " + &words(verdict, args.memory / PAGE)
    }

    fn json(&self) -> Value {
        let (args, outcome, verdict) = (self.args, self.outcome, self.verdict);
        let differences: Vec<_> = verdict
            .first
            .iter()
            .map(|(address, writer)| {
                json!({ "address": format!("{address:#x}"), "last_writer": writer.name() })
            })
            .collect();
        json!({
            "format": 1,
            "memory_bytes": args.memory,
            "page_size": PAGE,
            "cpu_threads": if args.no_cpu { 0 } else { args.cpu_threads },
            "devices": devices(args),
            "rate_pages_per_second": args.rate,
            "lose": args.lose.map(|lose| lose.name()),
            "rounds": outcome.rounds.iter().map(round_json).collect::<Vec<_>>(),
            "pages_sent": outcome.pages_sent(),
            "bytes_sent": outcome.bytes_sent(),
            "converged": outcome.converged,
            "downtime_ms": milliseconds(outcome.downtime),
            "downtime_goal_ms": args.downtime,
            "estimate": forecast_json(outcome.forecast),
            "dirty_pages_per_second": outcome.dirty_rate(),
            "pages_written": outcome.pages_written,
            "unmaps": outcome.unmaps,
            "verdict": if verdict.is_equal() { "equal" } else { "different" },
            "differing_pages": verdict.differing,
            "first_differences": differences,
        })
    }
}

/// What was expected, to read beside what came.
fn forecast_text(forecast: Forecast) -> String {
    let mut text = String::new();
    if forecast.first.is_some() {
        let first = forecast.first.and_then(|first| first.downtime);
        text += &match (forecast.rounds(), first) {
            (Some(rounds), Some(downtime)) => format!(
                "estimated after round 1: {}, downtime {:.1} ms\n",
                plural(rounds.into(), "round"),
                milliseconds(downtime)
            ),
            _ => "estimated after round 1: the rest never fits the downtime goal\n".to_owned(),
        };
    }
    if let Some(last) = forecast.last {
        text += &format!(
            "estimated before the stop: downtime {:.1} ms\n",
            milliseconds(last.downtime_now)
        );
    }
    text
}

fn forecast_json(forecast: Forecast) -> Value {
    let first = forecast.first.and_then(|first| first.downtime);
    json!({
        "rounds": forecast.rounds(),
        "downtime_ms": first.map(milliseconds),
        "downtime_before_stop_ms": forecast.last.map(|last| milliseconds(last.downtime_now)),
    })
}

fn devices(args: &Args) -> u32 {
    4 + u32::from(args.device.is_some())
}

fn words(verdict: &Verdict, pages: u64) -> String {
    let pages = plural(pages, "page");
    match verdict.differing {
        0 => format!("all {pages} equal"),
        differing => format!("DIFFERENT in {} of {pages}", count(differing)),
    }
}

fn round_json(round: &Round) -> Value {
    let found = round.found.map(|found| {
        json!({
            "cpu": found.cpu,
            "device": found.device,
            "windows": found.windows,
            "unmaps": found.unmaps,
            "vfio_user": found.vfio_user,
        })
    });
    json!({
        "round": round.number,
        "guest_stopped": round.last,
        "dirty_pages": round.dirty,
        "found_by": found,
        "pages_sent": round.sent.pages,
        "zero_pages_skipped": round.sent.zero,
        "bytes_sent": round.sent.bytes,
        "milliseconds": milliseconds(round.time),
        "bytes_per_second": round.bytes_per_second(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::outcome::Sent;

    /// The numbers of a guest of 16 TiB, in the columns of the table.
    #[test]
    fn the_largest_numbers_fit_80_columns() {
        let pages = 1_u64 << 32;
        let found = Found {
            cpu: pages,
            device: pages,
            windows: pages,
            unmaps: pages,
            vfio_user: 0,
        };
        let sent = Sent {
            pages,
            zero: pages,
            bytes: pages * PAGE,
        };
        let cells = [found.counts().map(narrow), [sent.pages; 4].map(narrow)].concat();
        let mib = decimal(sent.bytes as f64 / MIB as f64);
        let ms = decimal(milliseconds(Duration::from_secs(1_000_000)));
        for cell in cells.iter().chain([&mib, &ms]) {
            assert!(cell.len() <= 7, "{cell}");
        }
        let cell = "1234567";
        let line = row([
            "12345", cell, cell, cell, cell, cell, cell, cell, cell, cell,
        ]);
        assert!(line.len() <= 80);
    }
}
