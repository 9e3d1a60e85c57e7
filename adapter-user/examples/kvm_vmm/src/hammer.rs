// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices that put load on the tracker, without the guest's knowledge: each
//! maps, writes, marks and unmaps in a virtual IOMMU of its own, at full speed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use adapter_user::device_log::DeviceLog;
use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, SourceError, Tracker};
use adapter_user::{Extent, PageSize, TrackError};
use rand::{rngs::SmallRng, Rng, SeedableRng};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{HAMMERED, HAMMERED_PAGES, PAGE};
use crate::machine::Machine;
use crate::memory::DeviceMemory;
use crate::Result;

/// How many windows of one page a hammer has, from IOVA 0 on.
const WINDOWS: u64 = 64;
/// Added to the IOVA of a mapping that is unmapped before the mark.
const LATE: u64 = 1 << 40;

pub(crate) struct Hammers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
    /// How many mappings all hammers have made.
    maps: Arc<AtomicU64>,
    pub(crate) logs: Vec<DeviceLog>,
}

/// How the tracker learns of a hammer's writes.
#[derive(Clone)]
enum Kind {
    /// The hammer marks, before or after the unmap.
    Marks,
    /// The hammer logs writes to its whole aperture.
    Aperture(DeviceLog),
    /// The ranges of the hammer's log follow its mappings. The lock keeps the
    /// two in step.
    Ranges(DeviceLog, Arc<Mutex<Vec<u64>>>),
}

struct Hammer {
    kind: Kind,
    view: IovaView,
    memory: Arc<DeviceMemory>,
    gpa: u64,
    random: SmallRng,
    /// The guest address of each window that is mapped.
    windows: Vec<Option<u64>>,
}

impl Hammers {
    pub(crate) fn start(machine: &Machine, count: u64) -> Result<Hammers> {
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
            hammer.add_log(&machine.tracker)?;
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

    /// Stops the hammers and returns how many mappings they made.
    pub(crate) fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread
                .join()
                .map_err(|_| "the thread of a hammer panicked")??;
        }
        Ok(self.maps.load(Ordering::Relaxed))
    }
}

impl Hammer {
    /// Writes to a window, maps another page there, and writes again.
    fn step(&mut self) -> Result<()> {
        let window = self.random.random_range(0..WINDOWS);
        let iova = window * PAGE;
        if let Some(gpa) = self.windows[window as usize].take() {
            self.write(gpa)?;
            match &self.kind {
                Kind::Marks => {
                    // A slow device marks when its mapping is gone already.
                    let mapping = self.view.map(iova + LATE, gpa, PAGE)?;
                    self.view.unmap(iova + LATE, PAGE)?;
                    mapping.mark(iova + LATE, PAGE)?;
                }
                Kind::Aperture(log) => allow_off(log.mark(iova, PAGE))?,
                Kind::Ranges(log, live) => {
                    allow_off(log.mark(iova, PAGE))?;
                    let mut live = live.lock().unwrap_or_else(PoisonError::into_inner);
                    // A log that is off forgets a removed range at once, and
                    // may be switched on right after. So whether it keeps the
                    // range is asked before the removal.
                    let keeps = log.is_on();
                    log.remove_range(iova, PAGE)?;
                    live.retain(|at| *at != iova);
                    // After the unmap nobody reports this range.
                    let last = if keeps { report(log, iova, 1)? } else { None };
                    if let Some((words, extent)) = last {
                        self.view.unmap_dirty(iova, PAGE, &words, extent)?;
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

    fn add_log(&self, tracker: &Tracker) -> Result<()> {
        let kind = self.kind.clone();
        let read = move |_: &[IovaRange], dirty: &mut DirtyIovas| match &kind {
            Kind::Marks => Ok(()),
            Kind::Aperture(log) => read(log, 0, WINDOWS, dirty),
            // A mapping that came and went meanwhile was reported at its unmap.
            Kind::Ranges(log, live) => {
                let live = live.lock().unwrap_or_else(PoisonError::into_inner);
                live.iter().try_for_each(|iova| read(log, *iova, 1, dirty))
            }
        };
        tracker.add_log("hammer", &self.view, 0, read)?;
        Ok(())
    }
}

/// Accepts that a log refuses marks while it is off; nobody needs them then.
fn allow_off(marked: std::result::Result<(), TrackError>) -> Result<()> {
    match marked {
        Err(TrackError::Cause(adapter_user::Error::NotTracking)) => Ok(()),
        other => Ok(other?),
    }
}

/// Adds what `npages` pages of a log have from `iova` on to `dirty`.
fn read(
    log: &DeviceLog,
    iova: u64,
    npages: u64,
    dirty: &mut DirtyIovas,
) -> std::result::Result<(), SourceError> {
    if let Some((words, extent)) = report(log, iova, npages)? {
        dirty.or_bitmap(&words, extent)?;
    }
    Ok(())
}

/// A bitmap of a hammer's windows.
type Words = [u64; WINDOWS.div_ceil(64) as usize];

/// Reads `npages` pages of a log from `iova` on, if the log is on.
fn report(
    log: &DeviceLog,
    iova: u64,
    npages: u64,
) -> std::result::Result<Option<(Words, Extent)>, SourceError> {
    if !log.is_on() {
        return Ok(None);
    }
    let mut words = Words::default();
    log.report(iova, npages * PAGE, PAGE, &mut words)?;
    let pgsize = PageSize::new(PAGE).ok_or("no page size")?;
    let pages = Extent {
        bit: 0,
        iova,
        npages,
        pgsize,
    };
    Ok(Some((words, pages)))
}
