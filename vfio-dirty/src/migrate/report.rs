// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the user sees: a bar while pages go, a line per round, and the verdict.

use std::io::{self, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{json, Value};

use super::guest::PAGE;
use super::precopy::{Outcome, Round};
use super::units::{count, plural, size, MIB};
use super::verdict::Verdict;
use super::Args;

/// Everything there is to say about a migration.
pub(super) struct Report<'a> {
    pub(super) args: &'a Args,
    pub(super) outcome: &'a Outcome,
    pub(super) verdict: &'a Verdict,
}

pub(super) struct Reporter {
    json: bool,
    /// On the standard error, and only if that is a terminal.
    bar: ProgressBar,
}

impl Reporter {
    pub(super) fn new(args: &Args, process: u32) -> Self {
        let style = ProgressStyle::with_template("{msg:>8} [{bar:40}] {pos}/{len} pages");
        let bar = ProgressBar::new(0);
        bar.set_style(
            style
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> "),
        );
        let reporter = Self {
            json: args.json,
            bar,
        };
        let threads = match args.no_cpu {
            true => "no CPU".to_owned(),
            false => plural(args.cpu_threads.into(), "CPU thread"),
        };
        reporter.line(&format!(
            "guest of {} written by {threads} and 4 devices, {} a second each, to process {process}",
            size(args.memory),
            plural(args.rate.into(), "page"),
        ));
        reporter.line(&format!("{:16}{:-^39}", "", " found by "));
        reporter.line(&row(&[
            "round", "dirty", "CPU", "device", "windows", "unmaps", "sent", "MiB", "ms", "MiB/s",
        ]));
        reporter
    }

    pub(super) fn begin(&self, round: u32, pages: u64) {
        self.bar.set_message(format!("round {round}"));
        self.bar.set_length(pages);
        self.bar.set_position(0);
    }

    pub(super) fn progress(&self) {
        self.bar.inc(1);
    }

    pub(super) fn round(&self, round: &Round) {
        let found = |pick: fn(super::precopy::Found) -> u64| match round.found {
            Some(found) => count(pick(found)),
            None => "-".into(),
        };
        let number = match round.last {
            true => "stop".into(),
            false => round.number.to_string(),
        };
        self.line(&row(&[
            &number,
            &count(round.dirty),
            &found(|found| found.cpu),
            &found(|found| found.device),
            &found(|found| found.windows),
            &found(|found| found.unmap),
            &count(round.sent.pages),
            &format!("{:.1}", round.sent.bytes as f64 / MIB as f64),
            &format!("{:.1}", milliseconds(round.time)),
            &format!("{:.0}", round.bytes_per_second() / MIB as f64),
        ]));
    }

    pub(super) fn comparing(&self) {
        self.bar.finish_and_clear();
    }

    pub(super) fn finish(&self, report: &Report<'_>) {
        if self.json {
            print(&format!("{:#}", report.json()));
        } else {
            print(&report.text());
        }
    }

    fn line(&self, text: &str) {
        if !self.json {
            self.bar.suspend(|| print(text));
        }
    }
}

/// A reader who went away is no reason to stop.
fn print(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

fn row(cells: &[&str; 10]) -> String {
    let [round, dirty, cpu, device, windows, unmaps, sent, mib, ms, rate] = cells;
    format!(
        "{round:>5} {dirty:>9} {cpu:>9} {device:>9} {windows:>9} {unmaps:>9} {sent:>9} {mib:>9} {ms:>8} {rate:>8}"
    )
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

impl Report<'_> {
    fn text(&self) -> String {
        let (outcome, verdict) = (self.outcome, self.verdict);
        let mut text = String::new();
        if !outcome.converged {
            text += &format!(
                "the rest did not fit the downtime goal within {}, the guest was stopped anyway: \
                 allow more --downtime or write less with --rate\n",
                plural(self.args.max_rounds.into(), "round"),
            );
        }
        if let Some(lose) = self.args.lose {
            text += &format!("lost on purpose: all that `{}` reported\n", lose.name());
        }
        if !verdict.is_equal() {
            text += "first differing pages and their last writers:\n";
            for (address, writer) in &verdict.first {
                text += &format!("  {address:#014x}  {}\n", writer.name());
            }
        }
        let pages = self.args.memory / PAGE;
        text + &format!(
            "{} sent in {}, downtime {:.1} ms (goal {} ms), {} pages/s reported dirty, {}: {}",
            plural(outcome.pages_sent(), "page"),
            plural(outcome.rounds.len() as u64, "round"),
            milliseconds(outcome.downtime),
            self.args.downtime,
            count(outcome.dirty_rate() as u64),
            plural(outcome.unmaps, "unmap"),
            match verdict.differing {
                0 => format!("all {} equal", plural(pages, "page")),
                differing => format!(
                    "DIFFERENT in {} of {}",
                    count(differing),
                    plural(pages, "page")
                ),
            },
        )
    }

    fn json(&self) -> Value {
        let (outcome, verdict) = (self.outcome, self.verdict);
        let differences: Vec<_> = verdict
            .first
            .iter()
            .map(|(address, writer)| {
                json!({ "address": format!("{address:#x}"), "last_writer": writer.name() })
            })
            .collect();
        json!({
            "format": 1,
            "memory_bytes": self.args.memory,
            "page_size": PAGE,
            "cpu_threads": if self.args.no_cpu { 0 } else { self.args.cpu_threads },
            "devices": 4,
            "rate_pages_per_second": self.args.rate,
            "lose": self.args.lose.map(super::Lose::name),
            "rounds": outcome.rounds.iter().map(round_json).collect::<Vec<_>>(),
            "pages_sent": outcome.pages_sent(),
            "bytes_sent": outcome.bytes_sent(),
            "converged": outcome.converged,
            "downtime_ms": milliseconds(outcome.downtime),
            "downtime_goal_ms": self.args.downtime,
            "dirty_pages_per_second": outcome.dirty_rate(),
            "pages_written": outcome.pages_written,
            "unmaps": outcome.unmaps,
            "verdict": if verdict.is_equal() { "equal" } else { "different" },
            "differing_pages": verdict.differing,
            "first_differences": differences,
        })
    }
}

fn round_json(round: &Round) -> Value {
    let found = round.found.map(|found| {
        json!({
            "cpu": found.cpu,
            "device": found.device,
            "windows": found.windows,
            "unmaps": found.unmap,
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
