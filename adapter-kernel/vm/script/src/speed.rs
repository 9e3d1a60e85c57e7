// SPDX-License-Identifier: GPL-2.0-only
//! Times the loaded driver. In an emulated machine times alone mean nothing;
//! `dirty-vm ratio` prints the ratios of two drivers' times in one boot.

mod iommu;

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use dirty_core::uapi::{
    VFIO_IOMMU_DIRTY_PAGES, VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_IOMMU_MAP_DMA,
    VFIO_IOMMU_UNMAP_DMA,
};
use dirty_script::op::{Caller, BIGB, HUGE, MEM, PAGE};
use dirty_script::System;

use crate::ask::{ask, device, expect, text};
use crate::memory;
use crate::real::Real;

/// Bytes of the mappings in a report.
const TOTAL: u64 = 64 << 30;
/// Where that much memory can be mapped.
const SPACE: u64 = 0x20_0000_0000;
/// Bytes of one of many mappings, which all share the same memory.
const PIECE: u64 = 4 << 20;
/// An odd number of pages, so that mappings start at odd bits.
const ODD: u64 = PIECE - PAGE;
/// Pages of a pin call.
const PINS: i32 = 500;
/// Mappings for the measurement of MAP.
const MANY: u64 = 60_000;
/// Where arguments lie.
const ARG: u64 = HUGE;

/// The shortest time of `timed` in some runs, each after `prepare`.
fn shortest(
    runs: u32,
    real: &mut Real,
    mut prepare: impl FnMut(&mut Real) -> Result<(), String>,
    mut timed: impl FnMut(&mut Real) -> Result<(), String>,
) -> Result<Duration, String> {
    let mut best = Duration::MAX;
    for _ in 0..runs {
        prepare(real)?;
        let start = Instant::now();
        timed(real)?;
        best = best.min(start.elapsed());
    }
    Ok(best)
}

fn argument(real: &mut Real, words: &[u64]) -> Result<(), String> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    match real.poke(ARG, &bytes) {
        true => Ok(()),
        false => Err("no memory for arguments".into()),
    }
}

fn ioctl(real: &mut Real, nr: u32) -> Result<(), String> {
    let done = real.ioctl(nr, ARG);
    done.map(|_| ()).map_err(|e| format!("ioctl {nr:#x}: {e}"))
}

fn map(real: &mut Real, iova: u64, size: u64, vaddr: u64) -> Result<(), String> {
    argument(real, &[32 | 3 << 32, vaddr, iova, size])?;
    ioctl(real, VFIO_IOMMU_MAP_DMA)
}

fn unmap(real: &mut Real, iova: u64, size: u64) -> Result<(), String> {
    argument(real, &[24, iova, size])?;
    ioctl(real, VFIO_IOMMU_UNMAP_DMA)
}

/// Writes the argument of a report, before it is timed.
fn get_argument(real: &mut Real, size: u64) -> Result<(), String> {
    let flags = u64::from(VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP);
    let bitmap = size.div_ceil(PAGE).div_ceil(64) * 8;
    argument(real, &[48 | flags << 32, 0, size, PAGE, bitmap, BIGB])
}

fn get(real: &mut Real) -> Result<(), String> {
    ioctl(real, VFIO_IOMMU_DIRTY_PAGES)
}

/// One byte written in every `stride` bytes.
fn mark(real: &mut Real, stride: u64) -> Result<(), String> {
    let emu0 = device("emu0");
    let mut iova = 0;
    while iova < TOTAL {
        let done = real.rw(emu0, iova, 1, true, Caller::Process);
        if done != Ok(0) && iova % PIECE < ODD {
            return Err(format!("rw at {iova:#x}: {done:?}"));
        }
        iova += stride;
    }
    Ok(())
}

/// Pins or unpins the first pages of mappings, `n` in all.
fn pin(real: &mut Real, n: u64, on: bool) -> Result<(), String> {
    let emu0 = device("emu0");
    for k in 0..n / PINS as u64 {
        let iova = k * PIECE;
        let done = match on {
            true => real.pin(emu0, iova, PINS, 3),
            false => real.unpin(emu0, iova, PINS),
        };
        if done != Ok(if on { PINS } else { 0 }) {
            return Err(format!("pin at {iova:#x}: {done:?}"));
        }
    }
    Ok(())
}

/// A container of emulated devices with `pieces` of mappings, tracking.
fn tracked(real: &mut Real, pieces: u64, size: u64, vaddr: u64) -> Result<(), String> {
    expect(real, "new devs=emu0", "set_iommu(3)=ok")?;
    for k in 0..pieces {
        map(real, k * size, size, vaddr)?;
    }
    expect(real, "start", "0 ok")
}

/// What a run measures, by name.
#[derive(Default)]
struct Figures {
    times: BTreeMap<String, Duration>,
    counts: BTreeMap<String, u64>,
}

/// Reports of 64 GiB in a container that is set up.
fn reports(real: &mut Real, figures: &mut Figures, of: &str) -> Result<(), String> {
    let mut note = |what: &str, time| figures.times.insert(format!("{what}, {of}"), time);
    let argument = |real: &mut Real| get_argument(real, TOTAL);
    note("GET clean", shortest(20, real, argument, get)?);
    let sparse = |real: &mut Real| mark(real, TOTAL / 1024).and_then(|()| argument(real));
    note("GET sparse", shortest(10, real, sparse, get)?);
    let dense = |real: &mut Real| mark(real, 64 * PAGE).and_then(|()| argument(real));
    note("GET dense", shortest(4, real, dense, get)?);
    let start = Instant::now();
    pin(real, 100_000, true)?;
    note("pin 1e5 pages", start.elapsed());
    note("GET with 1e5 pins", shortest(10, real, argument, get)?);
    let start = Instant::now();
    pin(real, 100_000, false)?;
    note("unpin 1e5 pages", start.elapsed());
    Ok(())
}

/// Mappings of an odd number of pages, so that most start at an odd bit.
fn odd(real: &mut Real, figures: &mut Figures) -> Result<(), String> {
    let pieces = TOTAL / PIECE;
    tracked(real, pieces, ODD, MEM)?;
    let argument = |real: &mut Real| get_argument(real, ODD * pieces);
    let time = shortest(10, real, argument, get)?;
    figures
        .times
        .insert("GET clean, 16384 mappings at odd offsets".into(), time);
    Ok(())
}

/// MAP and UNMAP in a container with this device and many mappings.
fn mappings(real: &mut Real, figures: &mut Figures, device: &str) -> Result<(), String> {
    expect(real, &format!("new devs={device}"), "set_iommu(3)=ok")?;
    for k in 0..MANY {
        map(real, 2 * k * PAGE, PAGE, MEM)?;
    }
    let among = |real: &mut Real| {
        for k in 0..1000 {
            map(real, (2 * (k * 59) + 1) * PAGE, PAGE, MEM)?;
        }
        Ok(())
    };
    let without = |real: &mut Real| {
        for k in 0..1000 {
            // Before the first run nothing is mapped there.
            let _ = unmap(real, (2 * (k * 59) + 1) * PAGE, PAGE);
        }
        Ok(())
    };
    let time = shortest(5, real, without, among)?;
    let name = format!("1000 MAP among 60000, {device}");
    figures.times.insert(name, time);
    let again = |real: &mut Real| without(real).and_then(|()| among(real));
    let time = shortest(5, real, again, without)?;
    let name = format!("1000 UNMAP among 60000, {device}");
    figures.times.insert(name, time);
    Ok(())
}

/// Reports, pins and mappings of an emulated group.
fn emulated(real: &mut Real, figures: &mut Figures) -> Result<(), String> {
    // With huge pages, each byte written would take 2 MiB.
    memory::huge_pages(false)?;
    real.map_memory(SPACE, TOTAL, true).map_err(text)?;
    tracked(real, 1, TOTAL, SPACE)?;
    reports(real, figures, "one mapping")?;
    tracked(real, TOTAL / PIECE, PIECE, MEM)?;
    reports(real, figures, "16384 mappings")?;
    odd(real, figures)
}

/// Measures one part, `emulated`, `iommu` or `mappings`, and appends `kind TAB number TAB name`
/// for each figure to a file. The kind is `ns` or `count`.
pub(crate) fn run(part: &str, out: &str) -> Result<(), String> {
    let mut real = Real::new(65535).map_err(text)?;
    ask(&mut real, "bigbuf size=0x1000000")?;
    real.map_memory(ARG, PAGE, true).map_err(text)?;
    let mut figures = Figures::default();
    match part {
        "emulated" => emulated(&mut real, &mut figures)?,
        "iommu" => iommu::run(&mut real, &mut figures)?,
        "mappings" => iommu::among(&mut real, &mut figures)?,
        _ => return Err(format!("{part}: no part of the measurements")),
    }
    let mut report = fs::read_to_string(out).unwrap_or_default();
    for (name, time) in figures.times {
        report += &format!("ns\t{}\t{name}\n", time.as_nanos());
    }
    for (name, count) in figures.counts {
        report += &format!("count\t{count}\t{name}\n");
    }
    fs::write(out, report).map_err(text)
}

/// The least of each figure of a kind in a file.
fn read(path: &str, kind: &str) -> Result<BTreeMap<String, u64>, String> {
    let report = fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))?;
    let mut figures = BTreeMap::new();
    for line in report.lines() {
        let words: Vec<&str> = line.splitn(3, '\t').collect();
        let [of, number, name] = words[..] else {
            return Err(format!("{path}: a line without a number: {line}"));
        };
        if of == kind {
            let number: u64 = number.parse().map_err(|e| format!("{line}: {e}"))?;
            let least = figures.entry(name.to_string()).or_insert(number);
            *least = number.min(*least);
        }
    }
    Ok(figures)
}

/// Prints how many times as fast as the real driver the module is, and what the test
/// IOMMU has counted.
pub(crate) fn ratio(real: &str, ours: &str) -> Result<(), String> {
    let (mut times, mut counts) = (read(ours, "ns")?, read(ours, "count")?);
    println!(
        "{:<50} {:>12} {:>12} {:>8}",
        "speed", "real", "ours", "ratio"
    );
    for (name, real) in read(real, "ns")? {
        let ours = times.remove(&name);
        let ours = ours.ok_or(format!("{name} was not measured"))?;
        let (real, ours) = (real as f64 / 1000.0, ours as f64 / 1000.0);
        println!(
            "{name:<50} {real:>9.0} us {ours:>9.0} us {:>7.2}x",
            real / ours
        );
    }
    println!("{:<50} {:>12} {:>12}", "calls of the IOMMU", "real", "ours");
    // What a driver has not called has no line.
    for (name, real) in read(real, "count")? {
        let ours = counts.remove(&name).unwrap_or(0);
        println!("{name:<50} {real:>12} {ours:>12}");
    }
    for (name, ours) in counts {
        println!("{name:<50} {:>12} {ours:>12}", 0);
    }
    Ok(())
}
