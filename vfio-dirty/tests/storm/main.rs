// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two vfio-user servers and a VMM, each a process of its own, while the device writes all over
//! the guest's memory: which pages are stale at the destination, and what happens when one of
//! the three is killed.
//!
//! `cargo test --release -p vfio-dirty --test storm -- --repeat 20 --kills 50`

#[path = "../../src/serve/registers.rs"]
#[allow(dead_code)] // not all of them are of use here
mod registers;

mod kills; // who is killed, and what the others do
mod vmm; // the process that migrates

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;

use vmm::{Failure, Outcome, Plan};

/// Migrate between two vfio-user servers under a write storm
#[derive(Parser)]
struct Args {
    /// How often each migration runs
    #[arg(long, default_value_t = 1)]
    repeat: u32,

    /// How often a process is killed
    #[arg(long, default_value_t = 6)]
    kills: u32,

    /// Guest memory in MiB
    #[arg(long, default_value_t = 256)]
    memory: u64,

    /// Names of tests, which `cargo test` passes on. This is one test, so they change nothing
    #[arg(hide = true)]
    names: Vec<String>,
}

const USAGE: u8 = 2;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    // The VMM is this program again.
    if let [_, vmm, source, destination, memory, seed] = &args[..] {
        if vmm == kills::VMM {
            return kills::vmm(source, destination, memory, seed);
        }
    }
    let Ok(args) = Args::try_parse_from(&args).inspect_err(|cause| drop(cause.print())) else {
        return ExitCode::from(USAGE);
    };
    drop(args.names);
    match run(args.repeat, args.kills, args.memory << 20) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            println!("FAILED: {cause}");
            ExitCode::FAILURE
        }
    }
}

/// A kind of migration, and whether its pages must all arrive.
const CASES: [(&str, bool, Plan); 5] = [
    ("logged", true, plan(true, false, false)),
    ("logged, windows come and go", true, plan(true, true, false)),
    ("DMA by messages", true, plan(false, false, true)),
    ("not logged", false, plan(false, false, false)),
    (
        "not logged, windows come and go",
        false,
        plan(false, true, false),
    ),
];

const fn plan(logs: bool, remaps: bool, messages: bool) -> Plan {
    Plan {
        memory: 0,
        logs,
        remaps,
        messages,
    }
}

fn run(repeat: u32, kills: u32, memory: u64) -> Result<(), Failure> {
    println!(
        "{:31} {:>5} {:>11} {:>11} {:>7} {:>7} {:>8}",
        "storm", "right", "stale", "reported", "writes", "remaps", "down ms"
    );
    let mut longest = Duration::ZERO;
    for (name, arrives, plan) in CASES {
        let plan = Plan { memory, ..plan };
        let mut right = 0;
        let mut all = Vec::new();
        for seed in 0..repeat {
            let place = tempfile::tempdir()?;
            let (source, destination) = servers(place.path())?;
            let started = Instant::now();
            let outcome =
                vmm::migrate(source.path(), destination.path(), &plan, seed.into(), drop)?;
            longest = longest.max(started.elapsed());
            right += u32::from((outcome.stale == 0) == arrives);
            all.push(outcome);
        }
        println!(
            "{name:31} {right:>2}/{repeat:<2} {:>11} {:>11} {:>7} {:>7} {:>8}",
            range(&all, |outcome| outcome.stale),
            range(&all, |outcome| outcome.reported),
            narrow(all.iter().map(|outcome| outcome.writes).sum()),
            narrow(all.iter().map(|outcome| outcome.remaps).sum()),
            range(&all, |outcome| outcome.downtime.as_millis() as u64),
        );
        if right != repeat {
            return Err(format!("{} of {repeat} runs went wrong: {name}", repeat - right).into());
        }
    }
    kills::run(kills, memory, longest)
}

/// The least and the most of a number.
fn range(outcomes: &[Outcome], number: impl Fn(&Outcome) -> u64) -> String {
    let numbers = || outcomes.iter().map(&number);
    let (least, most) = (numbers().min(), numbers().max());
    match (least.unwrap_or_default(), most.unwrap_or_default()) {
        (least, most) if least == most => least.to_string(),
        (least, most) => format!("{least}-{most}"),
    }
}

fn narrow(number: u64) -> String {
    match number {
        0..=9_999 => number.to_string(),
        _ => format!("{}k", number / 1000),
    }
}

/// A server's process, which ends with this value.
struct Server {
    process: Child,
    path: PathBuf,
}

impl Server {
    fn start(path: PathBuf) -> Result<Server, Failure> {
        let mut process = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"))
            .args(["serve", "--socket"])
            .arg(&path)
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = process.stdout.take().ok_or("no output")?;
        let server = Server { process, path };
        // Its first line says that clients may come.
        let mut lines = BufReader::new(stdout).lines();
        lines.next().ok_or("the server has ended")??;
        // It prints a line for each client, so somebody must read them.
        std::thread::spawn(move || lines.for_each(drop));
        Ok(server)
    }

    fn path(&self) -> &str {
        self.path.to_str().unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Both fail if it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn servers(place: &Path) -> Result<(Server, Server), Failure> {
    let source = Server::start(place.join("source"))?;
    Ok((source, Server::start(place.join("destination"))?))
}

/// Whoever takes longer hangs.
const HANGS: Duration = Duration::from_secs(60);
