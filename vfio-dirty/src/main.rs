// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program `vfio-dirty`: dirty-page tracking of a VFIO container, to try,
//! to compare with Linux, and to prove by migrating real memory.

mod failure;
mod info;
mod migrate;
mod replay;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Dirty-page tracking of a VFIO type1 container, in userspace.
///
/// `migrate` moves real memory under real writes and proves that nothing is lost; `replay` answers
/// scripts as the Linux driver does; `info` says what this machine can do.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Migrate(migrate::Args),
    Replay(replay::Args),
    Info(info::Args),
    /// The receiving process of a migration.
    #[command(hide = true, name = migrate::DESTINATION)]
    Destination,
    /// The receiving process of a migration of a KVM guest.
    #[cfg(all(feature = "kvm", target_arch = "x86_64"))]
    #[command(hide = true, name = migrate::KVM_DESTINATION)]
    KvmDestination {
        #[arg(long)]
        kvm: String,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Migrate(args) => migrate::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Destination => migrate::destination(),
        #[cfg(all(feature = "kvm", target_arch = "x86_64"))]
        Command::KvmDestination { kvm } => Ok(kvm_vmm::receive(&kvm)),
    };
    result.unwrap_or_else(|failure| {
        // Nobody may be there to read it.
        let _ = writeln!(io::stderr(), "vfio-dirty: {failure}");
        failure.exit_code()
    })
}
