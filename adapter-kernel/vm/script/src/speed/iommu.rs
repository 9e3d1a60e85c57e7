// SPDX-License-Identifier: GPL-2.0-only
//! Times maps and unmaps of groups behind an IOMMU: the test IOMMU, which counts, and
//! QEMU's Intel IOMMU.

use std::time::{Duration, Instant};

use dirty_script::op::PAGE;

use super::{map, mappings, unmap, Figures};
use crate::ask::{expect, text};
use crate::memory;
use crate::real::Real;
use crate::tiommu::{self, Config, Counters, Tiommu};

/// The device behind the test IOMMU, and its number there.
const DEVICE: &str = "big0";
const NUMBER: u32 = 0;

/// Where memory is mapped: above the region that x86 reserves for interrupts.
const IOVA: u64 = 4 << 30;

/// Each kind of memory has a terabyte of addresses.
const TRANSPARENT: u64 = 0x100_0000_0000;
const HUGETLB: u64 = 0x200_0000_0000;
const REGISTERS: u64 = 0x300_0000_0000;
const SCATTERED: u64 = 0x400_0000_0000;
const REPEATED: u64 = 0x500_0000_0000;

/// A kind of memory that is mapped.
struct Memory {
    name: &'static str,
    vaddr: u64,
    size: u64,
    /// How often it is mapped; the shortest time counts.
    runs: u32,
}

const MEMORY: [Memory; 5] = [
    Memory {
        name: "128M of THP",
        vaddr: TRANSPARENT,
        size: 128 << 20,
        runs: 10,
    },
    Memory {
        name: "64M of hugetlb",
        vaddr: HUGETLB,
        size: 64 << 20,
        runs: 10,
    },
    Memory {
        name: "64M BAR",
        vaddr: REGISTERS,
        size: 64 << 20,
        runs: 10,
    },
    Memory {
        name: "16384 scattered pages",
        vaddr: SCATTERED,
        size: 16384 * PAGE,
        runs: 5,
    },
    Memory {
        name: "64G of repeated hugetlb",
        vaddr: REPEATED,
        size: 64 << 30,
        runs: 1,
    },
];

/// Times and counts of one operation in some runs.
struct Best<'a> {
    tiommu: Option<&'a Tiommu>,
    time: Duration,
    counters: Counters,
}

impl<'a> Best<'a> {
    fn new(tiommu: Option<&'a Tiommu>) -> Self {
        Best {
            tiommu,
            time: Duration::MAX,
            counters: Counters::default(),
        }
    }

    fn run(&mut self, timed: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        if let Some(tiommu) = self.tiommu {
            tiommu.reset().map_err(text)?;
        }
        let start = Instant::now();
        timed()?;
        self.time = self.time.min(start.elapsed());
        if let Some(tiommu) = self.tiommu {
            self.counters = tiommu.counters().map_err(text)?;
        }
        Ok(())
    }

    fn note(self, figures: &mut Figures, name: &str) {
        if self.tiommu.is_some() {
            for (what, count) in [
                ("maps", self.counters.maps),
                ("unmaps", self.counters.unmaps),
                ("syncs", self.counters.syncs),
            ] {
                if count != 0 {
                    figures.counts.insert(format!("{name}: {what}"), count);
                }
            }
        }
        figures.times.insert(name.into(), self.time);
    }
}

/// Maps and unmaps each kind of memory in a container with this device.
fn maps(
    real: &mut Real,
    figures: &mut Figures,
    device: &str,
    tiommu: Option<&Tiommu>,
) -> Result<(), String> {
    expect(real, &format!("new devs={device}"), "set_iommu(3)=ok")?;
    for Memory {
        name,
        vaddr,
        size,
        runs,
    } in MEMORY
    {
        let (mut mapped, mut unmapped) = (Best::new(tiommu), Best::new(tiommu));
        for _ in 0..runs {
            let failed = |e| format!("{name}, {device}: {e}");
            mapped
                .run(|| map(real, IOVA, size, vaddr))
                .map_err(failed)?;
            unmapped.run(|| unmap(real, IOVA, size)).map_err(failed)?;
        }
        mapped.note(figures, &format!("map {name}, {device}"));
        unmapped.note(figures, &format!("unmap {name}, {device}"));
    }
    Ok(())
}

/// Attaches the device to a container that has mappings, and takes it out again.
fn replay(
    real: &mut Real,
    figures: &mut Figures,
    device: &str,
    tiommu: Option<&Tiommu>,
) -> Result<(), String> {
    for Memory {
        name, vaddr, size, ..
    } in [&MEMORY[0], &MEMORY[3]]
    {
        let (mut attached, mut detached) = (Best::new(tiommu), Best::new(tiommu));
        for _ in 0..5 {
            expect(real, "new devs=emu0", "set_iommu(3)=ok")?;
            map(real, IOVA, *size, *vaddr)?;
            let attach = format!("attach dev={device} nodev=1");
            attached.run(|| expect(real, &attach, "ok"))?;
            let detach = format!("detach dev={device}");
            detached.run(|| expect(real, &detach, "0 ok"))?;
        }
        attached.note(figures, &format!("attach to {name}, {device}"));
        detached.note(figures, &format!("detach from {name}, {device}"));
    }
    Ok(())
}

/// The test IOMMU, with the page sizes of x86 for [`DEVICE`]. Linux 6.1 has none.
fn test_iommu() -> Result<Option<Tiommu>, String> {
    if !tiommu::exists() {
        return Ok(None);
    }
    let tiommu = Tiommu::open().map_err(text)?;
    let x86 = Config {
        device: NUMBER,
        pgsizes: 1 << 12 | 1 << 21 | 1 << 30,
        last: (1 << 48) - 1,
        ..Config::default()
    };
    tiommu.configure(x86).map_err(text)?;
    Ok(Some(tiommu))
}

/// MAP and UNMAP among many mappings, without an IOMMU and with each.
pub(super) fn among(real: &mut Real, figures: &mut Figures) -> Result<(), String> {
    mappings(real, figures, "emu0")?;
    if let Some(_tiommu) = test_iommu()? {
        mappings(real, figures, DEVICE)?;
    }
    mappings(real, figures, "pci0")
}

pub(super) fn run(real: &mut Real, figures: &mut Figures) -> Result<(), String> {
    memory::reserve_hugetlb(64)?;
    memory::transparent(real, TRANSPARENT, MEMORY[0].size)?;
    memory::hugetlb(real, HUGETLB, MEMORY[1].size)?;
    let _registers = memory::registers(REGISTERS, MEMORY[2].size)?;
    memory::scattered(real, SCATTERED, MEMORY[3].size)?;
    memory::repeated(real, REPEATED, MEMORY[4].size, 64 << 20)?;

    if let Some(tiommu) = test_iommu()? {
        maps(real, figures, DEVICE, Some(&tiommu))?;
        replay(real, figures, DEVICE, Some(&tiommu))?;
    }
    maps(real, figures, "pci0", None)?;
    replay(real, figures, "pci0", None)
}
