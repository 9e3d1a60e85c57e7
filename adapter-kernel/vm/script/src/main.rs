// SPDX-License-Identifier: GPL-2.0-only
//! The VM's program. Inside the VM it runs scripts on the real `/dev/vfio/vfio`; outside
//! it makes them and compares their transcripts.

#[path = "../../../../vfio-dirty/src/replay/arena.rs"]
mod arena;
mod ask;
mod backend;
mod cgroup;
mod compare;
mod edu;
mod failnth;
mod faults;
mod generate;
mod linux;
#[path = "../../../../vfio-dirty/src/replay/process.rs"]
mod process;
mod real;
mod speed;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::process::ExitCode;

use dirty_script::Case;
use real::Real;

const USAGE: &str = "usage:
  dirty-vm run SCRIPT OUT          run a script on /dev/vfio/vfio
  dirty-vm edu                     let a PCI device write memory by DMA
  dirty-vm faults [threads]        kill processes, unload the module in use
  dirty-vm backend                 print which driver answers a container
  dirty-vm cgroup                  start in a memory cgroup that is nearly full
  dirty-vm failnth                 let each allocation fail in turn
  dirty-vm speed OUT               append times to a file
  dirty-vm ratio REAL OURS         print the ratios of two drivers' times
  dirty-vm generate KIND SEED OPS  print a script of random operations; KIND is
                                   emulated, iommu, mixed, or halfway: mixed, and
                                   user memory ends in the middle of operations
  dirty-vm compare SCRIPT REAL OURS REPLAY [LISTED]
                                   compare three transcripts of a script";

fn run_case(case: &Case, out: File) -> io::Result<()> {
    let mut out = BufWriter::new(out);
    let mut real = Real::new(case.entry_limit)?;
    for line in &case.lines {
        let reply = dirty_script::run(&mut real, &line.op);
        writeln!(out, "  {}{reply}", line.echo)?;
    }
    out.flush()
}

/// Runs each case of a script in a process of its own.
fn run(script: &str, out: &str) -> Result<(), String> {
    let text = fs::read_to_string(script).map_err(|e| format!("{script}: {e}"))?;
    let cases = dirty_script::parse(&text, &mut 65535).map_err(|e| format!("{script}, {e}"))?;
    arena::map_all()?;
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
            let work = |pipe| i32::from(run_case(case, pipe).is_err());
            match process::piped(work, &mut |bytes| file.write_all(bytes))? {
                process::End::Exited(0) => Ok(()),
                process::End::Exited(code) => writeln!(file, "  CHILD DIED status={code}"),
                process::End::Died(how) => writeln!(file, "  CHILD DIED {how}"),
            }
        };
        step().map_err(|e| format!("{out}: {e}"))?;
    }
    file.flush().map_err(|e| format!("{out}: {e}"))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["run", script, out] => run(script, out),
        ["edu"] => arena::map_all().and_then(|()| edu::run()),
        ["faults"] => arena::map_all().and_then(|()| faults::run(false)),
        ["faults", "threads"] => arena::map_all().and_then(|()| faults::run(true)),
        ["backend"] => arena::map_all().and_then(|()| backend::run()),
        ["cgroup"] => arena::map_all().and_then(|()| cgroup::run()),
        ["failnth"] => arena::map_all().and_then(|()| failnth::run()),
        ["speed", out] => arena::map_all().and_then(|()| speed::run(out)),
        ["ratio", real, ours] => speed::ratio(real, ours),
        ["generate", kind, seed, ops] => generate::print(kind, seed, ops),
        ["compare", script, real, ours, replay] => compare::run(script, real, ours, replay, None),
        ["compare", script, real, ours, replay, listed] => {
            compare::run(script, real, ours, replay, Some(listed))
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
