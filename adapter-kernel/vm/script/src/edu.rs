// SPDX-License-Identifier: GPL-2.0-only
//! Real DMA: QEMU's `edu` device, bound to vfio-pci, copies memory through the IOMMU
//! mappings of the backend.

use std::os::unix::fs::FileExt;
use std::thread::sleep;
use std::time::Duration;

use dirty_script::op::{MEM, PAGE};
use dirty_script::System;

use crate::ask::{device, expect, text};
use crate::real::Real;

/// Offsets in the device's file: its registers, and its PCI command register.
const REGISTERS: u64 = 0;
const COMMAND: u64 = (7 << 40) + 4;
/// Memory and bus mastering.
const ENABLE: u16 = 6;

/// Registers of its DMA engine, and its buffer.
const SOURCE: u64 = 0x80;
const TARGET: u64 = 0x88;
const COUNT: u64 = 0x90;
const START: u64 = 0x98;
const BUFFER: u64 = 0x40000;

const RUN: u64 = 1;
const TO_MEMORY: u64 = 2;

/// Where the mapping is; the device reaches 28 bits.
const IOVA: u64 = 0x10_0000;
const BYTES: usize = 256;

struct Edu {
    file: std::fs::File,
}

impl Edu {
    fn open(real: &Real) -> Result<Self, String> {
        let file = real.device(device("pci0")).map_err(text)?.try_clone();
        let edu = Edu {
            file: file.map_err(text)?.into(),
        };
        let command = edu.file.write_all_at(&ENABLE.to_le_bytes(), COMMAND);
        command.map_err(text)?;
        Ok(edu)
    }

    fn set(&self, register: u64, value: u64) -> Result<(), String> {
        let written = self
            .file
            .write_all_at(&value.to_le_bytes(), REGISTERS + register);
        written.map_err(text)
    }

    /// Copies bytes, and waits until the engine is idle again.
    fn copy(&self, source: u64, target: u64, direction: u64) -> Result<(), String> {
        self.set(SOURCE, source)?;
        self.set(TARGET, target)?;
        self.set(COUNT, BYTES as u64)?;
        self.set(START, RUN | direction)?;
        for _ in 0..500 {
            sleep(Duration::from_millis(10));
            let mut state = [0; 8];
            self.file
                .read_exact_at(&mut state, REGISTERS + START)
                .map_err(text)?;
            if u64::from_le_bytes(state) & RUN == 0 {
                return Ok(());
            }
        }
        Err("the device's DMA does not end".into())
    }
}

fn bytes_at(real: &mut Real, addr: u64) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    real.peek(addr, &mut bytes);
    bytes
}

/// Prints what it has checked. The DMA after the unmap faults, and the kernel logs it.
pub(crate) fn run() -> Result<(), String> {
    let mut real = Real::new(65535).map_err(text)?;
    let real = &mut real;
    let pattern: Vec<u8> = (0..BYTES).map(|k| (k * 7 + 3) as u8).collect();
    expect(real, "new devs=pci0", "set_iommu(3)=ok")?;
    expect(real, "getdev dev=pci0", "getdev dev=pci0")?;
    expect(real, "map iova=0x100000 size=16p vaddr=mem", "0 ok")?;
    expect(real, "start", "0 ok")?;
    real.poke(MEM, &pattern);

    let edu = Edu::open(real)?;
    edu.copy(IOVA, BUFFER, 0)?;
    edu.copy(BUFFER, IOVA + 3 * PAGE, TO_MEMORY)?;
    if bytes_at(real, MEM + 3 * PAGE) != pattern {
        return Err("the device's bytes did not arrive".into());
    }
    println!("edu: {BYTES} bytes went through the device and came back");
    // A device behind an IOMMU may write anywhere: every report has every page.
    expect(real, "get iova=0x100000 size=16p", "0 ok bm=ffff,0")?;
    expect(real, "get iova=0x100000 size=16p", "0 ok bm=ffff,0")?;

    // A second group comes and goes while tracking is on, and DMA still works.
    expect(real, "attach dev=pci1", "ok")?;
    edu.copy(BUFFER, IOVA + 4 * PAGE, TO_MEMORY)?;
    expect(real, "get iova=0x100000 size=16p", "0 ok bm=ffff,0")?;
    expect(real, "detach dev=pci1", "0 ok")?;
    edu.copy(BUFFER, IOVA + 5 * PAGE, TO_MEMORY)?;
    for page in [4, 5] {
        if bytes_at(real, MEM + page * PAGE) != pattern {
            return Err(format!("DMA to page {page} was lost"));
        }
    }
    println!("edu: a second group came and went");

    // The unmap reports the range's bits; from then on DMA to it faults.
    real.poke(MEM + 3 * PAGE, &[0; BYTES]);
    expect(
        real,
        "unmap iova=0x100000 size=16p flags=1",
        "0 ok size=0x10000 bm=ffff,0",
    )?;
    edu.copy(BUFFER, IOVA + 3 * PAGE, TO_MEMORY)?;
    if bytes_at(real, MEM + 3 * PAGE) != [0; BYTES] {
        return Err("the device still writes to unmapped memory".into());
    }
    println!("edu: after the unmap nothing arrives");

    drop(edu); // its file keeps the group in use

    // When the last group behind an IOMMU goes, what it may have written is reported.
    expect(real, "new devs=emu0,pci0", "set_iommu(3)=ok")?;
    expect(real, "getdev dev=pci0", "getdev dev=pci0")?;
    expect(real, "map iova=0x100000 size=16p vaddr=mem", "0 ok")?;
    expect(real, "start", "0 ok")?;
    let edu = Edu::open(real)?;
    edu.copy(BUFFER, IOVA + 6 * PAGE, TO_MEMORY)?;
    drop(edu);
    expect(real, "detach dev=pci0", "0 ok")?;
    expect(real, "get iova=0x100000 size=16p", "0 ok bm=ffff,0")?;
    expect(real, "get iova=0x100000 size=16p", "0 ok bm=0,0")?;
    println!("edu: what a group wrote is reported once after it has gone");
    Ok(())
}
