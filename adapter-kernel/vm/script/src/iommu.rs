// SPDX-License-Identifier: GPL-2.0-only
//! Checks the test IOMMU itself, under the loaded driver: DMA, delayed writes, refused
//! maps, dirty bits, coherency and interrupts.

use dirty_core::Errno;
use dirty_script::op::{DeviceIndex, FaultKind, LOW0, MEM, PAGE};
use dirty_script::System;

use crate::ask::{ask, expect, text};
use crate::real::Real;
use crate::tiommu::{self, Tiommu, COHERENT, TRACKS, UNSAFE_MSI};

const DEVICE: DeviceIndex = LOW0;
const IOVA: u64 = 0x10_0000;
const PAGES: u64 = 16;
const BYTES: [u8; 8] = [0xa5; 8];

/// A container with the device, and its number at the test IOMMU.
struct Bench {
    real: Real,
    tiommu: Tiommu,
    device: u32,
}

impl Bench {
    fn memory(&mut self, page: u64) -> [u8; 8] {
        let mut bytes = [0; 8];
        self.real.peek(MEM + page * PAGE, &mut bytes);
        bytes
    }

    fn wipe(&mut self) {
        self.real.poke(MEM, &vec![0; (PAGES * PAGE) as usize]);
    }

    fn write(&self, page: u64) -> Result<(), String> {
        let written = self.tiommu.write(self.device, IOVA + page * PAGE, &BYTES);
        written.map(|_| ()).map_err(|e| format!("DMA: {e}"))
    }

    /// The pages that are dirty.
    fn dirty(&self, clear: bool) -> Result<Vec<u64>, String> {
        let is_dirty = |page: &u64| {
            let iova = IOVA + page * PAGE;
            self.tiommu.is_dirty(self.device, iova, PAGE, clear)
        };
        let mut pages = Vec::new();
        for page in 0..PAGES {
            if is_dirty(&page).map_err(text)? {
                pages.push(page);
            }
        }
        Ok(pages)
    }

    fn map(&mut self) -> Result<(), String> {
        expect(&mut self.real, "map iova=1M size=16p vaddr=mem", "0 ok")
    }

    fn unmap(&mut self) -> Result<(), String> {
        expect(
            &mut self.real,
            "unmap iova=1M size=16p",
            "0 ok size=0x10000",
        )
    }
}

fn check(what: &str, good: bool) -> Result<(), String> {
    match good {
        true => Ok(()),
        false => Err(format!("wrong: {what}")),
    }
}

/// Memory is reached where the container maps it, and as it allows.
fn translation(bench: &mut Bench) -> Result<(), String> {
    bench.map()?;
    bench.write(3)?;
    check("a write arrives", bench.memory(3) == BYTES)?;
    bench.unmap()?;
    let gone = bench.tiommu.write(bench.device, IOVA, &BYTES);
    check(
        "nothing is reached after an unmap",
        gone == Err(Errno::EFAULT),
    )?;
    let read_only = "map iova=1M size=16p vaddr=mem flags=1";
    expect(&mut bench.real, read_only, "0 ok")?;
    let refused = bench.tiommu.write(bench.device, IOVA, &BYTES);
    let mut seen = [0; 8];
    let read = bench.tiommu.read(bench.device, IOVA + 3 * PAGE, &mut seen);
    check(
        "no write to a mapping for reading",
        refused == Err(Errno::EFAULT),
    )?;
    check(
        "a mapping for reading is read",
        read == Ok(0) && seen == BYTES,
    )?;
    bench.unmap()?;
    println!("iommu: DMA reaches what is mapped, and nothing else");
    Ok(())
}

/// A write that is under way arrives with the next IOTLB sync.
fn delay(bench: &mut Bench) -> Result<(), String> {
    bench.wipe();
    bench.map()?;
    let at = IOVA + 5 * PAGE;
    let written = bench.tiommu.write_delayed(bench.device, at, &BYTES);
    written.map_err(text)?;
    check("a delayed write waits", bench.memory(5) == [0; 8])?;
    bench.unmap()?;
    check("an unmap waits for it", bench.memory(5) == BYTES)?;
    let counters = bench.tiommu.counters().map_err(text)?;
    check("its memory was pinned until then", counters.late == 0)?;
    println!("iommu: a write that was under way arrived before the unmap ended");
    Ok(())
}

/// A map that fails half-way leaves nothing behind.
fn refusal(bench: &mut Bench) -> Result<(), String> {
    bench.real.fault(FaultKind::Map, 9).map_err(text)?;
    let line = "map iova=1M size=16p vaddr=mem";
    expect(&mut bench.real, line, "-1 EIO")?;
    let counters = bench.tiommu.counters().map_err(text)?;
    check("a refused map leaves nothing", counters.bytes == 0)?;
    bench.map()?;
    bench.unmap()?;
    println!("iommu: a map that was refused half-way left nothing");
    Ok(())
}

/// Dirty bits are those of the pages that were written.
fn dirty(bench: &mut Bench) -> Result<(), String> {
    let written = [0, 2, 3, 15];
    bench.map()?;
    bench.tiommu.track(bench.device, true).map_err(text)?;
    check("at first all is clean", bench.dirty(true)?.is_empty())?;
    for page in written {
        bench.write(page)?;
    }
    check("written pages are dirty", bench.dirty(false)? == written)?;
    check("a look clears nothing", bench.dirty(true)? == written)?;
    check("a harvest clears them", bench.dirty(true)?.is_empty())?;
    let at = IOVA + 7 * PAGE;
    let delayed = bench.tiommu.write_delayed(bench.device, at, &BYTES);
    delayed.map_err(text)?;
    check("a write under way is dirty", bench.dirty(true)? == [7])?;
    check("the harvest's sync waits for it", bench.memory(7) == BYTES)?;
    bench.tiommu.track(bench.device, false).map_err(text)?;
    bench.unmap()?;
    println!("iommu: dirty bits are exact");
    Ok(())
}

/// A container is coherent (VFIO_DMA_CC_IOMMU) if its IOMMU can enforce that.
fn coherency(bench: &mut Bench) -> Result<(), String> {
    for (flags, answer) in [(COHERENT, "=> 1 ok"), (0, "=> 0 ok")] {
        ask(&mut bench.real, "new")?;
        let config = tiommu::config(DEVICE);
        bench
            .tiommu
            .configure(tiommu::Config { flags, ..config })
            .map_err(text)?;
        expect(&mut bench.real, "new devs=low0", "set_iommu(3)=ok")?;
        expect(&mut bench.real, "ext n=4", answer)?;
    }
    println!("iommu: a container is coherent if its IOMMU can be");
    Ok(())
}

/// A group whose interrupts are not isolated is refused.
fn interrupts(bench: &mut Bench) -> Result<(), String> {
    ask(&mut bench.real, "new")?;
    let config = tiommu::Config {
        flags: UNSAFE_MSI,
        ..tiommu::config(DEVICE)
    };
    bench.tiommu.configure(config).map_err(text)?;
    let refused = "set_iommu(3)=EPERM";
    expect(&mut bench.real, "new devs=low0", refused)?;
    println!("iommu: a group without isolated interrupts is refused");
    Ok(())
}

pub(crate) fn run() -> Result<(), String> {
    let tiommu = Tiommu::open().map_err(text)?;
    tiommu.reset().map_err(text)?;
    let config = tiommu::config(DEVICE);
    let flags = TRACKS;
    tiommu
        .configure(tiommu::Config { flags, ..config })
        .map_err(text)?;
    let mut bench = Bench {
        real: Real::new(65535).map_err(text)?,
        tiommu,
        device: config.device,
    };
    expect(&mut bench.real, "new devs=low0", "set_iommu(3)=ok")?;
    translation(&mut bench)?;
    delay(&mut bench)?;
    refusal(&mut bench)?;
    dirty(&mut bench)?;
    coherency(&mut bench)?;
    interrupts(&mut bench)?;
    ask(&mut bench.real, "new")?;
    bench.tiommu.configure(config).map_err(text)?;
    let counters = bench.tiommu.counters().map_err(text)?;
    check(
        "nothing is left",
        (counters.bytes, counters.domains) == (0, 0),
    )
}
