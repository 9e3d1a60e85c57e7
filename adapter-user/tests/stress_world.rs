// SPDX-License-Identifier: MIT OR Apache-2.0
//! A migration of a guest whose memory moves, goes and comes back, and whose devices
//! map, unmap and change their logs, all from threads of their own. Some reports are
//! never delivered. Now and then everybody waits, and then the destination has every
//! write, at the address where the memory is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{RwLock, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant};

use adapter_user::device_log::{DeviceLog, Holes, LogOptions};
use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, Report, Slot, Source, Tracker};
use adapter_user::{runs, DirtyBits, Extent, PageSize};
use rand::{rngs::SmallRng, Rng, SeedableRng};

const PAGE: u64 = 4096;
/// Pages of each memory: so many that few are written again soon, which would hide a
/// lost write.
const PAGES: u64 = 1 << 14;
const MEMORIES: usize = 3;
/// Where a memory can be, in steps of its size. Memory 0 stays at place 0.
const PLACES: u64 = 5;
/// Threads that write. Each has pages of its own, so a page has one last write.
const WRITERS: u64 = 8;
/// How often a thread writes before it lets the others check.
const BATCH: u32 = 32;
/// Pages that a device has mapped at once.
const WINDOW: u64 = 8;
const TIME: Duration = Duration::from_millis(1500);

struct World {
    tracker: Tracker,
    /// A page is one number.
    memory: Vec<Vec<AtomicU64>>,
    bits: Vec<DirtyBits>,
    /// The place of each memory that is a slot. Whoever maps must know what is mapped,
    /// as a VMM does, so a slot changes under this lock.
    places: RwLock<[Option<u64>; MEMORIES]>,
    /// Whoever checks has it alone.
    gate: RwLock<()>,
    stop: AtomicBool,
}

impl World {
    fn new() -> World {
        let tracker = Tracker::new(None);
        let pgsize = PageSize::new(PAGE).unwrap();
        let world = World {
            memory: (0..MEMORIES)
                .map(|_| (0..PAGES).map(|_| AtomicU64::new(0)).collect())
                .collect(),
            bits: (0..MEMORIES)
                .map(|_| DirtyBits::new(PAGES * PAGE, pgsize).unwrap())
                .collect(),
            places: RwLock::new([0, 1, 2].map(Some)),
            gate: RwLock::new(()),
            stop: AtomicBool::new(false),
            tracker,
        };
        for memory in 0..MEMORIES {
            world
                .tracker
                .add(world.slot(memory, memory as u64))
                .unwrap();
        }
        world
    }

    fn slot(&self, memory: usize, place: u64) -> Slot {
        let bits = self.bits[memory].clone();
        Slot::new(memory as u32, place * PAGES * PAGE, PAGES * PAGE, bits)
    }

    fn places(&self) -> RwLockReadGuard<'_, [Option<u64>; MEMORIES]> {
        self.places.read().unwrap()
    }

    fn write(&self, memory: usize, page: u64, random: &mut SmallRng) {
        self.memory[memory][page as usize].store(random.random(), Ordering::Relaxed);
    }

    /// Does something until the test ends, and pauses where others check.
    fn repeat(&self, mut what: impl FnMut()) {
        while !self.stop.load(Ordering::Relaxed) {
            let _gate = self.gate.read().unwrap();
            (0..BATCH).for_each(|_| what());
        }
    }
}

/// A page of a writer's own.
fn page(writer: u64, random: &mut SmallRng) -> u64 {
    random.random_range(0..PAGES / WRITERS) * WRITERS + writer
}

/// The VMM writes, also to memory that is no slot at the time.
fn vmm(world: &World, writer: u64) {
    let mut random = SmallRng::seed_from_u64(writer);
    world.repeat(|| {
        let (memory, page) = (random.random_range(0..MEMORIES), page(writer, &mut random));
        world.write(memory, page, &mut random);
        // The mark is refused, and kept, if the memory is no slot.
        let _ = world.bits[memory].mark(page * PAGE, 8);
    });
}

/// A device that marks through its mappings, sometimes after they are gone.
fn device_with_mappings(world: &World, writer: u64) {
    let mut random = SmallRng::seed_from_u64(writer);
    let view = world.tracker.iova_view();
    let mut late = None;
    world.repeat(|| {
        let (memory, page) = (random.random_range(0..MEMORIES), page(writer, &mut random));
        let places = world.places();
        let Some(place) = places[memory] else {
            return;
        };
        let gpa = (place * PAGES + page) * PAGE;
        let mapping = view.map(0, gpa, PAGE).unwrap();
        drop(places);
        world.write(memory, page, &mut random);
        // The memory may have gone since: then its bits keep the mark.
        let _ = mapping.mark(8, 8);
        view.unmap(0, PAGE).unwrap();
        if let Some((mapping, memory, page)) = late.replace((mapping, memory, page)) {
            world.write(memory, page, &mut random);
            let _ = mapping.mark(8, 8);
        }
    });
}

/// Adds a log to the tracker, which fails now and then.
fn plug(world: &World, view: &IovaView, log: &DeviceLog, random: &mut SmallRng) -> Source {
    let log = log.clone();
    let pgsize = PageSize::new(PAGE).unwrap();
    let mut reads = random.random_range(0..8);
    let read = move |ask: &[IovaRange], dirty: &mut DirtyIovas| {
        reads += 1;
        for IovaRange { iova, size } in ask.iter().copied() {
            let npages = size / PAGE;
            let mut words = vec![0; npages.div_ceil(64) as usize];
            log.report(iova, size, PAGE, &mut words)?;
            let extent = Extent {
                bit: 0,
                iova,
                npages,
                pgsize,
            };
            dirty.or_bitmap(&words, extent)?;
        }
        match reads % 8 {
            0 => Err("the log fails after its read".into()),
            _ => Ok(()),
        }
    };
    world.tracker.add_log("device", view, 0, read).unwrap()
}

/// A device with a log of its own, which it keeps in step with its view. The log leaves
/// the tracker and comes back, as when the device is plugged again.
fn device_with_a_log(world: &World, writer: u64) {
    let mut random = SmallRng::seed_from_u64(writer);
    let view = world.tracker.iova_view();
    // A range may be read after it left the log and before it leaves the view. Then the
    // view asks once more for what the log has forgotten.
    let log = DeviceLog::with_options(LogOptions {
        holes: Holes::Clean,
        ..LogOptions::default()
    });
    log.start_all(PAGE).unwrap();
    let mut source = Some(plug(world, &view, &log, &mut random));
    let mut window: [Option<(usize, u64)>; WINDOW as usize] = Default::default();
    world.repeat(|| {
        let at = random.random_range(0..WINDOW);
        let entry = &mut window[at as usize];
        if entry.is_some() && random.random_range(0..3) == 0 {
            *entry = None;
            log.remove_range(at * PAGE, PAGE).unwrap();
            view.unmap(at * PAGE, PAGE).unwrap();
        }
        if entry.is_none() {
            let (memory, page) = (random.random_range(0..MEMORIES), page(writer, &mut random));
            let places = world.places();
            let Some(place) = places[memory] else {
                return;
            };
            let gpa = (place * PAGES + page) * PAGE;
            view.map(at * PAGE, gpa, PAGE).unwrap();
            drop(places);
            log.add_range(at * PAGE, PAGE).unwrap();
            *entry = Some((memory, page));
        }
        if let Some((memory, page)) = *entry {
            world.write(memory, page, &mut random);
            match log.range(at * PAGE) {
                Some(range) if random.random() => range.mark(at * PAGE, 1).unwrap(),
                _ => log.mark(at * PAGE, 1).unwrap(),
            }
        }
        if random.random_range(0..5000) == 0 {
            // It is asked once more. If it fails, all memory behind the view is dirty.
            let _ = source.take().unwrap().remove();
            source = Some(plug(world, &view, &log, &mut random));
        }
    });
}

/// The guest's memory moves, goes and comes back.
fn hot_plug(world: &World, writer: u64) {
    let mut random = SmallRng::seed_from_u64(writer);
    while !world.stop.load(Ordering::Relaxed) {
        thread::yield_now();
        let _gate = world.gate.read().unwrap();
        let memory = random.random_range(1..MEMORIES);
        let mut places = world.places.write().unwrap();
        let place = random.random_range(1..PLACES);
        if places.contains(&Some(place)) {
            continue;
        }
        let gpa = place * PAGES * PAGE;
        match places[memory] {
            Some(_) if random.random() => {
                world.tracker.move_slot(memory as u32, gpa).unwrap();
                places[memory] = Some(place);
            }
            Some(_) => {
                world.tracker.remove_slot(memory as u32).unwrap();
                places[memory] = None;
            }
            // Its bits have all that was written since it was delivered.
            None if random.random_range(0..20) != 0 => {
                let slot = world.slot(memory, place);
                world.tracker.add_known(slot).unwrap();
                places[memory] = Some(place);
            }
            None => {
                world.write(memory, page(writer, &mut random), &mut random);
                world.tracker.add(world.slot(memory, place)).unwrap();
                places[memory] = Some(place);
            }
        }
    }
}

/// What the destination has.
struct Destination(Vec<Vec<u64>>);

impl Destination {
    fn copy(&mut self, world: &World, memory: usize, page: u64) {
        let now = world.memory[memory][page as usize].load(Ordering::Relaxed);
        self.0[memory][page as usize] = now;
    }

    fn copy_all(&mut self, world: &World) {
        for memory in 0..MEMORIES {
            (0..PAGES).for_each(|page| self.copy(world, memory, page));
        }
    }

    fn copy_words(&mut self, world: &World, id: u32, words: &[u64]) {
        for run in runs(words) {
            run.for_each(|page| self.copy(world, id as usize, page));
        }
    }

    fn deliver_removed(&mut self, world: &World, report: &Report) {
        for (slot, words) in report.removed() {
            self.copy_words(world, slot.id, words);
        }
    }

    /// Copies by slot.
    fn deliver(&mut self, world: &World, report: &mut Report) {
        for slot in report.slots() {
            self.copy_words(world, slot.id, report.slot(slot.id).unwrap());
        }
        self.deliver_removed(world, report);
        report.clear();
    }

    /// Copies by guest address, while no slot moves.
    fn deliver_by_address(&mut self, world: &World, report: &mut Report) {
        let places = *world.places.read().unwrap();
        for range in report.ranges(PAGE).unwrap() {
            for page in range.gpa / PAGE..(range.gpa + range.size) / PAGE {
                let memory = places.iter().position(|at| *at == Some(page / PAGES));
                let memory = memory.expect("a slot at the address");
                self.copy(world, memory, page % PAGES);
            }
        }
        self.deliver_removed(world, report);
        report.clear();
    }

    /// Takes a last report while nobody writes, and compares.
    fn check(&mut self, world: &World, report: &mut Report) {
        let _gate = world.gate.write().unwrap();
        // Each of the two logs may fail in one of these takes.
        assert!((0..3).any(|_| world.tracker.take(report).is_ok()));
        self.deliver_by_address(world, report);
        let places = *world.places.read().unwrap();
        for (memory, place) in places.iter().enumerate() {
            for (page, there) in (0..).zip(&self.0[memory]) {
                let here = world.memory[memory][page as usize].load(Ordering::Relaxed);
                // Memory that is away has its writes in its bits.
                let away = place.is_none() && world.bits[memory].is_dirty(page * PAGE);
                assert!(
                    here == *there || away,
                    "page {page} of memory {memory} is stale"
                );
            }
        }
    }
}

#[test]
fn a_guest_that_changes_while_it_migrates_loses_nothing() {
    let world = &World::new();
    let mut there = Destination(vec![vec![0; PAGES as usize]; MEMORIES]);
    let mut report = world.tracker.report();
    world.tracker.start().unwrap();
    there.copy_all(world);
    thread::scope(|scope| {
        let _stop = Stop(&world.stop);
        scope.spawn(|| vmm(world, 0));
        scope.spawn(|| device_with_mappings(world, 1));
        scope.spawn(|| device_with_a_log(world, 2));
        scope.spawn(|| device_with_a_log(world, 3));
        scope.spawn(|| hot_plug(world, 4));
        let mut random = SmallRng::seed_from_u64(200);
        let end = Instant::now() + TIME;
        while Instant::now() < end {
            // A log that fails makes what is behind its view dirty.
            let _ = world.tracker.take(&mut report);
            match random.random_range(0..100) {
                // The migration starts anew.
                0 => {
                    world.tracker.stop();
                    world.tracker.start().unwrap();
                    report.clear();
                    there.copy_all(world);
                }
                // The report is lost with what it had, so all memory is copied.
                1 => {
                    report = Report::new();
                    there.copy_all(world);
                }
                // The pages do not arrive.
                2..40 => {}
                40..60 => there.check(world, &mut report),
                _ => there.deliver(world, &mut report),
            }
        }
        there.check(world, &mut report);
    });
}

/// Lets the threads end, also after a failed check.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
