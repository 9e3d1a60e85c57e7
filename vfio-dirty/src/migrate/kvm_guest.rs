// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty migrate --guest kvm`: the example VMM.

use std::ffi::OsString;
use std::process::ExitCode;

use super::args::Args;
use crate::failure::Failure;

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
mod built {
    use super::*;
    use crate::migrate::args::{no_vfio_user, Lose};

    /// The argument with which the program starts itself as the receiving process.
    const DESTINATION: &str = "kvm-destination";

    pub(crate) fn run(args: &Args) -> Result<ExitCode, Failure> {
        let lose = args.lose.map(|lose| match lose {
            Lose::Cpu => Ok(kvm_vmm::Lose::Kvm),
            Lose::Vmm => Ok(kvm_vmm::Lose::Vmm),
            Lose::Device => Ok(kvm_vmm::Lose::Device),
            // What a device logs by IOVA, also in mappings that are gone.
            Lose::Unmap => Ok(kvm_vmm::Lose::Log),
            Lose::VfioUser => Err(no_vfio_user()),
        });
        let args = kvm_vmm::Args {
            kvm: args.kvm.clone(),
            lose: lose.transpose()?,
            seconds: args.stress.unwrap_or(0),
            hammers: if args.stress.is_some() { 4 } else { 0 },
        };
        Ok(kvm_vmm::run(&args, &[DESTINATION]))
    }

    pub(crate) fn receive(args: &[OsString]) -> Option<Result<ExitCode, Failure>> {
        match args {
            [first, option, path] if first == DESTINATION && option == "--kvm" => {
                Some(Ok(kvm_vmm::receive(&path.to_string_lossy())))
            }
            _ => None,
        }
    }
}

#[cfg(not(all(feature = "kvm", target_arch = "x86_64")))]
mod built {
    use super::*;

    pub(crate) fn run(args: &Args) -> Result<ExitCode, Failure> {
        let Args { kvm, stress, .. } = args;
        let _ = (kvm, stress); // only virtual machines need these
        Err(Failure::Usage(
            "this program was built without virtual machines, which takes the feature `kvm` on \
             x86-64: build it with --features kvm"
                .into(),
        ))
    }

    pub(crate) fn receive(_args: &[OsString]) -> Option<Result<ExitCode, Failure>> {
        None
    }
}

pub(super) use built::{receive, run};
