// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices that the guest knows nothing of: each maps, writes, marks and unmaps
//! a virtual IOMMU of its own as fast as it can.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use adapter_user::device_log::DeviceLog;
use adapter_user::guest::{Harvest, IovaView, SourceError, Tracker};
use adapter_user::{Extent, PageSize, TrackError};
use rand::{rngs::SmallRng, Rng, SeedableRng};
use vm_memory::{Bytes, GuestAddress};

use super::guest::{HAMMERED, HAMMERED_PAGES, PAGE};
use super::machine::{DeviceMemory, Machine};
use super::Result;

/// Windows of a hammer, from IOVA 0 on.
const WINDOWS: u64 = 64;
/// Distance of IOVAs whose mapping is gone before the mark.
const LATE: u64 = 1 << 40;

pub(super) struct Hammers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
    /// Mappings made, by all of them.
    maps: Arc<AtomicU64>,
    pub(super) logs: Vec<DeviceLog>,
}

/// How a hammer's writes become known.
#[derive(Clone)]
enum Kind {
    /// It marks, before or after the unmap.
    Marks,
    /// It has a log of its whole aperture.
    Aperture(DeviceLog),
    /// Its log's ranges follow the mappings; the lock keeps the two in step.
    Ranges(DeviceLog, Arc<Mutex<Vec<u64>>>),
}

struct Hammer {
    kind: Kind,
    view: IovaView,
    memory: Arc<DeviceMemory>,
    gpa: u64,
    random: SmallRng,
    /// Where each window leads, if it is mapped.
    windows: Vec<Option<u64>>,
}

impl Hammers {
    pub(super) fn start(machine: &Machine, count: u64) -> Result<Hammers> {
        let mut hammers = Hammers {
            stop: Arc::default(),
            threads: Vec::new(),
            maps: Arc::default(),
            logs: Vec::new(),
        };
        for index in 0..count {
            let log = DeviceLog::new(None);
            let kind = match index % 4 {
                1 => Kind::Aperture(log.clone()),
                3 => Kind::Ranges(log.clone(), Arc::default()),
                _ => Kind::Marks,
            };
            match &kind {
                Kind::Aperture(_) => log.add_range(0, WINDOWS * PAGE)?,
                Kind::Marks | Kind::Ranges(..) => {}
            }
            hammers.logs.push(log);
            let mut hammer = Hammer {
                view: machine.tracker.iova_view(),
                kind,
                memory: Arc::clone(&machine.device_memory),
                gpa: HAMMERED + index * HAMMERED_PAGES * PAGE,
                random: SmallRng::seed_from_u64(index),
                windows: vec![None; WINDOWS as usize],
            };
            hammer.add_source(&machine.tracker);
            let (stop, maps) = (Arc::clone(&hammers.stop), Arc::clone(&hammers.maps));
            hammers.threads.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    hammer.step()?;
                    maps.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            }));
        }
        Ok(hammers)
    }

    /// Stops them and tells how many mappings they made.
    pub(super) fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| "a hammer broke")??;
        }
        Ok(self.maps.load(Ordering::Relaxed))
    }
}

impl Hammer {
    /// Gives a window another page, after and before a write.
    fn step(&mut self) -> Result<()> {
        let window = self.random.random_range(0..WINDOWS);
        let iova = window * PAGE;
        if let Some(gpa) = self.windows[window as usize].take() {
            self.write(gpa)?;
            match &self.kind {
                Kind::Marks => {
                    // A device that is slow to tell: its mapping is gone.
                    let mapping = self.view.map(iova + LATE, gpa, PAGE)?;
                    self.view.unmap(iova + LATE, PAGE)?;
                    mapping.mark(iova + LATE, PAGE)?;
                }
                Kind::Aperture(log) => allow_off(log.mark(iova, PAGE))?,
                Kind::Ranges(log, live) => {
                    allow_off(log.mark(iova, PAGE))?;
                    let mut live = live.lock().unwrap_or_else(PoisonError::into_inner);
                    // A log keeps no range that goes while it is off, and may
                    // be switched on right after that.
                    let keeps = log.is_on();
                    log.remove_range(iova, PAGE)?;
                    live.retain(|at| *at != iova);
                    if keeps {
                        // The last chance to learn what was written there.
                        report(&self.view.harvest(), log, iova, 1)?;
                    }
                }
            }
            self.view.unmap(iova, PAGE)?;
        }
        let gpa = self.gpa + self.random.random_range(0..HAMMERED_PAGES) * PAGE;
        let mapping = self.view.map(iova, gpa, PAGE)?;
        if let Kind::Ranges(log, live) = &self.kind {
            let mut live = live.lock().unwrap_or_else(PoisonError::into_inner);
            log.add_range(iova, PAGE)?;
            live.push(iova);
        }
        self.windows[window as usize] = Some(gpa);
        self.write(gpa)?;
        match &self.kind {
            Kind::Marks => mapping.mark(iova, PAGE)?,
            Kind::Aperture(log) | Kind::Ranges(log, _) => allow_off(log.mark(iova, PAGE))?,
        }
        Ok(())
    }

    fn write(&mut self, gpa: u64) -> Result<()> {
        let at = self.random.random_range(0..PAGE / 8) * 8;
        let value: u64 = self.random.random();
        Ok(self.memory.write_obj(value, GuestAddress(gpa + at))?)
    }

    fn add_source(&self, tracker: &Tracker) {
        let (view, kind) = (self.view.clone(), self.kind.clone());
        tracker.add_source("hammer", move |_| {
            let harvest = view.harvest();
            match &kind {
                Kind::Marks => {}
                Kind::Aperture(log) => report(&harvest, log, 0, WINDOWS)?,
                Kind::Ranges(log, live) => {
                    let live = live.lock().unwrap_or_else(PoisonError::into_inner);
                    for iova in live.iter() {
                        report(&harvest, log, *iova, 1)?;
                    }
                }
            }
            // What was mapped in between was reported when it went.
            harvest.finish();
            Ok(())
        });
    }
}

/// Refused while the log is off: then nobody has asked yet.
fn allow_off(marked: std::result::Result<(), TrackError>) -> Result<()> {
    match marked {
        Err(TrackError::Cause(adapter_user::Error::NotTracking)) => Ok(()),
        other => Ok(other?),
    }
}

/// Harvests some pages of a log, if it is on.
fn report(
    harvest: &Harvest<'_>,
    log: &DeviceLog,
    iova: u64,
    npages: u64,
) -> std::result::Result<(), SourceError> {
    if !log.is_on() {
        return Ok(());
    }
    let mut words = [0; WINDOWS.div_ceil(64) as usize];
    log.report(iova, npages * PAGE, PAGE, &mut words)?;
    let pgsize = PageSize::new(PAGE).ok_or("no page size")?;
    let pages = Extent {
        bit: 0,
        iova,
        npages,
        pgsize,
    };
    Ok(harvest.or(&words, pages)?)
}
