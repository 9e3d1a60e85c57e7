// SPDX-License-Identifier: MIT OR Apache-2.0
//! The process that migrates: a VMM with a device in each of two servers.

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use adapter_user::guest::{IovaView, Report, Tracker};
use adapter_user::vfio_user::{Client, ClientError, ClientOptions, DmaMemory};
use adapter_user::{DirtyBits, Errno, GuestMemory, PageSize, Prot};
use dirty_core::migration::State;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use crate::registers::*;

const PAGE: u64 = 4096;
/// Bytes of a window, and half the distance between two.
const WINDOW: u64 = 1 << 20;
const WINDOWS: u64 = 8;
/// Writes a second: enough for some thousand dirty pages in a round, and so few that most pages
/// are clean in each.
const WRITES_A_SECOND: u64 = 150_000;
const ROUNDS: u32 = 8;
/// How long a round waits for writes.
const PAUSE: Duration = Duration::from_millis(20);

pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What a run is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Bytes of guest memory.
    pub(crate) memory: u64,
    /// Whether the client lets the device log.
    pub(crate) logs: bool,
    /// Whether windows are mapped and unmapped all the time.
    pub(crate) remaps: bool,
    /// Whether the server reaches memory by messages alone.
    pub(crate) messages: bool,
}

/// What came of a migration that ran to its end.
pub(crate) struct Outcome {
    /// Pages that differ.
    pub(crate) stale: u64,
    /// Writes that the device made, and pages that the reports had.
    pub(crate) writes: u64,
    pub(crate) reported: u64,
    pub(crate) remaps: u64,
    pub(crate) downtime: Duration,
}

/// The guest's memory as the server reaches it by messages.
struct Messages {
    memory: Arc<GuestMemory>,
    bits: DirtyBits,
}

impl DmaMemory for Messages {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        let read = self.memory.read(iova, data);
        read.map_err(|_| Errno::EFAULT)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        let written = self.memory.write(iova, data);
        written.map_err(|_| Errno::EFAULT)?;
        let marked = self.bits.mark(iova, data.len() as u64);
        marked.map_err(|_| Errno::EFAULT)
    }
}

/// A server's device.
struct Device(Client);

impl Device {
    fn connect(path: &str, memory: &Arc<GuestMemory>, bits: DirtyBits) -> Result<Self, Failure> {
        let memory = Messages {
            memory: Arc::clone(memory),
            bits,
        };
        let socket = UnixStream::connect(path)?;
        let client = Client::connect(socket, memory, ClientOptions::default())?;
        client.write_region(7, 4, &[6, 0])?; // memory and bus master
        Ok(Device(client))
    }

    fn map_ram(&self, memory: &GuestMemory, plan: &Plan) -> Result<(), ClientError> {
        let file = (!plan.messages).then(|| (memory.as_fd(), 0));
        self.0.map(0, memory.len(), Prot::READ_WRITE, file)
    }

    fn register(&self, offset: u64) -> Result<u64, ClientError> {
        let mut bytes = [0; 8];
        self.0.read_region(0, offset, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn set(&self, offset: u64, value: u64) -> Result<(), ClientError> {
        self.0.write_region(0, offset, &value.to_le_bytes())
    }

    /// Lets the device write all over the IOVAs below `end`.
    fn storm(&self, end: u64, seed: u64) -> Result<(), Failure> {
        for (register, value) in [
            (IOVA, 0),
            (STRIDE, PAGE / 2),
            (COUNT, end / (PAGE / 2)),
            (LENGTH, 64),
            (RATE, WRITES_A_SECOND),
            (SEED, seed),
            (COMMAND, STREAM),
        ] {
            self.set(register, value)?;
        }
        match self.register(STATUS)? {
            DONE => Ok(()),
            status => Err(format!("the device's status is {status}").into()),
        }
    }
}

/// Windows of IOVA, which come and go and lead to other memory each time.
struct Windows {
    device: Client,
    view: IovaView,
    memory: Arc<GuestMemory>,
    /// Where each leads to, if it is mapped.
    mapped: Vec<Option<u64>>,
    random: SmallRng,
}

impl Windows {
    fn iova(&self, number: usize) -> u64 {
        self.memory.len() + (2 * number as u64 + 1) * WINDOW
    }

    /// The first IOVA after all of them.
    fn end(memory: u64) -> u64 {
        memory + 2 * WINDOWS * WINDOW
    }

    /// Unmaps a window if it is mapped, and maps it to another place.
    fn change(&mut self) -> Result<(), Failure> {
        let number = self.random.random_range(0..self.mapped.len());
        let iova = self.iova(number);
        if self.mapped[number].take().is_some() {
            self.device.unmap(iova, WINDOW)?;
            self.view.unmap(iova, WINDOW)?;
        }
        let pages = (self.memory.len() - WINDOW) / PAGE;
        let gpa = self.random.random_range(0..=pages) * PAGE;
        self.view.map(iova, gpa, WINDOW)?;
        let file = Some((self.memory.as_fd(), gpa));
        self.device.map(iova, WINDOW, Prot::READ_WRITE, file)?;
        self.mapped[number] = Some(gpa);
        Ok(())
    }

    /// Changes windows until `stop`. Returns how often.
    fn run(mut self, stop: &AtomicBool) -> Result<u64, Failure> {
        let mut changes = 0;
        while !stop.load(Ordering::Relaxed) {
            self.change()?;
            changes += 1;
            thread::sleep(Duration::from_micros(500));
        }
        Ok(changes)
    }
}

/// Migrates from one server to another. Calls `watch` with both clients as soon as they are there.
pub(crate) fn migrate(
    source: &str,
    destination: &str,
    plan: &Plan,
    seed: u64,
    watch: impl FnOnce([Client; 2]),
) -> Result<Outcome, Failure> {
    let from = Arc::new(GuestMemory::new(plan.memory)?);
    let to = Arc::new(GuestMemory::new(plan.memory)?);
    let base = PageSize::new(PAGE).ok_or("no page size")?;
    let tracker = Tracker::new(None);
    let bits = tracker.add_slot(0, 0, None, plan.memory)?;
    let source = Device::connect(source, &from, bits)?;
    // What the VMM writes there is nobody's concern.
    let unused = DirtyBits::new(plan.memory, base)?;
    let destination = Device::connect(destination, &to, unused)?;
    watch([source.0.clone(), destination.0.clone()]);
    source.map_ram(&from, plan)?;
    destination.map_ram(&to, plan)?;

    let view = tracker.iova_view();
    view.map(0, 0, plan.memory)?;
    if plan.logs {
        // In this order: what the device writes before the tracker starts is in the first copy.
        source.0.start_logging(&[], base)?;
        tracker.add_log("storm", &view, 0, source.0.log())?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let remapper = plan.remaps.then(|| {
        let windows = Windows {
            device: source.0.clone(),
            view: view.clone(),
            memory: Arc::clone(&from),
            mapped: vec![None; WINDOWS as usize],
            random: SmallRng::seed_from_u64(seed),
        };
        let stop = Arc::clone(&stop);
        thread::spawn(move || windows.run(&stop))
    });
    source.storm(Windows::end(plan.memory), seed)?;
    thread::sleep(PAUSE);
    tracker.start()?;

    let all = plan.memory / PAGE;
    let mut outcome = Outcome {
        stale: 0,
        writes: 0,
        reported: 0,
        remaps: 0,
        downtime: Duration::ZERO,
    };
    let mut report = Report::new();
    copy(&from, &to, 0, plan.memory)?;
    for _ in 0..ROUNDS {
        // Nobody calls the destination's device before the end.
        if let Some(cause) = destination.0.ended() {
            return Err(cause.into());
        }
        thread::sleep(PAUSE);
        outcome.reported += round(&tracker, &mut report, &from, &to, all)?;
    }

    stop.store(true, Ordering::Relaxed);
    let paused = Instant::now();
    if let Some(remapper) = remapper {
        outcome.remaps = remapper.join().map_err(|_| "the remapper panicked")??;
    }
    source.0.set_state(State::StopCopy)?;
    outcome.reported += round(&tracker, &mut report, &from, &to, all)?;
    let mut state = vec![0; 1 << 20];
    let size = source.0.read_state(&mut state)?;
    if size == state.len() {
        return Err("the device's state is larger than 1 MiB".into());
    }
    destination.0.set_state(State::Resuming)?;
    destination.0.write_state(&state[..size])?;
    destination.0.set_state(State::Stop)?;
    outcome.downtime = paused.elapsed();
    tracker.stop();
    if plan.logs {
        source.0.stop_logging()?;
    }

    outcome.stale = compare(&from, &to)?;
    outcome.writes = source.register(SEQUENCE)?;
    let moved = destination.register(SEQUENCE)?;
    if moved != outcome.writes {
        return Err(format!("the device made {} writes, not {moved}", outcome.writes).into());
    }
    // The device goes on where it was.
    destination.0.set_state(State::Running)?;
    let started = Instant::now();
    while destination.register(SEQUENCE)? == moved {
        if started.elapsed() > Duration::from_secs(60) {
            return Err("the device at the destination does not write".into());
        }
    }
    Ok(outcome)
}

/// Takes a report, and copies its pages. Returns how many it had.
fn round(
    tracker: &Tracker,
    report: &mut Report,
    from: &GuestMemory,
    to: &GuestMemory,
    all: u64,
) -> Result<u64, Failure> {
    report.clear(); // its pages have arrived
    if let Err(failed) = tracker.take(report) {
        // What the log had is unknown, so no page may count as sent.
        assert_eq!(report.pages(), all, "a failed take has not every page");
        return Err(format!("{failed}: {}", failed.cause).into());
    }
    for range in report.ranges(PAGE)? {
        copy(from, to, range.gpa, range.size)?;
    }
    Ok(report.pages())
}

fn copy(from: &GuestMemory, to: &GuestMemory, at: u64, size: u64) -> Result<(), Failure> {
    let mut bytes = vec![0; 1 << 20];
    let end = at + size;
    for at in (at..end).step_by(bytes.len()) {
        let len = (bytes.len() as u64).min(end - at) as usize;
        let bytes = &mut bytes[..len];
        from.read(at, bytes)?;
        to.write(at, bytes)?;
    }
    Ok(())
}

/// How many pages differ.
fn compare(one: &GuestMemory, other: &GuestMemory) -> Result<u64, Failure> {
    let (mut ours, mut theirs) = ([0; PAGE as usize], [0; PAGE as usize]);
    let mut stale = 0;
    for at in (0..one.len()).step_by(PAGE as usize) {
        one.read(at, &mut ours)?;
        other.read(at, &mut theirs)?;
        stale += u64::from(ours != theirs);
    }
    Ok(stale)
}
