// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random calls of devices (pins, unpins over holes, unmaps, closes, callbacks that
//! misbehave) against naive books: a count for each page.

mod books;

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapter_user::{
    Container, Device, Error, Group, GroupId, GuestMemory, IommuType, Options, PinGuard, Prot,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use books::{Books, Guard};

const GROUP: GroupId = GroupId(1);
const PAGE: u64 = 4096;
/// Mapping m is the pages from 12 m on, 8 of them or 12: some have a hole after them,
/// and some do not.
const MAPPINGS: u64 = 5;
const STRIDE: u64 = 12;
const DEVICES: usize = 3;
const SEEDS: u64 = 400;
const STEPS: u64 = 250;

fn mapping(m: u64) -> (u64, u64) {
    let pages = if m % 2 == 0 { 8 } else { STRIDE };
    (m * STRIDE * PAGE, pages * PAGE)
}

/// What a dma_unmap callback does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Unpin,
    /// Drops its guards, then unpins the rest.
    DropGuards,
    UnmapFirst,
    PinFirst,
    Close,
    Nothing,
    Panic,
}

const MODES: [Mode; 7] = [
    Mode::Unpin,
    Mode::DropGuards,
    Mode::UnmapFirst,
    Mode::PinFirst,
    Mode::Close,
    Mode::Nothing,
    Mode::Panic,
];

/// What the callback of a device uses.
struct Driver {
    mode: Mode,
    guards: Vec<(u64, PinGuard)>,
}

type Shared = Arc<Mutex<Driver>>;

fn lock(driver: &Shared) -> MutexGuard<'_, Driver> {
    driver.lock().unwrap_or_else(PoisonError::into_inner)
}

fn on_unmap(container: &Container, driver: &Shared, device: &Device, iova: u64, size: u64) {
    let mode = lock(driver).mode;
    match mode {
        Mode::Panic => std::panic::resume_unwind(Box::new("a bug of the device")),
        Mode::Nothing => return,
        Mode::Close => return device.close(),
        Mode::DropGuards => lock(driver).guards.retain(|(_, guard)| {
            guard.iova() / PAGE * PAGE >= iova + size || guard.iova() + guard.size() <= iova
        }),
        // It fails unless another device has unpinned everything already.
        Mode::UnmapFirst => drop(container.unmap(iova, size)),
        Mode::PinFirst => drop(device.pin_pages(iova, Prot::READ, &mut [0])),
        Mode::Unpin => {}
    }
    device.unpin_range(iova, size);
}

struct World {
    container: Container,
    memory: Arc<GuestMemory>,
    drivers: [Shared; DEVICES],
    devices: [Option<Arc<Device>>; DEVICES],
    books: Books,
    rng: StdRng,
    next_guard: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let container = match seed % 8 {
            0 => Container::with_locked_pins(Options::default()),
            _ => Container::new(Options::default()),
        };
        container.add_group(Group::emulated(GROUP)).expect("group");
        container.set_iommu(IommuType::Type1v2).expect("type1v2");
        container.start().expect("start");
        let size = MAPPINGS * STRIDE * PAGE;
        World {
            container,
            memory: Arc::new(GuestMemory::new(size).expect("memory")),
            drivers: std::array::from_fn(|_| {
                Arc::new(Mutex::new(Driver {
                    mode: Mode::Unpin,
                    guards: Vec::new(),
                }))
            }),
            devices: Default::default(),
            books: Books::default(),
            rng: StdRng::seed_from_u64(seed),
            next_guard: 0,
        }
    }

    fn some_iova(&mut self) -> u64 {
        self.rng.random_range(0..MAPPINGS * STRIDE) * PAGE
    }

    /// Opens a device with a callback of some kind, or closes one.
    fn open_or_close(&mut self, d: usize) {
        if let Some(device) = self.devices[d].take() {
            match self.rng.random_range(0..3) {
                0 => device.close(),
                1 => {
                    device.close();
                    device.close();
                    assert_eq!(device.write(0, &[1]), Err(Error::UnknownDevice));
                }
                _ => {}
            }
            drop(device);
            self.books.close(d);
            return;
        }
        // The closed device's guards are dead, and may still be dropped.
        let old = std::mem::take(&mut lock(&self.drivers[d]).guards);
        self.books.guards.retain(|guard| guard.device != d);
        drop(old);
        let mode = match self.rng.random_range(0..10) {
            0..3 => Mode::Unpin,
            k => MODES[k - 3],
        };
        let (driver, weak) = (Arc::clone(&self.drivers[d]), self.container.downgrade());
        let callback = move |device: &Device, iova, size| {
            let container = weak.upgrade().expect("the test has it");
            on_unmap(&container, &driver, device, iova, size);
        };
        let device = self.container.open_device(GROUP, Some(Box::new(callback)));
        let device = device.expect("device");
        lock(&self.drivers[d]).mode = mode;
        self.devices[d] = Some(device);
        self.books.open.push(d);
        self.books.modes[d] = Some(mode);
    }

    fn map_or_unmap(&mut self) {
        let first = self.rng.random_range(0..MAPPINGS);
        let end = self.rng.random_range(first + 1..=MAPPINGS);
        let missing = (first..end).find(|m| !self.books.mapped[*m as usize]);
        if let Some(m) = missing.filter(|_| self.rng.random_bool(0.7)) {
            let (start, size) = mapping(m);
            let mapped = self
                .container
                .map(start, &self.memory, start, size, Prot::READ_WRITE);
            mapped.expect("map");
            self.books.mapped[m as usize] = true;
            return;
        }
        let (start, size) = (mapping(first).0, (end - first) * STRIDE * PAGE);
        let container = self.container.clone();
        let unmapped = catch_unwind(AssertUnwindSafe(|| container.unmap(start, size)));
        let expected = self.books.unmap(first..end);
        assert_eq!(unmapped.ok(), expected, "unmap {first}..{end}");
        // Devices that have closed in their callbacks.
        for d in 0..DEVICES {
            if self.devices[d].is_some() && !self.books.open.contains(&d) {
                let device = self.devices[d].take().expect("it is there");
                assert_eq!(device.pinned(), 0);
                assert_eq!(device.read(0, &mut [0]), Err(Error::UnknownDevice));
            }
        }
    }

    fn pin_pages(&mut self, d: usize, device: &Device) {
        let offset = if self.rng.random_bool(0.2) { 0x10 } else { 0 };
        let iova = self.some_iova() + offset;
        let n = self.rng.random_range(1..=6);
        let iovas: Vec<u64> = (0..n).map(|k| iova + k * PAGE).collect();
        let mut pfns = vec![0; iovas.len()];
        let pinned = device.pin_pages(iova, Prot::READ_WRITE, &mut pfns);
        if self.books.pin(&iovas) {
            assert_eq!(pinned, Ok(()));
            for iova in iovas {
                *self.books.raw[d].entry(iova).or_default() += 1;
            }
        } else {
            assert_eq!(pinned, Err(Error::Unmapped));
        }
    }

    fn pin(&mut self, d: usize, device: &Device) {
        let iova = self.some_iova() + self.rng.random_range(0..PAGE);
        let size = self.rng.random_range(1..5 * PAGE);
        let id = self.next_guard;
        let guard = Guard {
            id,
            device: d,
            iova,
            size,
            live: true,
        };
        let iovas: Vec<u64> = guard.pages().collect();
        match device.pin(iova, size, Prot::READ_WRITE) {
            Ok(pinned) => {
                assert!(self.books.pin(&iovas));
                self.books.guards.push(guard);
                lock(&self.drivers[d]).guards.push((id, pinned));
                self.next_guard += 1;
            }
            Err(e) => {
                assert_eq!(e, Error::Unmapped);
                assert!(!self.books.pin(&iovas));
            }
        }
    }

    /// Drops a guard of some device, or writes through it.
    fn use_a_guard(&mut self, d: usize) {
        let mut driver = lock(&self.drivers[d]);
        if driver.guards.is_empty() {
            return;
        }
        let k = self.rng.random_range(0..driver.guards.len());
        let id = driver.guards[k].0;
        let at = self.books.guards.iter().position(|guard| guard.id == id);
        let at = at.expect("in the books");
        if self.rng.random_bool(0.4) {
            drop(driver.guards.swap_remove(k));
            drop(driver);
            self.books.drop_guard(at);
            self.books.guards.remove(at);
            return;
        }
        let (booked, guard) = (self.books.guards[at], &driver.guards[k].1);
        assert_eq!((guard.iova(), guard.size()), (booked.iova, booked.size));
        let offset = self.rng.random_range(0..booked.size);
        let len = self.rng.random_range(1..=booked.size - offset) as usize;
        let bytes: Vec<u8> = (0..len).map(|_| self.rng.random()).collect();
        let written = guard.write(offset, &bytes);
        if booked.live {
            assert_eq!(written, Ok(()));
            let mut back = vec![0; len];
            let inside = self.memory.read(booked.iova + offset, &mut back);
            inside.expect("an IOVA is an offset here");
            assert!(back == bytes);
        } else {
            assert_eq!(written, Err(Error::Unmapped));
        }
    }

    fn step(&mut self) {
        let d = self.rng.random_range(0..DEVICES);
        let device = self.devices[d].clone();
        match (self.rng.random_range(0..20), device) {
            (0, _) => self.open_or_close(d),
            (1..4, _) => self.map_or_unmap(),
            (4..7, _) => self.use_a_guard(d),
            (7..10, Some(device)) => self.pin(d, &device),
            (10..13, Some(device)) => self.pin_pages(d, &device),
            (13, Some(device)) => {
                let (iova, n) = (self.some_iova(), self.rng.random_range(0..3 * STRIDE));
                device.unpin_range(iova, n * PAGE);
                if n != 0 {
                    self.books.unpin_range(d, iova, iova + n * PAGE - 1);
                }
            }
            (14..17, Some(device)) => {
                // Over holes, and now and then what others have pinned.
                let offset = if self.rng.random_bool(0.2) { 0x10 } else { 0 };
                let iova = self.some_iova() + offset;
                let n = self.rng.random_range(0..2 * STRIDE);
                device.unpin_pages(iova, n);
                self.books.unpin_pages(d, iova, n);
            }
            (17, Some(device)) => {
                let iova = self.some_iova() + self.rng.random_range(0..PAGE - 8);
                if device.mark(iova, 8).is_ok() {
                    self.books.mark(iova);
                } else {
                    assert_eq!(self.books.mapping_at(iova), None);
                }
            }
            (_, None) => self.open_or_close(d),
            _ => self.report(),
        }
        for (d, device) in self.devices.iter().enumerate() {
            if let Some(device) = device {
                assert_eq!(device.pinned(), self.books.pinned(d), "device {d}");
            }
        }
    }

    /// Compares what is dirty: first with what was pinned or marked since the last
    /// report, then with what is pinned.
    fn report(&mut self) {
        let report = || {
            let mut words = [0];
            let size = MAPPINGS * STRIDE * PAGE;
            let reported = self.container.dirty_bitmap(0, size, PAGE, &mut words);
            reported.expect("report");
            words[0]
        };
        let bits = |pages: &mut dyn Iterator<Item = u64>| pages.fold(0, |all, p| all | 1u64 << p);
        let pinned = bits(&mut self.books.core.keys().map(|iova| iova / PAGE));
        let dirty = bits(&mut std::mem::take(&mut self.books.dirty).into_iter());
        assert_eq!(report(), dirty | pinned);
        assert_eq!(report(), pinned);
    }

    /// When every device has closed, only what nobody has in its books is left.
    fn end(mut self) {
        for d in 0..DEVICES {
            if self.devices[d].is_some() {
                self.open_or_close(d);
            }
        }
        self.report();
        let all = self.container.unmap(0, MAPPINGS * STRIDE * PAGE);
        let expected = self.books.unmap(0..MAPPINGS);
        assert_eq!(Some(all), expected);
        assert!(self.books.core.is_empty(), "{:?}", self.books.core);
        assert_eq!(self.container.remove_group(GROUP), Ok(()));
        let guards = self
            .drivers
            .iter()
            .flat_map(|d| std::mem::take(&mut lock(d).guards));
        for (_, guard) in guards {
            assert_eq!(guard.read(0, &mut [0]), Err(Error::Unmapped));
        }
    }
}

#[test]
fn devices_keep_the_naive_books() {
    for seed in 0..SEEDS {
        let mut world = World::new(seed);
        let steps = catch_unwind(AssertUnwindSafe(move || {
            (0..STEPS).for_each(|_| world.step());
            world.end();
        }));
        assert!(steps.is_ok(), "seed {seed}");
    }
}
