// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes scripts of raw ioctls out of bytes: any number, any argument.

use std::{fmt, iter};

use arbitrary::{Arbitrary, Result, Unstructured};
use dirty_core::uapi::*;
use dirty_script::op::*;

use crate::gen::print;

/// One ioctl: `bytes` are written to [`ARG`], then the call is made.
struct Call {
    nr: u32,
    arg: u64,
    bytes: Vec<u8>,
}

impl<'a> Arbitrary<'a> for Call {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let nr = match u.int_in_range(0..=15u8)? {
            0 => u.arbitrary()?,
            1 => VFIO_IOMMU_GET_INFO,
            2..=6 => VFIO_IOMMU_MAP_DMA,
            7..=9 => VFIO_IOMMU_UNMAP_DMA,
            _ => VFIO_IOMMU_DIRTY_PAGES,
        };
        let arg = match u.int_in_range(0..=15u8)? {
            0 => u.arbitrary()?,
            1 => ARG + ARG_SIZE - u64::from(u.arbitrary::<u8>()? & 63),
            _ => ARG,
        };
        let mut bytes = Vec::new();
        // Most of these words make sense as some field.
        for _ in 0..u.int_in_range(0..=6u8)? {
            let word = match u.int_in_range(0..=9u8)? {
                0 => u.arbitrary()?,
                1 => u64::from(u.arbitrary::<u16>()?),
                2 => BUF + u64::from(u.arbitrary::<u16>()?),
                3 => MEM + PAGE * u64::from(u.arbitrary::<u8>()?),
                4 | 5 => PAGE * u64::from(u.arbitrary::<u8>()?),
                6 => 1 << u.int_in_range(0..=63u32)?,
                7 => 0u64.wrapping_sub(PAGE * u64::from(u.arbitrary::<u8>()?)),
                _ => {
                    u64::from(u.int_in_range(0..=64u32)?)
                        | u64::from(u.int_in_range(0..=8u32)?) << 32
                }
            };
            bytes.extend(word.to_ne_bytes());
        }
        Ok(Call { nr, arg, bytes })
    }
}

/// A script of raw ioctls, in a container with an emulated group. If the number
/// of calls is odd, a group behind an IOMMU is there too. After each call the
/// memory that it may have written is read. `Debug` prints a `.vt` script.
pub struct RawScript(pub Vec<Op>);

impl<'a> Arbitrary<'a> for RawScript {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(script(u.arbitrary_iter()?.collect::<Result<_>>()?))
    }

    fn arbitrary_take_rest(u: Unstructured<'a>) -> Result<Self> {
        Ok(script(
            u.arbitrary_take_rest_iter()?.collect::<Result<_>>()?,
        ))
    }
}

impl fmt::Debug for RawScript {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        print(&self.0, f)
    }
}

fn script(calls: Vec<Call>) -> RawScript {
    let devices = match calls.len() % 2 {
        0 => vec![EMU0],
        _ => vec![XPCI0, EMU0],
    };
    let new = Op::New(New {
        devices,
        kind: Some(3),
        budget: None,
        skip_read_only: false,
        iommu_dirty_tracking: false,
    });
    let call = |Call { nr, arg, bytes }| {
        [
            Op::Poke { addr: ARG, bytes },
            Op::Raw { nr, arg },
            Op::Peek { addr: ARG, n: 256 },
            Op::Peek { addr: BUF, n: 1024 },
        ]
    };
    RawScript(
        iter::once(new)
            .chain(calls.into_iter().flat_map(call))
            .collect(),
    )
}
