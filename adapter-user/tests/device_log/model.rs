// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random runs of a log, compared with sets of pages.

use std::collections::{BTreeMap, BTreeSet};

use adapter_user::device_log::LogRange;
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Start {
        ranges: Vec<(u64, u64)>,
        hint: u32,
    },
    SetTracking(bool),
    Stop,
    Add {
        first: u64,
        n: u64,
    },
    Remove {
        which: usize,
    },
    Take {
        iova: u64,
    },
    Mark {
        first: u64,
        n: u64,
    },
    Late {
        which: usize,
        at: u64,
        n: u64,
    },
    Report {
        first: u64,
        n: u64,
        shift: u32,
        clear: bool,
    },
}

fn ops() -> impl Strategy<Value = Op> {
    let range = (0..40u64, 1..12u64);
    prop_oneof![
        1 => (vec(range.clone(), 1..4), 0..3u32).prop_map(|(ranges, hint)| Op::Start { ranges, hint }),
        1 => any::<bool>().prop_map(Op::SetTracking),
        1 => Just(Op::Stop),
        4 => range.clone().prop_map(|(first, n)| Op::Add { first, n }),
        3 => (0..4usize).prop_map(|which| Op::Remove { which }),
        3 => (0..50u64).prop_map(|iova| Op::Take { iova }),
        4 => range.clone().prop_map(|(first, n)| Op::Mark { first, n }),
        4 => (0..3usize, 0..12u64, 1..4u64).prop_map(|(which, at, n)| Op::Late { which, at, n }),
        8 => (0..40u64, 1..40u64, 0..3u32, any::<bool>())
            .prop_map(|(first, n, shift, clear)| Op::Report { first, n, shift, clear }),
    ]
}

/// A range of the model.
#[derive(Clone, Debug)]
struct Range {
    n: u64,
    dirty: BTreeSet<u64>,
    /// The number of the START that its bits are of.
    epoch: u64,
    id: u64,
}

#[derive(Default)]
struct Model {
    on: bool,
    epoch: u64,
    next: u64,
    live: BTreeMap<u64, Range>,
    gone: Vec<(u64, Range)>,
}

impl Model {
    fn free(&self, first: u64, n: u64) -> bool {
        self.live
            .iter()
            .all(|(f, r)| f + r.n <= first || first + n <= *f)
    }

    fn add(&mut self, first: u64, n: u64) {
        self.next += 1;
        let range = Range {
            n,
            dirty: BTreeSet::new(),
            epoch: self.epoch,
            id: self.next,
        };
        self.live.insert(first, range);
    }

    fn switch(&mut self, on: bool) {
        self.on = on;
        self.epoch += 1;
        self.gone.clear();
        for range in self.live.values_mut() {
            range.dirty.clear();
            range.epoch = self.epoch;
        }
    }

    fn ranges(&mut self) -> impl Iterator<Item = (u64, &mut Range)> {
        let gone = self.gone.iter_mut().map(|(first, range)| (*first, range));
        self.live
            .iter_mut()
            .map(|(first, range)| (*first, range))
            .chain(gone)
    }
}

/// Runs the steps on a log and on the model. The log's pages have 4 KiB, and reports are
/// at several page sizes.
fn run(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let log = DeviceLog::new(None);
    let mut m = Model::default();
    let mut handles: Vec<(LogRange, u64, u64)> = Vec::new();
    for op in ops {
        match op {
            Op::Start { ranges, hint } => {
                let bytes: Vec<_> = ranges.iter().map(|(f, n)| (f * PAGE, n * PAGE)).collect();
                let done = log.start(&bytes, 1024 << hint).map(|pgsize| pgsize.bytes());
                let mut fresh = Model {
                    epoch: m.epoch,
                    next: m.next,
                    ..Model::default()
                };
                let mut disjoint = true;
                for (first, n) in ranges {
                    disjoint &= fresh.free(first, n);
                    fresh.add(first, n);
                }
                match disjoint && !m.on {
                    true => {
                        prop_assert_eq!(done, Ok(4096));
                        fresh.switch(true);
                        m = fresh;
                    }
                    false => prop_assert!(done.is_err()),
                }
            }
            Op::SetTracking(on) => {
                log.set_tracking(on).unwrap();
                // A log that is on and switched on again keeps its handles.
                match on && m.on {
                    true => {
                        m.gone.clear();
                        m.live.values_mut().for_each(|range| range.dirty.clear());
                    }
                    false => m.switch(on),
                }
            }
            Op::Stop => {
                log.stop();
                m.switch(false);
                m.live.clear();
            }
            Op::Add { first, n } => {
                let done = log.add_range(first * PAGE, n * PAGE);
                prop_assert_eq!(done.is_ok(), m.free(first, n));
                if done.is_ok() {
                    m.add(first, n);
                }
            }
            Op::Remove { which } => {
                let Some((first, range)) = m.live.iter().nth(which).map(|(f, r)| (*f, r.clone()))
                else {
                    continue;
                };
                log.remove_range(first * PAGE, range.n * PAGE).unwrap();
                m.live.remove(&first);
                if m.on {
                    m.gone.push((first, range));
                }
            }
            Op::Take { iova } => {
                let found = m
                    .live
                    .iter()
                    .find(|(f, r)| (**f..**f + r.n).contains(&iova));
                let handle = log.range(iova * PAGE);
                prop_assert_eq!(handle.is_some(), m.on && found.is_some());
                if let (Some(handle), Some((_, range))) = (handle, found) {
                    handles.push((handle, range.id, range.epoch));
                }
            }
            Op::Mark { first, n } => {
                let done = log.mark(first * PAGE + 1, n * PAGE - 1);
                let mut all = m.on;
                for page in (first..first + n).filter(|_| m.on) {
                    let found = m
                        .live
                        .iter_mut()
                        .find(|(f, r)| (**f..**f + r.n).contains(&page));
                    match found {
                        Some((_, range)) => drop(range.dirty.insert(page)),
                        None => all = false,
                    }
                }
                prop_assert_eq!(done.is_ok(), all);
            }
            Op::Late { which, at, n } => {
                let Some((handle, id, epoch)) = handles.iter().rev().nth(which) else {
                    continue;
                };
                let first = handle.first() / PAGE + at;
                let done = handle.mark(first * PAGE, n * PAGE);
                let found = m.ranges().find(|(_, r)| r.id == *id && r.epoch == *epoch);
                let Some((start, range)) = found else {
                    prop_assert!(done.is_err(), "a mark that no report will have is refused");
                    continue;
                };
                let end = start + range.n;
                prop_assert_eq!(done.is_ok(), first + n <= end);
                range
                    .dirty
                    .extend((first..first + n).filter(|page| *page < end));
            }
            Op::Report {
                first,
                n,
                shift,
                clear,
            } => {
                let (first, n) = (first >> shift << shift, (n >> shift).max(1) << shift);
                let mut words = [0];
                let done =
                    log.dirty_bitmap(first * PAGE, n * PAGE, PAGE << shift, clear, &mut words);
                let asked = first..first + n;
                let known = |page: u64| {
                    m.live.iter().any(|(f, r)| (*f..f + r.n).contains(&page))
                        || m.gone.iter().any(|(f, r)| (*f..f + r.n).contains(&page))
                };
                let all = m.on && asked.clone().all(known);
                prop_assert_eq!(done.is_ok(), all);
                if !all {
                    prop_assert_eq!(words, [0]);
                    continue;
                }
                let mut expected = 0;
                for (_, range) in m.ranges() {
                    for page in range.dirty.iter().filter(|page| asked.contains(page)) {
                        expected |= 1u64 << ((page - first) >> shift);
                    }
                    if clear {
                        range.dirty.retain(|page| !asked.contains(page));
                    }
                }
                prop_assert_eq!(words, [expected]);
                if clear {
                    m.gone
                        .retain(|(f, r)| *f < asked.start || f + r.n > asked.end);
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn any_run_agrees_with_the_model(ops in vec(ops(), 1..60)) {
        run(ops)?;
    }
}
