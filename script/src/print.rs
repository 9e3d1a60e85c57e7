// SPDX-License-Identifier: MIT OR Apache-2.0
//! Prints typed operations as lines of a script, which
//! [`parse`](crate::parse()) turns into the same operations.

use std::fmt;

use crate::op::*;
use crate::reply::Hex;

impl fmt::Display for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bitmap {
            pgsize,
            bsize,
            data,
            fill,
            dump,
        } = self;
        write!(
            f,
            "pgsize={pgsize:#x} bsize={bsize:#x} data={data:#x} fill={fill} dump={dump}"
        )
    }
}

/// ` ptr=ADDRESS`, or nothing.
struct Ptr(Option<u64>);

impl fmt::Display for Ptr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |ptr| write!(f, " ptr={ptr:#x}"))
    }
}

fn name(device: DeviceIndex) -> &'static str {
    DEVICES.get(device).map_or("?", |d| d.name)
}

/// Writes the operation as a line of a script.
impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::New(new) => write_new(f, new),
            Op::SetIommu(kind) => write!(f, "setiommu t={kind}"),
            Op::Attach { device, open } => {
                let nodev = if *open { "" } else { " nodev=1" };
                write!(f, "attach dev={}{nodev}", name(*device))
            }
            Op::Detach(device) => write!(f, "detach dev={}", name(*device)),
            Op::CloseDevice(device) => write!(f, "closedev dev={}", name(*device)),
            Op::GetDevice(device) => write!(f, "getdev dev={}", name(*device)),
            Op::Info { argsz, null } => {
                let null = if *null { " null=1" } else { "" };
                write!(f, "info argsz={argsz}{null}")
            }
            Op::Ext(n) => write!(f, "ext n={n}"),
            Op::Raw { nr, arg } => write!(f, "raw nr={nr:#x} arg={arg:#x}"),
            Op::Map(m) => write!(
                f,
                "map iova={:#x} size={:#x} vaddr={:#x} flags={:#x} argsz={}{}",
                m.iova,
                m.size,
                m.vaddr,
                m.flags,
                m.argsz,
                Ptr(m.ptr)
            ),
            Op::Unmap(u) => write!(
                f,
                "unmap iova={:#x} size={:#x} flags={:#x} argsz={} {}{}",
                u.iova,
                u.size,
                u.flags,
                u.argsz,
                u.bitmap,
                Ptr(u.ptr)
            ),
            Op::Dirty { argsz, flags, ptr } => {
                write!(f, "dirty flags={flags:#x} argsz={argsz}{}", Ptr(*ptr))
            }
            Op::Get(g) => {
                write!(
                    f,
                    "get iova={:#x} size={:#x} flags={:#x} argsz={} {}{}",
                    g.iova,
                    g.size,
                    g.flags,
                    g.argsz,
                    g.bitmap,
                    Ptr(g.ptr)
                )?;
                g.hdrend.map_or(Ok(()), |n| write!(f, " hdrend={n}"))
            }
            Op::Report(r) => write!(f, "report {r}"),
            Op::Harvest(r) => write!(f, "harvest {r}"),
            Op::Pin {
                device,
                iova,
                n,
                prot,
            } => write!(
                f,
                "pin dev={} iova={iova:#x} n={n} prot={prot}",
                name(*device)
            ),
            Op::Unpin { device, iova, n } => {
                write!(f, "unpin dev={} iova={iova:#x} n={n}", name(*device))
            }
            Op::Rw {
                device,
                iova,
                len,
                write,
                caller,
            } => {
                let by = match caller {
                    Caller::Process => "",
                    Caller::KernelThread => " kthread=1",
                    Caller::Child => " fork=1",
                };
                let (dev, write) = (name(*device), u8::from(*write));
                write!(
                    f,
                    "rw dev={dev} iova={iova:#x} len={len:#x} write={write}{by}"
                )
            }
            Op::Dma {
                device,
                iova,
                len,
                late,
            } => {
                let late = if *late { " late=1" } else { "" };
                write!(
                    f,
                    "dma dev={} iova={iova:#x} len={len:#x}{late}",
                    name(*device)
                )
            }
            Op::Mark { iova, len } => write!(f, "mark iova={iova:#x} len={len:#x}"),
            Op::OnUnmap { device, actions } => {
                let names: Vec<&str> = actions.iter().map(|a| action_name(*a)).collect();
                write!(f, "onunmap dev={} do={}", name(*device), names.join(","))
            }
            Op::Fault { kind, n } => {
                let kind = match kind {
                    FaultKind::Alloc => "alloc",
                    FaultKind::Copy => "copy",
                    FaultKind::Pin => "pin",
                    FaultKind::Map => "map",
                    FaultKind::Charge => "charge",
                    FaultKind::Track => "track",
                };
                write!(f, "fault {kind}={n}")
            }
            Op::Stat(device) => write!(f, "stat dev={}", name(*device)),
            Op::MemLock { limit, keep_cap } => {
                let keep_cap = if *keep_cap { " keepcap=1" } else { "" };
                write!(f, "memlock v={limit}{keep_cap}")
            }
            Op::VmLck => f.write_str("vmlck"),
            Op::EntryLimit(limit) => write!(f, "param name=dma_entry_limit val={limit}"),
            Op::HugeMem => f.write_str("hugemem"),
            Op::BigBuf(size) => write!(f, "bigbuf size={size:#x}"),
            Op::Peek { addr, n } => write!(f, "peek a={addr:#x} n={n}"),
            Op::Poke { addr, bytes } => write!(f, "poke a={addr:#x} hex={}", Hex(bytes)),
            Op::MapN { n, stride, iova } => {
                write!(f, "mapn n={n} stride={stride:#x} iova={iova:#x}")
            }
        }
    }
}

/// The name of a callback's action in scripts.
fn action_name(action: Action) -> &'static str {
    match action {
        Action::Unpin => "unpin",
        Action::Start => "start",
        Action::Stop => "stop",
        Action::Pin => "pin",
    }
}

fn write_new(f: &mut fmt::Formatter<'_>, new: &New) -> fmt::Result {
    let kind = match new.kind {
        None => " type=none",
        Some(1) => " type=v1",
        Some(6) => " type=nest",
        Some(_) => "",
    };
    let names: Vec<&str> = new.devices.iter().map(|d| name(*d)).collect();
    write!(f, "new devs={}{kind}", names.join(","))?;
    if let Some(budget) = new.budget {
        write!(f, " budget={budget}")?;
    }
    if new.skip_read_only {
        write!(f, " skipro=1")?;
    }
    if new.iommu_dirty_tracking {
        write!(f, " iommudirty=1")?;
    }
    Ok(())
}

impl fmt::Display for ReportArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ReportArg {
            iova,
            size,
            pgsize,
            words,
            fill,
        } = self;
        write!(
            f,
            "iova={iova:#x} size={size:#x} pgsize={pgsize:#x} words={words}"
        )?;
        match fill {
            Some(fill) => write!(f, " fill={fill}"),
            None => write!(f, " zeroed=1"),
        }
    }
}
