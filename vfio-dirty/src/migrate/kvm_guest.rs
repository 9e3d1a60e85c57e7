// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty migrate --guest kvm`: the example VMM.

use std::process::ExitCode;

use super::Args;
use crate::failure::Failure;

/// The subcommand of its receiving process.
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub(crate) const KVM_DESTINATION: &str = "kvm-destination";

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub(super) fn run(args: &Args) -> Result<ExitCode, Failure> {
    use super::Lose;
    use kvm_vmm as kvm;

    let lose = args.lose.map(|lose| match lose {
        Lose::Cpu => kvm::Lose::Kvm,
        Lose::Vmm => kvm::Lose::Vmm,
        Lose::Device => kvm::Lose::Device,
        // What a device logged by IOVA, also through mappings that are gone.
        Lose::Unmap => kvm::Lose::Log,
    });
    let args = kvm::Args {
        kvm: args.kvm.clone(),
        lose,
        seconds: args.stress.unwrap_or(0),
        hammers: if args.stress.is_some() { 4 } else { 0 },
    };
    Ok(kvm::run(&args, &[KVM_DESTINATION]))
}

#[cfg(not(all(feature = "kvm", target_arch = "x86_64")))]
pub(super) fn run(args: &Args) -> Result<ExitCode, Failure> {
    let Args { kvm, stress, .. } = args;
    let _ = (kvm, stress); // nothing to do with them here
    Err(Failure::Usage(
        "this program was built without virtual machines: build it with --features kvm".into(),
    ))
}
