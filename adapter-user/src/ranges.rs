// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ranges of addresses, each by its first and last address.

use crate::error::TrackError;

/// Checks that `ranges`, in any order, together cover every address from `first`
/// to `last`. The error has the first address that they miss.
pub(crate) fn check_covered(
    mut ranges: Vec<(u64, u64)>,
    first: u64,
    last: u64,
) -> Result<(), TrackError> {
    ranges.sort_unstable();
    let mut addr = first;
    for (start, end) in ranges {
        if start > addr {
            break;
        }
        match end.checked_add(1) {
            Some(next) => addr = addr.max(next),
            None => return Ok(()),
        }
    }
    match addr <= last {
        true => Err(TrackError::Unmapped { addr }),
        false => Ok(()),
    }
}
