// SPDX-License-Identifier: GPL-2.0-only
//! Runs operations on a real VFIO device that migrates, and prints each with its
//! answer. Outside of the VM it makes random operations.

mod device;
mod logging;
mod pages;
mod table;

use std::fmt::Display;
use std::io::{self, BufRead, BufWriter, Write};
use std::process::ExitCode;

use dirty_model::migration::random;
use rand::{RngCore, SeedableRng};

use device::Device;

const USAGE: &str = "usage:
  dirty-vm-migration table               print every call with every argument that differs
  dirty-vm-migration logging             print calls of DMA logging with their arguments
  dirty-vm-migration generate SEED OPS   print random operations
  dirty-vm-migration run MDEV            run the operations of the standard input on the
                                         device /sys/bus/mdev/devices/MDEV";

fn generate(seed: u64, count: usize) -> Result<(), String> {
    let mut bytes = vec![0; count * 64];
    rand::rngs::StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    print(&random(&bytes, count).map_err(|e| e.to_string())?)
}

fn print(lines: &[impl Display]) -> Result<(), String> {
    let mut out = BufWriter::new(io::stdout().lock());
    for line in lines {
        writeln!(out, "{line}").map_err(|e| e.to_string())?;
    }
    out.flush().map_err(|e| e.to_string())
}

fn run(mdev: &str) -> Result<(), String> {
    let mut device = Device::open(mdev).map_err(|e| format!("{mdev}: {e}"))?;
    let mut out = BufWriter::new(io::stdout().lock());
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|e| e.to_string())?;
        if line.is_empty() || line.starts_with('#') {
            writeln!(out, "{line}").map_err(|e| e.to_string())?;
            continue;
        }
        let answer = match logging::parse(&line)? {
            Some(call) => device.log(&call),
            None => device.run(&line.parse()?),
        };
        let answer = answer.map_err(|e| format!("{line}: {e}"))?;
        writeln!(out, "{line} => {answer}").map_err(|e| e.to_string())?;
    }
    out.flush().map_err(|e| e.to_string())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().map_err(|e| format!("{text}: {e}"));
    let done = match args[..] {
        ["table"] => print(&table::operations()),
        ["logging"] => print(&logging::lines()),
        ["generate", seed, count] => number(seed)
            .and_then(|seed| number(count).and_then(|count| generate(seed, count as usize))),
        ["run", mdev] => run(mdev),
        _ => Err(USAGE.into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            eprintln!("{what}");
            ExitCode::FAILURE
        }
    }
}
