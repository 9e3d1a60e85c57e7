// SPDX-License-Identifier: MIT OR Apache-2.0
//! The options of `vfio-dirty migrate`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use clap::ValueEnum;

use super::guest::PAGE;
use super::units::{self, MIB};
use crate::failure::Failure;

const MIN_MEMORY: u64 = 16 * MIB;

/// Migrate a guest's memory to another process while CPUs and devices write it
///
/// CPU threads write the memory; the kernel tracks them (userfaultfd and PAGEMAP_SCAN). Four
/// emulated devices write it too, and only the container's dirty tracking sees their writes: one
/// device keeps pages pinned, one pins for each write, one writes by dma_rw, and one is behind a
/// virtual IOMMU whose windows are mapped and unmapped all the time.
///
/// Pages go to a second process in rounds, until the rest can be sent within the downtime goal.
/// Then the writers stop and the rest is sent. At the end the two memories are compared byte by
/// byte. With --lose, the answers of one tracker are thrown away, and the comparison must fail.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The table has one line for each round:
  dirty            pages that must be sent
  found by CPU     pages that PAGEMAP_SCAN reported
  found by device  pages that GET_BITMAP, or a vfio-user device's log,
                   reported for guest RAM
  found by windows pages that GET_BITMAP reported for the windows
  found by unmaps  pages that UNMAP_DMA reported when windows were unmapped
  zero             pages not sent, because they are zero at both ends
  sent, MiB, ms    pages and bytes sent, and the time that took

Examples:
  vfio-dirty migrate
  vfio-dirty migrate --memory 4G --downtime 100 --plot rounds.svg
  vfio-dirty migrate --lose unmap
  vfio-dirty migrate --device vfio-user --lose vfio-user
  vfio-dirty migrate --guest kvm

Exit status: 0 the memories are equal; 1 they differ, or the migration failed;
2 bad usage, or --guest kvm cannot open /dev/kvm.")]
pub(crate) struct Args {
    /// Size of the guest's memory: a number with K, M, G or T, or KiB, MiB, GiB or TiB
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_memory)]
    pub(super) memory: u64,

    /// Stop the guest when the rest can be sent in this time
    #[arg(long, value_name = "MS", default_value_t = 50,
          value_parser = clap::value_parser!(u64).range(1..=60_000))]
    pub(super) downtime: u64,

    /// Stop the guest after this many rounds, even if the rest takes longer
    #[arg(long, value_name = "N", default_value_t = 30,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) max_rounds: u32,

    /// Number of threads that write as CPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(super) cpu_threads: u32,

    /// Let only devices write, for kernels that cannot track the writes of CPUs
    #[arg(long, conflicts_with = "cpu_threads")]
    pub(super) no_cpu: bool,

    /// Pages that each CPU thread and each device writes in a second
    #[arg(long, value_name = "PAGES", default_value_t = 20_000,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(super) rate: u32,

    /// Throw away what one tracker reports, so that pages must differ at the end
    #[arg(long, value_name = "TRACKER")]
    pub(super) lose: Option<Lose>,

    /// Add a device: it writes guest memory from another process, where `vfio-dirty serve` has it
    #[arg(long, value_name = "DEVICE", conflicts_with = "guest")]
    pub(super) device: Option<OtherDevice>,

    /// Migrate another kind of guest
    #[arg(long, value_name = "GUEST", conflicts_with_all = [
        "memory", "downtime", "max_rounds", "cpu_threads", "no_cpu", "rate", "json", "plot"])]
    pub(super) guest: Option<OtherGuest>,

    /// Run the virtual machine for this long, beside four devices that map and unmap at full speed
    #[arg(long, value_name = "SECONDS", requires = "guest")]
    pub(super) stress: Option<u64>,

    #[arg(
        long,
        value_name = "PATH",
        requires = "guest",
        hide = true,
        default_value = "/dev/kvm"
    )]
    pub(super) kvm: String,

    /// Print one JSON document instead of text
    #[arg(long)]
    pub(super) json: bool,

    /// Draw the rounds into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    pub(super) plot: Option<PathBuf>,
}

/// A tracker whose answers are thrown away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Lose {
    /// GET_BITMAP of guest RAM
    Device,
    /// UNMAP_DMA of the windows
    Unmap,
    /// PAGEMAP_SCAN, or KVM's dirty log
    Cpu,
    /// The writes of the VMM itself; only with --guest kvm
    Vmm,
    /// The log of the device in another process; only with --device vfio-user
    VfioUser,
}

/// A device that is not in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OtherDevice {
    /// A vfio-user server at each end; the state of the device moves, too
    VfioUser,
}

/// A guest that is not made of this program's threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum OtherGuest {
    /// A small virtual machine with two devices, which verifies its own memory
    Kvm,
}

impl Lose {
    /// The option's value.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Unmap => "unmap",
            Self::Cpu => "cpu",
            Self::Vmm => "vmm",
            Self::VfioUser => "vfio-user",
        }
    }

    /// A sentence that says what is missing.
    pub(super) fn sentence(self) -> String {
        let answers = match self {
            Self::Device => "the answers of GET_BITMAP for guest RAM",
            Self::Unmap => "the answers of UNMAP_DMA",
            Self::Cpu => "the answers of PAGEMAP_SCAN",
            Self::Vmm => "the marks of the VMM",
            Self::VfioUser => "the log of the vfio-user device",
        };
        format!("--lose {} threw away {answers}", self.name())
    }
}

impl Args {
    /// Checks what cannot be seen from one option alone.
    pub(super) fn check(&self) -> Result<(), Failure> {
        if self.no_cpu && self.lose == Some(Lose::Cpu) {
            return Err(Failure::Usage(
                "--no-cpu leaves no CPU tracker to lose: leave out one of the two options".into(),
            ));
        }
        if self.lose == Some(Lose::Vmm) {
            return Err(Failure::Usage(
                "only a virtual machine has a VMM to lose: add --guest kvm".into(),
            ));
        }
        if self.lose == Some(Lose::VfioUser) && self.device.is_none() {
            return Err(no_vfio_user());
        }
        if let Some(free) = free_memory() {
            // Both memories, their page tables and the program.
            let needed = self
                .memory
                .saturating_mul(2)
                .saturating_add(self.memory / 64 + 64 * MIB);
            if needed > free {
                return Err(Failure::Usage(format!(
                    "--memory {} needs {}, and this machine has {} to spare: ask for less",
                    units::size(self.memory),
                    units::size(needed),
                    units::size(free)
                )));
            }
        }
        if let Some(path) = &self.plot {
            try_to_write(path).map_err(|cause| {
                Failure::Usage(format!(
                    "--plot {} cannot be written ({cause}): name another file",
                    path.display()
                ))
            })?;
        }
        Ok(())
    }
}

/// Why `--lose vfio-user` alone is nothing.
pub(super) fn no_vfio_user() -> Failure {
    Failure::Usage("there is no vfio-user device to lose: add --device vfio-user".into())
}

fn parse_memory(text: &str) -> Result<u64, String> {
    let memory = units::parse_size(text)?;
    if memory % PAGE != 0 {
        return Err("the size must be a multiple of 4K".into());
    }
    if memory < MIN_MEMORY {
        return Err(format!("the smallest size is {}", units::size(MIN_MEMORY)));
    }
    Ok(memory)
}

/// Opens the file for writing, and leaves its contents, or its absence, as they are.
fn try_to_write(path: &Path) -> io::Result<()> {
    let new = !path.exists();
    File::options().append(true).create(true).open(path)?;
    if new {
        fs::remove_file(path)?;
    }
    Ok(())
}

fn free_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}
