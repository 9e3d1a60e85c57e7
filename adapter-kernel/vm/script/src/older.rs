// SPDX-License-Identifier: GPL-2.0-only
//! Kernels before 7.3, whose real driver answers some operations otherwise than the one
//! that the model and the module follow. `vm/differences` lists how.

use dirty_core::uapi::{VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP, VFIO_SET_IOMMU};
use dirty_script::op::*;

/// An IOMMU type that kernels before 6.13 had.
const NESTING: u64 = 6;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    Linux6_1,
    Linux6_12,
    Linux7_3,
}

impl Kernel {
    pub(crate) fn parse(series: &str) -> Result<Self, String> {
        match series {
            "6.1" => Ok(Kernel::Linux6_1),
            "6.12" => Ok(Kernel::Linux6_12),
            "7.3" => Ok(Kernel::Linux7_3),
            _ => Err(format!("{series}: it must be 6.1, 6.12 or 7.3")),
        }
    }

    /// Whether a fresh script may have an operation: not if the kernel's real driver
    /// would be in another state after it than the module. The tables have such
    /// operations, each in a case of its own.
    pub(crate) fn allows(self, op: &Op) -> bool {
        if self == Kernel::Linux7_3 {
            return true;
        }
        let sound = match op {
            Op::New(new) => new.kind != Some(NESTING),
            Op::SetIommu(kind) => *kind != NESTING,
            Op::Raw { nr, arg } => *nr != VFIO_SET_IOMMU || *arg != NESTING,
            Op::Map(m) => !ends_at_the_end(m.iova, m.size),
            Op::Unmap(u) => !ends_at_the_end(u.iova, u.size),
            Op::Get(g) => {
                g.flags != VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP
                    || !ends_at_the_end(g.iova, g.size)
            }
            // Before 6.18 the pages before the end were pinned and given back, and are
            // dirty then.
            Op::Pin { iova, n, .. } => {
                let bytes = u64::from(n.unsigned_abs()).saturating_mul(PAGE);
                iova.checked_add(bytes).is_some()
            }
            _ => true,
        };
        // Before 6.2 VFIO let such a device pin while another one could be told.
        let pins = match op {
            Op::Pin { device, .. } => DEVICES.get(*device).is_some_and(|d| d.dma_unmap),
            _ => true,
        };
        sound && (pins || self != Kernel::Linux6_1)
    }
}

/// Whether the last byte of a range is the last of the address space.
fn ends_at_the_end(iova: u64, size: u64) -> bool {
    size != 0 && iova.wrapping_add(size) == 0
}

/// A way in which a kernel's real driver answers otherwise in any script. The list of the
/// kernel names it, as `rule NAME : COMMIT`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// A sum that overflows is EINVAL.
    OverflowIsEinval,
}

impl Rule {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        match name {
            "overflow-is-einval" => Some(Rule::OverflowIsEinval),
            _ => None,
        }
    }

    /// What the kernel's real driver answers where the module answers `line`.
    pub(crate) fn apply(self, line: &str) -> String {
        match self {
            Rule::OverflowIsEinval => line
                .replace("ret=-75 EOVERFLOW", "ret=-22 EINVAL")
                .replace("EOVERFLOW", "EINVAL"),
        }
    }
}
