// SPDX-License-Identifier: MIT OR Apache-2.0
//! Live migrations of stock QEMU with an emulated VFIO device, in its process or in another.
//!
//! For each case a guest on one QEMU drives the device of `vfio-preload`, migrates to another
//! QEMU while it works, and checks its own memory there. All guest memory of the two is
//! compared, and QEMU's own trace with what it was answered.

// Each file uses only files below it.
mod story; // runs a case

mod check; // what the traces say
mod drive; // drives the device
mod launch; // what a QEMU is started with

mod case; // the cases

mod guest; // the guests

mod qemu; // a QEMU that runs

mod server; // a process that serves the device

mod lines;
mod qmp;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use crate::case::{Case, CASES};
use crate::guest::Guests;
use crate::qemu::Places;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Migrates stock QEMUs with an emulated VFIO device, and prints what came of it.
///
/// A negative control drops dirty bits on purpose: its destination must be stale.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The cases that continuous integration runs: under 90 s, and a fetch of QEMU
    #[arg(long)]
    quick: bool,
    /// Every case
    #[arg(long, conflicts_with = "quick")]
    all: bool,
    /// Only cases whose name has these words
    #[arg(long, value_name = "WORDS")]
    only: Option<String>,
    /// Runs each case so often
    #[arg(long, default_value_t = 1, value_name = "N")]
    repeat: usize,
    /// Keeps the folder of each case, and says where it is
    #[arg(long)]
    keep: bool,
    /// Prints a command line that starts QEMU with the device, and runs nothing
    #[arg(long)]
    print: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let build = tempfile::tempdir()?;
    let places = Places {
        cache: here.join("cache"),
        library: beside("libvfio_preload.so", "vfio-preload")?,
        server: beside("vfio-engine", "vfio-engine")?,
    };
    if options.print {
        return print(&places);
    }
    let wanted = |case: &&Case| {
        let named = options
            .only
            .as_ref()
            .is_none_or(|words| case.name.contains(words.as_str()));
        named && (case.quick || options.all || (options.only.is_some() && !options.quick))
    };
    let cases: Vec<&Case> = CASES.iter().filter(wanted).collect();
    if cases.is_empty() {
        return Err("no case has this name; --all runs every case".into());
    }
    for version in cases
        .iter()
        .flat_map(|case| [case.from, case.to])
        .collect::<BTreeSet<_>>()
    {
        qemu::fetch(&places.cache, version)?;
    }
    let with_linux = cases.iter().any(|case| case.guest.starts_with("linux"));
    let guests = Guests::build(build.path(), &places.cache, with_linux)?;
    println!(
        "{:<52} {:<12} {:<9} {:<9} {:>7}",
        "case", "QEMU", "expected", "seen", "seconds"
    );
    let mut good = true;
    for case in cases {
        for _ in 0..options.repeat {
            good &= show(&places, &guests, case, options.keep)?;
        }
    }
    Ok(good)
}

/// Runs a case, and prints its row.
fn show(places: &Places, guests: &Guests, case: &Case, keep: bool) -> Result<bool> {
    let folder = tempfile::Builder::new().prefix("vfio-qemu-").tempdir()?;
    let start = Instant::now();
    let done = story::run(places, guests, case, folder.path());
    let seconds = start.elapsed().as_secs_f64();
    let (seen, mut wrong) = match done {
        Ok(seen) => (seen.what.name(), seen.wrong),
        Err(error) => ("error", vec![error.to_string()]),
    };
    if seen != case.expected.name() && wrong.is_empty() {
        wrong.push(format!("it should be {}", case.expected.name()));
    }
    let versions = match case.from == case.to {
        true => case.from.name().to_owned(),
        false => format!("{} to {}", case.from.name(), case.to.name()),
    };
    println!(
        "{:<52} {versions:<12} {:<9} {seen:<9} {seconds:>7.1}",
        case.name,
        case.expected.name()
    );
    for wrong in &wrong {
        println!(
            "    WRONG: {}",
            wrong.trim_end().replace('\n', "\n           ")
        );
    }
    if keep {
        println!("    kept: {}", folder.keep().display());
    } else {
        folder.close()?; // all that it had is in it
    }
    Ok(wrong.is_empty())
}

/// A file of a package, beside this program.
fn beside(name: &str, package: &str) -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let file = program.with_file_name(name);
    match file.exists() {
        true => Ok(file),
        false => Err(format!(
            "{} is not there: cargo build --release -p {package}",
            file.display()
        )
        .into()),
    }
}

/// Prints how to start QEMU with the device.
fn print(places: &Places) -> Result<bool> {
    let folder = Path::new("/tmp/vfio");
    let place = folder.join("sys/dev0");
    println!("# A device has a folder that sysfs would have, with the link to its group.");
    println!(
        "mkdir -p {0} {1}/sys/groups/42",
        place.display(),
        folder.display()
    );
    println!(
        "ln -sfn {}/sys/groups/42 {}/iommu_group",
        folder.display(),
        place.display()
    );
    println!(
        "# `qemu-system-x86_64` may be any VMM. README.md of preload/ has the other variables."
    );
    println!(
        "LD_PRELOAD={} VFIO_PRELOAD_DEVICES=42:dev0 \\",
        places.library.display()
    );
    println!("    qemu-system-x86_64 -machine q35 -m 1G \\");
    println!(
        "    -device vfio-pci,sysfsdev={},enable-migration=on",
        place.display()
    );
    Ok(true)
}
