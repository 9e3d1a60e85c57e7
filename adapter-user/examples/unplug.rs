// SPDX-License-Identifier: MIT OR Apache-2.0
//! A live migration in which a VFIO device is unplugged.
//!
//! Two mock devices do DMA by IOVA and keep a DMA log, the guest's driver maps and unmaps
//! their windows in a virtual IOMMU, and the VMM writes too, all while memory is copied
//! round by round. In the middle one device is unplugged. At the end everybody stops, the
//! last round is copied, and source and destination are compared.
//!
//! `cargo run --release -p adapter-user --example unplug` exits with
//! status 0 if they are equal. With `-- --lose` the VMM makes a mistake: it lets go of the
//! device before it asks the log for the last time. Then pages differ, and the status
//! is 1.

use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use adapter_user::device_log::DeviceLog;
use adapter_user::guest::{Report, Source, Tracker};
use adapter_user::{DirtyBits, Domain, Prot};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;
type Memory = GuestMemoryMmap<DirtyBits>;
type Iotlb = [Option<u64>; WINDOWS as usize];

const PAGE: u64 = 4096;
const PAGES: u64 = 16 << 10; // 64 MiB
/// Each writer has pages of its own, so no log tells what another one has lost.
const NIC: Range<u64> = 0..PAGES / 2;
const DISK: Range<u64> = PAGES / 2..3 * PAGES / 4;
const VMM: Range<u64> = 3 * PAGES / 4..PAGES;
/// A device's windows: how many there are, and how many pages each one has.
const WINDOWS: u64 = 8;
const WINDOW: u64 = 16;
/// The IOVA of the first window.
const BASE: u64 = 0xf000_0000;
const ROUNDS: u32 = 8;
const UNPLUG_BEFORE: u32 = 5;

/// What the device's thread shares with the VMM.
struct Shared {
    domain: Domain,
    /// The device's DMA log. A real device has it in its driver.
    log: DeviceLog,
    memory: Memory,
    /// The guest page behind each window: the device's IOTLB.
    iotlb: RwLock<Iotlb>,
    stop: AtomicBool,
    unmaps: AtomicU64,
}

impl Shared {
    /// Writes one page by DMA. Nobody but the device's log knows of it.
    fn dma(&self, window: u64, page: u64, value: u64) -> Result<()> {
        // An unmap waits until the write is done and logged.
        let iotlb = self.iotlb.read().map_err(|_| "a driver panicked")?;
        let Some(first) = iotlb[window as usize] else {
            return Ok(());
        };
        let gpa = GuestAddress((first + page) * PAGE);
        let host = self.memory.get_host_address(gpa)?;
        // SAFETY: the page is mapped as long as `memory`, and aligned. Every access to it
        // is volatile or atomic: those of vm-memory, and this one.
        let word = unsafe { AtomicU64::from_ptr(host.cast()) };
        word.store(value, Ordering::Relaxed);
        Ok(self.log.mark(BASE + (window * WINDOW + page) * PAGE, 8)?)
    }

    /// The device at work. When it is told to stop, it completes what it has.
    fn work(&self) -> Result<()> {
        let mut random = SmallRng::seed_from_u64(PAGES);
        let mut value = 0;
        while !self.stop.load(Ordering::Relaxed) {
            let window = random.random_range(0..WINDOWS);
            value += 1;
            self.dma(window, random.random_range(0..WINDOW), value)?;
            if value % 64 == 0 {
                thread::sleep(Duration::from_micros(200));
            }
        }
        for number in 0..WINDOWS * WINDOW {
            value += 1;
            self.dma(number / WINDOW, number % WINDOW, value)?;
        }
        Ok(())
    }

    /// The guest's driver: maps a window, or unmaps it, every now and then.
    fn drive(&self, own: Range<u64>) -> Result<()> {
        let mut random = SmallRng::seed_from_u64(own.start);
        while !self.stop.load(Ordering::Relaxed) {
            let window = random.random_range(0..WINDOWS);
            let (iova, size) = (BASE + window * WINDOW * PAGE, WINDOW * PAGE);
            let iotlb = || self.iotlb.write().map_err(|_| "a device panicked");
            let was = iotlb()?[window as usize].take();
            if was.is_some() {
                self.domain.unmap(iova, size)?; // the device cannot reach it any more
                self.unmaps.fetch_add(1, Ordering::Relaxed);
            } else {
                let first = random.random_range(own.start..=own.end - WINDOW);
                let gpa = first * PAGE;
                self.domain.map(iova, gpa, size, Prot::READ_WRITE)?;
                iotlb()?[window as usize] = Some(first); // now it can
            }
            thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }
}

/// A device that is plugged in, and its driver in the guest.
struct Device {
    shared: Arc<Shared>,
    source: Source,
    threads: [JoinHandle<Result<()>>; 2],
}

impl Device {
    fn plug(name: &str, tracker: &Tracker, memory: &Memory, own: Range<u64>) -> Result<Device> {
        let log = DeviceLog::new(None);
        let domain = Domain::new(tracker.iova_view()).with_log(log.clone());
        // Before the device can write.
        let source = tracker.add_log(name, domain.view(), 0, log.clone())?;
        let shared = Arc::new(Shared {
            domain,
            log,
            memory: memory.clone(),
            iotlb: RwLock::default(),
            stop: AtomicBool::new(false),
            unmaps: AtomicU64::new(0),
        });
        shared.log.start_all(PAGE)?;
        let (device, driver) = (Arc::clone(&shared), Arc::clone(&shared));
        let threads = [
            thread::spawn(move || device.work()),
            thread::spawn(move || driver.drive(own)),
        ];
        Ok(Device {
            shared,
            source,
            threads,
        })
    }

    /// Stops both, and waits until the device writes no more.
    fn quiesce(self) -> Result<(Arc<Shared>, Source)> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        Ok((self.shared, self.source))
    }

    fn unplug(self, lose: bool) -> Result<()> {
        let (shared, source) = self.quiesce()?;
        if lose {
            shared.log.set_tracking(true)?; // the log starts anew, and forgets
        }
        source.remove()?; // asks the log for the last time
        shared.domain.unmap(0, 1 << 48)?;
        Ok(())
    }
}

fn copy(from: &Memory, to: &GuestMemoryMmap, gpa: u64, size: u64) -> Result<()> {
    let mut bytes = vec![0; size as usize];
    from.read_slice(&mut bytes, GuestAddress(gpa))?;
    Ok(to.write_slice(&bytes, GuestAddress(gpa))?)
}

/// Takes a round, copies its pages, and prints who has written them.
fn round(name: &str, tracker: &Tracker, from: &Memory, to: &GuestMemoryMmap) -> Result<()> {
    let mut report = Report::new();
    tracker.take(&mut report)?;
    let mut pages = [0u64; 3];
    for range in report.ranges(PAGE)? {
        copy(from, to, range.gpa, range.size)?;
        for page in range.gpa / PAGE..(range.gpa + range.size) / PAGE {
            let writer = [NIC, DISK, VMM].iter().position(|own| own.contains(&page));
            pages[writer.ok_or("a page of no memory is dirty")?] += 1;
        }
    }
    let ([nic, disk, vmm], all) = (pages, report.pages());
    println!("{name:>6} {all:>7} {nic:>7} {disk:>7} {vmm:>7}");
    Ok(())
}

pub(crate) fn migrate(lose: bool) -> Result<bool> {
    let all = (GuestAddress(0), (PAGES * PAGE) as usize);
    let memory = Memory::from_ranges(&[all])?;
    let destination = GuestMemoryMmap::from_ranges(&[all])?;
    let tracker = Tracker::new(None);
    tracker.add_memory(memory.iter())?;

    let mut nic = Some(Device::plug("nic", &tracker, &memory, NIC)?);
    let disk = Device::plug("disk", &tracker, &memory, DISK)?;
    tracker.start()?; // the devices' logs are on
    copy(&memory, &destination, 0, PAGES * PAGE)?;
    println!(" round   dirty     nic    disk     vmm");
    let mut random = SmallRng::seed_from_u64(1);
    for number in 1..=ROUNDS {
        for _ in 0..1000 {
            let gpa = GuestAddress(random.random_range(VMM) * PAGE);
            memory.write_obj(random.random::<u64>(), gpa)?;
        }
        thread::sleep(Duration::from_millis(20));
        if let Some(nic) = nic.take_if(|_| number == UNPLUG_BEFORE) {
            let unmaps = nic.shared.unmaps.load(Ordering::Relaxed);
            nic.unplug(lose)?;
            println!("       the nic is unplugged after {unmaps} unmaps");
        }
        round(&number.to_string(), &tracker, &memory, &destination)?;
    }
    let (disk, _) = disk.quiesce()?;
    round("stop", &tracker, &memory, &destination)?;
    tracker.stop();
    disk.log.stop();

    let (mut ours, mut theirs) = ([0; PAGE as usize], [0; PAGE as usize]);
    let mut differ = 0;
    for gpa in (0..PAGES).map(|page| GuestAddress(page * PAGE)) {
        memory.read_slice(&mut ours, gpa)?;
        destination.read_slice(&mut theirs, gpa)?;
        differ += u64::from(ours != theirs);
    }
    println!("{differ} of {PAGES} pages differ");
    Ok(differ == 0)
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if !(args.is_empty() || args == ["--lose"]) {
        eprintln!("usage: unplug [--lose]");
        return ExitCode::from(2);
    }
    match migrate(!args.is_empty()) {
        Ok(equal) => ExitCode::from(u8::from(!equal)),
        Err(cause) => {
            eprintln!("unplug: {cause}");
            ExitCode::from(2)
        }
    }
}
