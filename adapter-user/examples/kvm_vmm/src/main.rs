// SPDX-License-Identifier: MIT OR Apache-2.0
//! The example VMM as a program: `cargo run --release -p kvm-vmm`.

use std::process::ExitCode;

use clap::Parser;

/// Migrate a running guest to another process; the guest checks its own memory
///
/// Exit status: 0 it arrived whole, 1 it did not, 2 this machine runs no KVM
/// guests.
#[derive(Parser)]
struct Cli {
    /// Leave out one source of dirty pages, so that the guest finds stale pages
    #[arg(long, value_name = "SOURCE")]
    lose: Option<kvm_vmm::Lose>,

    /// Let the guest run for N seconds while its pages are sent
    #[arg(long, value_name = "N", default_value_t = 0)]
    seconds: u64,

    /// Run N devices that map and unmap at full speed
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=4))]
    hammers: u64,

    /// The path of KVM's device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: String,

    /// Run the receiving process
    #[arg(long, hide = true)]
    destination: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.destination {
        return kvm_vmm::receive(&cli.kvm);
    }
    let args = kvm_vmm::Args {
        kvm: cli.kvm,
        lose: cli.lose,
        seconds: cli.seconds,
        hammers: cli.hammers,
    };
    kvm_vmm::run(&args, &["--destination"])
}
