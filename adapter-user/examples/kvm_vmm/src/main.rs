// SPDX-License-Identifier: MIT OR Apache-2.0
//! An example VMM: it boots a small guest of its own on /dev/kvm and migrates it
//! to a second process while CPU, VMM and devices write its memory.
//!
//! `cargo run --release --example kvm_vmm --features kvm`

mod kvm;

use std::process::ExitCode;

use clap::Parser;

/// Migrate a running guest to another process; the guest checks its own memory
///
/// Exit status: 0 it arrived whole, 1 it did not, 2 there is no KVM here.
#[derive(Parser)]
struct Cli {
    /// Leave one source of dirty pages out: the guest must find stale pages
    #[arg(long, value_name = "SOURCE")]
    lose: Option<kvm::Lose>,

    /// Let the guest run for so long while its pages go
    #[arg(long, value_name = "N", default_value_t = 0)]
    seconds: u64,

    /// Devices that map and unmap their virtual IOMMUs at full speed
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=4))]
    hammers: u64,

    /// KVM's device
    #[arg(long, value_name = "PATH", default_value = "/dev/kvm")]
    kvm: String,

    /// Be the receiving process
    #[arg(long, hide = true)]
    destination: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.destination {
        return kvm::receive(&cli.kvm);
    }
    let args = kvm::Args {
        kvm: cli.kvm,
        lose: cli.lose,
        seconds: cli.seconds,
        hammers: cli.hammers,
    };
    kvm::run(&args, &["--destination"])
}
