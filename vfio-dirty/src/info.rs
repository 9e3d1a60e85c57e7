// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty info`: what a container offers, and what this machine can do.

use std::io::{self, Write};
use std::process::ExitCode;

use adapter_user::uapi::*;
use adapter_user::{host_options, Container, Error, Group, GroupId, IommuSpec, IommuType};
use nix::sys::resource::{getrlimit, Resource, RLIM_INFINITY};

use crate::failure::{cannot, is_file_limit, Failure};
use crate::migrate;

/// Show what a container offers, and what this machine can do
///
/// The part about containers shows what GET_INFO and CHECK_EXTENSION answer, for a group of
/// emulated devices and for a group behind a simulated IOMMU. The part about the machine shows
/// what pinning and `migrate` need.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  vfio-dirty info --json

Exit status: 0, or 1 if a container does not answer.")]
pub(crate) struct Args {
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
}

const EXTENSIONS: [(u64, &str); 5] = [
    (VFIO_TYPE1_IOMMU, "TYPE1"),
    (VFIO_TYPE1v2_IOMMU, "TYPE1v2"),
    (VFIO_DMA_CC_IOMMU, "DMA_CC"),
    (VFIO_UNMAP_ALL, "UNMAP_ALL"),
    (VFIO_UPDATE_VADDR, "UPDATE_VADDR"),
];

/// The answers of GET_INFO and CHECK_EXTENSION.
struct Offer {
    iova_pgsizes: u64,
    dirty_pgsizes: u64,
    max_bitmap: u64,
    dma_avail: u32,
    iova_ranges: Vec<(u64, u64)>,
    extensions: Vec<u64>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_ne_bytes(field.unwrap_or_default())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Asks a new container, which has one group, by its ioctls.
fn ask(group: Group) -> Result<Offer, Error> {
    let container = Container::new(host_options());
    container.add_group(group)?;
    container.set_iommu(IommuType::Type1v2)?;
    let mut arg = vec![0; 4096];
    arg[..4].copy_from_slice(&4096u32.to_ne_bytes());
    // SAFETY: the answer goes to `arg`, whose length is its first word.
    unsafe { container.ioctl(VFIO_IOMMU_GET_INFO, arg.as_mut_ptr() as u64)? };
    let mut offer = Offer {
        iova_pgsizes: u64_at(&arg, 8),
        dirty_pgsizes: 0,
        max_bitmap: 0,
        dma_avail: 0,
        iova_ranges: Vec::new(),
        extensions: Vec::new(),
    };
    let mut at = u32_at(&arg, 16) as usize;
    while at != 0 {
        match u32_at(&arg, at) as u16 {
            VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION => {
                offer.dirty_pgsizes = u64_at(&arg, at + 16);
                offer.max_bitmap = u64_at(&arg, at + 24);
            }
            VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => offer.dma_avail = u32_at(&arg, at + 8),
            VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                let ranges = (0..u32_at(&arg, at + 8) as usize).map(|k| at + 16 + 16 * k);
                offer.iova_ranges = ranges
                    .map(|r| (u64_at(&arg, r), u64_at(&arg, r + 8)))
                    .collect();
            }
            _ => {}
        }
        at = u32_at(&arg, at + 4) as usize;
    }
    for (extension, _) in EXTENSIONS {
        // SAFETY: this ioctl takes a value and no address.
        if unsafe { container.ioctl(VFIO_CHECK_EXTENSION, extension)? } != 0 {
            offer.extensions.push(extension);
        }
    }
    Ok(offer)
}

/// The page sizes as text: `4K 2M 1G`, or the smallest one if there are many.
fn page_sizes(bitmap: u64) -> String {
    let name = |bit: u32| match bit {
        0..=9 => format!("{}", 1u64 << bit),
        10..=19 => format!("{}K", 1u64 << (bit - 10)),
        20..=29 => format!("{}M", 1u64 << (bit - 20)),
        _ => format!("{}G", 1u64 << (bit - 30)),
    };
    let lowest = bitmap.trailing_zeros();
    if bitmap.count_ones() > 8 {
        return format!("{} and every larger power of two", name(lowest));
    }
    let bits = (0..64).filter(|bit| bitmap >> bit & 1 != 0);
    bits.map(name).collect::<Vec<_>>().join(" ")
}

fn iova_ranges(ranges: &[(u64, u64)]) -> String {
    if ranges.is_empty() {
        return "all".into();
    }
    let ranges = ranges.iter().map(|(a, b)| format!("{a:#x}-{b:#x}"));
    ranges.collect::<Vec<_>>().join(" ")
}

fn print_offer(out: &mut impl Write, title: &str, offer: &Offer) -> io::Result<()> {
    let known = EXTENSIONS
        .iter()
        .filter(|(id, _)| offer.extensions.contains(id));
    let names = known.map(|(_, name)| *name).collect::<Vec<_>>().join(" ");
    writeln!(out, "container, {title}")?;
    writeln!(out, "  extensions         {names}")?;
    let pgsizes = page_sizes(offer.iova_pgsizes);
    writeln!(out, "  page sizes         {pgsizes}")?;
    let ranges = iova_ranges(&offer.iova_ranges);
    writeln!(out, "  iova ranges        {ranges}")?;
    writeln!(out, "  mappings left      {}", offer.dma_avail)?;
    let pgsizes = page_sizes(offer.dirty_pgsizes);
    writeln!(out, "  dirty page size    {pgsizes}")?;
    let max = offer.max_bitmap >> 20;
    writeln!(
        out,
        "  dirty bitmap       at most {max} MiB for each call\n"
    )
}

fn json_offer(offer: &Offer) -> serde_json::Value {
    serde_json::json!({
        "extensions": offer.extensions,
        "iova_pgsizes": offer.iova_pgsizes,
        "iova_ranges": offer.iova_ranges,
        "dma_avail": offer.dma_avail,
        "dirty_pgsizes": offer.dirty_pgsizes,
        "max_dirty_bitmap_size": offer.max_bitmap,
    })
}

pub(crate) fn run(args: &Args) -> Result<ExitCode, Failure> {
    let id = GroupId(0);
    let emulated = ask(Group::emulated(id)).map_err(cannot("ask a container"))?;
    let iommu = Group::iommu(id, IommuSpec::default());
    let iommu = ask(iommu).map_err(cannot("ask a container"))?;
    let memlock = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(0, |(soft, _)| soft);
    let cap = caps::has_cap(
        None,
        caps::CapSet::Effective,
        caps::Capability::CAP_IPC_LOCK,
    );
    let cap = cap.unwrap_or(false);
    let tracking = match migrate::cpu_tracking() {
        Err(cause) if is_file_limit(&cause) => return Err(cannot("try CPU write tracking")(cause)),
        tracking => tracking,
    };
    let mut out = io::stdout().lock();
    let written = if args.json {
        let document = serde_json::json!({
            "emulated": json_offer(&emulated),
            "iommu": json_offer(&iommu),
            "machine": {
                "memlock": (memlock != RLIM_INFINITY).then_some(memlock),
                "cap_ipc_lock": cap,
                "cpu_write_tracking": tracking.is_ok(),
            },
        });
        writeln!(out, "{document:#}")
    } else {
        text(&mut out, &emulated, &iommu, memlock, cap, &tracking)
    };
    written.map_err(cannot("print the answer"))?;
    Ok(ExitCode::SUCCESS)
}

fn text(
    out: &mut impl Write,
    emulated: &Offer,
    iommu: &Offer,
    memlock: u64,
    cap: bool,
    tracking: &io::Result<()>,
) -> io::Result<()> {
    print_offer(out, "emulated devices", emulated)?;
    print_offer(out, "devices behind a simulated IOMMU", iommu)?;
    let limit = match memlock {
        RLIM_INFINITY => "no limit".into(),
        bytes => format!("limit {} KiB", bytes >> 10),
    };
    let cap = if cap {
        "not enforced (CAP_IPC_LOCK)"
    } else {
        "enforced"
    };
    writeln!(out, "this machine")?;
    writeln!(out, "  locked memory      {limit}, {cap}")?;
    match tracking {
        Ok(()) => writeln!(
            out,
            "  CPU write tracking yes (userfaultfd and PAGEMAP_SCAN)"
        ),
        Err(e) => writeln!(out, "  CPU write tracking no ({e}): migrate needs --no-cpu"),
    }
}
