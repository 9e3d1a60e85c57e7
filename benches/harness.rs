// SPDX-License-Identifier: MIT OR Apache-2.0
//! How criterion fills the rows of the table.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};

use crate::report::row::{Row, Who};
use crate::report::units::Unit;

pub(crate) type Bencher<'a> = criterion::Bencher<'a, WallTime>;

/// Everything is measured in each of so many rounds, so that a busy minute spoils
/// only one of a row's values.
const ROUNDS: u32 = 3;

/// All benches: criterion, and the rows so far.
pub(crate) struct Bench {
    criterion: Criterion,
    /// Where criterion's files go.
    files: PathBuf,
    rounds: u32,
    /// Whether anything was timed: a list or a test has no times.
    timed: bool,
    rows: Vec<Row>,
    /// How long each group took, setups and all rounds included.
    spent: Vec<(&'static str, Duration)>,
}

/// Measurements are short and few, because only ratios within one run count.
fn criterion(files: &Path) -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(50))
        .measurement_time(Duration::from_millis(300))
        .sample_size(10)
        .nresamples(2000)
        .output_directory(files)
        .without_plots()
        .configure_from_args()
}

impl Bench {
    pub(crate) fn new(dir: &Path) -> Bench {
        let files = dir.join("criterion");
        Bench {
            criterion: criterion(&files),
            files,
            rounds: 0,
            timed: false,
            rows: Vec::new(),
            spent: Vec::new(),
        }
    }

    /// Whether this is the first round, in which answers that take long to check are
    /// checked.
    pub(crate) fn is_first(&self) -> bool {
        self.rounds == 1
    }

    /// Begins the next round; whether there is one.
    pub(crate) fn next_round(&mut self) -> bool {
        // Criterion renames a benchmark whose name it has seen before.
        self.criterion = criterion(&self.files);
        self.rounds += 1;
        self.rounds == 1 || (self.rounds <= ROUNDS && self.timed)
    }

    /// Lets criterion time `run`, if the command line asks for it.
    pub(crate) fn time(
        &mut self,
        row: &mut Row,
        who: Who,
        name: &'static str,
        run: impl FnMut(&mut Bencher<'_>),
    ) {
        let started = Instant::now();
        let group_name = format!("{} {}", row.group, row.case);
        let dirs = [&group_name, name, row.size].map(dir_name);
        let dir = dirs
            .iter()
            .fold(self.files.clone(), |dir, name| dir.join(name));
        let estimates = dir.join("new/estimates.json");
        let _ = fs::remove_file(&estimates); // an earlier run's
        let mut group = self.criterion.benchmark_group(&group_name);
        group.sampling_mode(SamplingMode::Flat);
        if row.per != 1 {
            group.throughput(Throughput::Elements(row.per));
        }
        group.bench_function(BenchmarkId::new(name, row.size), run);
        group.finish();
        if let Some(median) = estimate(&estimates) {
            row.push(who, name, median);
            self.timed = true;
        }
        match self.spent.iter_mut().find(|(group, _)| *group == row.group) {
            Some((_, spent)) => *spent += started.elapsed(),
            None => self.spent.push((row.group, started.elapsed())),
        }
    }

    /// As `time`, with a state that `setup` makes: once, and only if the command
    /// line asks for this benchmark.
    pub(crate) fn time_on<S>(
        &mut self,
        row: &mut Row,
        who: Who,
        name: &'static str,
        setup: impl FnOnce() -> S,
        mut run: impl FnMut(&mut S, &mut Bencher<'_>),
    ) {
        let mut setup = Some(setup);
        let mut state = None;
        self.time(row, who, name, |b| {
            if let Some(setup) = setup.take() {
                state = Some(setup());
            }
            run(state.as_mut().expect("was just set up"), b);
        });
    }

    /// Adds a complete row of this round, if ours was measured.
    pub(crate) fn add(&mut self, row: Row) {
        if row.ours().is_none() {
            return;
        }
        match self.rows.iter_mut().find(|known| known.key() == row.key()) {
            Some(known) => known.merge(row),
            None => self.rows.push(row),
        }
    }

    /// Returns the rows, those of memory last, or none if nothing was timed. Prints how
    /// long each group took.
    pub(crate) fn finish(mut self) -> Vec<Row> {
        self.criterion.final_summary();
        let spent = self.spent.iter().map(|(group, d)| (*group, d.as_secs()));
        for (group, seconds) in spent.filter(|(_, seconds)| *seconds > 0) {
            println!("{group} took {seconds} s");
        }
        if !self.timed {
            return Vec::new();
        }
        self.rows.sort_by_key(|row| row.unit == Unit::Bytes);
        self.rows
    }
}

/// Criterion's name of a folder.
fn dir_name(name: &str) -> String {
    // It cuts longer ones.
    assert!(name.len() <= 64, "a name of more than 64 bytes: {name}");
    name.replace(['?', '"', '/', '\\', '*', '<', '>', ':', '|', '^'], "_")
}

/// Calls `work` in so many threads at a time, with the number of each. Returns the time
/// from when the first begins to when the last is done.
pub(crate) fn in_threads(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let start = Barrier::new(threads);
    let run = |k| {
        start.wait();
        let started = Instant::now();
        work(k);
        (started, Instant::now())
    };
    let times: Vec<_> = thread::scope(|scope| {
        let run = &run;
        let spawned: Vec<_> = (0..threads).map(|k| scope.spawn(move || run(k))).collect();
        let done = spawned.into_iter();
        done.map(|t| t.join().expect("no panic")).collect()
    });
    let first = times.iter().map(|(started, _)| started).min();
    let last = times.iter().map(|(_, done)| done).max();
    match (first, last) {
        (Some(first), Some(last)) => *last - *first,
        _ => Duration::ZERO,
    }
}

/// The median in nanoseconds.
pub(crate) fn median(mut times: Vec<Duration>) -> Option<f64> {
    times.sort();
    let middle = times.get(times.len() / 2)?;
    Some(middle.as_nanos() as f64)
}

/// The median of criterion's `estimates.json`, in nanoseconds.
fn estimate(estimates: &Path) -> Option<f64> {
    let text = fs::read_to_string(estimates).ok()?;
    let json: serde_json::Value = serde_json::from_str(&text).ok()?;
    json["median"]["point_estimate"].as_f64()
}

/// Times `run` only, and calls `prepare` before each.
pub(crate) fn after<S>(
    b: &mut Bencher<'_>,
    state: &mut S,
    mut prepare: impl FnMut(&mut S),
    mut run: impl FnMut(&mut S),
) {
    b.iter_custom(|iters| {
        let mut total = Duration::ZERO;
        for _ in 0..iters {
            prepare(state);
            let start = Instant::now();
            run(state);
            total += start.elapsed();
        }
        without_clock(total, iters)
    });
}

/// The time `total` of `n` timings, without what reading the clock took.
fn without_clock(total: Duration, n: u64) -> Duration {
    let clock = (0..1000).map(|_| Instant::now().elapsed()).min();
    let clocks = clock.unwrap_or_default() * u32::try_from(n).unwrap_or(u32::MAX);
    total.saturating_sub(clocks).max(Duration::from_nanos(1))
}
