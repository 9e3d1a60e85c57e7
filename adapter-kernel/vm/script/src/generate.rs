// SPDX-License-Identifier: GPL-2.0-only
//! Fresh random scripts. They are the model's, without operations that only a
//! simulation can do, and without those after which the two drivers differ on purpose
//! for the rest of a case.

use arbitrary::{Arbitrary, Unstructured};
use dirty_core::uapi::{VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_SET_IOMMU};
use dirty_model::{Naive, Script};
use dirty_script::op::*;
use dirty_script::run;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use crate::expected::Expected;
use crate::older::Kernel;

/// Bytes that one script is made of.
const BYTES: usize = 1200;
/// Scripts in a case, each with a container of its own.
const SCRIPTS: usize = 5;

/// Which devices a container has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Emulated,
    Iommu,
    Mixed,
    /// Some IOMMUs are test IOMMUs.
    Test,
    /// As `Test`, and some have no page below 64K.
    Big,
}

impl Kind {
    /// The device in such a container that stands for one of a random script.
    fn stand_in(self, device: DeviceIndex) -> DeviceIndex {
        match (self, device) {
            (Kind::Test | Kind::Big, PCI1) => LOW0,
            (Kind::Test | Kind::Big, XPCI0) => LOW0,
            (Kind::Test | Kind::Big, XPCI1) => FOUR0,
            (Kind::Test, BIG0) => FOUR0,
            (Kind::Big, PCI0) => BIG0,
            _ => device,
        }
    }

    /// Whether the VM has the device, and such a container may have it.
    fn has(self, device: DeviceIndex) -> bool {
        let Some(spec) = DEVICES.get(device) else {
            return false;
        };
        match self {
            Kind::Emulated => spec.pgsizes.is_none(),
            Kind::Iommu => spec.pgsizes.is_some() && device != BIG0,
            Kind::Mixed => device != BIG0,
            Kind::Test | Kind::Big => true,
        }
    }

    /// Keeps only such a container's devices, and adds one of each kind it needs.
    fn limit(self, devices: &mut Vec<DeviceIndex>) {
        devices.retain(|d| self.has(*d));
        match self {
            // Emulated groups alone become groups behind an IOMMU by an attach.
            Kind::Test | Kind::Big => return,
            Kind::Emulated | Kind::Iommu | Kind::Mixed => {}
        }
        if self != Kind::Emulated && devices.iter().all(|d| emulated(*d)) {
            devices.push(0);
        }
        if self != Kind::Iommu && !devices.iter().any(|d| emulated(*d)) {
            devices.push(4);
        }
    }
}

/// Whether a device has no IOMMU. Only such devices pin: pins by others narrow the
/// dirty scope, where the real driver differs (D11).
fn emulated(device: DeviceIndex) -> bool {
    DEVICES.get(device).is_some_and(|d| d.pgsizes.is_none())
}

/// The operation with the devices that such a container has instead.
fn with_stand_ins(mut op: Op, kind: Kind) -> Op {
    match &mut op {
        Op::New(new) => {
            for device in &mut new.devices {
                *device = kind.stand_in(*device);
            }
        }
        Op::Attach { device, .. }
        | Op::Detach(device)
        | Op::CloseDevice(device)
        | Op::GetDevice(device)
        | Op::Rw { device, .. } => *device = kind.stand_in(*device),
        _ => {}
    }
    op
}

/// Whether a bitmap is refused or written whole. One that faults half-way makes the
/// real driver lose its bits (D2, D3), and then all later answers differ.
fn whole(b: &Bitmap, size: u64) -> bool {
    let fits = b.data == BUF && size <= 1 << 30;
    let end = b.data.checked_add(b.bsize);
    let refused = end.is_none_or(|end| end > USER_END);
    fits || refused
}

/// The operation as the VM can run it; `None` if it cannot. `halfway`: user memory may
/// end in the middle of an operation.
fn runnable(op: Op, kind: Kind, halfway: bool) -> Option<Op> {
    let exists = |device| kind.has(device);
    match op {
        Op::New(mut new) => {
            kind.limit(&mut new.devices);
            new.budget = None;
            new.skip_read_only = false;
            new.iommu_dirty_tracking = false;
            Some(Op::New(new))
        }
        Op::Attach { device, .. } | Op::Detach(device) => exists(device).then_some(op),
        Op::CloseDevice(device) | Op::GetDevice(device) => exists(device).then_some(op),
        // The kernel keeps no counters of a closed device.
        Op::Stat(_) => None,
        Op::Rw { device, .. } => exists(device).then_some(op),
        Op::Pin { device, .. } => emulated(device).then_some(op),
        // VFIO itself warns of other numbers of pages, and of other devices.
        Op::Unpin { device, n, .. } => {
            let calls_back = DEVICES.get(device).is_some_and(|d| d.dma_unmap);
            let sound = emulated(device) && calls_back && (1..=512).contains(&n);
            sound.then_some(op)
        }
        Op::Map(_) | Op::Unmap(_) | Op::Get(_) if halfway => Some(op),
        // It consists of pages of 4K, which an IOMMU with larger ones cannot map.
        Op::Map(m) if m.vaddr == RO && kind == Kind::Big => None,
        // Memory that ends half-way makes writes fault half-way (D4).
        Op::Map(m) => (m.vaddr != MEM + MEM_SIZE - PAGE || m.size <= PAGE).then_some(op),
        Op::Unmap(ref u) => (u.flags & 1 == 0 || whole(&u.bitmap, u.size)).then_some(op),
        Op::Get(ref g) => whole(&g.bitmap, g.size).then_some(op),
        // Its bitmap would be what an earlier operation left in memory.
        Op::Dirty {
            flags: VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
            argsz: 48..,
            ..
        } => None,
        Op::Report(_) | Op::Harvest(_) | Op::Mark { .. } | Op::Dma { .. } => None,
        // Only the test IOMMU can be told to fail.
        Op::Fault {
            kind: FaultKind::Map,
            ..
        } if matches!(kind, Kind::Test | Kind::Big) => Some(op),
        Op::OnUnmap { .. } | Op::Fault { .. } => None,
        op => Some(op),
    }
}

/// Moves a pin or unpin at an odd address to the page's start, unless one mapping has
/// all of it. A pin that reaches into the next mapping may be kept in either by the
/// real driver, which then may not find it again, and stops the kernel when the mapping
/// goes.
fn keeps_to_one_mapping(model: &Naive, op: &mut Op) {
    if let Op::Pin { iova, n, .. } | Op::Unpin { iova, n, .. } = op {
        let last = iova.wrapping_add((*n).max(1) as u64 * PAGE - 1);
        let mappings = model.mappings();
        let mut holds = mappings
            .iter()
            .map(|(start, size)| *start..=start + (size - 1));
        if !holds.any(|range| range.contains(iova) && range.contains(&last)) {
            *iova &= !(PAGE - 1);
        }
    }
}

fn sets_type(op: &Op) -> bool {
    matches!(
        op,
        Op::SetIommu(_)
            | Op::Raw {
                nr: VFIO_SET_IOMMU,
                ..
            }
    )
}

/// Pages that are pinned in `model` after these operations.
fn pinned_after(model: &Naive, ops: impl Iterator<Item = Op>) -> u64 {
    let mut model = model.clone();
    ops.for_each(|op| drop(run(&mut model, &op)));
    model.pinned_pages()
}

/// Makes an unpin that would leave pins behind one of a single page. An unpin stops at
/// the first page that is not mapped, and pins after it stay; the test module forgets
/// them all the same, and the real backend leaks them when the container goes.
fn unpins_all_it_names(model: &Naive, op: &mut Op) {
    if let Op::Unpin { device, iova, n } = op {
        let (device, first) = (*device, *iova);
        let single = |page: u64| Op::Unpin {
            device,
            iova: first.wrapping_add(page * PAGE),
            n: 1,
        };
        let one_by_one = pinned_after(model, (0..*n as u64).map(single));
        if pinned_after(model, [op.clone()].into_iter()) != one_by_one {
            *op = single(0);
        }
    }
}

/// Prints cases of one kind of container for a kernel, with `ops` operations in all.
pub(crate) fn print(kind: &str, seed: &str, ops: &str, kernel: &str) -> Result<(), String> {
    let kernel = Kernel::parse(kernel)?;
    let number = |text: &str| text.parse::<u64>().map_err(|e| format!("{text}: {e}"));
    let (mut random, ops) = (StdRng::seed_from_u64(number(seed)?), number(ops)?);
    let name = kind;
    let kind = match kind {
        "emulated" => Kind::Emulated,
        "iommu" => Kind::Iommu,
        "mixed" | "halfway" => Kind::Mixed,
        "test" => Kind::Test,
        "big" => Kind::Big,
        _ => return Err(format!("{kind}: no kind of container")),
    };
    let mut bytes = vec![0; BYTES];
    let (mut done, mut case) = (0, 0);
    let mut text = String::new();
    while done < ops {
        text += &format!("case {name}-{seed}-{case}\n");
        case += 1;
        // A limit stays with the process, which may not be allowed to raise it again:
        // a case has one at most, near its end.
        let mut limited = false;
        let mut expected = Expected::new(65535);
        for k in 1..=SCRIPTS {
            random.fill_bytes(&mut bytes);
            // The kernel reads it when the type is set, the others at the open: it is
            // set before both.
            let limit = match bytes[0] % 8 {
                0 => bytes[1] % 8,
                _ => 255,
            };
            text += &format!("param name=dma_entry_limit val={limit}\n");
            expected.step(&Op::EntryLimit(limit.into()));
            let script = Script::arbitrary(&mut Unstructured::new(&bytes));
            let script = script.map_err(|e| e.to_string())?;
            let mut changed = false;
            let mut fault = None;
            for op in script.0 {
                let op = with_stand_ins(op, kind);
                let Some(mut op) = runnable(op, kind, name == "halfway") else {
                    continue;
                };
                if let Op::Fault { n, .. } = op {
                    fault = Some(n);
                    continue;
                }
                if !expected.is_sound(&op) || !kernel.allows(&op) {
                    continue;
                }
                keeps_to_one_mapping(&expected.model, &mut op);
                unpins_all_it_names(&expected.model, &mut op);
                // A changed limit is for later containers. The kernel would take it
                // for this one too, if a type were set again.
                changed |= matches!(op, Op::EntryLimit(_));
                if changed && sets_type(&op) {
                    continue;
                }
                if let Op::MemLock { keep_cap, .. } = &mut op {
                    // Outside the VM the process may not have the right to keep.
                    *keep_cap = false;
                    if limited || k != SCRIPTS {
                        continue;
                    }
                    limited = true;
                }
                // A fault waits for an operation that maps.
                let pages = expected.maps(&op);
                if let Some(n) = fault.filter(|_| pages != 0) {
                    let fault = Op::Fault {
                        kind: FaultKind::Map,
                        n: n % (pages + pages / 8) + 1,
                    };
                    expected.step(&fault);
                    text += &format!("{fault}\n");
                }
                if pages != 0 {
                    fault = None;
                }
                expected.step(&op);
                text += &format!("{op}\n");
                done += 1;
            }
            text += "vmlck\n";
        }
    }
    print!("{text}");
    Ok(())
}
