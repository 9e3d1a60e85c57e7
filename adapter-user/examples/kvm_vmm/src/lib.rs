// SPDX-License-Identifier: MIT OR Apache-2.0
//! An example VMM that migrates a running KVM guest to another process.
//!
//! Everything that writes guest memory is in one [`Tracker`], and one call to
//! [`Tracker::take`] a round tells what is dirty:
//!
//! | who writes | how the tracker learns of it | where |
//! |---|---|---|
//! | the guest's CPU | KVM's dirty log, as a source | `source::add_kvm_log` |
//! | the VMM | [`DirtyBits`] in vm-memory's regions | `machine` |
//! | device 0 | it marks through its mapping of the virtual IOMMU | `dma` |
//! | device 1 | it has a log by IOVA, which the tracker reads | `dma` |
//!
//! `vfio-dirty migrate --guest kvm` runs it. Start reading at `source::migrate`.
//! The guest's program counts its steps and verifies its memory when it arrives, so
//! that a stale page is found.
//!
//! That program and the virtual machine are x86-64's. On other architectures this crate is
//! empty, and `vfio-dirty migrate --guest kvm` says that it takes x86-64.
//!
//! [`Tracker`]: adapter_user::guest::Tracker
//! [`Tracker::take`]: adapter_user::guest::Tracker::take
//! [`DirtyBits`]: adapter_user::DirtyBits

#![cfg(target_arch = "x86_64")]

mod asm;
mod destination;
mod dma;
mod guest;
mod hammer;
mod machine;
mod memory;
mod source;
mod wire;

use std::error::Error;
use std::ffi::CString;
use std::process::ExitCode;

use kvm_ioctls::Kvm;

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// What to run.
#[derive(Clone, Debug)]
pub struct Args {
    /// The path of KVM's device, `/dev/kvm`.
    pub kvm: String,
    /// A source that is left out, so that the guest must find stale pages.
    pub lose: Option<Lose>,
    /// How many seconds the guest runs while its pages are sent.
    pub seconds: u64,
    /// How many devices map and unmap as fast as they can, at most 4.
    pub hammers: u64,
}

/// The sources of dirty pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lose {
    /// KVM's log of what the CPU writes.
    Kvm,
    /// What the VMM writes through vm-memory.
    Vmm,
    /// What device 0 marks through its mappings.
    Device,
    /// What device 1 logs by IOVA.
    Log,
}

/// Runs a guest and migrates it to a second process.
///
/// The second process is this program, started with the arguments `destination`
/// and `--kvm PATH`; it must call [`receive`]. The exit status is 0 if the guest
/// arrived whole, 1 if it did not, and 2 if this machine runs no KVM guests.
pub fn run(args: &Args, destination: &[&str]) -> ExitCode {
    finish(&args.kvm, || source::migrate(args, destination))
}

/// Runs the second process, which receives the guest on standard input.
///
/// The exit status is that of [`run`].
pub fn receive(kvm: &str) -> ExitCode {
    finish(kvm, || destination::receive(kvm))
}

fn finish(kvm: &str, run: impl FnOnce() -> Result<ExitCode>) -> ExitCode {
    let path = CString::new(kvm).unwrap_or_default();
    if let Err(cause) = Kvm::new_with_path(path) {
        eprintln!("{}", no_kvm(kvm, cause.errno()));
        return ExitCode::from(2);
    }
    run().unwrap_or_else(|cause| {
        let way_out = match is_file_limit(&*cause) {
            true => format!("; {MORE_FILES}"),
            false => String::new(),
        };
        eprintln!("the migration failed: {cause}{way_out}");
        ExitCode::FAILURE
    })
}

const MORE_FILES: &str = "allow more with `ulimit -n 256`";

/// Whether `cause`, or what caused it, is the limit of open files.
fn is_file_limit(cause: &(dyn Error + 'static)) -> bool {
    let io = cause.downcast_ref::<std::io::Error>();
    let errno = match cause.downcast_ref::<kvm_ioctls::Error>() {
        Some(cause) => Some(cause.errno()),
        None => io.and_then(std::io::Error::raw_os_error),
    };
    errno == Some(libc::EMFILE) || cause.source().is_some_and(is_file_limit)
}

/// Says why KVM's device cannot be opened, and what to do.
fn no_kvm(path: &str, errno: i32) -> String {
    let cause = std::io::Error::from_raw_os_error(errno);
    let (what, way_out) = match errno {
        libc::EACCES | libc::EPERM => (
            "this user may not run virtual machines",
            "join the group that owns the device (`sudo usermod -aG kvm $USER`, then log in again)",
        ),
        libc::EMFILE => ("this process may open too few files", MORE_FILES),
        _ => (
            "no virtual machines here",
            "load the module kvm_intel or kvm_amd, or enable virtualization in the firmware or \
             in the outer virtual machine",
        ),
    };
    format!("{what}: {path} cannot be opened ({cause}); {way_out}")
}

#[cfg(test)]
mod tests {
    use super::no_kvm;

    #[test]
    fn each_cause_has_its_way_out() {
        let denied = no_kvm("/dev/kvm", libc::EACCES);
        assert!(denied.contains("may not") && denied.contains("usermod -aG kvm"));
        assert!(!denied.contains("no virtual machines"), "{denied}");
        assert!(no_kvm("/dev/kvm", libc::EMFILE).contains("ulimit -n"));
        let missing = no_kvm("/dev/kvm", libc::ENOENT);
        assert!(missing.starts_with("no virtual machines here: /dev/kvm"));
    }
}
