// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VMM that re-executes itself in the middle of a migration, while a device in another
//! process writes. At the end source and destination are compared byte by byte.
//!
//! Three processes of this program: this one has the device, its log and the real IOMMU,
//! and it stays. The VMM is started by it, and replaces itself by exec(2). Guest memory,
//! the destination's memory and the saved tracker are memfds, which the VMM keeps open.
//! The VMM talks to the device through a socket that is its standard input.
//!
//! Controls do the same and leave something out. They must lose pages.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, Report, Tracker};
use adapter_user::{DirtyBits, GuestMemory};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::fs::{ftruncate, memfd_create, MemfdFlags};

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

const PAGE: u64 = 4096;
/// Two slots of 2 MiB each.
const SLOT: u64 = 512 * PAGE;
const MEMORY: u64 = 2 * SLOT;
/// The device sees windows of 16 pages. Window k is at IOVA k << 20.
const WINDOW: u64 = 16 * PAGE;
const WINDOWS: u64 = 6;
/// The guest does not move this one before the upgrade.
const STAYS: u64 = (WINDOWS - 1) << 20;
/// The exit status of a VMM whose destination differs.
const DIFFERENT: i32 = 3;

/// What a VMM leaves out.
const WHOLE: &str = "nothing";
const CONTROLS: [&str; 3] = ["restore", "report", "log"];

fn main() -> ExitCode {
    let args: Vec<String> = env::args().collect();
    let result = match args.get(1).map(String::as_str) {
        Some("before") => before(&args[2..]),
        Some("after") => after(&args[2..]),
        _ => parent(),
    };
    match result {
        Ok(status) => ExitCode::from(status as u8),
        Err(cause) => {
            eprintln!("{cause}");
            ExitCode::FAILURE
        }
    }
}

/// Runs migrations of several seeds, and the controls.
fn parent() -> Outcome<i32> {
    for seed in 0..4 {
        match migrate(WHOLE, seed)? {
            0 => println!("seed {seed}: source and destination are equal"),
            status => return Err(format!("seed {seed}: the VMM ended with {status}").into()),
        }
    }
    for control in CONTROLS {
        match migrate(control, 1)? {
            DIFFERENT => println!("without {control}: pages are lost, as they must be"),
            status => {
                return Err(format!("without {control}: the VMM ended with {status}").into());
            }
        }
    }
    Ok(0)
}

/// A file of `size` bytes in memory, which an exec does not close.
fn memfd(size: u64) -> Outcome<OwnedFd> {
    let file = memfd_create("live-upgrade", MemfdFlags::empty())?;
    ftruncate(&file, size)?;
    Ok(file)
}

/// Runs a VMM that leaves something out, and the device beside it. Returns its status.
fn migrate(without: &str, seed: u64) -> Outcome<i32> {
    let (guest, destination) = (memfd(MEMORY)?, memfd(MEMORY)?);
    let (ours, theirs) = UnixStream::pair()?;
    let numbers = [&guest, &destination].map(|file| file.as_raw_fd().to_string());
    let mut vmm = Command::new(env::current_exe()?)
        .arg("before")
        .args(numbers)
        .args([without, &seed.to_string()])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()?;
    let device = Arc::new(Mutex::new(Device {
        memory: GuestMemory::from_fd(guest)?,
        iommu: BTreeMap::new(),
        log: BTreeSet::new(),
        on: true,
        rng: StdRng::seed_from_u64(seed),
    }));
    let writer = Arc::clone(&device);
    let writer = thread::spawn(move || loop {
        if !writer.lock().map_err(|_| "a lock")?.write()? {
            return Outcome::Ok(());
        }
        thread::sleep(Duration::from_micros(20));
    });
    let served = serve(&device, ours);
    device.lock().map_err(|_| "a lock")?.on = false;
    writer.join().map_err(|_| "the device panicked")??;
    served?;
    let status = vmm.wait()?.code();
    status.ok_or_else(|| "the VMM was killed".into())
}

/// A device behind an IOMMU that logs by IOVA.
struct Device {
    memory: GuestMemory,
    /// First IOVA and guest address of each window.
    iommu: BTreeMap<u64, u64>,
    /// The dirty pages of IOVAs. A page stays when its window goes.
    log: BTreeSet<u64>,
    on: bool,
    rng: StdRng,
}

impl Device {
    /// Writes each page of a window.
    fn write_all(&mut self, iova: u64) -> Outcome<()> {
        let gpa = *self.iommu.get(&iova).ok_or("no window")?;
        for page in (0..WINDOW).step_by(PAGE as usize) {
            let bytes: [u8; 8] = self.rng.random();
            self.memory.write(gpa + page, &bytes)?;
            self.log.insert(iova + page);
        }
        Ok(())
    }

    /// Writes somewhere, if the device is on. Returns whether it is.
    fn write(&mut self) -> Outcome<bool> {
        if !self.on || self.iommu.is_empty() {
            return Ok(self.on);
        }
        let window = self.rng.random_range(0..self.iommu.len());
        let (iova, gpa) = self.iommu.iter().nth(window).ok_or("no window")?;
        let at = self.rng.random_range(0..WINDOW / 8) * 8;
        let bytes: [u8; 8] = self.rng.random();
        self.memory.write(gpa + at, &bytes)?;
        self.log.insert((iova + at) / PAGE * PAGE);
        Ok(true)
    }
}

/// Answers the VMM until it ends.
fn serve(device: &Mutex<Device>, mut socket: UnixStream) -> Outcome<()> {
    for line in BufReader::new(socket.try_clone()?).lines() {
        let line = line?;
        let mut words = line.split(' ');
        let what = words.next().ok_or("no word")?;
        let numbers = words.map(str::parse).collect::<Result<Vec<u64>, _>>()?;
        let mut device = device.lock().map_err(|_| "a lock")?;
        let answer = match (what, &numbers[..]) {
            ("map", [iova, gpa]) => {
                device.iommu.insert(*iova, *gpa);
                device.write_all(*iova)?;
                Vec::new()
            }
            ("write", [iova]) => {
                device.write_all(*iova)?;
                Vec::new()
            }
            ("unmap", [iova]) => {
                device.iommu.remove(iova);
                Vec::new()
            }
            ("log", [iova, size]) => {
                let hit = device.log.range(iova..&(iova + size)).copied();
                let hit: Vec<u64> = hit.collect();
                device.log.retain(|page| !hit.contains(page));
                hit
            }
            ("windows", []) => device.iommu.iter().flat_map(|(a, b)| [*a, *b]).collect(),
            ("stop", []) => {
                device.on = false;
                Vec::new()
            }
            _ => return Err(format!("an unknown request: {line}").into()),
        };
        let answer: Vec<String> = answer.iter().map(u64::to_string).collect();
        writeln!(socket, "{}", answer.join(" "))?;
    }
    Ok(())
}

/// The VMM's end of the device.
#[derive(Clone)]
struct Remote(Arc<Mutex<BufReader<UnixStream>>>);

impl Remote {
    /// The socket is standard input, before and after the exec.
    fn new() -> Outcome<Remote> {
        let socket = rustix::io::dup(std::io::stdin())?;
        Ok(Remote(Arc::new(Mutex::new(BufReader::new(socket.into())))))
    }

    fn ask(&self, request: &str) -> Outcome<Vec<u64>> {
        let mut socket = self.0.lock().map_err(|_| "a lock")?;
        writeln!(socket.get_mut(), "{request}")?;
        let mut line = String::new();
        socket.read_line(&mut line)?;
        let numbers = line.split_whitespace().map(str::parse);
        Ok(numbers.collect::<Result<Vec<u64>, _>>()?)
    }

    /// The device's log, as a VMM asks a kernel or a vfio-user server for it.
    fn log(&self) -> impl FnMut(&[IovaRange], &mut DirtyIovas) -> Outcome<()> + Send + 'static {
        let remote = self.clone();
        move |ask, dirty| {
            for range in ask {
                for page in remote.ask(&format!("log {} {}", range.iova, range.size))? {
                    dirty.or_range(page, PAGE)?;
                }
            }
            Ok(())
        }
    }
}

struct Vmm {
    guest: GuestMemory,
    destination: GuestMemory,
    tracker: Tracker,
    bits: Vec<DirtyBits>,
    remote: Remote,
    rng: StdRng,
}

/// A file that was open before the exec.
fn inherited(number: &str) -> Outcome<OwnedFd> {
    let number = number.parse()?;
    // SAFETY: the process before left it open for this one, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

impl Vmm {
    /// A VMM whose tracker has the slots, is off and has no source.
    fn new(guest: OwnedFd, destination: OwnedFd, seed: u64) -> Outcome<Vmm> {
        let tracker = Tracker::new(None);
        let slots = [0, 1].map(|id| tracker.add_slot(id, u64::from(id) * SLOT, None, SLOT));
        Ok(Vmm {
            guest: GuestMemory::from_fd(guest)?,
            destination: GuestMemory::from_fd(destination)?,
            bits: slots.into_iter().collect::<Result<_, _>>()?,
            tracker,
            remote: Remote::new()?,
            rng: StdRng::seed_from_u64(seed),
        })
    }

    /// The VMM writes a page and marks it.
    fn write(&mut self, page: u64) -> Outcome<()> {
        let bytes: [u8; 16] = self.rng.random();
        let at = page * PAGE + self.rng.random_range(0..PAGE - 16);
        self.guest.write(at, &bytes)?;
        self.bits[(at / SLOT) as usize].mark(at % SLOT, 16)?;
        Ok(())
    }

    /// Some writes, and the guest maps a window elsewhere.
    fn run(&mut self, view: &IovaView) -> Outcome<()> {
        for _ in 0..20 {
            let page = self.rng.random_range(0..MEMORY / PAGE);
            self.write(page)?;
        }
        let iova = self.rng.random_range(0..WINDOWS - 1) << 20;
        self.unmap(view, iova)?;
        self.map(view, iova)
    }

    fn map(&mut self, view: &IovaView, iova: u64) -> Outcome<()> {
        let gpa = self.rng.random_range(0..(MEMORY - WINDOW) / PAGE) * PAGE;
        view.map(iova, gpa, WINDOW)?;
        self.remote.ask(&format!("map {iova} {gpa}")).map(drop)
    }

    fn unmap(&self, view: &IovaView, iova: u64) -> Outcome<()> {
        self.remote.ask(&format!("unmap {iova}"))?;
        Ok(view.unmap(iova, WINDOW).map(drop)?)
    }

    /// Copies the pages of a report that `wanted` picks.
    fn copy(&self, report: &Report, wanted: impl Fn(u64) -> bool) -> Outcome<()> {
        let mut bytes = [0; PAGE as usize];
        for range in report.ranges(PAGE)? {
            let pages = range.gpa / PAGE..(range.gpa + range.size) / PAGE;
            for page in pages.filter(|page| wanted(*page)) {
                self.guest.read(page * PAGE, &mut bytes)?;
                self.destination.write(page * PAGE, &bytes)?;
            }
        }
        Ok(())
    }

    fn round(&mut self, report: &mut Report) -> Outcome<()> {
        self.tracker.take(report)?;
        self.copy(report, |_| true)?;
        report.clear();
        Ok(())
    }

    /// The number of pages that differ.
    fn differences(&self) -> Outcome<u64> {
        let (mut a, mut b) = ([0; PAGE as usize], [0; PAGE as usize]);
        let mut different = 0;
        for at in (0..MEMORY).step_by(PAGE as usize) {
            self.guest.read(at, &mut a)?;
            self.destination.read(at, &mut b)?;
            different += u64::from(a != b);
        }
        Ok(different)
    }
}

/// The first half of the migration: guest, destination, what is left out, seed.
fn before(args: &[String]) -> Outcome<i32> {
    let [guest, destination, without, seed] = args else {
        return Err("4 arguments".into());
    };
    // Copies, as the numbers themselves are for the next program.
    let [guest_copy, destination_copy] = [guest, destination].map(|number| {
        let file = inherited(number)?;
        let copy = file.try_clone()?;
        std::mem::forget(file);
        Outcome::Ok(copy)
    });
    let mut vmm = Vmm::new(guest_copy?, destination_copy?, seed.parse()?)?;
    let view = vmm.tracker.iova_view();
    for window in 0..WINDOWS {
        vmm.map(&view, window << 20)?;
    }
    vmm.tracker.add_log("device", &view, 0, vmm.remote.log())?;
    vmm.tracker.start()?;
    let mut report = vmm.tracker.report();
    report.set_all();
    vmm.copy(&report, |_| true)?;
    report.clear();
    for _ in 0..5 {
        vmm.run(&view)?;
        vmm.round(&mut report)?;
    }
    // A round of which half has arrived, and then more that no take has seen: marks, what
    // the device wrote through a window that is gone, and through one that stays.
    vmm.run(&view)?;
    for page in 0..8 {
        vmm.write(page * 100)?;
    }
    vmm.tracker.take(&mut report)?;
    vmm.copy(&report, |page| page % 2 == 1)?;
    for page in (1..MEMORY / PAGE).step_by(2) {
        report.discard(page * PAGE, PAGE);
    }
    vmm.unmap(&view, 0)?;
    vmm.map(&view, 0)?;
    vmm.write(1000)?;

    let nothing = Report::new();
    let undelivered = if without == "report" {
        &nothing
    } else {
        &report
    };
    let saved = vmm.tracker.save(undelivered)?;
    let file = memfd(0)?;
    let number = file.as_raw_fd().to_string();
    let mut out = File::from(file);
    out.write_all(&saved)?;
    out.rewind()?;
    std::mem::forget(out);
    // The device goes on writing, also while nobody tracks. Most of these pages are clean
    // in what was saved.
    vmm.remote.ask(&format!("write {STAYS}"))?;
    let failed = Command::new(env::current_exe()?)
        .args(["after", guest, destination, without, seed, &number])
        .exec();
    Err(failed.into())
}

/// The second half: as the first, and the saved tracker.
fn after(args: &[String]) -> Outcome<i32> {
    let [guest, destination, without, seed, saved] = args else {
        return Err("5 arguments".into());
    };
    let seed = seed.parse::<u64>()? + 1000;
    let mut vmm = Vmm::new(inherited(guest)?, inherited(destination)?, seed)?;
    let mut bytes = Vec::new();
    File::from(inherited(saved)?).read_to_end(&mut bytes)?;

    let view = if without == "restore" {
        vmm.tracker.start()?;
        vmm.tracker.iova_view()
    } else {
        let restored = vmm.tracker.restore(&bytes)?;
        restored.view("device").ok_or("no view")?.clone()
    };
    // What the device wrote meanwhile through a window that the guest then moves is told
    // only through the saved mappings.
    let windows = vmm.remote.ask("windows")?;
    for window in windows.chunks_exact(2) {
        match window[0] {
            STAYS => drop(vmm.remote.ask(&format!("unmap {STAYS}"))?),
            iova => drop(view.map(iova, window[1], WINDOW)?),
        }
    }
    vmm.map(&view, STAYS)?;
    if without == "log" {
        // A log that is started anew has forgotten what was dirty.
        vmm.remote.ask(&format!("log 0 {}", WINDOWS << 20))?;
    }
    vmm.tracker.add_log("device", &view, 0, vmm.remote.log())?;
    let mut report = Report::new();
    vmm.round(&mut report)?;
    for _ in 0..5 {
        vmm.run(&view)?;
        vmm.round(&mut report)?;
    }
    vmm.remote.ask("stop")?;
    vmm.round(&mut report)?;
    let different = vmm.differences()?;
    eprintln!("without {without}: {different} pages differ");
    Ok(if different == 0 { 0 } else { DIFFERENT })
}
