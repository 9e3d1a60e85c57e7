// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program `vfio-dirty`: VFIO dirty-page tracking to try, to compare with
//! Linux, and to check by migrating real memory.

mod failure;
mod info;
mod migrate;
mod replay;
mod serve;

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::Failure;

/// Try VFIO dirty-page tracking, without VFIO hardware
///
/// `migrate` moves real memory to another process while it is written, and
/// compares the two. `replay` answers scripts as the Linux driver does. `info`
/// says what a container offers and what this machine can do. `serve` has a device for programs that
/// speak vfio-user.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 80)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Migrate(migrate::Args),
    Replay(replay::Args),
    Info(info::Args),
    Serve(serve::Args),
}

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    // `migrate` starts this program again as the receiving process, and as a server. These are no
    // commands for users, and clap would suggest even hidden ones.
    let part = migrate::receive(&args).or_else(|| serve::connected(&args));
    let result = part.unwrap_or_else(run);
    result.unwrap_or_else(|failure| {
        // If this cannot be printed, the exit status still tells.
        let _ = writeln!(io::stderr(), "vfio-dirty: {failure}");
        failure.exit_code()
    })
}

fn run() -> Result<ExitCode, Failure> {
    match Cli::parse().command {
        Command::Migrate(args) => migrate::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Serve(args) => serve::run(&args),
    }
}
