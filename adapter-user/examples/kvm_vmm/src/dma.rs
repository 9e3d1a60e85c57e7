// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device that does DMA behind a virtual IOMMU, in a thread of its own.
//!
//! Device 0 marks what it writes through its mappings. Device 1 keeps a log by
//! IOVA, as VFIO devices do; the tracker reads the log and translates it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{channel, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use adapter_user::device_log::DeviceLog;
use adapter_user::guest::{Mapping, Tracker};
use adapter_user::{Domain, Prot};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{OFFSETS, PAGE, REG_DOORBELL, REG_IOVA, REG_MAP, REG_UNMAP};
use crate::memory::DeviceMemory;
use crate::{Lose, Result};

pub(crate) struct Dma {
    domain: Domain,
    /// The log of device 1.
    pub(crate) log: Option<DeviceLog>,
    /// The IOVA page that REG_MAP and REG_DOORBELL use.
    iova: AtomicU32,
    windows: Mutex<BTreeMap<u64, Mapping>>,
    rung: AtomicU64,
    done: Arc<AtomicU64>,
    queue: Sender<(Mapping, u32)>,
}

impl Dma {
    pub(crate) fn new(
        index: usize,
        tracker: &Tracker,
        memory: &Arc<DeviceMemory>,
        lose: Option<Lose>,
    ) -> Result<Dma> {
        let mut domain = Domain::new(tracker.iova_view());
        let log = (index == 1).then(|| DeviceLog::new(None));
        if let Some(log) = &log {
            domain = domain.with_log(log.clone());
        }
        let done = Arc::new(AtomicU64::new(0));
        let (queue, jobs) = channel::<(Mapping, u32)>();
        let device = Device {
            memory: Arc::clone(memory),
            log: log.clone(),
            marks: lose != Some(Lose::Device),
        };
        let count = Arc::clone(&done);
        thread::spawn(move || {
            for (mapping, value) in jobs {
                device.write(&mapping, value);
                count.fetch_add(1, Ordering::Release);
            }
        });
        if let Some(log) = log.as_ref().filter(|_| lose != Some(Lose::Log)) {
            tracker.add_log("device", domain.view(), 0, log.clone())?;
        }
        Ok(Dma {
            domain,
            log,
            iova: AtomicU32::new(0),
            windows: Mutex::default(),
            rung: AtomicU64::new(0),
            done,
            queue,
        })
    }

    fn windows(&self) -> MutexGuard<'_, BTreeMap<u64, Mapping>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles the guest's write to a register.
    pub(crate) fn written(&self, register: u16, value: u32) -> Result<()> {
        let page = u64::from(value) * PAGE;
        let iova = u64::from(self.iova.load(Ordering::Relaxed)) * PAGE;
        match register {
            REG_IOVA => self.iova.store(value, Ordering::Relaxed),
            REG_MAP => self.map(iova, page)?,
            REG_UNMAP => {
                self.windows().remove(&page);
                self.domain.unmap(page, PAGE)?;
            }
            REG_DOORBELL => {
                let mapping = self.windows().get(&iova).cloned();
                let mapping = mapping.ok_or("the guest rang for a window that is not mapped")?;
                self.rung.fetch_add(1, Ordering::Relaxed);
                self.queue.send((mapping, value))?;
            }
            _ => return Err("the guest wrote an unknown register".into()),
        }
        Ok(())
    }

    fn map(&self, iova: u64, gpa: u64) -> Result<()> {
        let mapping = self.domain.map(iova, gpa, PAGE, Prot::READ_WRITE)?;
        self.windows().insert(iova, mapping);
        Ok(())
    }

    /// How many doorbells the device has served.
    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    /// Waits until every doorbell is served. The guest must be stopped.
    pub(crate) fn drain(&self) {
        while self.done() < self.rung.load(Ordering::Relaxed) {
            thread::yield_now();
        }
    }

    /// The doorbells served, and each window's IOVA and guest address.
    pub(crate) fn state(&self) -> (u64, Vec<(u64, u64)>) {
        let windows = self.windows();
        let windows = windows.values().map(|m| (m.iova(), m.gpa())).collect();
        (self.done(), windows)
    }

    /// Takes over the state of another device.
    pub(crate) fn restore(&self, done: u64, windows: Vec<(u64, u64)>) -> Result<()> {
        self.rung.store(done, Ordering::Relaxed);
        self.done.store(done, Ordering::Release);
        windows
            .into_iter()
            .try_for_each(|(iova, gpa)| self.map(iova, gpa))
    }
}

/// What the device's thread owns.
struct Device {
    memory: Arc<DeviceMemory>,
    log: Option<DeviceLog>,
    marks: bool,
}

impl Device {
    fn write(&self, mapping: &Mapping, value: u32) {
        for offset in OFFSETS {
            let at = GuestAddress(mapping.gpa() + offset);
            self.memory.write_obj(u64::from(value), at).expect("RAM");
        }
        match &self.log {
            // The log refuses marks while it is off; nobody needs them then.
            Some(log) => drop(log.mark(mapping.iova(), PAGE)),
            None if self.marks => mapping.mark(mapping.iova(), PAGE).expect("in the mapping"),
            None => {}
        }
    }
}
