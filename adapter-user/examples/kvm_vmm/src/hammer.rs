// SPDX-License-Identifier: MIT OR Apache-2.0
//! Devices that put load on the tracker, without the guest's knowledge: each
//! maps, writes, marks and unmaps in a virtual IOMMU of its own, at full speed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use adapter_user::device_log::DeviceLog;
use adapter_user::{Domain, Prot, TrackError};
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
const RW: Prot = Prot::READ_WRITE;

pub(crate) struct Hammers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
    /// How many mappings all hammers have made.
    maps: Arc<AtomicU64>,
    pub(crate) logs: Vec<DeviceLog>,
}

/// A device that puts load on the tracker.
struct Hammer {
    domain: Domain,
    /// The log that tells the tracker of its writes. Without one, the hammer marks,
    /// before or after the unmap.
    log: Option<DeviceLog>,
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
            let mut domain = Domain::new(machine.tracker.iova_view());
            let log = (index % 2 == 1).then(|| DeviceLog::new(None));
            if let Some(log) = &log {
                if index % 4 == 1 {
                    log.add_range(0, WINDOWS * PAGE)?; // it does not know its map
                } else {
                    domain = domain.with_log(log.clone());
                }
                let view = domain.view();
                machine.tracker.add_log("hammer", view, 0, log.clone())?;
                hammers.logs.push(log.clone());
            }
            let mut hammer = Hammer {
                domain,
                log,
                memory: Arc::clone(&machine.device_memory),
                gpa: HAMMERED + index * HAMMERED_PAGES * PAGE,
                random: SmallRng::seed_from_u64(index),
                windows: vec![None; WINDOWS as usize],
            };
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
            if let Some(log) = &self.log {
                allow_off(log.mark(iova, PAGE))?;
            } else {
                // A slow device marks when its mapping is gone already.
                let mapping = self.domain.map(iova + LATE, gpa, PAGE, RW)?;
                self.domain.unmap(iova + LATE, PAGE)?;
                mapping.mark(iova + LATE, PAGE)?;
            }
            self.domain.unmap(iova, PAGE)?;
        }
        let gpa = self.gpa + self.random.random_range(0..HAMMERED_PAGES) * PAGE;
        let mapping = self.domain.map(iova, gpa, PAGE, RW)?;
        self.windows[window as usize] = Some(gpa);
        self.write(gpa)?;
        match &self.log {
            Some(log) => allow_off(log.mark(iova, PAGE)),
            None => Ok(mapping.mark(iova, PAGE)?),
        }
    }

    fn write(&mut self, gpa: u64) -> Result<()> {
        let at = self.random.random_range(0..PAGE / 8) * 8;
        let value: u64 = self.random.random();
        Ok(self.memory.write_obj(value, GuestAddress(gpa + at))?)
    }
}

/// Accepts that a log refuses marks while it is off; nobody needs them then.
fn allow_off(marked: std::result::Result<(), TrackError>) -> Result<()> {
    match marked {
        Err(TrackError::Cause(adapter_user::Error::NotTracking)) => Ok(()),
        other => Ok(other?),
    }
}
