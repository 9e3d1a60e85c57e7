// SPDX-License-Identifier: MIT OR Apache-2.0
//! What several calls have: ranges, page sizes and times.

use std::time::Duration;

use adapter_user::{Error, Extent, PageSize, TrackError};
use libc::c_ulong;

use crate::failure::Failure;
use crate::pointer::Pointers;

/// A range of addresses: IOVAs or guest-physical addresses, as the call says.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first address.
    pub addr: u64,
    /// The length in bytes.
    pub size: u64,
}

/// The argument of an ioctl. It has 32 bits where addresses have.
#[allow(clippy::unnecessary_cast)] // not where it has 64
pub(crate) fn argument(arg: c_ulong) -> u64 {
    arg as u64
}

/// A time as C has it, or all ones beyond 584 years.
pub(crate) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// A bitmap of C: bit k % 64 of word k / 64 is the page at `addr + k * pgsize`.
pub(crate) fn bitmap(
    c: &Pointers,
    words: *const u64,
    addr: u64,
    npages: u64,
    pgsize: u64,
) -> Result<(&[u64], Extent), Failure> {
    let pgsize = PageSize::new(pgsize).ok_or(TrackError::PageSize)?;
    // Before `words` is looked at, so that only a range that can be decides how long it is.
    if !pgsize.aligns(addr) {
        return Err(Error::Misaligned.into());
    }
    if let Some(more) = npages.checked_sub(1) {
        let last = more.checked_mul(pgsize.bytes());
        let last = last.and_then(|offset| addr.checked_add(offset));
        last.ok_or(Error::Wraps)?;
    }
    let nwords = usize::try_from(npages.div_ceil(64)).unwrap_or(usize::MAX);
    let words = c.slice(words, nwords, "words")?;
    let extent = Extent {
        bit: 0,
        iova: addr,
        npages,
        pgsize,
    };
    Ok((words, extent))
}
