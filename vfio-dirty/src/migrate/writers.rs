// SPDX-License-Identifier: MIT OR Apache-2.0
//! The threads that write the guest's memory until they are paused.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::guest::{Guest, Writer, PAGE};
use crate::failure::{cannot, Failure};

/// Something that writes guest memory. Both calls tell how many pages they wrote.
pub(super) trait Work: Send {
    /// Writes once.
    fn step(&mut self) -> Result<u64, Failure>;

    /// Completes what is on its way when the guest is paused: writes that only the last round of
    /// this writer's own tracker can find.
    fn drain(&mut self) -> Result<u64, Failure> {
        let mut pages = 0;
        for _ in 0..16 {
            pages += self.step()?;
        }
        Ok(pages)
    }
}

/// What a thread gives back: devices stay open, and their pages pinned, beyond the pause.
type Outcome = (Box<dyn Work>, Result<u64, Failure>);

pub(super) struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Outcome>>,
    paused: Vec<Box<dyn Work>>,
}

impl Writers {
    /// Starts a thread for each of `works`, each writing about `rate` pages a second.
    pub(super) fn start(works: Vec<Box<dyn Work>>, rate: u32) -> Result<Self, Failure> {
        let mut writers = Self {
            stop: Arc::default(),
            threads: Vec::new(),
            paused: Vec::new(),
        };
        for mut work in works {
            let stop = Arc::clone(&writers.stop);
            let body = move || {
                let result = keep_writing(&mut *work, rate, &stop);
                (work, result)
            };
            let thread = thread::Builder::new().spawn(body);
            writers
                .threads
                .push(thread.map_err(cannot("start a writer thread"))?);
        }
        Ok(writers)
    }

    /// Stops every writer for good and tells how many pages they wrote.
    pub(super) fn pause(&mut self) -> Result<u64, Failure> {
        self.stop.store(true, Ordering::Relaxed);
        let mut pages = 0;
        for thread in self.threads.drain(..) {
            let (work, result) = thread
                .join()
                .map_err(|_| Failure::Runtime("a writer thread panicked".into()))?;
            self.paused.push(work);
            pages += result?;
        }
        Ok(pages)
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

fn keep_writing(work: &mut dyn Work, rate: u32, stop: &AtomicBool) -> Result<u64, Failure> {
    let start = Instant::now();
    let mut pages = 0;
    let mut forgiven = 0; // pages it was too slow for
    while !stop.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_secs_f64() * f64::from(rate)) as u64;
        let late = due.saturating_sub(pages + forgiven);
        if late == 0 {
            thread::sleep(Duration::from_micros(500));
            continue;
        }
        forgiven += late.saturating_sub(u64::from(rate) / 20);
        pages += work.step()?;
    }
    Ok(pages + work.drain()?)
}

/// A CPU: short writes at random places.
pub(super) struct Cpu {
    guest: Arc<Guest>,
    random: SmallRng,
}

impl Cpu {
    pub(super) fn new(guest: &Arc<Guest>) -> Self {
        Self {
            guest: Arc::clone(guest),
            random: SmallRng::from_os_rng(),
        }
    }
}

impl Work for Cpu {
    fn step(&mut self) -> Result<u64, Failure> {
        let block = self.guest.any_block(Writer::Cpu, &mut self.random);
        let page = self.random.random_range(block);
        let bytes: [u8; 64] = self.random.random();
        let offset = self.random.random_range(0..=PAGE - bytes.len() as u64);
        self.guest
            .write_by_cpu(Writer::Cpu, page * PAGE + offset, &bytes)
            .map_err(cannot("write guest memory"))?;
        Ok(1)
    }
}
