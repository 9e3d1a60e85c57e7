// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads that come and go write and mark while others report, map, unmap, attach,
//! detach, open and close. What the container's lock does about threads is what is
//! tested here: threads that end, that mark in two containers at once, that mark in a
//! callback, that a fork leaves behind. Everything runs with membarrier(2) and without.
//!
//! As in `stress`, each writer counts a word of its own up in every page, and in the end
//! the copy must be the same as the memory.

#[path = "support/barred.rs"]
mod barred;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use adapter_user::{
    Container, Device, Error, Group, GroupId, GuestMemory, IommuType, Options, Prot,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const GROUP: GroupId = GroupId(1);
const PAGE: u64 = 4096;
const PAGES: u64 = 512;
/// The pages of a mapping. The later half of the mappings comes and goes.
const MAPPING: u64 = 64;
const ROUNDS: u64 = 30;
/// How often each writer writes in a round. The lock changes its way after 1024 marks.
const WRITES: u64 = 10000;
const WRITERS: usize = 5;

type Copy = Vec<AtomicU64>;

struct World {
    container: Container,
    /// Has the same memory, and the marks of one device.
    other: Container,
    memory: Arc<GuestMemory>,
    copy: Copy,
    other_copy: Copy,
    done: AtomicBool,
    /// How often a callback has marked.
    called: AtomicU64,
}

fn container(memory: &Arc<GuestMemory>) -> Container {
    let container = Container::new(Options::default());
    container.add_group(Group::emulated(GROUP)).expect("group");
    container.set_iommu(IommuType::Type1v2).expect("type1v2");
    for first in (0..PAGES).step_by(MAPPING as usize) {
        map(&container, memory, first);
    }
    container.start().expect("start");
    container
}

fn map(container: &Container, memory: &Arc<GuestMemory>, page: u64) {
    let (at, size) = (page * PAGE, MAPPING * PAGE);
    let mapped = container.map(at, memory, at, size, Prot::READ_WRITE);
    mapped.expect("map");
}

fn put(memory: &GuestMemory, page: u64, word: usize) -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let count = COUNT.fetch_add(1, Relaxed);
    let at = page * PAGE + word as u64 * 8;
    memory.write(at, &count.to_ne_bytes()).expect("in bounds");
    count
}

impl World {
    fn new() -> Arc<Self> {
        let memory = Arc::new(GuestMemory::new(PAGES * PAGE).expect("memory"));
        let copy = || (0..PAGES as usize * WRITERS).map(|_| AtomicU64::new(0));
        Arc::new(World {
            container: container(&memory),
            other: container(&memory),
            memory,
            copy: copy().collect(),
            other_copy: copy().collect(),
            done: AtomicBool::new(false),
            called: AtomicU64::new(0),
        })
    }

    fn word(&self, page: u64, word: usize) -> u64 {
        let mut bytes = [0; 8];
        let at = page * PAGE + word as u64 * 8;
        self.memory.read(at, &mut bytes).expect("in bounds");
        u64::from_ne_bytes(bytes)
    }

    fn copy_page(&self, copy: &Copy, page: u64) {
        for word in 0..WRITERS {
            copy[page as usize * WRITERS + word].fetch_max(self.word(page, word), Relaxed);
        }
    }

    fn copy_reported(&self, copy: &Copy, first: u64, words: &[u64]) {
        for page in 0..words.len() as u64 * 64 {
            if words[(page / 64) as usize] >> (page % 64) & 1 != 0 {
                self.copy_page(copy, first + page);
            }
        }
    }

    /// Copies a page whose mark says that no report has it.
    fn marked(&self, page: u64, marked: Result<(), Error>) {
        match marked {
            Ok(()) => {}
            Err(Error::Unmapped) => self.copy_page(&self.copy, page),
            Err(e) => panic!("mark: {e}"),
        }
    }

    fn write_through(&self, rng: &mut StdRng) {
        let device = self.container.open_device(GROUP, None).expect("device");
        for _ in 0..WRITES {
            let page = rng.random_range(0..PAGES);
            // It counts up what was there: nobody else writes this word.
            let value = self.word(page, 0) + 1;
            match device.write(page * PAGE, &value.to_ne_bytes()) {
                Ok(()) | Err(Error::Unmapped) => {}
                Err(e) => panic!("write: {e}"),
            }
            let mut read = [0; 8];
            match device.read(page * PAGE, &mut read) {
                Ok(()) | Err(Error::Unmapped) => {}
                Err(e) => panic!("read: {e}"),
            }
        }
    }

    /// Marks through a device that is closed and opened now and then.
    fn mark(&self, rng: &mut StdRng) {
        let mut device = self.container.open_device(GROUP, None).expect("device");
        for k in 0..WRITES {
            let page = rng.random_range(0..PAGES);
            put(&self.memory, page, 1);
            self.marked(page, device.mark(page * PAGE + 8, 8));
            if k % 4000 == 3999 {
                device = self.container.open_device(GROUP, None).expect("device");
            }
        }
    }

    /// Marks in two containers at once: the inner mark finds the thread's slot taken.
    fn mark_both(&self, rng: &mut StdRng) {
        let other = self.other.clone();
        let on_mark = Box::new(move |iova, size| other.mark(iova, size));
        let device = self.container.open_logged_device(GROUP, None, on_mark);
        let device = device.expect("device");
        for _ in 0..WRITES {
            let page = rng.random_range(0..PAGES);
            put(&self.memory, page, 2);
            self.marked(page, device.mark(page * PAGE + 16, 8));
        }
    }

    /// Marks from threads that live for a few marks.
    fn mark_briefly(&self, rng: &mut StdRng) {
        for _ in 0..WRITES / 100 {
            let pages: Vec<u64> = (0..20).map(|_| rng.random_range(0..PAGES)).collect();
            thread::scope(|scope| {
                scope.spawn(|| {
                    for page in pages {
                        put(&self.memory, page, 3);
                        self.marked(page, self.container.mark(page * PAGE, PAGE));
                    }
                });
            });
        }
    }

    /// The turns of a thread that does not write: one, and more until the writers have
    /// ended. In between others mark often enough for the lock to open its slots.
    fn turns(&self) -> impl Iterator<Item = ()> + '_ {
        let more = || {
            thread::sleep(Duration::from_micros(2000));
            (!self.done.load(Relaxed)).then_some(())
        };
        std::iter::once(()).chain(std::iter::from_fn(more))
    }

    fn report(&self, container: &Container, copy: &Copy) {
        let mut words = [0; (PAGES / 64) as usize];
        let reported = container.dirty_bitmap(0, PAGES * PAGE, PAGE, &mut words);
        reported.expect("report");
        self.copy_reported(copy, 0, &words);
    }

    /// Pins pages of a mapping, unmaps it, which calls the device, and maps it again.
    fn unmap(&self, device: &Device, rng: &mut StdRng) {
        for () in self.turns() {
            let first = rng.random_range(PAGES / MAPPING / 2..PAGES / MAPPING) * MAPPING;
            let (at, size) = (first * PAGE, MAPPING * PAGE);
            device
                .pin_pages(at, Prot::READ_WRITE, &mut [0; 2])
                .expect("pin");
            let mut words = [0; (MAPPING / 64) as usize];
            let unmapped = self.container.unmap_dirty(at, size, PAGE, &mut words);
            assert_eq!(unmapped, Ok(size));
            self.copy_reported(&self.copy, first, &words);
            thread::yield_now();
            map(&self.container, &self.memory, first);
        }
    }

    /// Attaches and detaches groups, and opens and closes devices in them.
    fn attach(&self) {
        for () in self.turns() {
            let id = GroupId(2);
            self.container
                .add_group(Group::emulated(id))
                .expect("group");
            let device = self.container.open_device(id, None).expect("device");
            assert_eq!(self.container.remove_group(id), Err(Error::GroupBusy));
            drop(device);
            self.container.remove_group(id).expect("no device is open");
            thread::yield_now();
        }
    }

    /// The child of a fork has one thread, and the lock's traces of all the others.
    fn fork(&self) {
        // SAFETY: the other threads wait at a barrier, so they hold no lock that the
        // child needs.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let mut words = [0; (PAGES / 64) as usize];
            let report = |words: &mut [u64]| {
                let reported = self.container.dirty_bitmap(0, PAGES * PAGE, PAGE, words);
                reported.is_ok()
            };
            let mut good = report(&mut words);
            for k in 0..3000 {
                good &= self.container.mark(k % 3 * PAGE, 1).is_ok();
            }
            good &= report(&mut words) && words[0] & 7 == 7;
            good &= self.container.unmap(0, MAPPING * PAGE).is_ok();
            // SAFETY: it ends the child at once.
            unsafe { libc::_exit(i32::from(!good)) }
        }
        let mut status = 0;
        // SAFETY: it writes to `status`.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert_eq!(status, 0, "the child");
    }

    fn round(self: &Arc<Self>, round: u64) {
        let seed = |thread: u64| StdRng::seed_from_u64(round * 100 + thread);
        self.done.store(false, Relaxed);
        let weak = Arc::downgrade(self);
        let on_unmap = move |device: &Device, iova: u64, size: u64| {
            // The device's last write, which the report of the unmap must have.
            if let Some(world) = weak.upgrade() {
                put(&world.memory, iova / PAGE + 1, 4);
                device.mark(iova + PAGE, PAGE).expect("it is mapped still");
                world.called.fetch_add(1, Relaxed);
            }
            device.unpin_range(iova, size);
        };
        let pinner = self.container.open_device(GROUP, Some(Box::new(on_unmap)));
        let pinner = pinner.expect("device");
        let (ended, forked) = (AtomicU64::new(0), AtomicBool::new(false));
        // Keeps a thread, so that it has a slot still, until the fork.
        let keep = || {
            ended.fetch_add(1, Relaxed);
            while !forked.load(Relaxed) {
                thread::yield_now();
            }
        };
        thread::scope(|scope| {
            let writers = [
                scope.spawn(|| {
                    self.write_through(&mut seed(0));
                    keep();
                }),
                scope.spawn(|| {
                    self.mark(&mut seed(1));
                    keep();
                }),
                scope.spawn(|| {
                    self.mark_both(&mut seed(2));
                    keep();
                }),
                scope.spawn(|| {
                    self.mark_briefly(&mut seed(3));
                    keep();
                }),
            ];
            let helpers = [
                scope.spawn(|| {
                    self.turns()
                        .for_each(|()| self.report(&self.container, &self.copy))
                }),
                scope.spawn(|| {
                    self.turns()
                        .for_each(|()| self.report(&self.other, &self.other_copy))
                }),
                scope.spawn(|| self.unmap(&pinner, &mut seed(4))),
                scope.spawn(|| self.attach()),
            ];
            while ended.load(Relaxed) < 4 && !writers.iter().any(|w| w.is_finished()) {
                thread::yield_now();
            }
            self.done.store(true, Relaxed);
            let helped = helpers.map(|helper| helper.join());
            if ended.load(Relaxed) == 4 {
                self.fork();
            }
            forked.store(true, Relaxed);
            assert!(helped.iter().all(Result::is_ok), "a helper has failed");
            let ended = writers.map(|writer| writer.join());
            assert!(ended.iter().all(Result::is_ok), "a writer has failed");
        });
        self.report(&self.container, &self.copy);
        self.report(&self.other, &self.other_copy);
        for page in 0..PAGES {
            for word in 0..WRITERS {
                let at = page as usize * WRITERS + word;
                let now = self.word(page, word);
                assert_eq!(now, self.copy[at].load(Relaxed), "page {page}, word {word}");
                if word == 2 {
                    assert_eq!(now, self.other_copy[at].load(Relaxed), "page {page}");
                }
            }
        }
    }
}

#[test]
fn no_mark_is_lost() {
    let world = World::new();
    (0..ROUNDS).for_each(|round| world.round(round));
    assert_ne!(world.called.load(Relaxed), 0);
}

#[test]
fn no_mark_is_lost_without_membarrier() {
    barred::run(module_path!(), "no_mark_is_lost");
}

/// A seccomp filter comes to a thread that reports after others have begun to mark.
#[test]
fn a_filter_that_comes_late() {
    let memory = Arc::new(GuestMemory::new(PAGES * PAGE).expect("memory"));
    let container = container(&memory);
    let device = container.open_device(GROUP, None).expect("device");
    let (marked, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let marker = || {
        for k in 0.. {
            if done.load(Relaxed) {
                break;
            }
            device.mark(k % PAGES * PAGE, 1).expect("mark");
            marked.fetch_add(1, Relaxed);
        }
    };
    // Waits until one of the two has marked every page.
    let wait = || {
        let from = marked.load(Relaxed);
        while marked.load(Relaxed) < from + 3 * PAGES {
            thread::yield_now();
        }
    };
    let barred = || {
        barred::bar();
        for _ in 0..5 {
            wait();
            let mut words = [0; (PAGES / 64) as usize];
            let reported = container.dirty_bitmap(0, PAGES * PAGE, PAGE, &mut words);
            reported.expect("report");
            assert!(words.iter().all(|word| *word == !0), "a mark is lost");
        }
    };
    let reported = thread::scope(|scope| {
        scope.spawn(marker);
        scope.spawn(marker);
        wait();
        let reported = scope.spawn(barred).join();
        done.store(true, Relaxed);
        reported
    });
    reported.expect("every report is full");
}
