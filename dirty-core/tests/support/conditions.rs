// SPDX-License-Identifier: MIT OR Apache-2.0
//! Conditions under which calls fail, for tests of the order of checks.

use dirty_core::{Errno, Options, Target, Unmap};

use super::{Rig, Spec, ARG, PAGE};

/// No error.
pub(crate) const OK: Errno = Errno(0);
/// The iova where two pages are mapped.
pub(crate) const MAPPED: u64 = 0x10_0000;
/// An iova where nothing is mapped.
pub(crate) const FREE: u64 = 0x20_0000;
/// The iova of a reserved page.
pub(crate) const RESERVED: u64 = 0x80_0000;
/// The last page of the address space: two pages from here on wrap.
pub(crate) const TOP: u64 = 0u64.wrapping_sub(PAGE);
/// The condition under which a row is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum But {
    Nothing,
    /// The container has no room for one more mapping.
    Full,
    /// The first allocation fails.
    NoMemory,
    /// The first page cannot be pinned: EFAULT.
    NoPin,
    /// The first charge fails: EINTR.
    NoCharge,
    /// The mapping's vaddr is invalid.
    VaddrInvalid,
    /// The mapping's vaddr is invalid, and the caller has another address
    /// space, which cannot pay for the mapping.
    OtherMm,
    /// An emulated group is in the container.
    Emulated,
    /// Tracking is on.
    Tracking,
    /// Tracking is on, a page is pinned, and the device never unpins it.
    Pinned,
}

/// A container with an IOMMU group and one mapping, under the condition `but`.
pub(crate) fn prepare(kind: u64, but: But) -> Rig {
    let mut options = Options::default();
    options.dma_entry_limit = if but == But::Full { 1 } else { 2 };
    let spec = Spec {
        reserved: vec![(RESERVED, RESERVED + PAGE - 1)],
        ..Spec::pages(PAGE)
    };
    let mut rig = Rig::new(options, kind, &[Some(spec)]);
    rig.map(MAPPED, 2 * PAGE).expect("map");
    match but {
        But::Nothing | But::Full => {}
        But::NoMemory => rig.mem.fault().arm(1),
        But::NoPin => rig.host.pin_fault.arm(1),
        But::NoCharge => rig.host.charge_fault.arm(1),
        But::VaddrInvalid | But::OtherMm => {
            let mut unmap = Unmap::vaddr(Target::All);
            let step = rig.unmap_step(&mut unmap);
            step.expect("invalidate");
            if but == But::OtherMm {
                rig.host.mm = 1;
                rig.host.limit.insert(1, 0);
                rig.host.add_memory(ARG, PAGE);
            }
        }
        But::Emulated => rig.attach(1, None).expect("attach"),
        But::Tracking => rig.start(),
        But::Pinned => {
            rig.start();
            rig.pin(MAPPED, 1).expect("pin");
        }
    }
    rig
}
