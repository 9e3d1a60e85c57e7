// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty`: see README.md.
mod failure;
mod replay;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}
#[derive(Subcommand)]
enum Command {
    Replay(replay::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Replay(args) => replay::run(&args),
    };
    result.unwrap_or_else(|failure| {
        eprintln!("vfio-dirty: {failure}");
        failure.exit_code()
    })
}
