// SPDX-License-Identifier: GPL-2.0-only
//! Fresh random scripts: the model's, but for what only a simulation can do
//! and what makes the two drivers differ on purpose for the rest of a case.

use arbitrary::{Arbitrary, Unstructured};
use dirty_core::uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP;
use dirty_model::{Naive, Script};
use dirty_script::op::*;
use dirty_script::run;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

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
}

impl Kind {
    /// Whether such a container may have the device, and the VM has it.
    fn has(self, device: DeviceIndex) -> bool {
        let Some(spec) = DEVICES.get(device).filter(|d| d.name != "big0") else {
            return false;
        };
        match self {
            Kind::Emulated => spec.pgsizes.is_none(),
            Kind::Iommu => spec.pgsizes.is_some(),
            Kind::Mixed => true,
        }
    }

    /// Makes a container's devices its own.
    fn limit(self, devices: &mut Vec<DeviceIndex>) {
        devices.retain(|d| self.has(*d));
        if self != Kind::Emulated && devices.iter().all(|d| emulated(*d)) {
            devices.push(0);
        }
        if self != Kind::Iommu && !devices.iter().any(|d| emulated(*d)) {
            devices.push(4);
        }
    }
}

/// Pins by a device behind an IOMMU narrow the dirty scope, which the real
/// driver does in its own way (D11).
fn emulated(device: DeviceIndex) -> bool {
    DEVICES.get(device).is_some_and(|d| d.pgsizes.is_none())
}

/// Whether a bitmap is refused or written whole: one that faults half-way
/// leaves the real driver without its bits (D2, D3).
fn whole(b: &Bitmap, size: u64) -> bool {
    let fits = b.data == BUF && size <= 1 << 30;
    let refused = b.data >= USER_END - 8 || b.data % 8 != 0 && b.data >= USER_END;
    fits || refused
}

/// A pin at an odd address may reach into the next mapping, and the real driver
/// keeps it in either, as its tree happens to be: it may not find it again, and
/// stops the kernel when the mapping goes.
fn aligned(iova: u64) -> u64 {
    iova & !(PAGE - 1)
}

/// The operation as a VM can run it, if it can.
fn runnable(mut op: Op, kind: Kind) -> Option<Op> {
    let exists = |device| kind.has(device);
    match op {
        Op::New(mut new) => {
            kind.limit(&mut new.devices);
            new.budget = None;
            new.skip_read_only = false;
            Some(Op::New(new))
        }
        Op::Attach { device, .. } | Op::Detach(device) => exists(device).then_some(op),
        Op::CloseDevice(device) | Op::GetDevice(device) => exists(device).then_some(op),
        // Counters of a closed device are not kept anywhere.
        Op::Stat(_) => None,
        Op::Rw { device, .. } => exists(device).then_some(op),
        Op::Pin {
            device,
            ref mut iova,
            ..
        } => {
            *iova = aligned(*iova);
            emulated(device).then_some(op)
        }
        // VFIO itself warns of other numbers of pages, and of other devices.
        Op::Unpin {
            device,
            n,
            ref mut iova,
        } => {
            *iova = aligned(*iova);
            let calls_back = DEVICES.get(device).is_some_and(|d| d.dma_unmap);
            let sound = emulated(device) && calls_back && (1..=512).contains(&n);
            sound.then_some(op)
        }
        // Memory that ends half-way makes writes fault half-way (D4).
        Op::Map(m) => (m.vaddr != MEM + MEM_SIZE - PAGE || m.size <= PAGE).then_some(op),
        Op::Unmap(ref u) => (u.flags & 1 == 0 || whole(&u.bitmap, u.size)).then_some(op),
        Op::Get(ref g) => whole(&g.bitmap, g.size).then_some(op),
        // A report whose argument is what an earlier operation left.
        Op::Dirty {
            flags: VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP,
            argsz: 48..,
            ..
        } => None,
        Op::Report(_) | Op::Harvest(_) | Op::Mark { .. } => None,
        Op::OnUnmap { .. } | Op::Fault { .. } | Op::EntryLimit(_) => None,
        op => Some(op),
    }
}

/// A driver that unpins what is not mapped forgets pins that it still has (the
/// test module does): the real backend leaks them when the container goes.
fn unpins_what_is_mapped(model: &Naive, op: &mut Op) {
    if let Op::Unpin { iova, n, .. } = op {
        let mapped = |page: u64| {
            let at = iova.wrapping_add(page * PAGE);
            let holds = |(start, size): &(u64, u64)| at >= *start && at - *start < *size;
            model.mappings().iter().any(holds)
        };
        if !(0..*n as u64).all(mapped) {
            *n = 1;
        }
    }
}

/// Prints cases of one kind of container, with `ops` operations in all.
pub(crate) fn print(kind: &str, seed: &str, ops: &str) -> Result<(), String> {
    let number = |text: &str| text.parse::<u64>().map_err(|e| format!("{text}: {e}"));
    let (mut random, ops) = (StdRng::seed_from_u64(number(seed)?), number(ops)?);
    let name = kind;
    let kind = match kind {
        "emulated" => Kind::Emulated,
        "iommu" => Kind::Iommu,
        "mixed" => Kind::Mixed,
        _ => return Err(format!("{kind}: no kind of container")),
    };
    let mut bytes = vec![0; BYTES];
    let (mut done, mut case) = (0, 0);
    let mut text = String::new();
    while done < ops {
        text += &format!("case {name}-{seed}-{case}\n");
        case += 1;
        // A limit stays with the process, and whoever may not raise it again
        // answers otherwise: one a case, near its end.
        let mut limited = false;
        let mut model = Naive::default();
        for k in 1..=SCRIPTS {
            random.fill_bytes(&mut bytes);
            // The kernel reads it when the type is set, others at the open.
            let limit = match bytes[0] % 8 {
                0 => bytes[1] % 8,
                _ => 255,
            };
            text += &format!("param name=dma_entry_limit val={limit}\n");
            run(&mut model, &Op::EntryLimit(limit.into()));
            let script = Script::arbitrary(&mut Unstructured::new(&bytes));
            let script = script.map_err(|e| e.to_string())?;
            for mut op in script.0.into_iter().filter_map(|op| runnable(op, kind)) {
                unpins_what_is_mapped(&model, &mut op);
                if let Op::MemLock { keep_cap, .. } = &mut op {
                    // Outside, the right may not be there to keep.
                    *keep_cap = false;
                    if limited || k != SCRIPTS {
                        continue;
                    }
                    limited = true;
                }
                run(&mut model, &op);
                text += &format!("{op}\n");
                done += 1;
            }
            text += "vmlck\n";
        }
    }
    print!("{text}");
    Ok(())
}
