// SPDX-License-Identifier: MIT OR Apache-2.0
//! How fast memory becomes dirty, and what that means for a migration.

use std::time::Duration;

use adapter_user::DirtyRate;
use libc::c_int;

use crate::border::border;
use crate::failure::Failure;
use crate::pointer::{Grows, Pointers};
use crate::range::nanoseconds;

/// Bytes that become dirty in a second, over a window of time, and an estimate of how a
/// migration goes on. It has no clock: the caller says when each sample was taken, in
/// nanoseconds since any moment that stays the same.
///
/// The rate is that of distinct pages: a page that is written twice between two takes
/// counts once. So longer rounds show a lower rate.
///
/// A rate belongs to one thread at a time.
pub struct Rate {
    inner: DirtyRate,
}

/// The value of `rounds` if a migration does not end.
pub const VFIO_DIRTY_NEVER: u32 = 0xffff_ffff;

/// How a migration goes on at a dirty rate and a bandwidth that stay as they are. Make it
/// zero and set `argsz`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Estimate {
    /// `sizeof(struct vfio_dirty_estimate)`. The call stores how many bytes it has filled,
    /// which are fewer if the library is older than the header.
    pub argsz: u32,
    /// How many rounds go before the guest can be stopped, or VFIO_DIRTY_NEVER if the rest
    /// never fits the downtime limit: too much becomes dirty for the bandwidth. More than
    /// 1000 rounds count as never.
    pub rounds: u32,
    /// The downtime in nanoseconds if the guest is stopped now: what remains, divided by
    /// the bandwidth. QEMU calls it the expected downtime.
    pub downtime_now_ns: u64,
    /// How long the rounds take together, in nanoseconds, or UINT64_MAX if they never end.
    pub time_ns: u64,
    /// The downtime in nanoseconds when the guest is stopped after these rounds, or
    /// UINT64_MAX if they never end.
    pub downtime_ns: u64,
}

// SAFETY: it begins with a u32, and has no padding: two u32 and 3 u64.
unsafe impl Grows for Estimate {
    const FIRST: usize = 8 + 3 * 8;
}

/// Creates a rate without samples, over the last `window_ns` nanoseconds. 0 has the last
/// two samples.
///
/// # Safety
///
/// There is room for a pointer at `rate`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_rate_new(window_ns: u64, rate: *mut *mut Rate) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let out = c.out(rate, "rate")?;
            let inner = DirtyRate::new(Duration::from_nanos(window_ns));
            c.give(out, Rate { inner });
            Ok(0)
        })
    }
}

/// Frees a rate. NULL is ignored.
///
/// # Safety
///
/// Nobody uses the rate any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_rate_free(rate: *mut Rate) {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            drop(c.take_back(rate, "rate")?);
            Ok(0)
        })
    };
}

/// Records that `bytes` became dirty between the sample before and the time `at_ns`: 4096
/// times vfio_dirty_report_pages() of a report that was clear before the take. Of the first
/// sample only the time counts. A time that is not later than that of the sample before
/// adds its bytes to that sample.
///
/// # Safety
///
/// No other thread uses the rate.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_rate_record(rate: *mut Rate, at_ns: u64, bytes: u64) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let rate = c.handle_mut(rate, "rate")?;
            rate.inner.record(Duration::from_nanos(at_ns), bytes);
            Ok(0)
        })
    }
}

/// Stores how many bytes became dirty in a second. -ENODATA before the second sample.
///
/// # Safety
///
/// No thread changes the rate meanwhile. There is room for the answer at `bytes`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_rate_bytes_per_second(
    rate: *const Rate,
    bytes: *mut u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let rate = c.read(rate, "rate")?;
            let out = c.out(bytes, "bytes")?;
            c.put(out, rate.inner.bytes_per_second().ok_or_else(no_data)?);
            Ok(0)
        })
    }
}

/// Estimates how a migration goes on that has `remaining` bytes to send, sends `bandwidth`
/// bytes a second, and may stop the guest for `limit_ns` nanoseconds. Each round sends what
/// became dirty in the round before.
///
/// Pages that are written again and again become dirty less often than the rate of short
/// rounds says, and a round never has more than all memory. So a guest that writes the same
/// few pages may do better.
///
/// -EINVAL if `argsz` is too small or `bandwidth` is 0. -ENODATA before the second sample.
///
/// # Safety
///
/// `estimate` has `argsz` bytes. No thread changes the rate meanwhile.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_rate_estimate(
    rate: *const Rate,
    remaining: u64,
    bandwidth: u64,
    limit_ns: u64,
    estimate: *mut Estimate,
) -> c_int {
    let answer = |c: &Pointers| {
        let rate = c.read(rate, "rate")?;
        let out = c.sized(estimate, "estimate")?;
        if bandwidth == 0 {
            return Err(Failure::argument("bandwidth", "is 0"));
        }
        let limit = Duration::from_nanos(limit_ns);
        let found = rate.inner.estimate(remaining, bandwidth, limit);
        let found = found.ok_or_else(no_data)?;
        let or_never = |time: Option<Duration>| time.map_or(u64::MAX, nanoseconds);
        let value = Estimate {
            argsz: 0,
            rounds: found.rounds.unwrap_or(VFIO_DIRTY_NEVER),
            downtime_now_ns: nanoseconds(found.downtime_now),
            time_ns: or_never(found.time),
            downtime_ns: or_never(found.downtime),
        };
        c.fill(out, value);
        Ok(0)
    };
    // SAFETY: the caller keeps the contract.
    unsafe { border(answer) }
}

fn no_data() -> Failure {
    Failure::new(libc::ENODATA, "a rate needs two samples")
}
