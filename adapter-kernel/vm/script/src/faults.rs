// SPDX-License-Identifier: GPL-2.0-only
//! Kills processes in the middle of operations, runs threads on one container, and
//! tries to unload a module in use. Every pin must be given back.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dirty_script::op::{LOW0, PAGE};
use nix::libc;
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::waitpid;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::ask::{ask, expect, text};
use crate::process;
use crate::real::Real;
use crate::tiommu::{self, Tiommu};

/// Processes that are killed.
const VICTIMS: u64 = 60;
/// How long threads work on one container, and the fewest rounds of each.
const STRESS: Duration = Duration::from_secs(8);
const ROUNDS: u64 = 10;

/// How many pins the kernel holds: taken and not given back.
pub(crate) fn pins() -> Result<i64, String> {
    // Each processor has its own count; this adds them up.
    fs::write("/proc/sys/vm/stat_refresh", "1").map_err(text)?;
    let stat = fs::read_to_string("/proc/vmstat").map_err(text)?;
    let value = |name: &str| {
        let line = stat.lines().find_map(|l| l.strip_prefix(name));
        line.and_then(|l| l.trim().parse::<i64>().ok())
            .ok_or(format!("no {name} in /proc/vmstat"))
    };
    Ok(value("nr_foll_pin_acquired ")? - value("nr_foll_pin_released ")?)
}

/// Waits until as many pins are held as before, since processes end in their own time.
pub(crate) fn settled(before: i64) -> Result<(), String> {
    for _ in 0..3000 {
        if pins()? == before {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Err(format!("{} pins are held for ever", pins()? - before))
}

/// Maps, pins and reports until it is killed.
fn victim(k: u64) {
    let mut real = match Real::new(65535) {
        Ok(real) => real,
        Err(_) => return,
    };
    let devices = [
        "emu0",
        "emu0,pci0",
        "pci0",
        "emu0,emu1",
        "low0",
        "emu0,pci0,low0",
    ][(k % 6) as usize];
    let _ = ask(&mut real, &format!("new devs={devices}"));
    for round in 0u64.. {
        for line in [
            "map iova=1M size=2048p vaddr=mem",
            "map iova=16M size=7p vaddr=mem+1p",
            "start",
            "pin dev=emu0 iova=259p n=200",
            "pin dev=emu0 iova=1156p n=500",
            "rw dev=emu0 iova=0x101fff len=9000",
            "get iova=1M size=2048p bsize=256",
            "unpin dev=emu0 iova=266p n=100",
            "unmap iova=16M size=7p flags=1",
        ] {
            let _ = ask(&mut real, line);
        }
        if round % 3 == 2 {
            let _ = ask(&mut real, "unmap flags=2");
        }
    }
}

/// Kills processes with mappings and pins.
fn killed() -> Result<(), String> {
    let before = pins()?;
    let mut random = StdRng::seed_from_u64(1);
    for k in 0..VICTIMS {
        let child = process::child(|| {
            victim(k);
            0
        });
        let child = child.map_err(text)?;
        thread::sleep(Duration::from_millis(random.random_range(0..120)));
        kill(child, Signal::SIGKILL).map_err(text)?;
        waitpid(child, None).map_err(text)?;
    }
    settled(before)?;
    unmapped()?;
    println!("faults: {VICTIMS} processes killed, no pin is left");
    Ok(())
}

/// Tries to unload a module; whether that worked.
#[allow(unsafe_code)]
fn unloaded(module: &std::ffi::CStr) -> Result<bool, String> {
    // SAFETY: a system call with a C string and flags.
    let ret = unsafe { libc::syscall(libc::SYS_delete_module, module.as_ptr(), libc::O_NONBLOCK) };
    match nix::errno::Errno::result(ret) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN) => Ok(false),
        Err(e) => Err(text(e)),
    }
}

fn unload() -> Result<(), String> {
    let mut real = Real::new(65535).map_err(text)?;
    expect(&mut real, "new devs=emu0", "set_iommu(3)=ok")?;
    expect(&mut real, "map iova=0 size=4p", "0 ok")?;
    for module in [c"vfio_iommu_dirty", c"vfio_iommu_type1"] {
        if fs::exists(format!("/sys/module/{}", module.to_string_lossy())).map_err(text)?
            && unloaded(module)?
        {
            return Err("the module was unloaded while in use".into());
        }
    }
    expect(&mut real, "unmap iova=0 size=4p", "0 ok size=0x4000")?;
    println!("faults: a module in use stays");
    Ok(())
}

/// One thread's work: repeats its lines until it is told to stop.
fn work(lines: &[&str], mut real: Real, rounds: &AtomicU64, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        for line in lines {
            let _ = ask(&mut real, line);
        }
        rounds.fetch_add(1, Ordering::Relaxed);
    }
}

/// Lets a device behind the test IOMMU write until it is told to stop. Some writes are
/// still under way when their mapping goes.
fn write(rounds: &AtomicU64, stop: &AtomicBool) -> Result<(), String> {
    let tiommu = Tiommu::open().map_err(text)?;
    let device = tiommu::number(LOW0).ok_or("no low0")?;
    let mut random = StdRng::seed_from_u64(2);
    while !stop.load(Ordering::Relaxed) {
        let iova = (1 << 20) + random.random_range(0..164 * PAGE);
        // Nothing may be mapped there at the moment.
        let _ = match random.random() {
            true => tiommu.write(device, iova, &[1; 8]),
            false => tiommu.write_delayed(device, iova, &[2; 8]),
        };
        rounds.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Checks that nothing is mapped in the test IOMMU, and that no memory was unpinned
/// while a device could write it.
fn unmapped() -> Result<(), String> {
    if !tiommu::exists() {
        return Ok(());
    }
    let tiommu = Tiommu::open().map_err(text)?;
    let counters = tiommu.counters().map_err(text)?;
    match (counters.bytes, counters.late, counters.split) {
        (0, 0, 0) => Ok(()),
        _ => Err(format!("the test IOMMU: {counters:?}")),
    }
}

/// Threads share a container: one changes mappings, one uses a device, one starts,
/// reports and stops, one moves a group, and a device behind the test IOMMU does DMA, if
/// there is one.
fn stress() -> Result<(), String> {
    let before = pins()?;
    let mut real = Real::new(65535).map_err(text)?;
    let new = match tiommu::exists() {
        true => "new devs=emu0,emu1,pci0,low0",
        false => "new devs=emu0,emu1,pci0",
    };
    expect(&mut real, new, "set_iommu(3)=ok")?;
    let stop = &AtomicBool::new(false);
    let rounds: [AtomicU64; 5] = Default::default();
    let jobs: [&[&str]; 4] = [
        &[
            "map iova=1M size=64p vaddr=mem",
            "map iova=320p size=100p vaddr=mem+64p",
            "unmap iova=1M size=64p",
            "unmap iova=1M size=164p flags=1 bsize=24",
        ],
        &[
            "pin dev=emu0 iova=1M n=30",
            "rw dev=emu1 iova=0x101fff len=300000",
            "pin dev=emu1 iova=326p n=60",
            "unpin dev=emu0 iova=1M n=30",
            "unpin dev=emu1 iova=326p n=60",
        ],
        &[
            "start",
            "get iova=1M size=164p bsize=24",
            "get iova=320p size=100p bsize=16",
            "stop",
        ],
        &["attach dev=pci1", "info argsz=4096", "detach dev=pci1"],
    ];
    let shares: Result<Vec<Real>, _> = (1..).zip(&jobs).map(|(k, _)| real.share(k)).collect();
    let shares = shares.map_err(text)?;
    let (of_threads, of_device) = rounds.split_at(jobs.len());
    let counted = match tiommu::exists() {
        true => &rounds[..],
        false => of_threads,
    };
    let wrote = thread::scope(|scope| {
        let writer = scope.spawn(|| match tiommu::exists() {
            true => write(&of_device[0], stop),
            false => Ok(()),
        });
        for ((lines, share), rounds) in jobs.into_iter().zip(shares).zip(&rounds) {
            scope.spawn(move || work(lines, share, rounds, stop));
        }
        let start = Instant::now();
        let few = || counted.iter().any(|n| n.load(Ordering::Relaxed) < ROUNDS);
        while start.elapsed() < STRESS || few() {
            thread::sleep(Duration::from_millis(50));
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap_or(Err("the writer panicked".into()))
    });
    wrote?;
    drop(real);
    settled(before)?;
    unmapped()?;
    let device = match tiommu::exists() {
        true => " and a device",
        false => "",
    };
    println!("faults: four threads{device} on one container, no pin is left");
    eprintln!("rounds of each: {rounds:?}");
    Ok(())
}

/// With `threads`, also the threads, which meet a defect of the real driver (U3).
pub(crate) fn run(threads: bool) -> Result<(), String> {
    if tiommu::exists() {
        let tiommu = Tiommu::open().map_err(text)?;
        tiommu.reset().map_err(text)?;
    }
    unload()?;
    killed()?;
    if threads {
        stress()?;
    }
    Ok(())
}
