// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random runs of a domain with faults, compared with sets of pages: after each step the
//! view, the log and the container agree, and each report has what was written.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use adapter_user::device_log::LogOptions;
use adapter_user::{Device, PinGuard};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// A step of a random run. Addresses are numbers of pages.
#[derive(Clone, Debug)]
enum Op {
    Map {
        iova: u64,
        gpa: u64,
        n: u64,
    },
    Unmap {
        iova: u64,
        n: u64,
    },
    /// A mark by the domain.
    Mark {
        iova: u64,
        n: u64,
    },
    /// A write by a device that the domain opened, or by one that it does not know.
    Write {
        iova: u64,
        known: bool,
    },
    /// A mark in the log alone.
    Log {
        iova: u64,
    },
    Pin {
        iova: u64,
    },
    Unpin,
    /// From now on the device that pins does what an unmap tells it, or it does not.
    Obey(bool),
    /// Somebody maps or unmaps a page in the log or the container behind the domain's back.
    ForeignLog {
        iova: u64,
    },
    ForeignMap {
        iova: u64,
    },
    /// A take, which fails if the log is off.
    Take {
        off: bool,
    },
}

const IOVAS: u64 = 16;

/// The guest's memory: first page, length, and whether it has host addresses. Pages 8
/// and 9 are in no slot.
const SLOTS: [(u64, u64, bool); 3] = [(0, 8, true), (10, 6, true), (16, 2, false)];

/// How many ranges the log has room for, and mappings the container.
const RANGES: usize = 5;
const MAPPINGS: usize = 5;

fn ops() -> impl Strategy<Value = Op> {
    let iova = 0..IOVAS;
    prop_oneof![
        4 => (iova.clone(), 0..18u64, 1..6u64).prop_map(|(iova, gpa, n)| Op::Map { iova, gpa, n }),
        3 => (iova.clone(), 1..IOVAS).prop_map(|(iova, n)| Op::Unmap { iova, n }),
        2 => (iova.clone(), 1..4u64).prop_map(|(iova, n)| Op::Mark { iova, n }),
        2 => (iova.clone(), any::<bool>()).prop_map(|(iova, known)| Op::Write { iova, known }),
        2 => iova.clone().prop_map(|iova| Op::Log { iova }),
        1 => iova.clone().prop_map(|iova| Op::Pin { iova }),
        1 => Just(Op::Unpin),
        1 => any::<bool>().prop_map(Op::Obey),
        1 => iova.clone().prop_map(|iova| Op::ForeignLog { iova }),
        1 => iova.prop_map(|iova| Op::ForeignMap { iova }),
        2 => (0..6u32).prop_map(|k| Op::Take { off: k == 0 }),
    ]
}

fn slot(page: u64) -> Option<usize> {
    let mut slots = SLOTS.iter();
    slots.position(|(first, n, _)| (*first..first + n).contains(&page))
}

/// What the world looks like, page by page.
#[derive(Default)]
struct Model {
    /// The domain's mappings: first IOVA, guest page and length.
    mappings: BTreeMap<u64, (u64, u64)>,
    foreign_log: BTreeSet<u64>,
    foreign_map: BTreeSet<u64>,
    /// The IOVAs that are pinned.
    pins: BTreeSet<u64>,
    /// The guest's pages that were written since the last take.
    written: BTreeSet<u64>,
    /// The IOVAs that were written since then, and where each one has led.
    touched: BTreeSet<u64>,
    led: Vec<BTreeSet<u64>>,
}

impl Model {
    /// The guest page behind an IOVA.
    fn page(&self, iova: u64) -> Option<u64> {
        let (first, (gpa, n)) = self.mappings.range(..=iova).next_back()?;
        (iova - first < *n).then(|| gpa + (iova - first))
    }

    /// The mappings in the container that slots give to one of the domain.
    fn parts(gpa: u64, n: u64) -> usize {
        let slots: BTreeSet<usize> = (gpa..gpa + n).filter_map(slot).collect();
        slots.len()
    }

    fn write(&mut self, iova: u64) {
        self.touched.insert(iova);
        self.written
            .extend(self.page(iova).filter(|page| slot(*page).is_some()));
    }

    fn in_container(&self, iova: u64) -> bool {
        let page = self.page(iova).and_then(slot);
        page.is_some() || self.foreign_map.contains(&iova)
    }
}

struct World {
    tracker: Tracker,
    domain: Domain,
    log: Option<DeviceLog>,
    container: Option<Container>,
    /// A device that the domain opened, and one that it does not know.
    devices: Option<[Arc<Device>; 2]>,
    obey: Arc<AtomicBool>,
    pins: Vec<PinGuard>,
    m: Model,
}

impl World {
    fn new(with_log: bool, with_container: bool) -> World {
        let tracker = Tracker::new(None);
        for (id, (first, n, host)) in (0..).zip(SLOTS) {
            let host = host.then(|| leaked(n));
            tracker.add_slot(id, first * PAGE, host, n * PAGE).unwrap();
        }
        let log = with_log.then(|| {
            DeviceLog::with_options(LogOptions {
                budget: Some(8 * RANGES as u64),
                ..LogOptions::default()
            })
        });
        let container = with_container.then(|| {
            let mut options = Options::default();
            options.dma_entry_limit = MAPPINGS as u32;
            container_with(options)
        });
        let domain = domain(&tracker, log.as_ref(), container.as_ref());
        if let Some(log) = &log {
            log.start_all(PAGE).unwrap();
            let log = log.clone();
            tracker.add_log("log", domain.view(), 0, log).unwrap();
        }
        let obey = Arc::new(AtomicBool::new(true));
        let devices = container.as_ref().map(|container| {
            container.start().unwrap();
            let log = container.clone();
            tracker.add_log("container", domain.view(), 0, log).unwrap();
            let obeys = Arc::clone(&obey);
            let unpin = move |device: &Device, iova, size| {
                if obeys.load(Ordering::Relaxed) {
                    device.unpin_range(iova, size);
                }
            };
            let unknown = container.open_device(GROUP, Some(Box::new(unpin)));
            [domain.open_device(GROUP, None).unwrap(), unknown.unwrap()]
        });
        tracker.start().unwrap();
        World {
            tracker,
            domain,
            log,
            container,
            devices,
            obey,
            pins: Vec::new(),
            m: Model {
                led: vec![BTreeSet::new(); IOVAS as usize + 8],
                ..Model::default()
            },
        }
    }

    fn map(&mut self, iova: u64, gpa: u64, n: u64) -> Result<(), TestCaseError> {
        let range = iova..iova + n;
        let m = &self.m;
        let mut ok = range.clone().all(|iova| m.page(iova).is_none());
        if self.log.is_some() {
            ok &= range.clone().all(|iova| !m.foreign_log.contains(&iova));
            ok &= m.mappings.len() + m.foreign_log.len() < RANGES;
        }
        if self.container.is_some() {
            let pages = range.clone().zip(gpa..);
            let mut pages = pages.filter_map(|(iova, page)| Some((iova, slot(page)?)));
            ok &= pages.all(|(iova, slot)| SLOTS[slot].2 && !m.foreign_map.contains(&iova));
            let parts = m.mappings.values().map(|(gpa, n)| Model::parts(*gpa, *n));
            let parts = parts.sum::<usize>() + Model::parts(gpa, n);
            ok &= parts + m.foreign_map.len() <= MAPPINGS;
        }
        let done = self.domain.map(iova * PAGE, gpa * PAGE, n * PAGE, RW);
        prop_assert_eq!(done.is_ok(), ok, "{:?}", done);
        // A mapping that failed may have been there for a moment.
        for (iova, page) in range.zip(gpa..) {
            self.m.led[iova as usize].insert(page);
        }
        if ok {
            self.m.mappings.insert(iova, (gpa, n));
        }
        Ok(())
    }

    fn unmap(&mut self, iova: u64, n: u64) -> Result<(), TestCaseError> {
        let range = iova..iova + n;
        let m = &mut self.m;
        let hit: Vec<(u64, u64)> = m.mappings.iter().map(|(k, (_, n))| (*k, k + n)).collect();
        let hit = hit
            .into_iter()
            .filter(|(k, end)| *k < range.end && *end > range.start);
        let hit: Vec<(u64, u64)> = hit.collect();
        let whole = hit
            .iter()
            .all(|(k, end)| *k >= range.start && *end <= range.end);
        let pinned = m.pins.iter().any(|pin| range.contains(pin));
        let ok = whole && (!pinned || self.obey.load(Ordering::Relaxed));
        let done = self.domain.unmap(iova * PAGE, n * PAGE);
        prop_assert_eq!(done.is_ok(), ok, "{:?}", done);
        if let Ok(size) = done {
            let bytes: u64 = hit.iter().map(|(k, end)| (end - k) * PAGE).sum();
            prop_assert_eq!(size, bytes);
            let pins: Vec<u64> = m
                .pins
                .iter()
                .copied()
                .filter(|p| range.contains(p))
                .collect();
            for pin in pins {
                m.write(pin); // it was dirty to the end
                m.pins.remove(&pin);
            }
            m.mappings
                .retain(|k, _| hit.iter().all(|(gone, _)| gone != k));
            m.foreign_map.retain(|page| !range.contains(page));
        }
        Ok(())
    }

    fn take(&mut self, off: bool) -> Result<(), TestCaseError> {
        for pin in self.m.pins.clone() {
            self.m.write(pin);
        }
        let log = self.log.as_ref().filter(|_| off);
        log.inspect(|log| log.stop());
        let mut report = Report::new();
        let taken = self.tracker.take(&mut report);
        prop_assert_eq!(taken.is_err(), log.is_some());
        if let Some(log) = log {
            log.start_all(PAGE).unwrap();
        }
        let found = dirty(&report);
        let m = &mut self.m;
        prop_assert!(
            found.is_superset(&m.written),
            "{:?} is not in {:?}",
            m.written,
            found
        );
        let all = 0..IOVAS + 8;
        let touched = all.filter(|iova| log.is_some() || m.touched.contains(iova));
        let allowed: BTreeSet<u64> = touched.flat_map(|k| m.led[k as usize].clone()).collect();
        prop_assert!(
            found.is_subset(&allowed),
            "{:?} is more than {:?}",
            found,
            allowed
        );
        m.written.clear();
        // Nobody asks for what the view does not map.
        let (logged, mapped) = (&m.foreign_log, &m.foreign_map);
        m.touched
            .retain(|k| logged.contains(k) || mapped.contains(k));
        // After a failure the view remembers all until a log was read.
        for iova in (0..IOVAS + 8).filter(|_| log.is_none()) {
            m.led[iova as usize] = m.page(iova).into_iter().collect();
        }
        Ok(())
    }

    fn step(&mut self, op: Op) -> Result<(), TestCaseError> {
        match op {
            Op::Map { iova, gpa, n } => self.map(iova, gpa, n)?,
            Op::Unmap { iova, n } => self.unmap(iova, n)?,
            Op::Mark { iova, n } => {
                let hit = (iova..iova + n).all(|iova| self.m.page(iova).is_some());
                let marked = self.domain.mark(iova * PAGE + 5, (n - 1) * PAGE + 1);
                prop_assert_eq!(marked.is_ok(), hit);
                (iova..iova + n).for_each(|iova| self.m.write(iova));
            }
            Op::Write { iova, known } => {
                if let Some([ours, other]) = &self.devices {
                    let device = if known { ours } else { other };
                    let written = device.write(iova * PAGE, &[1]);
                    let mapped = self.m.in_container(iova);
                    // Only the domain's device is told of what the view does not map.
                    let ok = mapped && (!known || self.m.page(iova).is_some());
                    prop_assert_eq!(written.is_ok(), ok, "{:?}", written);
                    self.m.write(iova);
                }
            }
            Op::Log { iova } => {
                if let Some(log) = &self.log {
                    let mapped = log.mark(iova * PAGE, PAGE).is_ok();
                    let m = &self.m;
                    let known = m.page(iova).is_some() || m.foreign_log.contains(&iova);
                    prop_assert_eq!(mapped, known);
                    self.m.write(iova);
                }
            }
            Op::Pin { iova } => {
                if let Some([_, device]) = &self.devices {
                    let guard = device.pin(iova * PAGE, 1, RW);
                    prop_assert_eq!(guard.is_ok(), self.m.in_container(iova));
                    if let Ok(guard) = guard {
                        self.pins.push(guard);
                        self.m.pins.insert(iova);
                    }
                }
            }
            Op::Unpin => {
                // Guards whose pages are gone are dropped as well.
                self.pins.clear();
                for pin in std::mem::take(&mut self.m.pins) {
                    self.m.write(pin);
                }
            }
            Op::Obey(obey) => self.obey.store(obey, Ordering::Relaxed),
            Op::ForeignLog { iova } => {
                if let Some(log) = &self.log {
                    match self.m.foreign_log.remove(&iova) {
                        true => log.remove_range(iova * PAGE, PAGE).unwrap(),
                        false => {
                            if log.add_range(iova * PAGE, PAGE).is_ok() {
                                self.m.foreign_log.insert(iova);
                            }
                        }
                    }
                }
            }
            Op::ForeignMap { iova } => {
                if let Some(container) = &self.container {
                    let host = self.tracker.slots()[0].host.unwrap();
                    // SAFETY: the memory is leaked, and nobody has a reference to it.
                    if unsafe { container.map_process(iova * PAGE, host, PAGE, RW) }.is_ok() {
                        self.m.foreign_map.insert(iova);
                    }
                }
            }
            Op::Take { off } => self.take(off)?,
        }
        self.agree()
    }

    /// The view, the log and the container have what the model has.
    fn agree(&self) -> Result<(), TestCaseError> {
        for iova in 0..IOVAS + 8 {
            let page = self.m.page(iova);
            let view = self.domain.view().translate(iova * PAGE);
            prop_assert_eq!(view, page.map(|page| page * PAGE));
            if let Some(log) = &self.log {
                let mapped = page.is_some() || self.m.foreign_log.contains(&iova);
                prop_assert_eq!(log.range(iova * PAGE).is_some(), mapped);
            }
            if let Some([_, device]) = &self.devices {
                let read = device.read(iova * PAGE, &mut [0]);
                prop_assert_eq!(read.is_ok(), self.m.in_container(iova));
            }
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]
    #[test]
    fn any_run_agrees_with_sets_of_pages(
        with in any::<(bool, bool)>(),
        ops in vec(ops(), 1..60),
    ) {
        let mut world = World::new(with.0, with.1);
        for op in ops {
            world.step(op)?;
        }
        world.step(Op::Take { off: false })?;
        world.step(Op::Take { off: false })?;
    }
}
