// SPDX-License-Identifier: MIT OR Apache-2.0
//! One thread marks, another takes a snapshot every 10 ms.

use std::hint::black_box;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{PoisonError, RwLock};
use std::thread;
use std::time::{Duration, Instant};

use rand::Rng;

use crate::data::{check, naive, random, zeroed, GIB_64};
use crate::harness::{median, Bench};
use crate::report::row::{Row, Who};
use crate::sets::{Atomic, PageSet, Shared};

const OURS: &str = Shared::NAME;
const ATOMIC: &str = <Atomic as PageSet>::NAME;

const INTERVAL: Duration = Duration::from_millis(10);

pub(crate) fn run(bench: &mut Bench) {
    let row = |case| Row::new("shared", case, GIB_64.name);
    let mut mark = row("one mark").of(ATOMIC, 1.0);
    let mut many = row("mark of 512 pages").of(ATOMIC, 1.0);
    let mut middle = row("snapshot, median").of(ATOMIC, 0.2);
    // A marker must not delay a snapshot until the next one is due.
    let mut longest = row("snapshot, longest")
        .longest()
        .at_most(INTERVAL.as_nanos() as f64);

    let mut snapshots = Vec::new();
    measure::<Locked>(bench, &mut mark, Who::Ours, OURS, 1, &mut snapshots);
    measure::<Locked>(bench, &mut many, Who::Ours, OURS, 512, &mut Vec::new());
    report(&mut middle, &mut longest, Who::Ours, OURS, snapshots);

    let mut snapshots = Vec::new();
    measure::<Atomic>(bench, &mut mark, Who::Peer, ATOMIC, 1, &mut snapshots);
    measure::<Atomic>(bench, &mut many, Who::Peer, ATOMIC, 512, &mut Vec::new());
    report(&mut middle, &mut longest, Who::Peer, ATOMIC, snapshots);

    for row in [mark, many, middle, longest] {
        bench.add(row);
    }
}

/// Adds the median and the longest of the snapshots' times.
fn report(
    median_row: &mut Row,
    longest_row: &mut Row,
    who: Who,
    name: &'static str,
    snapshots: Vec<Duration>,
) {
    if let Some(last) = snapshots.iter().max() {
        longest_row.push(who, name, last.as_nanos() as f64);
    }
    if let Some(middle) = median(snapshots) {
        median_row.push(who, name, middle);
    }
}

/// A bitmap that threads share.
trait Sharable: Sync {
    fn new() -> Self;

    fn mark(&self, page: u64, n: u64);

    fn snapshot(&self, out: &mut [u64]);
}

/// Ours, as the container of `adapter-user` holds it.
struct Locked(RwLock<Shared>);

impl Sharable for Locked {
    fn new() -> Self {
        Locked(RwLock::new(Shared::new(GIB_64.pages)))
    }

    fn mark(&self, page: u64, n: u64) {
        let shared = self.0.read().unwrap_or_else(PoisonError::into_inner);
        shared.0.mark(page, n);
    }

    fn snapshot(&self, out: &mut [u64]) {
        let mut shared = self.0.write().unwrap_or_else(PoisonError::into_inner);
        shared.take(out);
    }
}

impl Sharable for Atomic {
    fn new() -> Self {
        PageSet::new(GIB_64.pages)
    }

    fn mark(&self, page: u64, n: u64) {
        match n {
            1 => self.0.set_bit(page as usize),
            _ => self
                .0
                .set_addr_range((page * 4096) as usize, (n * 4096) as usize),
        }
    }

    fn snapshot(&self, out: &mut [u64]) {
        out.copy_from_slice(&self.0.get_and_reset());
    }
}

/// Times marks of `n` pages, and each snapshot meanwhile.
fn measure<S: Sharable>(
    bench: &mut Bench,
    row: &mut Row,
    who: Who,
    name: &'static str,
    n: u64,
    snapshots: &mut Vec<Duration>,
) {
    let setup = || {
        let mut rng = random(n);
        let last = GIB_64.pages - n;
        let pages: Vec<u64> = (0..1 << 20).map(|_| rng.random_range(0..=last)).collect();
        check_marks::<S>(name, &pages[..100_000], n);
        (S::new(), pages)
    };
    bench.time_on(row, who, name, setup, |(set, pages), b| {
        b.iter_custom(|iters| {
            let pages = pages.iter().cycle().take(iters as usize);
            let took = |out: &[u64], time| {
                black_box(out);
                snapshots.push(time);
            };
            beside_snapshots(set, took, || {
                let start = Instant::now();
                for page in pages {
                    set.mark(*page, n);
                }
                start.elapsed()
            })
        });
    });
}

/// Checks that no mark is lost.
fn check_marks<S: Sharable>(name: &str, pages: &[u64], n: u64) {
    let set = S::new();
    let mut all = zeroed(GIB_64.words());
    let mut add = |out: &[u64]| {
        for (all, out) in all.iter_mut().zip(out) {
            *all |= out;
        }
    };
    beside_snapshots(
        &set,
        |out, _| add(out),
        || {
            pages.iter().for_each(|page| set.mark(*page, n));
        },
    );
    let mut out = zeroed(GIB_64.words());
    set.snapshot(&mut out);
    add(&out);
    let marked = pages.iter().flat_map(|page| *page..page + n);
    check(name, &all, &naive(GIB_64.pages, marked));
}

/// Runs `work` while another thread takes snapshots and hands each to `took`.
fn beside_snapshots<S: Sharable, R>(
    set: &S,
    mut took: impl FnMut(&[u64], Duration) + Send,
    work: impl FnOnce() -> R,
) -> R {
    let (end, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut out = zeroed(GIB_64.words());
            while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                let start = Instant::now();
                set.snapshot(&mut out);
                took(&out, start.elapsed());
            }
        });
        let result = work();
        drop(end);
        result
    })
}
