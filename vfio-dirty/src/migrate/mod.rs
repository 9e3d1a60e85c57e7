// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty migrate`: a live migration of real memory under real writes, with a verdict.

mod args;
mod cpu_tracker;
mod destination;
mod devices;
mod guest;
mod kvm_guest;
mod link;
mod outcome;
mod plot;
mod precopy;
mod remote;
mod report;
mod source;
mod tracking;
pub(crate) mod units;
mod verdict;
mod viommu;
mod wire;
mod writers;

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use adapter_user::{host_options, Container, Error, Group, GuestMemory, IommuType, Options, Prot};

pub(crate) use self::args::Args;

use self::args::{Lose, OtherDevice};
use self::cpu_tracker::CpuTracker;
use self::devices::{LongPins, Messages, ShortPins, GROUP};
use self::guest::{Guest, PAGE};
use self::link::Patience;
use self::outcome::Summary;
use self::precopy::Goals;
use self::remote::Remote;
use self::report::Reporter;
use self::source::{Starting, DESTINATION};
use self::tracking::Tracking;
use self::verdict::Verdict;
use self::viommu::Churn;
use self::writers::{Cpu, Work, Writers};
use crate::failure::{cannot, explain, is_file_limit, Failure};

/// How long the guest runs before its migration starts.
const WARM_UP: Duration = Duration::from_millis(100);

/// After this silence of the destination process the user is told.
const NOTICE: Duration = Duration::from_secs(2);

/// After this silence of the destination process the migration fails.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs the command.
pub(crate) fn run(args: &Args) -> Result<ExitCode, Failure> {
    if args.guest.is_some() {
        return kvm_guest::run(args);
    }
    args.check()?;
    check_page()?;
    let reporter = Reporter::new(args.json);
    reporter.preparing(args)?;
    // Both processes allocate their memory at the same time.
    let destination = Starting::new(args.memory, |process| Patience {
        notice: NOTICE,
        limit: LIMIT,
        tell: reporter.silence(process, LIMIT),
    })?;
    let guest = Guest::boot(args.memory, || reporter.progress(1));
    let guest = Arc::new(guest.map_err(cannot("set up the guest's memory"))?);
    let container = new_container(&guest).map_err(cannot("set up the container"))?;
    let tracking = Tracking::new(&guest)?;
    tracking.add_ram(&container, guest.len(), args.lose == Some(Lose::Device));
    let mut works = works(args, &guest, &container, &tracking)?;
    let mut destination = destination.ready()?;
    if args.device == Some(OtherDevice::VfioUser) {
        let remote = Remote::new(&guest, destination.memory(), args.rate)?;
        remote.track(&tracking, args.lose == Some(Lose::VfioUser))?;
        works.push(Box::new(remote));
    }
    reporter.started(args, destination.process_id())?;

    let mut writers = Writers::start(works, args.rate)?;
    thread::sleep(WARM_UP);
    if let Some(cpus) = track_cpus(args, &guest)? {
        tracking.add_cpus(cpus, args.lose == Some(Lose::Cpu));
    }
    container.start().map_err(cannot("start tracking"))?;
    tracking.start()?;
    let goals = Goals {
        downtime: Duration::from_millis(args.downtime),
        max_rounds: args.max_rounds,
    };
    let outcome = precopy::migrate(
        &guest,
        &tracking,
        &mut writers,
        &mut destination,
        &goals,
        &reporter,
    )?;
    container.stop().map_err(cannot("stop tracking"))?;

    reporter.begin("comparing", guest.pages());
    let progress = |pages| reporter.progress(pages);
    let verdict = Verdict::compare(&guest, destination.memory(), progress)?;
    destination.finish()?;
    let summary = Summary {
        args,
        outcome: &outcome,
        verdict: &verdict,
    };
    reporter.finish(&summary)?;
    if let Some(path) = &args.plot {
        plot::draw(path, &summary).map_err(|cause| {
            Failure::Runtime(format!("cannot draw into {}: {cause}", path.display()))
        })?;
    }
    Ok(match verdict.is_equal() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Runs a receiving process, if `args` are those with which [`run`] starts one.
pub(crate) fn receive(args: &[OsString]) -> Option<Result<ExitCode, Failure>> {
    match args {
        [first] if first == DESTINATION => Some(destination::receive().map(|()| ExitCode::SUCCESS)),
        _ => kvm_guest::receive(args),
    }
}

/// Its guest's pages are of 4 KiB, and the kernel must be able to track each.
fn check_page() -> Result<(), Failure> {
    match host_options().page_size.bytes() {
        PAGE => Ok(()),
        other => Err(Failure::Runtime(format!(
            "`migrate` needs a kernel with pages of 4 KiB, and this one's have {} KiB: boot one \
             with pages of 4 KiB",
            other >> 10
        ))),
    }
}

/// Whether the kernel can track what CPUs write. The error says why not.
pub(crate) fn cpu_tracking() -> io::Result<()> {
    let memory = Arc::new(GuestMemory::new(PAGE)?);
    CpuTracker::protect(&memory).map(drop)
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
    tracking: &Tracking,
) -> Result<Vec<Box<dyn Work>>, Failure> {
    let lost = args.lose == Some(Lose::Unmap);
    let mut works: Vec<Box<dyn Work>> = vec![
        Box::new(LongPins::new(guest, container)?),
        Box::new(ShortPins::new(guest, container)?),
        Box::new(Messages::new(guest, container)?),
        Box::new(Churn::new(guest, container, tracking, lost)?),
    ];
    if !args.no_cpu {
        for _ in 0..args.cpu_threads {
            works.push(Box::new(Cpu::new(guest)));
        }
    }
    Ok(works)
}

fn track_cpus(args: &Args, guest: &Guest) -> Result<Option<CpuTracker>, Failure> {
    if args.no_cpu {
        return Ok(None);
    }
    CpuTracker::protect(&guest.cpu).map(Some).map_err(|cause| {
        Failure::Runtime(match is_file_limit(&cause) {
            true => format!("cannot track the writes of CPUs: {}", explain(&cause)),
            false => format!(
                "this kernel does not track the writes of CPUs, which takes Linux 6.7 or newer \
                 with userfaultfd allowed ({cause}): run with --no-cpu to let only devices write"
            ),
        })
    })
}
