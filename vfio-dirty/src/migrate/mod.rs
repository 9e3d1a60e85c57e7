// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty migrate`: a live migration of real memory under real writes, with a verdict.

mod cpu_tracker;
mod destination;
mod devices;
mod guest;
mod kvm_guest;
mod link;
mod page_set;
mod plot;
mod precopy;
mod report;
mod source;
mod units;
mod verdict;
mod viommu;
mod wire;
mod writers;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use adapter_user::{Container, Error, Group, GuestMemory, IommuType, Options, Prot};
use clap::ValueEnum;

#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
pub(crate) use self::kvm_guest::KVM_DESTINATION;
pub(crate) use self::source::DESTINATION;

use self::cpu_tracker::CpuTracker;
use self::devices::{LongPins, Messages, ShortPins, GROUP};
use self::guest::{Guest, PAGE};
use self::precopy::{Goals, Trackers};
use self::report::{Report, Reporter};
use self::source::Starting;
use self::units::MIB;
use self::verdict::Verdict;
use self::viommu::{Churn, Viommu};
use self::writers::{Cpu, Work, Writers};
use crate::failure::{cannot, Failure};

/// How long the guest runs before its migration starts.
const WARM_UP: Duration = Duration::from_millis(100);

const MIN_MEMORY: u64 = 16 * MIB;

/// Migrate a guest's memory to another process while CPUs and devices write it
///
/// The memory is written by CPU threads, whose writes the kernel tracks (userfaultfd and
/// PAGEMAP_SCAN), and by four emulated devices, whose writes only the container's dirty tracking
/// can see: one with long pins, one that pins for each write, one that writes by dma_rw, and one
/// behind a virtual IOMMU whose windows are mapped and unmapped all the time.
///
/// Pages go to a second process in rounds until the rest fits the downtime goal; then the writers
/// stop and the rest is sent. At the end the two memories are compared byte by byte. With --lose
/// one tracker's answers are thrown away, and the comparison must fail.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vfio-dirty migrate
  vfio-dirty migrate --memory 4G --downtime 100 --plot rounds.svg
  vfio-dirty migrate --lose unmap        # shows what the harvest at unmap saves
  vfio-dirty migrate --guest kvm         # a virtual machine, which checks itself

Exit status: 0 the memories are equal, 1 they differ or the migration failed, 2 bad usage, or
no /dev/kvm for --guest kvm.")]
pub(crate) struct Args {
    /// Memory of the guest, in bytes or with K, M or G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_memory)]
    memory: u64,

    /// Stop the guest when the rest can be sent in this time
    #[arg(long, value_name = "MS", default_value_t = 50,
          value_parser = clap::value_parser!(u64).range(1..=60_000))]
    downtime: u64,

    /// Stop the guest after this many rounds in any case
    #[arg(long, value_name = "N", default_value_t = 30,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    max_rounds: u32,

    /// Threads that write as CPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=64))]
    cpu_threads: u32,

    /// Let only devices write, for kernels that cannot track the CPUs' writes
    #[arg(long, conflicts_with = "cpu_threads")]
    no_cpu: bool,

    /// Pages that each CPU thread and each device writes in a second
    #[arg(long, value_name = "PAGES", default_value_t = 20_000,
          value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    rate: u32,

    /// Throw away what one tracker reports: the verdict must then be that pages differ
    #[arg(long, value_name = "TRACKER")]
    lose: Option<Lose>,

    /// Migrate another guest: `kvm` is a small virtual machine with two emulated devices, whose
    /// own program verifies its memory at the destination
    #[arg(long, value_name = "GUEST", conflicts_with_all = [
        "memory", "downtime", "max_rounds", "cpu_threads", "no_cpu", "rate", "json", "plot"])]
    guest: Option<OtherGuest>,

    /// Go on for so long with the virtual machine, beside four devices that map and unmap as fast
    /// as they can
    #[arg(long, value_name = "SECONDS", requires = "guest")]
    stress: Option<u64>,

    #[arg(
        long,
        value_name = "PATH",
        requires = "guest",
        hide = true,
        default_value = "/dev/kvm"
    )]
    kvm: String,

    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,

    /// Draw pages and bytes of each round into an SVG file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Lose {
    /// GET_BITMAP over guest RAM
    Device,
    /// The bitmaps harvested when windows are unmapped
    Unmap,
    /// PAGEMAP_SCAN, or KVM's log
    Cpu,
    /// What the VMM itself writes; only with --guest kvm
    Vmm,
}

/// A guest that is not made of this program's threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OtherGuest {
    /// A virtual machine
    Kvm,
}

impl Lose {
    fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Unmap => "unmap",
            Self::Cpu => "cpu",
            Self::Vmm => "vmm",
        }
    }
}

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Failure> {
    if args.guest.is_some() {
        return kvm_guest::run(args);
    }
    check(args)?;
    let destination = Starting::new(args.memory)?; // both get their memory at the same time
    let guest = Guest::boot(args.memory).map_err(cannot("set up the guest's memory"))?;
    let guest = Arc::new(guest);
    let container = new_container(&guest).map_err(cannot("set up the container"))?;
    let viommu = Viommu::new(&guest, &container)?;
    let works = works(args, &guest, &container, &viommu)?;
    let mut destination = destination.ready()?;
    let reporter = Reporter::new(args, destination.process_id());

    let mut writers = Writers::start(works, args.rate)?;
    thread::sleep(WARM_UP);
    let mut trackers = Trackers {
        container,
        viommu,
        cpu: track_cpu(args, &guest)?,
        lose: args.lose,
    };
    trackers.viommu.start_tracking()?;
    let goals = Goals {
        downtime: Duration::from_millis(args.downtime),
        max_rounds: args.max_rounds,
    };
    let outcome = precopy::migrate(
        &guest,
        &mut trackers,
        &mut writers,
        &mut destination,
        &goals,
        &reporter,
    )?;
    trackers.viommu.stop_tracking()?;

    reporter.comparing();
    let verdict = Verdict::compare(&guest, destination.memory())?;
    destination.finish()?;
    let report = Report {
        args,
        outcome: &outcome,
        verdict: &verdict,
    };
    reporter.finish(&report);
    if let Some(path) = &args.plot {
        plot::draw(path, &report).map_err(|cause| {
            Failure::Runtime(format!("cannot draw into {}: {cause}", path.display()))
        })?;
    }
    Ok(match verdict.is_equal() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Runs the receiving process, which [`run`] starts with the subcommand [`DESTINATION`].
pub(crate) fn destination() -> Result<ExitCode, Failure> {
    destination::receive().map(|()| ExitCode::SUCCESS)
}

/// Whether the kernel can track what CPUs write; an error says why not.
pub(crate) fn cpu_tracking() -> io::Result<()> {
    let memory = Arc::new(GuestMemory::new(PAGE)?);
    CpuTracker::protect(&memory).map(drop)
}

fn parse_memory(text: &str) -> Result<u64, String> {
    let memory = units::parse_size(text)?;
    if memory % PAGE != 0 {
        return Err("the memory must be a multiple of 4K".into());
    }
    if memory < MIN_MEMORY {
        return Err(format!("the least memory is {}", units::size(MIN_MEMORY)));
    }
    Ok(memory)
}

/// What a look at one argument alone cannot tell.
fn check(args: &Args) -> Result<(), Failure> {
    if args.no_cpu && args.lose == Some(Lose::Cpu) {
        return Err(Failure::Usage(
            "there is no CPU tracker to lose with --no-cpu: leave one of the two out".into(),
        ));
    }
    if args.lose == Some(Lose::Vmm) {
        return Err(Failure::Usage(
            "only a virtual machine has a VMM to lose: add --guest kvm".into(),
        ));
    }
    if let Some(free) = free_memory() {
        // Both memories, their page tables and the program.
        let needed = args
            .memory
            .saturating_mul(2)
            .saturating_add(args.memory / 64 + 64 * MIB);
        if needed > free {
            return Err(Failure::Usage(format!(
                "--memory {} needs {} and the machine has {} to spare: give it less",
                units::size(args.memory),
                units::size(needed),
                units::size(free)
            )));
        }
    }
    if let Some(path) = &args.plot {
        let folder = path.parent().map(|folder| Path::new(".").join(folder));
        if path.is_dir() || !folder.is_some_and(|folder| folder.is_dir()) {
            return Err(Failure::Usage(format!(
                "--plot {} is not a file in a folder that exists: name another",
                path.display()
            )));
        }
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

/// A container in which devices see guest RAM at IOVA 0.
fn new_container(guest: &Guest) -> Result<Container, Error> {
    let container = Container::new(Options::default());
    container.add_group(Group::emulated(GROUP))?;
    container.set_iommu(IommuType::Type1v2)?;
    container.map(0, &guest.dma, 0, guest.len(), Prot::READ_WRITE)?;
    Ok(container)
}

fn works(
    args: &Args,
    guest: &Arc<Guest>,
    container: &Container,
    viommu: &Arc<Viommu>,
) -> Result<Vec<Box<dyn Work>>, Failure> {
    let mut works: Vec<Box<dyn Work>> = vec![
        Box::new(LongPins::new(guest, container)?),
        Box::new(ShortPins::new(guest, container)?),
        Box::new(Messages::new(guest, container)?),
        Box::new(Churn::new(viommu)),
    ];
    if !args.no_cpu {
        for _ in 0..args.cpu_threads {
            works.push(Box::new(Cpu::new(guest)));
        }
    }
    Ok(works)
}

fn track_cpu(args: &Args, guest: &Guest) -> Result<Option<CpuTracker>, Failure> {
    if args.no_cpu {
        return Ok(None);
    }
    CpuTracker::protect(&guest.cpu).map(Some).map_err(|cause| {
        Failure::Runtime(format!(
            "this kernel does not track the CPUs' writes, which takes Linux 6.7 or newer with \
             userfaultfd allowed ({cause}): run with --no-cpu to let only devices write"
        ))
    })
}
