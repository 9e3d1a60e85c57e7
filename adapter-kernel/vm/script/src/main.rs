// SPDX-License-Identifier: GPL-2.0-only
//! The VM's program. Inside the VM it runs scripts on the real `/dev/vfio/vfio`; outside
//! it makes them and compares their transcripts.

mod absent;
#[path = "../../../../vfio-dirty/src/replay/arena.rs"]
mod arena;
mod ask;
mod backend;
mod cgroup;
mod compare;
mod dma;
mod edu;
mod exact;
mod expected;
mod failnth;
mod faults;
mod generate;
mod iommu;
mod linux;
mod memory;
mod older;
#[path = "../../../../vfio-dirty/src/replay/process.rs"]
mod process;
mod real;
mod speed;
mod tiommu;
#[path = "../../../../adapter-user/tests/support/userfault.rs"]
mod userfault;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use dirty_core::Errno;
use dirty_script::op::{MEM, MEM_SIZE};
use dirty_script::Case;
use dma::Checker;
use real::Real;
use tiommu::Tiommu;

const USAGE: &str = "usage:
  dirty-vm configure               give devices the test IOMMUs that scripts expect
  dirty-vm run SCRIPT OUT [huge]   run a script on /dev/vfio/vfio; huge: on memory
                                   of huge pages
  dirty-vm iommu                   check the test IOMMU itself
  dirty-vm edu                     let a PCI device write memory by DMA
  dirty-vm exact                   dirty pages that the test IOMMU knows of
  dirty-vm faults [threads]        kill processes, unload the module in use
  dirty-vm absent [real]           use memory whose pages come late; real: expect
                                   what the real driver does
  dirty-vm backend                 print which driver answers a container
  dirty-vm cgroup                  start in a memory cgroup that is nearly full
  dirty-vm failnth                 let each allocation fail in turn
  dirty-vm speed PART OUT          append times to a file; PART is emulated, iommu
                                   or mappings
  dirty-vm ratio REAL OURS         print the ratios of two drivers' times
  dirty-vm generate KIND SEED OPS KERNEL
                                   print a script of random operations for Linux 6.1,
                                   6.12 or 7.3; KIND is
                                   emulated, iommu or mixed; test: behind test
                                   IOMMUs; big: and some have no page below 64K;
                                   halfway: mixed, and user memory ends in the
                                   middle of operations
  dirty-vm compare SCRIPT REAL OURS REPLAY [LIST...]
                                   compare three transcripts of a script";

fn run_case(case: &Case, huge: bool, out: File) -> io::Result<()> {
    let mut out = BufWriter::new(out);
    if huge {
        memory::replace_by_hugetlb(MEM, MEM_SIZE).map_err(io::Error::other)?;
    }
    let mut real = Real::new(case.entry_limit)?;
    let mut checker = Checker::new(case).map_err(io::Error::other)?;
    for line in &case.lines {
        checker.before(&line.op);
        let reply = dirty_script::run(&mut real, &line.op);
        let wrong = checker.after(&mut real, &line.op);
        writeln!(out, "  {}{reply}{wrong}", line.echo)?;
    }
    out.flush()
}

/// Runs each case of a script in a process of its own.
fn run(script: &str, out: &str, huge: bool) -> Result<(), String> {
    let text = fs::read_to_string(script).map_err(|e| format!("{script}: {e}"))?;
    let cases = dirty_script::parse(&text, &mut 65535).map_err(|e| format!("{script}, {e}"))?;
    arena::map_all()?;
    // A VM need not have the test IOMMU.
    let tiommu = match Tiommu::open() {
        Ok(tiommu) => Some(tiommu),
        Err(Errno::ENOENT) => None,
        Err(e) => return Err(format!("/dev/tiommu: {e}")),
    };
    if let Some(tiommu) = &tiommu {
        tiommu.reset().map_err(ask::text)?;
    }
    let file = File::create(out).map_err(|e| format!("{out}: {e}"))?;
    let mut file = BufWriter::new(file);
    for case in &cases {
        let mut step = || -> io::Result<()> {
            if let Some(title) = &case.title {
                writeln!(file, "{title}")?;
            }
            if case.lines.is_empty() {
                return Ok(());
            }
            let work = |pipe| i32::from(run_case(case, huge, pipe).is_err());
            match process::piped(work, &mut |bytes| file.write_all(bytes))? {
                process::End::Exited(0) => Ok(()),
                process::End::Exited(code) => writeln!(file, "  CHILD DIED status={code}"),
                process::End::Died(how) => writeln!(file, "  CHILD DIED {how}"),
            }
        };
        step().map_err(|e| format!("{out}: {e}"))?;
    }
    file.flush().map_err(|e| format!("{out}: {e}"))?;
    tiommu.map_or(Ok(()), |tiommu| counted(&tiommu, out))
}

/// Writes to a file beside the transcript what the test IOMMU has counted, if the
/// script has used it.
fn counted(tiommu: &Tiommu, out: &str) -> Result<(), String> {
    let tiommu::Counters {
        maps,
        unmaps,
        syncs,
        faults,
        ..
    } = tiommu.counters().map_err(ask::text)?;
    if maps == 0 {
        return Ok(());
    }
    let text = format!("{maps} maps, {unmaps} unmaps, {syncs} IOTLB syncs, {faults} faults\n");
    let name = format!("{}.iommu", out.trim_end_matches(".out"));
    fs::write(&name, text).map_err(|e| format!("{name}: {e}"))
}

fn configure() -> Result<(), String> {
    let tiommu = Tiommu::open().map_err(ask::text)?;
    tiommu.configure_all().map_err(ask::text)?;
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["configure"] => configure(),
        ["run", script, out] => run(script, out, false),
        ["run", script, out, "huge"] => run(script, out, true),
        ["iommu"] => arena::map_all().and_then(|()| iommu::run()),
        ["edu"] => arena::map_all().and_then(|()| edu::run()),
        ["exact"] => arena::map_all().and_then(|()| exact::run()),
        ["faults"] => arena::map_all().and_then(|()| faults::run(false)),
        ["faults", "threads"] => arena::map_all().and_then(|()| faults::run(true)),
        ["absent"] => arena::map_all().and_then(|()| absent::run(false)),
        ["absent", "real"] => arena::map_all().and_then(|()| absent::run(true)),
        ["backend"] => arena::map_all().and_then(|()| backend::run()),
        ["cgroup"] => arena::map_all().and_then(|()| cgroup::run()),
        ["failnth"] => arena::map_all().and_then(|()| failnth::run()),
        ["speed", part, out] => arena::map_all().and_then(|()| speed::run(part, out)),
        ["ratio", real, ours] => speed::ratio(real, ours),
        ["generate", kind, seed, ops, kernel] => generate::print(kind, seed, ops, kernel),
        ["compare", script, real, ours, replay, ref lists @ ..] => {
            compare::run(script, real, ours, replay, lists)
        }
        _ => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
