// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices of a container mark what they wrote, from one thread and from two, while
//! the VMM takes a report every 10 ms. The peer is a bitmap of vm-memory, which knows
//! no IOVAs.

use std::hint::black_box;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use adapter_user::{Container, Device, Group, GroupId, GuestMemory, IommuType, Options, Prot};
use rand::Rng;

use crate::data::{check, naive, random, zeroed, GIB_64};
use crate::harness::{in_threads, median, Bench};
use crate::host::PAGE;
use crate::report::row::{Row, Who};
use crate::sets::{Atomic, PageSet};

const INTERVAL: Duration = Duration::from_millis(10);

const THREADS: [(usize, &str); 2] = [(1, "1 thread"), (2, "2 threads")];

pub(crate) fn run(bench: &mut Bench) {
    let row = |case: String| Row::new("vmm", case, GIB_64.name);
    for (threads, name) in THREADS {
        let mut mark = row(format!("container: mark, {name}"));
        let mut report = row(format!("container: report, {name}"));
        // A marker must not delay a report until the next one is due.
        let mut longest = row(format!("container: longest report, {name}")).longest();
        for who in [Who::Ours, Who::Peer] {
            let mut times = Vec::new();
            measure(bench, &mut mark, who, threads, 1, &mut times);
            if let Some(last) = times.iter().max() {
                longest.push(who, who_name(who), last.as_nanos() as f64);
            }
            if let Some(middle) = median(times) {
                report.push(who, who_name(who), middle);
            }
        }
        for row in [mark, report, longest] {
            bench.add(row);
        }
    }
    let mut many = row("container: mark of 512 pages, 1 thread".to_owned());
    for who in [Who::Ours, Who::Peer] {
        measure(bench, &mut many, who, 1, 512, &mut Vec::new());
    }
    bench.add(many);
}

fn who_name(who: Who) -> &'static str {
    match who {
        Who::Ours => "ours",
        Who::Peer | Who::Limit => Atomic::NAME,
    }
}

fn measure(
    bench: &mut Bench,
    row: &mut Row,
    who: Who,
    threads: usize,
    n: u64,
    times: &mut Vec<Duration>,
) {
    let marks = Marks { threads, n };
    match who {
        Who::Ours => marks.time::<Tracked>(bench, row, who, times),
        Who::Peer | Who::Limit => marks.time::<Atomic>(bench, row, who, times),
    }
}

/// Dirty pages that threads mark.
trait Sharable: Sync {
    fn new() -> Self;

    fn mark(&self, page: u64, n: u64);

    /// Takes the dirty pages to `out`; returns the words that were there, if it has
    /// words of its own.
    fn report(&self, out: &mut Vec<u64>) -> Vec<u64>;
}

/// A container with 64 GiB at IOVA 0, tracking, and a device.
struct Tracked {
    container: Container,
    device: Arc<Device>,
}

impl Sharable for Tracked {
    fn new() -> Self {
        let bytes = GIB_64.pages * PAGE;
        let container = Container::new(Options::default());
        let group = container.add_group(Group::emulated(GroupId(1)));
        group.expect("an emulated group");
        let set = container.set_iommu(IommuType::Type1v2);
        set.expect("type1 v2");
        // Nobody touches it, so the system has no page of it.
        let memory = Arc::new(GuestMemory::new(bytes).expect("addresses"));
        let mapped = container.map(0, &memory, 0, bytes, Prot::READ_WRITE);
        mapped.expect("a free range");
        container.start().expect("memory for a bitmap");
        let device = container.open_device(GroupId(1), None);
        Tracked {
            container,
            device: device.expect("a device"),
        }
    }

    fn mark(&self, page: u64, n: u64) {
        let marked = self.device.mark(page * PAGE, n * PAGE);
        marked.expect("mapped pages");
    }

    fn report(&self, out: &mut Vec<u64>) -> Vec<u64> {
        let bytes = GIB_64.pages * PAGE;
        let got = self.container.dirty_bitmap(0, bytes, PAGE, out);
        got.expect("a whole mapping");
        Vec::new()
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
                .set_addr_range((page * PAGE) as usize, (n * PAGE) as usize),
        }
    }

    fn report(&self, out: &mut Vec<u64>) -> Vec<u64> {
        std::mem::replace(out, self.0.get_and_reset())
    }
}

/// Marks of `n` pages from some threads.
#[derive(Clone, Copy)]
struct Marks {
    threads: usize,
    n: u64,
}

impl Marks {
    /// Random first pages.
    fn pages(self) -> Vec<u64> {
        let mut rng = random(self.n);
        let last = GIB_64.pages - self.n;
        (0..1 << 20).map(|_| rng.random_range(0..=last)).collect()
    }

    /// Marks `each` times from each thread, and returns how long they all took.
    fn mark<S: Sharable>(self, set: &S, pages: &[u64], each: usize) -> Duration {
        in_threads(self.threads, |k| {
            // Each begins elsewhere in the pages.
            let pages = pages.iter().cycle().skip(k * pages.len() / 2);
            pages.take(each).for_each(|page| set.mark(*page, self.n));
        })
    }

    /// Times the marks, and each report meanwhile.
    fn time<S: Sharable>(
        self,
        bench: &mut Bench,
        row: &mut Row,
        who: Who,
        times: &mut Vec<Duration>,
    ) {
        let name = who_name(who);
        let setup = || {
            let pages = self.pages();
            self.check::<S>(name, &pages[..100_000]);
            (S::new(), pages)
        };
        bench.time_on(row, who, name, setup, |(set, pages), b| {
            b.iter_custom(|iters| {
                let took = |out: &[u64], time| {
                    black_box(out);
                    times.push(time);
                };
                beside_reports(set, took, || self.mark(set, pages, iters as usize))
            });
        });
    }

    /// Checks that no mark is lost.
    fn check<S: Sharable>(self, name: &str, pages: &[u64]) {
        let set = S::new();
        let mut all = zeroed(GIB_64.words());
        let mut add = |out: &[u64]| {
            for (all, out) in all.iter_mut().zip(out) {
                *all |= out;
            }
        };
        let marks = || self.mark(&set, pages, pages.len());
        beside_reports(&set, |out, _| add(out), marks);
        let mut out = zeroed(GIB_64.words());
        set.report(&mut out);
        add(&out);
        let marked = pages.iter().flat_map(|page| *page..page + self.n);
        check(name, &all, &naive(GIB_64.pages, marked));
    }
}

/// Runs `work` while another thread takes reports and hands each to `took`.
fn beside_reports<S: Sharable, R>(
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
                let before = set.report(&mut out);
                took(&out, start.elapsed());
                drop(before); // not in the time of a report
            }
        });
        let result = work();
        drop(end);
        result
    })
}
