// SPDX-License-Identifier: MIT OR Apache-2.0
//! Checks of arguments that several calls share.

use dirty_core::Errno;

use super::abi::MAX_BITMAP;
use super::mapping::smallest;
use super::process::Result;

/// Test T of rule A5: fails unless a bitmap of `bytes` fits `size` bytes of
/// pages.
pub(super) fn test_bitmap(size: u64, pgsize: u64, bytes: u64) -> Result<()> {
    if pgsize == 0 {
        return Err(Errno::EINVAL);
    }
    let pages = size / smallest(pgsize);
    let enough = bytes >= pages.div_ceil(64) * 8;
    match pages != 0 && bytes != 0 && bytes <= MAX_BITMAP && enough {
        true => Ok(()),
        false => Err(Errno::EINVAL),
    }
}

/// Fails with EINVAL unless the condition holds.
pub(super) fn check(holds: bool) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Errno::EINVAL),
    }
}
