// SPDX-License-Identifier: GPL-2.0-only
//! Fresh random scripts: the model's, but for what only a simulation can do
//! and what makes the two drivers differ on purpose for the rest of a case.

use arbitrary::{Arbitrary, Unstructured};
use dirty_model::Script;
use dirty_script::op::*;
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

/// Bytes that one script is made of.
const BYTES: usize = 1200;

/// Whether a VM has the device.
fn exists(device: DeviceIndex) -> bool {
    DEVICES.get(device).is_some_and(|d| d.name != "big0")
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

/// The operation as a VM can run it, if it can.
fn runnable(op: Op) -> Option<Op> {
    match op {
        Op::New(mut new) => {
            new.devices.retain(|d| exists(*d));
            new.budget = None;
            new.skip_read_only = false;
            Some(Op::New(new))
        }
        Op::Attach { device, .. } | Op::Detach(device) => exists(device).then_some(op),
        Op::CloseDevice(device) | Op::GetDevice(device) => exists(device).then_some(op),
        // Counters of a closed device are not kept anywhere.
        Op::Stat(_) => None,
        Op::Pin { device, .. } | Op::Rw { device, .. } => emulated(device).then_some(op),
        // VFIO itself warns of other numbers of pages.
        Op::Unpin { device, n, .. } => (emulated(device) && (1..=512).contains(&n)).then_some(op),
        // Memory that ends half-way makes writes fault half-way (D4).
        Op::Map(m) => (m.vaddr != MEM + MEM_SIZE - PAGE || m.size <= PAGE).then_some(op),
        Op::Unmap(ref u) => (u.flags & 1 == 0 || whole(&u.bitmap, u.size)).then_some(op),
        Op::Get(ref g) => whole(&g.bitmap, g.size).then_some(op),
        Op::Report(_) | Op::Harvest(_) | Op::Mark { .. } => None,
        Op::OnUnmap { .. } | Op::Fault { .. } => None,
        op => Some(op),
    }
}

/// Prints cases with `ops` operations in all.
pub(crate) fn print(seed: &str, ops: &str) -> Result<(), String> {
    let number = |text: &str| text.parse::<u64>().map_err(|e| format!("{text}: {e}"));
    let (mut random, ops) = (StdRng::seed_from_u64(number(seed)?), number(ops)?);
    let mut bytes = vec![0; BYTES];
    let (mut done, mut case) = (0, 0);
    let mut text = String::new();
    while done < ops {
        random.fill_bytes(&mut bytes);
        let script = Script::arbitrary(&mut Unstructured::new(&bytes)).map_err(|e| e.to_string())?;
        text += &format!("case {seed}-{case}\nparam name=dma_entry_limit val=65535\n");
        case += 1;
        for op in script.0.into_iter().filter_map(runnable) {
            text += &format!("{op}\n");
            done += 1;
        }
        text += "vmlck\n";
    }
    print!("{text}");
    Ok(())
}
