// SPDX-License-Identifier: MIT OR Apache-2.0
//! The threads that write the guest's memory until they are paused.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::guest::{Guest, Writer, PAGE};
use crate::failure::{cannot, Failure};

/// Something that writes guest memory.
pub(super) trait Work: Send {
    /// Writes once.
    fn step(&mut self) -> Result<Written, Failure>;

    /// Completes what is in flight when the guest is paused. Only the last round can find these
    /// writes, and only if the tracker of this writer works.
    fn drain(&mut self) -> Result<Written, Failure> {
        let mut written = Written::default();
        for _ in 0..16 {
            written += self.step()?;
        }
        Ok(written)
    }

    /// Moves what the writer has to the destination, after it was drained and all pages were sent.
    fn move_state(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

/// What a writer has done.
#[derive(Clone, Copy, Default)]
pub(super) struct Written {
    /// Pages written; a page counts each time.
    pub(super) pages: u64,
    /// Windows unmapped while they were tracked.
    pub(super) unmaps: u64,
}

impl AddAssign for Written {
    fn add_assign(&mut self, other: Self) {
        self.pages += other.pages;
        self.unmaps += other.unmaps;
    }
}

/// What a thread returns. Its device stays open, and its pages stay pinned, after the pause.
type Finished = (Box<dyn Work>, Result<Written, Failure>);

pub(super) struct Writers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Finished>>,
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

    /// Stops every writer for good and returns what they did.
    pub(super) fn pause(&mut self) -> Result<Written, Failure> {
        self.stop.store(true, Ordering::Relaxed);
        let mut written = Written::default();
        for thread in self.threads.drain(..) {
            let (work, result) = thread
                .join()
                .map_err(|_| Failure::Runtime("a writer thread panicked".into()))?;
            self.paused.push(work);
            written += result?;
        }
        Ok(written)
    }

    /// Moves the states of the paused writers to the destination.
    pub(super) fn move_states(&mut self) -> Result<(), Failure> {
        self.paused
            .iter_mut()
            .try_for_each(|work| work.move_state())
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

fn keep_writing(work: &mut dyn Work, rate: u32, stop: &AtomicBool) -> Result<Written, Failure> {
    let start = Instant::now();
    let mut written = Written::default();
    let mut skipped = 0; // pages that it was too slow to write
    while !stop.load(Ordering::Relaxed) {
        let due = (start.elapsed().as_secs_f64() * f64::from(rate)) as u64;
        let late = due.saturating_sub(written.pages + skipped);
        if late == 0 {
            thread::sleep(Duration::from_micros(500));
            continue;
        }
        skipped += late.saturating_sub(u64::from(rate) / 20);
        written += work.step()?;
    }
    written += work.drain()?;
    Ok(written)
}

/// A CPU: short writes at random addresses.
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
    fn step(&mut self) -> Result<Written, Failure> {
        let block = self.guest.any_block(Writer::Cpu, &mut self.random);
        let page = self.random.random_range(block);
        let bytes: [u8; 64] = self.random.random();
        let offset = self.random.random_range(0..=PAGE - bytes.len() as u64);
        self.guest
            .write_by_cpu(Writer::Cpu, page * PAGE + offset, &bytes)
            .map_err(cannot("write guest memory"))?;
        Ok(Written::pages(1))
    }
}

impl Written {
    pub(super) fn pages(pages: u64) -> Self {
        Self { pages, unmaps: 0 }
    }
}
