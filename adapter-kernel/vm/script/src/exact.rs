// SPDX-License-Identifier: GPL-2.0-only
//! Dirty pages that the test IOMMU knows of (D12), by DMA of its devices.

use std::fs;

use dirty_script::op::{DeviceIndex, FOUR0, LOW0, MEM, PAGE};
use dirty_script::System;

use crate::ask::{ask, expect, text};
use crate::real::{parameters, Real};
use crate::tiommu::{self, Tiommu, TRACKS_IF_ASKED};

/// Its IOMMU has pages of 4K only, so one page is one dirty bit.
const DEVICE: DeviceIndex = FOUR0;
/// Its IOMMU does not track.
const OTHER: DeviceIndex = LOW0;
const IOVA: u64 = 1 << 20;
const BYTES: [u8; 8] = [0xa5; 8];
const MAP: &str = "map iova=1M size=256p vaddr=mem";

struct Bench {
    real: Real,
    tiommu: Tiommu,
    device: u32,
}

/// The answer of a report in which these of 256 pages are dirty.
fn bits(pages: &[u64]) -> String {
    let mut words = [0u64; 4];
    for page in pages {
        words[*page as usize / 64] |= 1 << (page % 64);
    }
    let words = words.map(|word| format!("{word:x}"));
    format!("0 ok bm={}", words.join(","))
}

impl Bench {
    fn expect(&mut self, line: &str, end: &str) -> Result<(), String> {
        expect(&mut self.real, line, end)
    }

    fn write(&self, pages: &[u64]) -> Result<(), String> {
        for page in pages {
            let written = self.tiommu.write(self.device, IOVA + page * PAGE, &BYTES);
            written.map_err(|e| format!("DMA: {e}"))?;
        }
        Ok(())
    }

    /// GET_BITMAP tells these pages and no other.
    fn told(&mut self, pages: &[u64]) -> Result<(), String> {
        self.expect("get iova=1M size=256p bsize=32 dump=4", &bits(pages))
    }

    fn page(&mut self, page: u64) -> [u8; 8] {
        let mut bytes = [0; 8];
        self.real.peek(MEM + page * PAGE, &mut bytes);
        bytes
    }
}

/// What the device writes is told once, and nothing else.
fn exact(bench: &mut Bench) -> Result<(), String> {
    let written = [3, 70, 71, 255];
    bench.write(&[9])?;
    bench.expect("start", "0 ok")?;
    bench.told(&[])?;
    bench.write(&written)?;
    bench.told(&written)?;
    bench.told(&[])?;
    println!("exact: 4 pages of 256 are told, then none; none from before START");
    bench.write(&written)?;
    let faults = "get iova=1M size=256p bsize=32 data=end-24";
    let answer = ask(&mut bench.real, faults)?;
    if !answer.contains("-1 EFAULT") {
        return Err(format!("{answer}, expected EFAULT"));
    }
    bench.told(&written)?;
    println!("exact: after a report that faulted all 4 are told");
    Ok(())
}

/// A page whose write is under way is told when its bytes are in memory.
fn delayed(bench: &mut Bench) -> Result<(), String> {
    bench.real.poke(MEM, &[0; 16 * PAGE as usize]);
    let at = IOVA + 5 * PAGE;
    let started = bench.tiommu.write_delayed(bench.device, at, &BYTES);
    started.map_err(text)?;
    if bench.page(5) == BYTES {
        return Err("the write is not delayed".into());
    }
    bench.told(&[5])?;
    if bench.page(5) != BYTES {
        return Err("a page was told before its write was in memory".into());
    }
    println!("exact: a write that was under way is in memory when its page is told");
    Ok(())
}

fn unmaps(bench: &mut Bench) -> Result<(), String> {
    let unmap = "unmap iova=1M size=256p flags=1 bsize=32 dump=4";
    bench.write(&[200])?;
    let end = bits(&[200]).replace("ok", "ok size=0x100000");
    bench.expect(unmap, &end)?;
    bench.expect(MAP, "0 ok")?;
    bench.told(&[])?;
    bench.write(&[17])?;
    bench.expect("unmap iova=1M size=256p", "0 ok size=0x100000")?;
    bench.expect(MAP, "0 ok")?;
    bench.told(&[])?;
    println!("exact: UNMAP tells the page written last; without a bitmap it forgets");

    bench.real.poke(MEM, &[0; 16 * PAGE as usize]);
    bench.write(&[201])?;
    let at = IOVA + 5 * PAGE;
    let ordered = bench.tiommu.write_late(bench.device, at, &BYTES);
    ordered.map_err(text)?;
    if bench.page(5) == BYTES {
        return Err("the write is not late".into());
    }
    let end = bits(&[5, 201]).replace("ok", "ok size=0x100000");
    bench.expect(unmap, &end)?;
    if bench.page(5) != BYTES {
        return Err("the late write was not made".into());
    }
    bench.expect(MAP, "0 ok")?;
    bench.told(&[])?;
    println!("exact: UNMAP tells a page written between its harvest and the unmap");
    Ok(())
}

/// Everything is dirty while a group is there whose IOMMU does not track.
fn beside_another(bench: &mut Bench) -> Result<(), String> {
    let all: Vec<u64> = (0..256).collect();
    bench.expect("attach dev=low0", "ok")?;
    bench.told(&all)?;
    bench.told(&all)?;
    bench.expect("detach dev=low0", "0 ok")?;
    bench.told(&all)?;
    bench.write(&[64])?;
    bench.told(&[64])?;
    println!("exact: an IOMMU that does not track makes all dirty until it leaves");
    // The same domain comes while tracking is on, and goes with a page untold.
    bench.expect("attach dev=emu0", "ok")?;
    bench.write(&[65])?;
    bench.expect("detach dev=four0", "0 ok")?;
    bench.told(&[65])?;
    bench.expect("attach dev=four0", "ok")?;
    bench.told(&[])?;
    bench.write(&[66])?;
    bench.told(&[66])?;
    println!("exact: a group that leaves has told its pages; one that comes tells");
    Ok(())
}

fn set(on: bool) -> Result<(), String> {
    let file = format!("{}/iommu_dirty_tracking", parameters());
    fs::write(&file, if on { "1" } else { "0" }).map_err(|e| format!("{file}: {e}"))
}

fn open(bench: &mut Bench) -> Result<(), String> {
    bench.expect("new devs=four0", "set_iommu(3)=ok")?;
    bench.expect(MAP, "0 ok")
}

pub(crate) fn run() -> Result<(), String> {
    let tiommu = Tiommu::open().map_err(text)?;
    let config = tiommu::config(DEVICE);
    let tracks = tiommu::Config {
        flags: TRACKS_IF_ASKED,
        ..config
    };
    tiommu.configure(tracks).map_err(text)?;
    tiommu.configure(tiommu::config(OTHER)).map_err(text)?;
    let mut bench = Bench {
        real: Real::new(65535).map_err(text)?,
        tiommu,
        device: config.device,
    };
    set(true)?;
    open(&mut bench)?;
    exact(&mut bench)?;
    delayed(&mut bench)?;
    unmaps(&mut bench)?;
    beside_another(&mut bench)?;
    set(false)?;
    open(&mut bench)?;
    match exact(&mut bench) {
        Err(e) if e.contains("bm=ffffffffffffffff") => {}
        other => return Err(format!("the control: {other:?}")),
    }
    println!("exact: the control, without the parameter, tells all 256");
    ask(&mut bench.real, "new")?;
    bench.tiommu.configure(config).map_err(text)?;
    let counters = bench.tiommu.counters().map_err(text)?;
    match (counters.bytes, counters.domains) {
        (0, 0) => Ok(()),
        left => Err(format!("left in the IOMMU: {left:?}")),
    }
}
