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

/// As `slice::partition_point`. It takes O(1) if the answer is `near` or a little above,
/// so it suits look-ups of ascending ranges.
pub(crate) fn partition_near<T>(items: &[T], near: usize, pred: impl Fn(&T) -> bool) -> usize {
    let (below, above) = items.split_at(near.min(items.len()));
    if below.last().is_some_and(|item| !pred(item)) {
        return below.partition_point(pred);
    }
    let mut end = 0; // `pred` holds for those below `end.div_ceil(2)`
    while above.get(end).is_some_and(&pred) {
        end = 2 * end + 1;
    }
    let start = end.div_ceil(2);
    let between = &above[start..end.min(above.len())];
    below.len() + start + between.partition_point(pred)
}

#[cfg(test)]
mod tests {
    use super::partition_near;

    #[test]
    fn near_makes_no_difference() {
        for len in 0..20 {
            let items: Vec<usize> = (0..len).collect();
            for want in 0..=len {
                for near in 0..22 {
                    assert_eq!(partition_near(&items, near, |item| *item < want), want);
                }
            }
        }
    }
}
