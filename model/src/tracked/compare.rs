// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs operations on a tracker and on the model.

use std::collections::BTreeSet;

use adapter_user::guest::{IovaView, Mapping, Report, Slot, Source, SourceError, Tracker};
use adapter_user::{DirtyBits, Extent, PageSize};

use super::logs::{Keeper, Log, Logs, Remap};
use super::ops::{LogKind, Op, IOVAS, MEMORIES, PAGE, PLACE, SMALL, VIEWS};
use super::world::{Page, Target, World};

/// The names of the views' logs.
pub(super) const LOGS: [&str; VIEWS] = ["log 0", "log 1"];

pub(super) struct Run {
    pub(super) world: World,
    pub(super) tracker: Tracker,
    pub(super) bits: Vec<DirtyBits>,
    pub(super) views: Vec<IovaView>,
    pub(super) sources: [Option<(Source, Keeper)>; VIEWS],
    pub(super) handles: Vec<(Mapping, Vec<Target>)>,
    pub(super) logs: Logs,
    pub(super) report: Report,
    /// The memories that must not come back as known ones.
    pub(super) unknown: [bool; MEMORIES],
}

/// Runs operations, and a last take.
///
/// # Errors
///
/// Says which operation went wrong, and how.
pub fn run(ops: &[Op]) -> Result<(), String> {
    let mut run = Run::new().ok_or("no memory for a few bits")?;
    for (at, op) in ops
        .iter()
        .chain([&Op::Take { delivered: true }])
        .enumerate()
    {
        run.step(*op)
            .map_err(|what| format!("operation {at}, {op:?}: {what}"))?;
    }
    Ok(())
}

pub(super) fn expect(what: &str, right: bool) -> Result<(), String> {
    match right {
        true => Ok(()),
        false => Err(format!("wrong: {what}")),
    }
}

fn describe(cause: SourceError) -> String {
    cause.to_string()
}

pub(super) fn add_kvm(tracker: &Tracker, logs: &Logs) {
    let logs = logs.clone();
    tracker.add_source("kvm", move |report| {
        let mut shared = logs.lock();
        if std::mem::take(&mut shared.fail_kvm) {
            return Err("KVM fails".into());
        }
        let ring = std::mem::take(&mut shared.kvm).into_iter();
        Ok(report.or_ring(ring.map(|(memory, page)| (memory as u32, page)))?)
    });
}

impl Run {
    fn new() -> Option<Run> {
        let tracker = Tracker::new(None);
        let pgsize = PageSize::new(PAGE)?;
        let bits = (0..MEMORIES).map(|_| DirtyBits::new(SMALL * PAGE, pgsize).ok());
        let logs = Logs::default();
        add_kvm(&tracker, &logs);
        Some(Run {
            world: World::new(),
            bits: bits.collect::<Option<_>>()?,
            views: (0..VIEWS).map(|_| tracker.iova_view()).collect(),
            sources: Default::default(),
            handles: Vec::new(),
            logs,
            report: tracker.report(),
            unknown: [false; MEMORIES],
            tracker,
        })
    }

    fn slot(&self, memory: usize, place: u64) -> Slot {
        let (id, gpa) = (memory as u32, place * PLACE * PAGE);
        let size = self.world.pages[memory] * PAGE;
        let mut slot = Slot::new(id, gpa, size, self.bits[memory].clone());
        slot.host = Some((memory as u64 + 1) << 40);
        slot
    }

    fn step(&mut self, op: Op) -> Result<(), String> {
        match op {
            Op::Add {
                memory,
                place,
                known,
            } => self.add(memory, place, known),
            Op::Move { memory, place } => {
                self.read_kvm(memory);
                let free = self.world.place[memory].is_some() && self.world.is_free(memory, place);
                let moved = self.tracker.move_slot(memory as u32, place * PLACE * PAGE);
                if free {
                    self.world.depart(memory);
                    self.world.place[memory] = Some(place * PLACE);
                }
                expect("move_slot", moved.is_ok() == free)
            }
            Op::Remove { memory } => {
                self.read_kvm(memory);
                let removed = self.tracker.remove_slot(memory as u32);
                let there = self.world.place[memory].is_some();
                self.world.depart(memory);
                expect("remove_slot", removed.is_ok() == there)
            }
            Op::Grow { memory } => {
                let grown = self.tracker.grow_slot(memory as u32, PLACE * PAGE);
                let there = self.world.place[memory].is_some();
                if there {
                    let new = self.world.pages[memory]..PLACE;
                    self.world.pages[memory] = PLACE;
                    new.for_each(|page| self.world.write((memory, page)));
                }
                expect("grow_slot", grown.is_ok() == there)
            }
            Op::Map { view, iova, gpa, n } => self.map(view, iova, gpa, n),
            Op::Unmap { view, iova, n } => {
                let told = self.unmap_device(view, iova, n)?;
                if told != 0 {
                    return self.unmap_dirty(view, iova, n, told);
                }
                let unmapped = self.views[view].unmap(iova * PAGE, n * PAGE);
                let wanted = self.world.unmap(view, iova, n) * PAGE;
                expect("unmap", unmapped == Ok(wanted))
            }
            Op::UnmapDirty {
                view,
                iova,
                n,
                words,
            } => {
                let told = self.unmap_device(view, iova, n)?;
                self.unmap_dirty(view, iova, n, words | told)
            }
            Op::Vmm { memory, page } => {
                if page >= self.world.pages[memory] {
                    return Ok(());
                }
                // A memory that was no slot yet has bits that are on.
                let marked = self.bits[memory].mark(page * PAGE, 1);
                self.world.allowed.insert((memory, page));
                self.world.write((memory, page));
                let is_slot = self.world.place[memory].is_some();
                expect("mark of a slot", marked.is_ok() || !is_slot)
            }
            Op::Mark { view, iova } => {
                let target = self.world.views[view].live[iova as usize];
                let marked = self.views[view].mark(iova * PAGE + 5, 1);
                let Some(target) = target else {
                    return expect("mark of what is not mapped", marked.is_err());
                };
                self.world.write_to(target);
                let slot = target
                    .bound
                    .and_then(|(memory, _)| self.world.place[memory]);
                expect("mark of a mapping", marked.is_ok() || slot.is_none())
            }
            Op::Late { handle, page } => {
                let Some((mapping, targets)) = self.handles.iter().rev().nth(handle) else {
                    return Ok(());
                };
                let at = page % targets.len() as u64;
                let _ = mapping.mark(mapping.iova() + at * PAGE, 1);
                let target = targets[at as usize];
                self.world.write_to(target);
                Ok(())
            }
            Op::Log { view, iova } => {
                let target = self.world.views[view].live[iova as usize];
                if let (Some(target), Some((_, keeper))) = (target, &self.sources[view]) {
                    keeper.write(iova).map_err(describe)?;
                    self.logs.lock().pending[view].insert(iova);
                    self.world.write_to(target);
                }
                Ok(())
            }
            Op::Kvm { memory, page } => {
                if self.world.place[memory].is_some() && page < self.world.pages[memory] {
                    self.logs.lock().kvm.insert((memory, page));
                    self.world.write((memory, page));
                }
                Ok(())
            }
            Op::FailLog { view } => {
                self.logs.lock().fail_log[view] = self.sources[view].is_some();
                Ok(())
            }
            Op::FailKvm => {
                self.logs.lock().fail_kvm = true;
                Ok(())
            }
            Op::Plug { view, kind } => self.plug(view, kind),
            Op::Remap { view, iova, gpa } => {
                let remap = self.sources[view].as_ref().map(|_| Remap { iova, gpa });
                self.logs.lock().remap[view] = remap;
                Ok(())
            }
            Op::Discard { memory, page } => {
                self.bits[memory].discard(page * PAGE, PAGE);
                // It may be in a log or in the report all the same.
                self.world.written.remove(&(memory, page));
                Ok(())
            }
            Op::DiscardTaken { memory, page } => {
                if let Some(place) = self.report.slots().iter().find(|s| s.id == memory as u32) {
                    self.report.discard(place.gpa + page * PAGE, PAGE);
                    // What was written since is told all the same.
                    if !self.world.since.contains(&(memory, page)) {
                        self.world.written.remove(&(memory, page));
                    }
                }
                Ok(())
            }
            Op::Start => {
                self.tracker.start().map_err(|cause| cause.to_string())?;
                self.report.clear();
                self.world.on = true;
                self.world.written.clear();
                // The bits of what is no slot keep what they have.
                let place = self.world.place;
                self.world
                    .allowed
                    .retain(|(memory, _)| place[*memory].is_none());
                self.world.forget();
                Ok(())
            }
            Op::Stop => {
                self.tracker.stop();
                self.world.on = false;
                self.world.forget();
                Ok(())
            }
            Op::Upgrade => self.upgrade(),
            Op::Take { delivered } => self.take(delivered),
        }
    }

    fn add(&mut self, memory: usize, place: u64, known: bool) -> Result<(), String> {
        let slot = self.slot(memory, place);
        let free = self.world.place[memory].is_none() && self.world.is_free(memory, place);
        let known = known && !self.unknown[memory];
        let added = match known {
            true => self.tracker.add_known(slot),
            false => self.tracker.add(slot),
        };
        if free {
            self.unknown[memory] = false;
            self.world.place[memory] = Some(place * PLACE);
            if !known {
                let all = 0..self.world.pages[memory];
                all.for_each(|page| self.world.write((memory, page)));
            }
        }
        expect("add", added.is_ok() == free)
    }

    /// The VMM reads KVM's log of a slot before KVM forgets it.
    fn read_kvm(&mut self, memory: usize) {
        let mut words = [0];
        let mut shared = self.logs.lock();
        shared.kvm.retain(|(at, page)| {
            words[0] |= u64::from(*at == memory) << page;
            *at != memory
        });
        drop(shared);
        let _ = self.bits[memory].mark_bitmap(&words);
        for page in (0..PLACE).filter(|page| words[0] >> page & 1 != 0) {
            self.world.allowed.insert((memory, page));
        }
    }

    fn map(&mut self, view: usize, iova: u64, gpa: u64, n: u64) -> Result<(), String> {
        let mapped = self.views[view].map(iova * PAGE, gpa * PAGE, n * PAGE);
        let world = &mut self.world;
        let live = &world.views[view].live;
        let free = (iova..iova + n).all(|iova| live[iova as usize].is_none());
        expect("map", mapped.is_ok() == free)?;
        if let Ok(mapping) = mapped {
            let targets = (gpa..gpa + n).map(|gpa| {
                let bound = world.at(gpa);
                Target { gpa, bound }
            });
            let targets: Vec<Target> = targets.collect();
            for (iova, target) in (iova..).zip(&targets) {
                world.views[view].live[iova as usize] = Some(*target);
            }
            self.handles.push((mapping, targets));
            if let Some((_, keeper)) = &self.sources[view] {
                keeper.map(iova..iova + n).map_err(describe)?;
            }
        }
        Ok(())
    }

    /// The devices behind a view lose pages. Returns a bit for each that is dirty and
    /// that their log does not keep.
    fn unmap_device(&mut self, view: usize, iova: u64, n: u64) -> Result<u64, String> {
        let Some((_, keeper)) = &self.sources[view] else {
            return Ok(0);
        };
        let live = &self.world.views[view].live;
        let mapped = (iova..iova + n).filter(|iova| live[*iova as usize].is_some());
        let mapped: Vec<u64> = mapped.collect();
        let told = keeper.unmap(&mapped).map_err(describe)?;
        if let Keeper::Container(..) = keeper {
            let pending = &mut self.logs.lock().pending[view];
            let gone = pending.iter().copied().filter(|at| mapped.contains(at));
            let gone: BTreeSet<u64> = gone.collect();
            pending.retain(|at| !gone.contains(at));
            expect("what the unmap of a container tells", told == gone)?;
        }
        Ok(told.iter().fold(0, |words, at| words | 1 << (at - iova)))
    }

    fn unmap_dirty(&mut self, view: usize, iova: u64, n: u64, words: u64) -> Result<(), String> {
        let words = words & ((1 << n) - 1);
        let extent = Extent {
            bit: 0,
            iova: iova * PAGE,
            npages: n,
            pgsize: PageSize::new(PAGE).ok_or("no page size")?,
        };
        let unmapped = self.views[view].unmap_dirty(iova * PAGE, n * PAGE, &[words], extent);
        for k in (0..n).filter(|k| words >> k & 1 != 0) {
            if let Some(target) = self.world.views[view].live[(iova + k) as usize] {
                self.world.write_to(target);
            }
            self.world.allow(view, iova + k);
        }
        let wanted = self.world.unmap(view, iova, n) * PAGE;
        expect("unmap_dirty", unmapped == Ok(wanted))
    }

    fn plug(&mut self, view: usize, kind: LogKind) -> Result<(), String> {
        let Some((source, _)) = self.sources[view].take() else {
            let keeper = Keeper::new(kind).map_err(describe)?;
            let live = self.world.views[view].live.iter().enumerate();
            let live = live.filter(|(_, target)| target.is_some());
            keeper
                .map(live.map(|(iova, _)| iova as u64))
                .map_err(describe)?;
            self.add_log(view, keeper)?;
            self.world.views[view].logged = true;
            return Ok(());
        };
        let fails = self.world.on && self.logs.lock().fail_log[view];
        self.allow_log(view, fails);
        self.logs.lock().remap[view] = None;
        let removed = source.remove();
        let mut shared = self.logs.lock();
        shared.pending[view].clear();
        shared.fail_log[view] = false;
        drop(shared);
        self.world.views[view].logged = false;
        self.world.views[view].gone.clear();
        match removed {
            Err(failed) if !fails => Err(format!("wrong: {}", describe(failed.cause))),
            removed => expect("remove", removed.is_err() == fails),
        }
    }

    /// Adds the log of a view to the tracker.
    pub(super) fn add_log(&mut self, view: usize, keeper: Keeper) -> Result<(), String> {
        let log = Log {
            view,
            iommu: self.views[view].clone(),
            keeper: keeper.clone(),
            logs: self.logs.clone(),
        };
        let added = self.tracker.add_log(LOGS[view], &self.views[view], 0, log);
        self.sources[view] = Some((added.map_err(|cause| cause.to_string())?, keeper));
        Ok(())
    }

    /// What the read of a log may make dirty.
    fn allow_log(&mut self, view: usize, fails: bool) {
        let pending = self.logs.lock().pending[view].clone();
        for iova in 0..IOVAS {
            if fails || pending.contains(&iova) {
                self.world.allow(view, iova);
            }
        }
    }

    /// What a take or a save may make dirty. Returns whether a source fails, or the
    /// tracker is off.
    pub(super) fn allow_sources(&mut self) -> bool {
        let on = self.world.on;
        let (fail_log, fail_kvm) = {
            let shared = self.logs.lock();
            (shared.fail_log, shared.fail_kvm)
        };
        if on {
            for (view, fails) in fail_log.into_iter().enumerate() {
                self.allow_log(view, fails);
                if !fails {
                    self.world.views[view].gone.clear();
                }
            }
            let kvm = self.logs.lock().kvm.clone();
            self.world.allowed.extend(kvm);
        }
        if on && fail_kvm {
            self.world.allow_all();
        }
        self.allow_remaps();
        !on || fail_kvm || fail_log.contains(&true)
    }

    fn take(&mut self, delivered: bool) -> Result<(), String> {
        if !self.world.on {
            self.world.allow_all();
        }
        let fails = self.allow_sources();
        match self.tracker.take(&mut self.report) {
            Err(failed) if !fails => return Err(format!("wrong: {}", describe(failed.cause))),
            taken => expect("the result of take", taken.is_err() == fails)?,
        }
        let told = self.told()?;
        self.check(&told)?;
        self.world.since.clear();
        if !fails {
            self.world.departed.clear();
        }
        if delivered {
            let removed = self.report.removed();
            let removed = removed.flat_map(|(slot, words)| {
                let pages = (0..PLACE).filter(|page| words[0] >> page & 1 != 0);
                pages.map(move |page| (slot.id as usize, page))
            });
            // What was handed out is delivered, but for what the bits have besides.
            let removed: Vec<Page> = removed.collect();
            for (memory, page) in removed {
                if !self.bits[memory].is_dirty(page * PAGE) {
                    self.world.written.remove(&(memory, page));
                }
            }
            let place = self.world.place;
            self.world
                .written
                .retain(|(memory, _)| place[*memory].is_none());
            self.world
                .allowed
                .retain(|(memory, _)| place[*memory].is_none());
            self.report.clear();
        }
        self.remapped();
        Ok(())
    }

    /// The tracker translates when all logs are read. So what a log has may count for
    /// a mapping that was made after the read.
    fn allow_remaps(&mut self) {
        let shared = self.logs.lock();
        for view in 0..VIEWS {
            let (pending, fails) = (&shared.pending[view], shared.fail_log[view]);
            let remap = shared.remap[view].filter(|remap| pending.contains(&remap.iova));
            if let (Some(Remap { gpa, .. }), false) = (remap, fails) {
                let bound = self.world.at(gpa);
                let target = Target { gpa, bound };
                let pages: Vec<Page> = self.world.behind(target).collect();
                self.world.allowed.extend(pages);
            }
        }
    }

    /// What the guest did in the midst of a take, after its log was read.
    pub(super) fn remapped(&mut self) {
        let remapped = std::mem::take(&mut self.logs.lock().remapped);
        for done in remapped {
            let Remap { iova, gpa } = done.remap;
            let old = self.world.views[done.view].live[iova as usize];
            if let (Some(old), true) = (old, done.wrote_before) {
                self.world.write_to(old);
            }
            self.world.unmap(done.view, iova, 1);
            let bound = self.world.at(gpa);
            let target = Target { gpa, bound };
            self.world.views[done.view].live[iova as usize] = Some(target);
            self.world.write_to(target);
            self.handles.push((done.mapping, vec![target]));
        }
    }

    /// The pages that the report has, by where each memory is now.
    fn told(&self) -> Result<BTreeSet<Page>, String> {
        let ranges = self
            .report
            .ranges(PAGE)
            .map_err(|cause| cause.to_string())?;
        let pages = ranges.flat_map(|r| r.gpa / PAGE..(r.gpa + r.size) / PAGE);
        let told = pages.map(|gpa| match self.world.at(gpa) {
            Some(page) => Ok(page),
            None => Err(format!("page {gpa} is told, and it is in no slot")),
        });
        told.collect()
    }

    fn check(&self, told: &BTreeSet<Page>) -> Result<(), String> {
        for page in &self.world.written {
            if self.world.place[page.0].is_some() && !told.contains(page) {
                return Err(format!("page {page:?} was written, and it is not told"));
            }
        }
        for page in told {
            if !self.world.allowed.contains(page) {
                return Err(format!("page {page:?} is told, and it was never written"));
            }
        }
        let slots = self.report.slots();
        let right = slots.iter().all(|slot| {
            let place = self.world.place[slot.id as usize];
            place == Some(slot.gpa / PAGE) && slot.size == self.world.pages[slot.id as usize] * PAGE
        });
        let count = self.world.place.iter().flatten().count();
        expect("the slots of the report", right && slots.len() == count)
    }
}
