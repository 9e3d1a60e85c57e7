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
        let sound_6_1 = match op {
            // VFIO let such a device pin while another one could be told of an unmap.
            Op::Pin { device, .. } => DEVICES.get(*device).is_some_and(|d| d.dma_unmap),
            // The zero page is not charged, and so a limit comes later.
            Op::MemLock { .. } => false,
            // Where a capability fits without the gap, and with it does not.
            Op::Info { argsz, .. } => !(65..4096).contains(argsz),
            _ => true,
        };
        sound && (sound_6_1 || self != Kernel::Linux6_1)
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
    /// A mapping beyond an IOMMU's aperture is not found when the IOMMU comes to a container
    /// that has none any more: the sum that ends the search is 2^64. Intel's page tables
    /// refuse it then.
    MappingBeyondIsMissed,
    /// Intel's page tables refuse an IOVA beyond them with EFAULT.
    BeyondTablesIsEfault,
    /// There is IOMMU type 6.
    NestingExists,
    /// GET_INFO puts capabilities after each other without a gap.
    NoGapBeforeCapability,
    /// A read-only pin of memory that was never written takes the zero page, which nobody
    /// pays for.
    ZeroPageIsFree,
}

impl Rule {
    pub(crate) fn parse(name: &str) -> Option<Self> {
        match name {
            "overflow-is-einval" => Some(Rule::OverflowIsEinval),
            "mapping-beyond-is-missed" => Some(Rule::MappingBeyondIsMissed),
            "beyond-tables-is-efault" => Some(Rule::BeyondTablesIsEfault),
            "nesting-exists" => Some(Rule::NestingExists),
            "no-gap-before-capability" => Some(Rule::NoGapBeforeCapability),
            "zero-page-is-free" => Some(Rule::ZeroPageIsFree),
            _ => None,
        }
    }

    /// Whether the kernel's real driver answers `real` where the module answers `ours`.
    pub(crate) fn explains(self, real: &str, ours: &str) -> bool {
        match self {
            Rule::OverflowIsEinval => {
                let pins = ours.replace("ret=-75 EOVERFLOW", "ret=-22 EINVAL");
                ours != real && real == pins.replace("EOVERFLOW", "EINVAL")
            }
            Rule::MappingBeyondIsMissed => attaches(real, "EFAULT", ours, "EINVAL"),
            Rule::NestingExists => (real, ours) == ("ext n=6 => 1 ok", "ext n=6 => 0 ok"),
            Rule::NoGapBeforeCapability => {
                ours.starts_with("info ") && without_gap(ours).as_deref() == Some(real)
            }
            Rule::BeyondTablesIsEfault | Rule::ZeroPageIsFree => false,
        }
    }

    /// Whether the module and the real driver may both answer `ours` where the model, which
    /// follows Linux 7.3, answers `ideal`.
    pub(crate) fn explains_both(self, ours: &str, ideal: &str) -> bool {
        let locked = |line: &str| -> Option<u64> {
            let kib = line.strip_prefix("vmlck => ")?.strip_suffix(" kB")?;
            kib.parse().ok()
        };
        match self {
            Rule::ZeroPageIsFree => locked(ours).zip(locked(ideal)).is_some_and(|(o, i)| o < i),
            Rule::BeyondTablesIsEfault => attaches(ours, "EFAULT", ideal, "ERANGE"),
            _ => false,
        }
    }
}

/// Whether both lines are of an attach that fails in its container's IOMMUs, with these
/// errnos.
fn attaches(line: &str, errno: &str, other: &str, other_errno: &str) -> bool {
    let fails = |line: &str, errno: &str| -> Option<String> {
        let attach = line.strip_suffix(errno)?.strip_suffix(":set_container=")?;
        attach.starts_with("attach ").then(|| attach.to_owned())
    };
    fails(line, errno).is_some_and(|attach| fails(other, other_errno) == Some(attach))
}

/// An answer of GET_INFO in which the third capability follows the second, which ends 4
/// bytes before a multiple of 8.
fn without_gap(line: &str) -> Option<String> {
    if line.contains("cap@72{") {
        return Some(line.replace("cap@72{", "cap@68{"));
    }
    // The argument was too small, and the answer is how large it has to be.
    let (before, after) = line.split_once("=> 0 ok argsz=")?;
    let (size, rest) = after.split_once(' ')?;
    let size: u64 = size.parse().ok()?;
    Some(format!(
        "{before}=> 0 ok argsz={} {rest}",
        size.checked_sub(4)?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_explains_the_same_attach_only() {
        let line = |errno: &str| format!("attach dev=xpci1 xpci1:set_container={errno}");
        let rule = Rule::MappingBeyondIsMissed;
        assert!(rule.explains(&line("EFAULT"), &line("EINVAL")));
        assert!(!rule.explains(&line("EINVAL"), &line("EFAULT")));
        let other = "attach dev=pci0 pci0:set_container=EINVAL";
        assert!(!rule.explains(&line("EFAULT"), other));
        assert!(!rule.explains("map iova=0x0 => -1 EFAULT", "map iova=0x0 => -1 EINVAL"));
        let rule = Rule::BeyondTablesIsEfault;
        assert!(rule.explains_both(&line("EFAULT"), &line("ERANGE")));
        assert!(!rule.explains_both(&line("EFAULT"), &line("EINVAL")));
        assert!(!rule.explains(&line("EFAULT"), &line("ERANGE")));
    }
}
