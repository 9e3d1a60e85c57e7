// SPDX-License-Identifier: MIT OR Apache-2.0
//! Some threads write, mark, pin and unpin while others report, unmap, map, stop and
//! start. A thread that gets a page in a report copies it, and in the end the copy must
//! be the same as the memory.
//!
//! Each writer has words of its own in every page and only counts them up. So the
//! higher of two copies of a word is the newer one, and the threads that report need no
//! order among themselves.

#[path = "support/barred.rs"]
#[allow(dead_code)]
mod barred;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use adapter_user::uapi::*;
use adapter_user::{
    Container, Device, Error, Extent, Group, GroupId, GuestMemory, IommuType, PageSize, Prot,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

#[path = "support/page.rs"]
mod page;

use page::PAGE;

const ROUNDS: u64 = 150;
/// How often each writer writes in a round.
const WRITES: u64 = 250;

const GROUP: GroupId = GroupId(1);
const PAGES: u64 = 1024;
/// How many mappings there are. Each pair has 128 pages, 40 in the first mapping and 88
/// in the second, so that the two share a word of a report.
const MAPPINGS: u64 = PAGES / 64;
/// The offsets of the writers' words in a page. The first writer has two, at the start
/// and at the end, and writes them together across a page boundary.
const WORDS: [u64; 5] = [0, PAGE - 8, 8, 16, 24];

/// The first page of a mapping.
fn start_of(mapping: u64) -> u64 {
    mapping / 2 * 128 + mapping % 2 * 40
}

/// The pages of a random range of whole mappings.
fn some_mappings(rng: &mut StdRng, among: Range<u64>) -> Range<u64> {
    let first = rng.random_range(among.clone());
    let end = rng.random_range(first + 1..=among.end);
    start_of(first)..start_of(end)
}

struct Stress {
    container: Container,
    memory: Arc<GuestMemory>,
    copy: Vec<AtomicU64>,
    pinner: Arc<Device>,
    /// The pages that the pinner has pinned, once for each pin.
    pinned: Arc<Mutex<Vec<u64>>>,
    /// Whether the writers of this round have ended.
    done: AtomicBool,
    writes: AtomicU64,
    reports: AtomicU64,
    unmaps: AtomicU64,
}

fn lock(pinned: &Mutex<Vec<u64>>) -> MutexGuard<'_, Vec<u64>> {
    pinned.lock().expect("no thread has panicked")
}

impl Stress {
    fn new() -> Self {
        let container = Container::new(page::options());
        container.add_group(Group::emulated(GROUP)).expect("group");
        container.set_iommu(IommuType::Type1v2).expect("type1v2");
        let pinned = Arc::new(Mutex::new(Vec::<u64>::new()));
        let held = Arc::clone(&pinned);
        // The lock stops the device's writes before its pins are dropped.
        let on_unmap = move |device: &Device, iova, size| {
            let mut held = lock(&held);
            device.unpin_range(iova, size);
            held.retain(|page| !(iova..iova + size).contains(&(page * PAGE)));
        };
        let pinner = container.open_device(GROUP, Some(Box::new(on_unmap)));
        Stress {
            memory: Arc::new(GuestMemory::new(PAGES * PAGE).expect("memory")),
            copy: (0..PAGES * WORDS.len() as u64)
                .map(|_| AtomicU64::new(0))
                .collect(),
            pinner: pinner.expect("device"),
            pinned,
            container,
            done: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            reports: AtomicU64::new(0),
            unmaps: AtomicU64::new(0),
        }
    }

    fn map(&self, pages: Range<u64>) {
        let (first, size) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
        let mapped = self
            .container
            .map(first, &self.memory, first, size, Prot::READ_WRITE);
        mapped.expect("map");
    }

    fn put(&self, page: u64, word: usize, value: u64) {
        let at = page * PAGE + WORDS[word];
        self.memory
            .write(at, &value.to_ne_bytes())
            .expect("in bounds");
        self.writes.fetch_add(1, Relaxed);
    }

    fn word(&self, page: u64, word: usize) -> u64 {
        let mut bytes = [0; 8];
        let at = page * PAGE + WORDS[word];
        self.memory.read(at, &mut bytes).expect("in bounds");
        u64::from_ne_bytes(bytes)
    }

    fn copied(&self, page: u64, word: usize) -> &AtomicU64 {
        &self.copy[page as usize * WORDS.len() + word]
    }

    fn copy_pages(&self, pages: Range<u64>) {
        for page in pages {
            for word in 0..WORDS.len() {
                self.copied(page, word)
                    .fetch_max(self.word(page, word), Relaxed);
            }
        }
    }

    /// Copies the pages of a report that starts at page `first`.
    fn copy_reported(&self, first: u64, pgsize: u64, report: &[u64]) {
        for bit in 0..report.len() as u64 * 64 {
            if report[(bit / 64) as usize] >> (bit % 64) & 1 != 0 {
                let start = first * PAGE + bit * pgsize;
                self.copy_pages(start / PAGE..(start + pgsize).div_ceil(PAGE));
            }
        }
    }

    /// Writes through the container, across a page boundary each time.
    fn write_by_device(&self, rng: &mut StdRng) {
        let device = self.container.open_device(GROUP, None).expect("device");
        for count in self.counts() {
            let page = rng.random_range(1..PAGES);
            let value = [count.to_ne_bytes(); 2].concat();
            match device.write(page * PAGE - 8, &value) {
                // The part that was written is marked.
                Ok(()) | Err(Error::Unmapped) => self.writes.fetch_add(1, Relaxed),
                Err(e) => panic!("write: {e}"),
            };
        }
    }

    /// Writes runs of pages, then marks them.
    fn write_and_mark(&self, word: usize, rng: &mut StdRng) {
        for count in self.counts() {
            let first = rng.random_range(0..PAGES);
            let n = rng
                .random_range(1..=PAGES - first)
                .min(1 << rng.random_range(0..9));
            (first..first + n).for_each(|page| self.put(page, word, count));
            let marked = if rng.random() {
                let at = first * PAGE + WORDS[word];
                self.container.mark(at, (n - 1) * PAGE + 8)
            } else {
                self.mark_bitmap(first, n)
            };
            match marked {
                Ok(()) => {}
                // A part is in no mapping, so no report has it: copy it here.
                Err(Error::Unmapped) => self.copy_pages(first..first + n),
                Err(e) => panic!("mark: {e}"),
            }
        }
    }

    /// Marks pages by a bitmap, as another tracker does.
    fn mark_bitmap(&self, first: u64, n: u64) -> Result<(), Error> {
        let mut words = [0u64; (PAGES / 64) as usize];
        (first..first + n).for_each(|p| words[(p / 64) as usize] |= 1 << (p % 64));
        let extent = Extent {
            bit: 0,
            iova: 0,
            npages: PAGES,
            pgsize: PageSize::new(PAGE).expect("a power of two"),
        };
        self.container.mark_bitmap(&words, extent)
    }

    /// Pins pages, writes every page that is pinned, and unpins some. Some stay pinned
    /// from one round to the next.
    fn pin_and_write(&self, word: usize, rng: &mut StdRng) {
        for count in self.counts() {
            let mut pinned = lock(&self.pinned);
            let first = rng.random_range(0..PAGES - 4);
            let mut pfns = vec![0; rng.random_range(1..=4)];
            match self
                .pinner
                .pin_pages(first * PAGE, Prot::READ_WRITE, &mut pfns)
            {
                Ok(()) => pinned.extend(first..first + pfns.len() as u64),
                Err(Error::Unmapped) => {}
                Err(e) => panic!("pin: {e}"),
            }
            pinned.iter().for_each(|page| self.put(*page, word, count));
            while pinned.len() > 16 || rng.random_bool(0.3) && !pinned.is_empty() {
                let k = rng.random_range(0..pinned.len());
                self.pinner.unpin_pages(pinned.swap_remove(k) * PAGE, 1);
            }
        }
    }

    /// The values that a writer writes in a round.
    fn counts(&self) -> impl Iterator<Item = u64> {
        static COUNT: AtomicU64 = AtomicU64::new(1);
        (0..WRITES).map(|_| COUNT.fetch_add(1, Relaxed))
    }

    /// The turns of a thread that does not write: one, and more until the writers have
    /// ended.
    fn turns(&self) -> impl Iterator<Item = ()> + '_ {
        let more = || (!self.done.load(Relaxed)).then_some(());
        std::iter::once(()).chain(std::iter::from_fn(more))
    }

    /// Takes reports of whole mappings at several page sizes.
    fn report(&self, rng: &mut StdRng) {
        for () in self.turns() {
            let pages = some_mappings(rng, 0..MAPPINGS);
            let (first, size) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
            let pgsize = [PAGE / 4, PAGE, 8 * PAGE, 128 * PAGE][rng.random_range(0..4)];
            let pgsize = if (first | size) % pgsize == 0 {
                pgsize
            } else {
                PAGE
            };
            let mut report = vec![0; size.div_ceil(pgsize * 64) as usize];
            let reported = match rng.random_range(0..3) {
                0 => self
                    .container
                    .dirty_bitmap(first, size, pgsize, &mut report),
                1 => self
                    .container
                    .dirty_bitmap_zeroed(first, size, pgsize, &mut report),
                _ if pgsize == PAGE => self.report_by_ioctl(first, size, &mut report),
                _ => continue,
            };
            match reported {
                Ok(()) => {
                    self.copy_reported(pages.start, pgsize, &report);
                    self.reports.fetch_add(1, Relaxed);
                }
                Err(Error::NotTracking) => {}
                Err(e) => panic!("report: {e}"),
            }
        }
    }

    fn report_by_ioctl(&self, iova: u64, size: u64, report: &mut [u64]) -> Result<(), Error> {
        let mut arg = (
            vfio_iommu_type1_dirty_bitmap {
                argsz: 48,
                flags: VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
            },
            vfio_iommu_type1_dirty_bitmap_get {
                iova,
                size,
                bitmap: vfio_bitmap {
                    pgsize: PAGE,
                    size: report.len() as u64 * 8,
                    data: report.as_mut_ptr() as u64,
                },
            },
        );
        let (nr, arg) = (VFIO_IOMMU_DIRTY_PAGES, &raw mut arg as u64);
        // SAFETY: it reads `arg` and writes to `report`, which has `size` bits.
        let done = unsafe { self.container.ioctl(nr, arg) };
        done.map(|_| ())
    }

    /// Unmaps some of the later mappings and maps them again.
    fn unmap(&self, rng: &mut StdRng) {
        for () in self.turns() {
            let pages = some_mappings(rng, MAPPINGS / 2..MAPPINGS);
            let (first, size) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
            let pgsize = [PAGE, 8 * PAGE][rng.random_range(0..2)];
            let mut report = vec![0; size.div_ceil(pgsize * 64) as usize];
            let unmapped = if rng.random_bool(0.8) {
                let unmapped = self.container.unmap_dirty(first, size, pgsize, &mut report);
                unmapped.inspect(|_| self.copy_reported(pages.start, pgsize, &report))
            } else {
                // This forgets what was dirty, so copy all of it.
                let unmapped = self.container.unmap(first, size);
                unmapped.inspect(|_| self.copy_pages(pages.clone()))
            };
            match unmapped {
                Ok(bytes) => {
                    assert_eq!(bytes, size);
                    self.unmaps.fetch_add(1, Relaxed);
                }
                // Nothing was unmapped.
                Err(Error::NotTracking | Error::StillPinned) => continue,
                Err(e) => panic!("unmap: {e}"),
            }
            thread::yield_now();
            for mapping in (0..MAPPINGS).filter(|m| pages.contains(&start_of(*m))) {
                self.map(start_of(mapping)..start_of(mapping + 1));
            }
        }
    }

    /// Stops and starts tracking, which forgets what was dirty, and copies everything.
    fn restart(&self, rng: &mut StdRng) {
        for () in self.turns().take(3) {
            (0..rng.random_range(0..8)).for_each(|_| thread::yield_now());
            self.container.stop().expect("stop");
            (0..rng.random_range(0..3)).for_each(|_| thread::yield_now());
            self.container.start().expect("start");
            self.copy_pages(0..PAGES);
        }
    }

    fn round(&self, round: u64) {
        let seed = |thread: u64| StdRng::seed_from_u64(round * 100 + thread);
        self.done.store(false, Relaxed);
        thread::scope(|scope| {
            let writers = [
                scope.spawn(|| self.write_by_device(&mut seed(0))),
                scope.spawn(|| self.write_and_mark(2, &mut seed(1))),
                scope.spawn(|| self.write_and_mark(3, &mut seed(2))),
                scope.spawn(|| self.pin_and_write(4, &mut seed(3))),
            ];
            scope.spawn(|| self.report(&mut seed(4)));
            scope.spawn(|| self.report(&mut seed(5)));
            scope.spawn(|| self.unmap(&mut seed(6)));
            if round % 3 == 0 {
                scope.spawn(|| self.restart(&mut seed(7)));
            }
            let ended = writers.map(|writer| writer.join());
            self.done.store(true, Relaxed);
            assert!(ended.iter().all(Result::is_ok), "a writer has failed");
        });
        self.check();
    }

    /// Checks that the last report of a round has everything that is left, and that it
    /// clears every page that is not pinned.
    fn check(&self) {
        let report = || {
            let mut report = vec![0; (PAGES / 64) as usize];
            let reported = self
                .container
                .dirty_bitmap(0, PAGES * PAGE, PAGE, &mut report);
            reported.expect("report");
            report
        };
        self.copy_reported(0, PAGE, &report());
        for page in 0..PAGES {
            for word in 0..WORDS.len() {
                let (now, copied) = (self.word(page, word), self.copied(page, word));
                assert_eq!(now, copied.load(Relaxed), "page {page} was not reported");
            }
        }
        let mut pinned = vec![0; (PAGES / 64) as usize];
        for page in lock(&self.pinned).iter() {
            pinned[(page / 64) as usize] |= 1 << (page % 64);
        }
        assert!(report() == pinned, "only pinned pages stay dirty");
    }
}

#[test]
fn no_write_is_lost() {
    let stress = Stress::new();
    for mapping in 0..MAPPINGS {
        stress.map(start_of(mapping)..start_of(mapping + 1));
    }
    stress.container.start().expect("start");
    (0..ROUNDS).for_each(|round| stress.round(round));
    let Stress {
        writes,
        reports,
        unmaps,
        ..
    } = &stress;
    println!("{writes:?} writes, {reports:?} reports, {unmaps:?} unmaps");
    for happened in [writes, reports, unmaps] {
        assert_ne!(happened.load(Relaxed), 0);
    }
}

#[test]
fn no_write_is_lost_without_membarrier() {
    barred::run(module_path!(), "no_write_is_lost");
}
