// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes scripts out of bytes, for property tests and fuzzing. Most operations
//! are sensible and concern few pages, so that they meet; some have wrong
//! arguments.

use std::fmt;

use arbitrary::{Arbitrary, Result, Unstructured};
use dirty_script::op::*;

/// Most operations in a script.
const MAX_OPS: usize = 40;

/// A script of typed operations, with faults among them. `Debug` prints it as a
/// `.vt` script.
pub struct Script(pub Vec<Op>);

impl<'a> Arbitrary<'a> for Script {
    /// Never fails: any bytes make a script.
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let mut ops = vec![new(u)?];
        while ops.len() < MAX_OPS && !u.is_empty() {
            match op(u) {
                Ok(op) => ops.push(op),
                Err(_) => break,
            }
        }
        Ok(Script(ops))
    }
}

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(&self.0, f)
    }
}

/// Prints operations as a `.vt` script.
pub(crate) fn print(ops: &[Op], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    ops.iter().try_for_each(|op| writeln!(f, "{op}"))
}

/// True once in `n` times.
fn rarely(u: &mut Unstructured<'_>, n: u8) -> Result<bool> {
    Ok(u.int_in_range(0..=n - 1)? == n - 1)
}

fn device(u: &mut Unstructured<'_>) -> Result<DeviceIndex> {
    // Devices that can pin and write come up more often.
    let devices = [EMU0, EMU0, EMU0, EMU1, XPCI0, XPCI1, BIG0, PCI0, PCI1, EMU2];
    Ok(*u.choose(&devices)?)
}

fn new(u: &mut Unstructured<'_>) -> Result<Op> {
    let sets: [&[DeviceIndex]; 12] = [
        &[EMU0],
        &[EMU0, EMU1],
        &[XPCI0],
        &[EMU0, XPCI0],
        &[PCI0],
        &[PCI0, EMU0],
        &[XPCI0, XPCI1],
        &[BIG0],
        &[BIG0, EMU0],
        &[EMU0, EMU2],
        &[],
        &[XPCI0, BIG0, EMU0],
    ];
    let devices = u.choose(&sets)?.to_vec();
    let kind = *u.choose(&[3, 3, 3, 3, 3, 3, 1, 6])?;
    let set = !rarely(u, 16)?;
    let budget = match rarely(u, 8)? {
        true => Some(u64::from(u.arbitrary::<u8>()?) * 16),
        false => None,
    };
    let options = u.int_in_range(0..=15u8)?;
    Ok(Op::New(New {
        devices,
        kind: set.then_some(kind),
        budget,
        skip_read_only: options % 4 == 3,
        iommu_dirty_tracking: options / 4 >= 2,
    }))
}

/// An iova: mostly one of the first 256 pages, now and then one at an edge of
/// the address space or of the IOMMUs' ranges.
fn iova(u: &mut Unstructured<'_>) -> Result<u64> {
    let page = match u.int_in_range(0..=15)? {
        0 => *u.choose(&[
            u64::MAX / PAGE,
            u64::MAX / PAGE - 1,
            0xfee00,
            0xfedff,
            (1 << 36) - 1,
            1 << 36,
            1 << 51,
        ])?,
        1..=3 => 16 * u.int_in_range(0..=15u64)?, // a multiple of 64K
        _ => u.int_in_range(0..=255u64)?,
    };
    let off = match rarely(u, 24)? {
        true => u.arbitrary::<u16>()? & 0xfff,
        false => 0,
    };
    Ok(page.wrapping_mul(PAGE).wrapping_add(off.into()))
}

fn size(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=31)? {
        0 => *u.choose(&[
            0,
            1,
            PAGE - 1,
            PAGE + 1,
            8 << 40,
            0u64.wrapping_sub(PAGE),
            1 << 63,
        ])?,
        1..=6 => 0x10000 * u.int_in_range(1..=8u64)?,
        7..=9 => 256 * PAGE,
        _ => PAGE * u.int_in_range(1..=130u64)?,
    })
}

/// `right`, or rarely another argsz.
fn argsz(u: &mut Unstructured<'_>, right: u32) -> Result<u32> {
    Ok(match rarely(u, 24)? {
        true => *u.choose(&[0, 7, 8, 15, 23, 24, 31, 47, 48, 49, u32::MAX])?,
        false => right,
    })
}

/// Rarely another place for an argument.
fn ptr(u: &mut Unstructured<'_>) -> Result<Option<u64>> {
    Ok(match rarely(u, 40)? {
        true => Some(*u.choose(&[0, HOLE, BUF + BUF_SIZE - 8, RO, u64::MAX])?),
        false => None,
    })
}

/// A bitmap for `size` bytes of pages, which mostly fits.
fn bitmap(u: &mut Unstructured<'_>, size: u64) -> Result<Bitmap> {
    let pgsize = match u.int_in_range(0..=15)? {
        0 => *u.choose(&[0, 1, 3, 0x800, 0x2000, 1 << 21, 1 << 63])?,
        1..=2 => 0x10000,
        _ => PAGE,
    };
    let fit = (size / PAGE).div_ceil(64).wrapping_mul(8);
    let bsize = match u.int_in_range(0..=15)? {
        0 => *u.choose(&[0, 7, 8, 1 << 28, (1 << 28) + 8, u64::MAX])?,
        1..=3 => fit.wrapping_add(8),
        _ => fit,
    };
    let data = match rarely(u, 12)? {
        true => *u.choose(&[
            0,
            BUF + 1,
            BUF + BUF_SIZE - 8,
            BUF + BUF_SIZE - 16,
            RO,
            HOLE,
            USER_END,
            USER_END - 8,
            u64::MAX,
        ])?,
        false => BUF,
    };
    Ok(Bitmap {
        pgsize,
        bsize,
        data,
        fill: *u.choose(&[0, 0, 255])?,
        dump: 5,
    })
}

fn report(u: &mut Unstructured<'_>) -> Result<ReportArg> {
    let (iova, size) = range(u)?;
    let pgsize = *u.choose(&[PAGE, 0x10000, 0x2000, 0x8000, 1 << 21, 0x400, 256])?;
    let fit = size.checked_div(pgsize).unwrap_or(1).div_ceil(64);
    Ok(ReportArg {
        iova,
        size,
        pgsize,
        words: fit.min(1 << 12) + u64::from(rarely(u, 4)?),
        fill: *u.choose(&[Some(0), Some(255), None, None])?,
    })
}

/// A range for reports: often all the pages that most operations concern.
fn range(u: &mut Unstructured<'_>) -> Result<(u64, u64)> {
    Ok(match u.int_in_range(0..=2)? {
        0 => (0, 512 * PAGE),
        _ => (iova(u)?, size(u)?),
    })
}

fn map(u: &mut Unstructured<'_>) -> Result<Op> {
    let vaddr = match u.int_in_range(0..=15)? {
        0 => *u.choose(&[
            HOLE,
            RO,
            MEM + MEM_SIZE - PAGE,
            0,
            MEM + 1,
            0u64.wrapping_sub(PAGE),
        ])?,
        1..=4 => MEM + 0x10000 * u.int_in_range(0..=31u64)?,
        _ => MEM + PAGE * u.int_in_range(0..=255u64)?,
    };
    let flags = *u.choose(&[3, 3, 3, 3, 3, 1, 1, 2, 4, 4, 0, 7, 8])?;
    let mut map = MapArg::new(iova(u)?, size(u)?, vaddr, flags);
    map.argsz = argsz(u, 32)?;
    map.ptr = ptr(u)?;
    Ok(Op::Map(map))
}

fn op(u: &mut Unstructured<'_>) -> Result<Op> {
    Ok(match u.int_in_range(0..=127u8)? {
        115..=118 => Op::Dma {
            device: *u.choose(&[XPCI0, XPCI0, XPCI1, BIG0, PCI0, EMU0])?,
            iova: iova(u)?,
            len: *u.choose(&[1, 1, 1, PAGE, 3 * PAGE, 0x10000, 0])?,
            late: rarely(u, 4)?,
        },
        kind => op_of_kind(kind % 64, u)?,
    })
}

fn op_of_kind(kind: u8, u: &mut Unstructured<'_>) -> Result<Op> {
    Ok(match kind {
        0..=12 => map(u)?,
        13..=19 => {
            let flags = *u.choose(&[0, 0, 1, 1, 1, 2, 4, 6, 3, 5, 8])?;
            let (iova, size) = match flags & 2 != 0 && !rarely(u, 4)? {
                true => (0, 0),
                false => range(u)?,
            };
            Op::Unmap(UnmapArg {
                argsz: argsz(u, if flags & 1 == 0 { 24 } else { 48 })?,
                flags,
                iova,
                size,
                bitmap: bitmap(u, size)?,
                ptr: ptr(u)?,
            })
        }
        20..=23 => Op::Dirty {
            argsz: 8,
            flags: 1,
            ptr: None,
        },
        24 => Op::Dirty {
            argsz: 8,
            flags: 2,
            ptr: None,
        },
        25 => Op::Dirty {
            argsz: argsz(u, 8)?,
            flags: *u.choose(&[0, 3, 4, 8, 1 << 31])?,
            ptr: ptr(u)?,
        },
        26..=32 => {
            let (iova, size) = range(u)?;
            Op::Get(GetArg {
                argsz: argsz(u, 48)?,
                flags: 4,
                iova,
                size,
                bitmap: bitmap(u, size)?,
                ptr: ptr(u)?,
                hdrend: None,
            })
        }
        33..=34 => Op::Report(report(u)?),
        35 => Op::Harvest(report(u)?),
        36..=42 => Op::Pin {
            device: device(u)?,
            iova: iova(u)?,
            n: *u.choose(&[1, 1, 2, 3, 5, 17, 70, 0, -1, 512, 513])?,
            prot: *u.choose(&[3, 3, 1, 2, 0, 4])?,
        },
        43..=46 => Op::Unpin {
            device: device(u)?,
            iova: iova(u)?,
            n: *u.choose(&[1, 1, 2, 3, 5, 70, 0, -1, 600])?,
        },
        47..=51 => Op::Rw {
            device: device(u)?,
            iova: iova(u)?.wrapping_add(u64::from(u.arbitrary::<u16>()? & 0xfff)),
            len: *u.choose(&[1, 2, 100, 4096, 4097, 9000, 70000, 0])?,
            write: !rarely(u, 4)?,
            caller: *u.choose(&[
                Caller::Process,
                Caller::Process,
                Caller::Process,
                Caller::KernelThread,
                Caller::Child,
            ])?,
        },
        52 => Op::Mark {
            iova: iova(u)?,
            len: match size(u)? {
                // Marking terabytes takes too long.
                len if len > 1 << 30 && len <= 1 << 62 => 1 << 22,
                len => len,
            },
        },
        53 => Op::Attach {
            device: device(u)?,
            open: !rarely(u, 4)?,
        },
        54 => Op::Detach(device(u)?),
        55 => match u.int_in_range(0..=3)? {
            0 => Op::CloseDevice(device(u)?),
            1 => Op::GetDevice(device(u)?),
            2 => Op::SetIommu(*u.choose(&[3, 1, 9, 6, 0])?),
            _ => Op::Stat(device(u)?),
        },
        56 => match u.int_in_range(0..=2)? {
            0 => Op::Info {
                argsz: argsz(u, 4096)?,
                null: rarely(u, 8)?,
            },
            1 => Op::Ext(u.int_in_range(0..=12)?),
            _ => Op::Raw {
                nr: 0x3b64 + u32::from(u.int_in_range(0..=20u8)?),
                arg: u.int_in_range(0..=3u64)?,
            },
        },
        57..=60 => Op::Fault {
            kind: *u.choose(&[
                FaultKind::Alloc,
                FaultKind::Copy,
                FaultKind::Pin,
                FaultKind::Map,
                FaultKind::Charge,
                FaultKind::Track,
            ])?,
            n: match u.int_in_range(0..=3)? {
                0 => u.int_in_range(1..=5000u64)?,
                _ => u.int_in_range(1..=24u64)?,
            },
        },
        61 => Op::OnUnmap {
            device: device(u)?,
            actions: u
                .choose(&[
                    &[Action::Unpin][..],
                    &[],
                    &[Action::Unpin, Action::Start],
                    &[Action::Stop, Action::Unpin],
                    &[Action::Unpin, Action::Pin],
                    &[Action::Stop, Action::Start, Action::Unpin],
                ])?
                .to_vec(),
        },
        62 => Op::MemLock {
            limit: PAGE * u.int_in_range(0..=64u64)?,
            keep_cap: rarely(u, 2)?,
        },
        _ => Op::EntryLimit(u.int_in_range(0..=4)?),
    })
}
