// SPDX-License-Identifier: MIT OR Apache-2.0
//! A migration of a guest whose memory moves, goes and comes back, and whose devices
//! map, unmap and change their logs, all from threads of their own. Some reports are
//! never delivered. In the end the destination has every write, at the address where
//! the memory is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{RwLock, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant};

use adapter_user::device_log::{DeviceLog, Holes, LogOptions};
use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, Report, Slot, Source, Tracker};
use adapter_user::{DirtyBits, Extent, PageSize};
use rand::{rngs::SmallRng, Rng, SeedableRng};

const PAGE: u64 = 4096;
/// Pages of each memory.
const PAGES: u64 = 256;
const MEMORIES: usize = 3;
/// Where a memory can be, in steps of its size. Memory 0 stays at place 0.
const PLACES: u64 = 5;
/// Threads that write. Each has pages of its own, so a page has one last write.
const WRITERS: u64 = 4;
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
        Slot {
            id: memory as u32,
            gpa: place * PAGES * PAGE,
            host: None,
            size: PAGES * PAGE,
            bits: self.bits[memory].clone(),
        }
    }

    fn places(&self) -> RwLockReadGuard<'_, [Option<u64>; MEMORIES]> {
        self.places.read().unwrap()
    }

    fn write(&self, memory: usize, page: u64, random: &mut SmallRng) {
        self.memory[memory][page as usize].store(random.random(), Ordering::Relaxed);
    }

    fn runs(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

/// A page of a writer's own.
fn page(writer: u64, random: &mut SmallRng) -> u64 {
    random.random_range(0..PAGES / WRITERS) * WRITERS + writer
}

/// The VMM writes, also to memory that is no slot at the time.
fn vmm(world: &World, writer: u64) {
    let mut random = SmallRng::seed_from_u64(writer);
    while world.runs() {
        let (memory, page) = (random.random_range(0..MEMORIES), page(writer, &mut random));
        world.write(memory, page, &mut random);
        // The mark is refused, and kept, if the memory is no slot.
        let _ = world.bits[memory].mark(page * PAGE, 8);
    }
}

/// A device that marks through its mappings, sometimes after they are gone.
fn device_with_mappings(world: &World, writer: u64) {
    let mut random = SmallRng::seed_from_u64(writer);
    let view = world.tracker.iova_view();
    let mut late = None;
    while world.runs() {
        let (memory, page) = (random.random_range(0..MEMORIES), page(writer, &mut random));
        let places = world.places();
        let Some(place) = places[memory] else {
            continue;
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
    }
}

/// Adds a log to the tracker, which fails now and then.
fn plug(world: &World, view: &IovaView, log: &DeviceLog) -> Source {
    let log = log.clone();
    let pgsize = PageSize::new(PAGE).unwrap();
    let mut reads = 0;
    let read = move |ask: &[IovaRange], dirty: &mut DirtyIovas| {
        reads += 1;
        if reads % 13 == 0 {
            return Err("the log fails".into());
        }
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
        Ok(())
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
    let mut source = plug(world, &view, &log);
    let mut window: [Option<(usize, u64)>; WINDOW as usize] = Default::default();
    while world.runs() {
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
                continue;
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
        if random.random_range(0..500) == 0 {
            // It is asked once more. If it fails, all memory behind the view is dirty.
            let _ = source.remove();
            source = plug(world, &view, &log);
        }
    }
}

/// The guest's memory moves, goes and comes back.
fn hot_plug(world: &World) {
    let mut random = SmallRng::seed_from_u64(100);
    while world.runs() {
        let memory = random.random_range(1..MEMORIES);
        let mut places = world.places.write().unwrap();
        let place = random.random_range(1..PLACES);
        if places.iter().any(|taken| *taken == Some(place)) {
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
            None => {
                let slot = world.slot(memory, place);
                match random.random() {
                    // Its bits have all that was written since it was delivered.
                    true => world.tracker.add_known(slot).unwrap(),
                    false => world.tracker.add(slot).unwrap(),
                }
                places[memory] = Some(place);
            }
        }
        drop(places);
        thread::yield_now();
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
        let pages = (0..PAGES).filter(|page| words[(page / 64) as usize] >> (page % 64) & 1 != 0);
        pages.for_each(|page| self.copy(world, id as usize, page));
    }

    /// Copies by slot, and what slots had that are removed.
    fn deliver(&mut self, world: &World, report: &mut Report) {
        for slot in report.slots() {
            self.copy_words(world, slot.id, report.slot(slot.id).unwrap());
        }
        for (slot, words) in report.removed() {
            self.copy_words(world, slot.id, words);
        }
        report.clear();
    }

    /// Copies by guest address.
    fn deliver_by_address(&mut self, world: &World, report: &Report) {
        let places = world.places();
        let at: HashMap<u64, usize> = (0..MEMORIES)
            .filter_map(|memory| Some((places[memory]?, memory)))
            .collect();
        for range in report.ranges(PAGE).unwrap() {
            for page in range.gpa / PAGE..(range.gpa + range.size) / PAGE {
                self.copy(world, at[&(page / PAGES)], page % PAGES);
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
        scope.spawn(|| vmm(world, 0));
        scope.spawn(|| device_with_mappings(world, 1));
        scope.spawn(|| device_with_a_log(world, 2));
        scope.spawn(|| device_with_a_log(world, 3));
        scope.spawn(|| hot_plug(world));
        let mut random = SmallRng::seed_from_u64(200);
        let end = Instant::now() + TIME;
        while Instant::now() < end {
            // A log that failed makes what is behind its view dirty.
            let _ = world.tracker.take(&mut report);
            match random.random_range(0..50) {
                // The migration starts anew.
                0 => {
                    world.tracker.stop();
                    world.tracker.start().unwrap();
                    report.clear();
                    there.copy_all(world);
                }
                // The pages do not arrive.
                1..20 => {}
                // The report is lost with what it had, so all memory is copied.
                20 => {
                    report = Report::new();
                    there.copy_all(world);
                }
                _ => there.deliver(world, &mut report),
            }
        }
        world.stop.store(true, Ordering::Relaxed);
    });
    // Memory that is away comes back: its bits have what was written meanwhile.
    for memory in 0..MEMORIES {
        let mut places = world.places.write().unwrap();
        if places[memory].is_none() {
            let free = (1..PLACES).find(|place| !places.contains(&Some(*place)));
            let free = free.unwrap();
            let slot = world.slot(memory, free);
            world.tracker.add_known(slot).unwrap();
            places[memory] = Some(free);
        }
    }
    // Each of the two logs may fail in one of these takes.
    assert!((0..3).any(|_| world.tracker.take(&mut report).is_ok()));
    assert_eq!(report.removed().count(), 0);
    there.deliver_by_address(world, &report);
    for memory in 0..MEMORIES {
        for (page, there) in there.0[memory].iter().enumerate() {
            let here = world.memory[memory][page].load(Ordering::Relaxed);
            assert_eq!(here, *there, "page {page} of memory {memory} is stale");
        }
    }
}
