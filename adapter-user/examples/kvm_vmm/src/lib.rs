// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VMM that migrates a running guest: everything that writes its memory is in
//! one tracker, and one call a round tells what is dirty.

mod asm;
mod destination;
mod dma;
mod guest;
mod hammer;
mod machine;
mod source;
mod wire;

use std::error::Error;
use std::process::ExitCode;

use kvm_ioctls::Kvm;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What to run.
pub(crate) struct Args {
    /// KVM's device.
    pub(crate) kvm: String,
    /// A source that is left out: the guest must find stale pages.
    pub(crate) lose: Option<Lose>,
    /// How long the guest runs while its pages go.
    pub(crate) seconds: u64,
    /// Devices that map and unmap as fast as they can.
    pub(crate) hammers: u64,
}

/// The sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Lose {
    /// KVM's log of what the CPU writes
    Kvm,
    /// What the VMM writes, through vm-memory
    Vmm,
    /// Marks of a device, by the mappings of its virtual IOMMU
    Device,
    /// The log of a device, by IOVA
    Log,
}

/// Runs a guest and migrates it to a process that is this program with the
/// arguments `destination`, which must call [`receive`]. Exit status: 0 it
/// arrived whole, 1 it did not, 2 there is no KVM here.
pub(crate) fn run(args: &Args, destination: &[&str]) -> ExitCode {
    finish(&args.kvm, || source::migrate(args, destination))
}

/// The receiving process.
pub(crate) fn receive(kvm: &str) -> ExitCode {
    finish(kvm, || destination::receive(kvm))
}

fn finish(kvm: &str, run: impl FnOnce() -> Result<ExitCode>) -> ExitCode {
    let path = std::ffi::CString::new(kvm).unwrap_or_default();
    if let Err(cause) = Kvm::new_with_path(path) {
        eprintln!("no virtual machines here: {kvm} cannot be opened ({cause})");
        return ExitCode::from(2);
    }
    run().unwrap_or_else(|cause| {
        eprintln!("the migration failed: {cause}");
        ExitCode::FAILURE
    })
}
