// SPDX-License-Identifier: MIT OR Apache-2.0
//! Scripts of calls, random ones and all short ones, on a log and on its model.

#[path = "../support/cases.rs"]
mod cases;

use std::collections::BTreeSet;
use std::ops::Range;

use adapter_user::device_log::uapi::{iommu_hwpt_get_dirty_bitmap, IOMMU_HWPT_GET_DIRTY_BITMAP};
use adapter_user::device_log::{Holes, LogOptions, LogRange};
use cases::cases;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;

use super::model::{everything, Ask, Model};
use super::*;

/// A call. Pages are counted from the first page of the world.
#[derive(Clone, Debug)]
enum Op {
    /// Without ranges: `start_all`.
    Start(Vec<(u64, u64)>, u32),
    SetTracking(bool),
    Stop,
    Add(u64, u64),
    Remove(usize),
    /// Takes the handle of the range that holds a page.
    Handle(u64),
    Mark(u64, u64),
    /// Marks through one of the newest handles.
    Late(usize, u64, u64),
    Report(u64, u64, u32, bool),
    /// A report that cannot be delivered.
    Lost(u64, u64),
    Clear(u64, u64),
    ClearBitmap(u64, u64, u32, u64),
    /// `false`: it cannot be delivered.
    TakeRemoved(bool),
}

const SIZE: u64 = 48;

fn ops() -> impl Strategy<Value = Op> {
    let range = || (0..40u64, 1..12u64);
    prop_oneof![
        2 => (vec(range(), 0..4), 0..4u32).prop_map(|(ranges, hint)| Op::Start(ranges, hint)),
        1 => any::<bool>().prop_map(Op::SetTracking),
        1 => Just(Op::Stop),
        6 => range().prop_map(|(first, n)| Op::Add(first, n)),
        5 => (0..4usize).prop_map(Op::Remove),
        3 => (0..50u64).prop_map(Op::Handle),
        4 => range().prop_map(|(first, n)| Op::Mark(first, n)),
        4 => (0..3usize, 0..12u64, 1..4u64).prop_map(|(which, at, n)| Op::Late(which, at, n)),
        6 => (0..40u64, 1..40u64, 0..3u32, any::<bool>())
            .prop_map(|(first, n, shift, clear)| Op::Report(first, n, shift, clear)),
        1 => range().prop_map(|(first, n)| Op::Lost(first, n)),
        2 => range().prop_map(|(first, n)| Op::Clear(first, n)),
        2 => (0..40u64, 1..40u64, 0..3u32, any::<u64>())
            .prop_map(|(first, n, shift, bits)| Op::ClearBitmap(first, n, shift, bits)),
        1 => any::<bool>().prop_map(Op::TakeRemoved),
    ]
}

/// Where the world lies, and the log's options.
#[derive(Clone, Copy, Debug)]
struct World {
    /// Its first page.
    first: u64,
    options: LogOptions,
}

impl World {
    /// Whether the log may report more than was written: its cap is small.
    fn coarse(self) -> bool {
        self.options.removed < 1 << 16
    }
}

fn worlds() -> impl Strategy<Value = World> {
    // The world is at the start of the IOVA space, over the end of a word, over the
    // end of 512 pages, or at the end of the IOVA space.
    let first = prop_oneof![Just(0u64), Just(40), Just(488), Just((1 << 52) - SIZE)];
    let budget = prop_oneof![3 => Just(None), 1 => (0..6u64).prop_map(|words| Some(words * 8))];
    let removed = prop_oneof![2 => Just(16u64 << 20), 1 => 0..400u64];
    let holes = prop_oneof![Just(Holes::Refused), Just(Holes::Clean)];
    (first, budget, removed, holes).prop_map(|(first, budget, removed, holes)| World {
        first,
        options: LogOptions {
            budget,
            removed,
            holes,
        },
    })
}

/// A log beside its model.
struct Run {
    world: World,
    log: DeviceLog,
    model: Model,
    /// Handles, each with the number and the pages of its piece.
    handles: Vec<(LogRange, u64, Range<u64>)>,
}

impl Run {
    fn new(world: World) -> Run {
        Run {
            world,
            log: DeviceLog::with_options(world.options),
            model: Model::new(world.options),
            handles: Vec::new(),
        }
    }

    /// The pages of a call: at most to the end of the world.
    fn pages(&self, first: u64, n: u64) -> Range<u64> {
        let first = first.min(SIZE - 1);
        self.world.first + first..self.world.first + (first + n).min(SIZE)
    }

    /// The arguments of a call by bytes.
    fn bytes(pages: &Range<u64>) -> (u64, u64) {
        (pages.start * PAGE, (pages.end - pages.start) * PAGE)
    }

    fn ask(&self, first: u64, n: u64, shift: u32) -> Ask {
        let n = (n >> shift).max(1) << shift;
        let first = (first >> shift << shift).min(SIZE - n);
        Ask {
            pages: self.pages(first, n),
            shift,
        }
    }

    fn step(&mut self, op: Op) -> TestCaseResult {
        match op {
            Op::Start(ranges, hint) => self.start(&ranges, hint)?,
            Op::SetTracking(true) => {
                let done = self.log.set_tracking(true).is_ok();
                match self.model.on {
                    Some(_) => {
                        self.model.reset();
                        prop_assert!(done);
                    }
                    None => prop_assert_eq!(done, self.model.start(0, everything())),
                }
            }
            Op::SetTracking(false) => {
                self.log.set_tracking(false).unwrap();
                self.model.on = None;
            }
            Op::Stop => {
                self.log.stop();
                self.model.on = None;
            }
            Op::Add(first, n) => {
                let pages = self.pages(first, n);
                let (iova, size) = Self::bytes(&pages);
                let done = self.log.add_range(iova, size).is_ok();
                prop_assert_eq!(done, self.model.add(pages));
            }
            Op::Remove(which) => {
                if let Some(pages) = self.model.mapped.values().nth(which).cloned() {
                    let (iova, size) = Self::bytes(&pages);
                    self.log.remove_range(iova, size).unwrap();
                    self.model.remove(&pages);
                }
            }
            Op::Handle(page) => self.handle(self.world.first + page.min(SIZE - 1))?,
            Op::Mark(first, n) => {
                let pages = self.pages(first, n);
                let (iova, size) = Self::bytes(&pages);
                let done = self.log.mark(iova + 1, size - 1).is_ok();
                prop_assert_eq!(done, self.model.mark(pages));
            }
            Op::Late(which, at, n) => self.late(which, at, n)?,
            Op::Report(first, n, shift, clear) => {
                self.report(&self.ask(first, n, shift), clear)?;
            }
            Op::Lost(first, n) => self.lost(first, n)?,
            Op::Clear(first, n) => {
                let pages = self.pages(first, n);
                let (iova, size) = Self::bytes(&pages);
                let done = self.log.clear_range(iova, size).is_ok();
                prop_assert_eq!(done, self.model.on.is_some());
                self.model.clear(&pages);
            }
            Op::ClearBitmap(first, n, shift, bits) => {
                let ask = self.ask(first, n, shift);
                let (iova, size) = Self::bytes(&ask.pages);
                let done = self.log.clear_bitmap(iova, size, PAGE << shift, &[bits]);
                prop_assert_eq!(done.is_ok(), self.model.on.is_some());
                self.clear_bits(&ask, bits);
            }
            Op::TakeRemoved(deliver) => self.take_removed(deliver)?,
        }
        Ok(())
    }

    fn start(&mut self, ranges: &[(u64, u64)], hint: u32) -> TestCaseResult {
        let shift = hint.saturating_sub(2);
        // The ranges must be multiples of the page size.
        let round = |(first, n): &(u64, u64)| {
            let first = first.min(&(SIZE - 1)) >> shift << shift;
            let n = n.div_ceil(1 << shift) << shift;
            self.pages(first, n)
        };
        let filter: Vec<Range<u64>> = ranges.iter().map(round).collect();
        let bytes: Vec<(u64, u64)> = filter.iter().map(Self::bytes).collect();
        let (done, filter) = match filter.is_empty() {
            true => (self.log.start_all(1024 << hint), everything()),
            false => (self.log.start(&bytes, 1024 << hint), filter),
        };
        let works = self.model.start(shift, filter);
        prop_assert_eq!(done.is_ok(), works);
        if let Ok(pgsize) = done {
            prop_assert_eq!(pgsize.bytes(), PAGE << shift);
        }
        Ok(())
    }

    fn handle(&mut self, page: u64) -> TestCaseResult {
        let live = self.model.on.iter().flat_map(|on| &on.live);
        let found = live.clone().find(|piece| piece.pages.contains(&page));
        let handle = self.log.range(page * PAGE);
        prop_assert_eq!(handle.is_some(), found.is_some());
        if let (Some(handle), Some(piece)) = (handle, found) {
            prop_assert_eq!(handle.first() / PAGE, piece.pages.start);
            prop_assert_eq!(handle.last() / PAGE + 1, piece.pages.end);
            self.handles.push((handle, piece.id, piece.pages.clone()));
        }
        Ok(())
    }

    fn late(&mut self, which: usize, at: u64, n: u64) -> TestCaseResult {
        let Some((handle, id, had)) = self.handles.iter().rev().nth(which) else {
            return Ok(());
        };
        let at = had.start + at;
        let pages = at..(at + n).min(self.world.first + SIZE);
        if pages.is_empty() {
            return Ok(());
        }
        let (iova, size) = Self::bytes(&pages);
        let done = handle.mark(iova, size).is_ok();
        let expected = self.model.late(*id, had, pages.clone());
        match self.world.coarse() {
            // Removed ranges may have joined.
            true => prop_assert!(done || !expected),
            false => prop_assert_eq!(done, expected),
        }
        Ok(())
    }

    fn report(&mut self, ask: &Ask, clear: bool) -> TestCaseResult {
        let (iova, size) = Self::bytes(&ask.pages);
        let mut words = [1 << 63];
        let done = self
            .log
            .dirty_bitmap(iova, size, PAGE << ask.shift, clear, &mut words)
            .is_ok();
        prop_assert_eq!(words[0] >> 63, 1, "the buffer keeps its bits");
        let bits = words[0] ^ 1 << 63;
        let answers = self.model.answers(&ask.pages);
        if !done {
            prop_assert!(!answers && bits == 0);
            return Ok(());
        }
        let expected = self.model.report(ask);
        match self.world.coarse() {
            // It may have joined dirty pages, and removed ranges too.
            true => prop_assert_eq!(bits & expected, expected, "a page is lost"),
            false => prop_assert!(answers && bits == expected, "{bits:b} {expected:b}"),
        }
        if clear {
            self.model.clear(&ask.pages);
        }
        Ok(())
    }

    /// The bitmap is at an address that has no memory.
    fn lost(&mut self, first: u64, n: u64) -> TestCaseResult {
        let (iova, length) = Self::bytes(&self.pages(first, n));
        let arg = iommu_hwpt_get_dirty_bitmap {
            size: 48,
            iova,
            length,
            page_size: PAGE,
            data: 8,
            ..Default::default()
        };
        // SAFETY: the structure is ours, and address 8 has no memory.
        let done = unsafe {
            self.log
                .ioctl(IOMMU_HWPT_GET_DIRTY_BITMAP, &raw const arg as u64)
        };
        prop_assert!(done.is_err());
        Ok(())
    }

    fn clear_bits(&mut self, ask: &Ask, bits: u64) {
        let set = |page: &u64| bits >> ((page - ask.pages.start) >> ask.shift) & 1 != 0;
        let mut at = ask.pages.start;
        while at < ask.pages.end {
            let rest = at..ask.pages.end;
            let n = rest.clone().take_while(set).count() as u64;
            if n > 0 {
                self.model.clear(&(at..at + n));
            }
            at += n + 1;
        }
    }

    fn take_removed(&mut self, deliver: bool) -> TestCaseResult {
        let mut told = BTreeSet::new();
        let mut calls = 0;
        let done = self.log.take_removed(|iova, size| {
            told.extend(iova / PAGE..iova / PAGE + size / PAGE);
            calls += 1;
            match deliver {
                true => Ok(()),
                false => Err(TrackError::NotSupported),
            }
        });
        let gone = self.model.gone();
        if self.model.on.is_none() {
            prop_assert_eq!(done, cause(Error::NotTracking));
            return Ok(());
        }
        prop_assert_eq!(done.is_ok(), deliver || calls == 0);
        if done.is_ok() {
            match self.world.coarse() {
                true => prop_assert!(told.is_superset(&gone)),
                false => prop_assert_eq!(told, gone),
            }
            self.model.forget_removed();
        }
        Ok(())
    }

    /// Nothing is left out at the end, and nothing stays dirty for ever.
    fn end(&mut self) -> TestCaseResult {
        let live: Vec<_> = self.model.on.iter().flat_map(|on| &on.live).collect();
        let live: Vec<_> = live.iter().map(|piece| piece.pages.clone()).collect();
        for pages in &live {
            self.report(
                &Ask {
                    pages: pages.clone(),
                    shift: 0,
                },
                true,
            )?;
        }
        self.take_removed(true)?;
        for pages in live {
            // Two ranges may share a page of the log.
            if self.model.on.as_ref().is_some_and(|on| on.shift == 0) {
                prop_assert_eq!(
                    report(&self.log, pages.start, pages.end - pages.start),
                    Ok(vec![])
                );
            }
        }
        self.log.stop();
        for (handle, ..) in &self.handles {
            prop_assert_eq!(handle.mark(handle.first(), 1), cause(Error::NotTracking));
        }
        Ok(())
    }
}

fn run(world: World, ops: impl IntoIterator<Item = Op>) -> TestCaseResult {
    let mut run = Run::new(world);
    for op in ops {
        run.step(op)?;
    }
    run.end()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases(20_000)))]
    #[test]
    fn any_run_agrees_with_the_model(world in worlds(), ops in vec(ops(), 1..60)) {
        run(world, ops)?;
    }
}

/// Every script of up to five calls in a world of a few pages.
#[test]
fn every_short_script_agrees_with_the_model() {
    let calls = [
        Op::Add(0, 2),
        Op::Add(2, 1),
        Op::Remove(0),
        Op::Handle(0),
        Op::Mark(0, 3),
        Op::Late(0, 1, 1),
        Op::Report(0, 1, 0, true),
        Op::Report(0, 3, 0, true),
        Op::Report(0, 2, 1, false),
        Op::Clear(1, 2),
        Op::TakeRemoved(true),
        Op::SetTracking(true),
    ];
    // A cap that holds everything, big pages, and a cap that holds nothing.
    for (first, removed, shift) in [(0, 16 << 20, 2), (510, 16 << 20, 3), (510, 0, 2)] {
        let options = LogOptions {
            removed,
            ..LogOptions::default()
        };
        let world = World { first, options };
        for number in 0..calls.len().pow(5) {
            let digit = |at: u32| calls[number / calls.len().pow(at) % calls.len()].clone();
            let script = [Op::Add(0, 2), Op::Start(vec![], shift)];
            let script = script.into_iter().chain((0..5).map(digit));
            let done = run(world, script.clone());
            assert!(
                done.is_ok(),
                "{world:?} {:?}: {done:?}",
                script.collect::<Vec<_>>()
            );
        }
    }
}
