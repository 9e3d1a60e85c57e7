// SPDX-License-Identifier: GPL-2.0-only
//! START in a memory cgroup that is nearly full: it must fail and change nothing, and
//! the process must live.

use std::fs;

use dirty_script::System;
use nix::sys::signal::Signal;
use nix::sys::wait::{waitpid, WaitStatus};

use crate::ask::{expect, text};
use crate::process;
use crate::real::Real;

const CGROUP: &str = "/sys/fs/cgroup/dirty-vm";
/// What is left in the cgroup.
const ROOM: u64 = 14 << 20;
/// Where 64 GiB of memory are, which all large mappings share.
const SPACE: u64 = 0x20_0000_0000;
/// The bits of four mappings of 64 GiB.
const BITS: u64 = (256 << 30) / 4096 / 8;

fn set(file: &str, value: &str) -> Result<(), String> {
    fs::write(format!("{CGROUP}/{file}"), value).map_err(|e| format!("{file}: {e}"))
}

fn get(file: &str) -> Result<String, String> {
    fs::read_to_string(format!("{CGROUP}/{file}")).map_err(|e| format!("{file}: {e}"))
}

fn charged() -> Result<u64, String> {
    get("memory.current")?.trim().parse().map_err(text)
}

/// A line of the cgroup's `memory.stat` or `memory.events`.
fn count(file: &str, name: &str) -> Result<u64, String> {
    let counts = get(file)?;
    let line = counts.lines().find_map(|l| l.strip_prefix(name));
    let value = line.and_then(|l| l.trim().parse().ok());
    value.ok_or(format!("no {name} in {file}"))
}

fn leave_room() -> Result<(), String> {
    set("memory.max", &(charged()? + ROOM).to_string())
}

/// Maps four times 64 GiB from the `k`-th TiB on.
fn map(real: &mut Real, k: u64) -> Result<(), String> {
    for at in 0..4 {
        let iova = (k << 40) + (at << 36);
        let line = format!("map iova={iova:#x} size=64G vaddr={SPACE:#x}");
        expect(real, &line, "0 ok")?;
    }
    Ok(())
}

/// What START over 256 GiB of mappings charges.
fn charge(real: &mut Real) -> Result<(), String> {
    let stats = ["kernel ", "vmalloc ", "slab ", "pagetables "];
    let of = |stats: [&str; 4]| stats.map(|name| count("memory.stat", name));
    let (before, stats_before) = (charged()?, of(stats));
    expect(real, "start", "0 ok")?;
    let (after, stats_after) = (charged()?, of(stats));
    expect(real, "stop", "0 ok")?;
    let charged = after.saturating_sub(before);
    let mut text = format!(
        "cgroup: {} KiB charged for {} KiB of bits:",
        charged >> 10,
        BITS >> 10
    );
    for ((name, before), after) in stats.into_iter().zip(stats_before).zip(stats_after) {
        let grown = after?.saturating_sub(before?);
        text += &format!(" {name}{} KiB", grown >> 10);
    }
    println!("{text}");
    if charged < BITS {
        return Err("the bits are not charged".into());
    }
    // One bit for each page, since none is pinned, and what the cgroup charges in advance.
    if charged > BITS + (1 << 20) {
        return Err("more is charged than the bits need".into());
    }
    Ok(())
}

/// Runs in the cgroup.
fn starts() -> Result<(), String> {
    set("cgroup.procs", "0")?;
    let mut real = Real::new(65535).map_err(text)?;
    let real = &mut real;
    real.map_memory(SPACE, 64 << 30, true).map_err(text)?;
    expect(real, "new devs=emu0", "set_iommu(3)=ok")?;
    expect(real, "map iova=0 size=64p vaddr=mem", "0 ok")?;
    map(real, 1)?;
    charge(real)?;
    // 512 GiB, whose bits alone do not fit.
    map(real, 2)?;
    leave_room()?;
    expect(real, "start", "-1 ENOMEM")?;
    expect(real, "get size=64p", "-1 EINVAL bm=0,0")?;
    expect(real, "rw dev=emu0 iova=2p len=1", "ret=0")?;
    set("memory.max", "max")?;
    expect(real, "start", "0 ok")?;
    expect(real, "rw dev=emu0 iova=3p len=1", "ret=0")?;
    expect(real, "get size=64p", "0 ok bm=8,0")?;
    println!("cgroup: START fails with 14 MiB left, and succeeds when there is room");
    Ok(())
}

/// The control: a process that takes more memory than is left is killed.
fn greedy() -> Result<(), String> {
    set("cgroup.procs", "0")?;
    leave_room()?;
    let memory = vec![1u8; 4 * ROOM as usize];
    Err(format!(
        "{} bytes in a full cgroup",
        std::hint::black_box(memory).len()
    ))
}

/// Runs `work` in a child; how it ended, and how many the OOM killer ended.
fn child(work: fn() -> Result<(), String>) -> Result<(WaitStatus, u64), String> {
    set("memory.max", "max")?;
    let before = count("memory.events", "oom_kill ")?;
    let child = process::child(|| match work() {
        Ok(()) => 0,
        Err(e) => {
            println!("{e}");
            1
        }
    });
    let end = waitpid(child.map_err(text)?, None).map_err(text)?;
    Ok((end, count("memory.events", "oom_kill ")? - before))
}

pub(crate) fn run() -> Result<(), String> {
    fs::create_dir(CGROUP).map_err(|e| format!("{CGROUP}: {e}"))?;
    match child(starts)? {
        (WaitStatus::Exited(_, 0), 0) => {}
        end => return Err(format!("START in a full cgroup: {end:?}")),
    }
    match child(greedy)? {
        (WaitStatus::Signaled(_, Signal::SIGKILL, _), 1) => {}
        end => return Err(format!("the control was not killed: {end:?}")),
    }
    println!("cgroup: the control, which takes more than is left, was killed");
    Ok(())
}
