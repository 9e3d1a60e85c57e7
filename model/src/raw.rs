// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core and the model under raw ioctls: any number, any bytes.

use arbitrary::{Arbitrary, Result, Unstructured};
use dirty_core::uapi::*;
use dirty_script::op::*;
use dirty_script::System;

use crate::{Naive, Sim};

/// One ioctl: bytes are written to where arguments go, then the call is made.
#[derive(Clone, Debug)]
pub struct RawCall {
    nr: u32,
    arg: u64,
    bytes: Vec<u8>,
}

impl<'a> Arbitrary<'a> for RawCall {
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
        // Words, most of which make sense somewhere.
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
        Ok(RawCall { nr, arg, bytes })
    }
}

/// Makes the calls on both, in a container with an emulated group and, for
/// calls of an odd number, one behind an IOMMU; both must answer the same and
/// leave the same bytes behind.
///
/// # Errors
///
/// The first call where they do not.
pub fn compare_raw(calls: &[RawCall]) -> std::result::Result<(), String> {
    let (mut sim, mut model) = (Sim::default(), Naive::default());
    let devices = match calls.len() % 2 {
        0 => vec![4],
        _ => vec![2, 4],
    };
    let new = Op::New(New {
        devices,
        kind: 3,
        set: true,
        budget: None,
        skip_read_only: false,
    });
    dirty_script::run(&mut sim, &new);
    dirty_script::run(&mut model, &new);
    for (k, call) in calls.iter().enumerate() {
        let core = make(&mut sim, call);
        let naive = make(&mut model, call);
        if core != naive {
            return Err(format!(
                "call {k}: core {:?}, model {:?}{}\n{calls:#x?}",
                core.0,
                naive.0,
                if core.1 == naive.1 {
                    ""
                } else {
                    ", other bytes"
                }
            ));
        }
    }
    sim.close();
    Ok(())
}

/// Makes one call; what it answered, and the memory that it may have written.
fn make(system: &mut dyn System, call: &RawCall) -> (dirty_script::Answer, Vec<u8>) {
    system.poke(ARG, &call.bytes);
    let answer = system.ioctl(call.nr, call.arg);
    let mut memory = vec![0; 256 + 1024];
    let (arg, buf) = memory.split_at_mut(256);
    system.peek(ARG, arg);
    system.peek(BUF, buf);
    (answer, memory)
}
