// SPDX-License-Identifier: MIT OR Apache-2.0
//! How fast memory becomes dirty, and what that means for a migration.

use std::collections::VecDeque;
use std::time::Duration;

/// How many samples a window keeps. Beyond it the oldest go.
const MOST_SAMPLES: usize = 256;

/// After this many rounds a migration counts as one that does not end.
const MOST_ROUNDS: u32 = 1000;

const NANOS: u128 = 1_000_000_000;

/// Bytes that become dirty in a second, over a window of time; and how many rounds and
/// how much downtime a migration takes at that rate.
///
/// It has no clock: the caller says when each sample was taken, as a time since any
/// moment that stays the same.
///
/// The rate is that of distinct pages: a page that is written twice between two takes
/// counts once. So longer rounds show a lower rate, and QEMU's `calc-dirty-rate` over a
/// longer time does too.
///
/// ```
/// use std::time::Duration;
/// use adapter_user::DirtyRate;
///
/// let ms = Duration::from_millis;
/// let mut rate = DirtyRate::new(ms(1000));
/// rate.record(ms(0), 0); // tracking begins
/// rate.record(ms(100), 10 << 20); // report.bytes() of a take 100 ms later
/// rate.record(ms(200), 10 << 20);
/// assert_eq!(rate.bytes_per_second(), Some(100 << 20));
///
/// // 400 MiB are left, 400 MiB are sent in a second, 70 ms of downtime are allowed. A
/// // round of 400 MiB and one of 100 MiB come first, and 25 MiB are left then.
/// let estimate = rate.estimate(400 << 20, 400 << 20, ms(70)).unwrap();
/// assert_eq!(estimate.downtime_now, ms(1000));
/// assert_eq!(estimate.rounds, Some(2));
/// assert_eq!(estimate.downtime, Some(Duration::from_micros(62_500)));
/// ```
#[derive(Clone, Debug)]
pub struct DirtyRate {
    window: Duration,
    /// When each sample was taken, and what became dirty since the one before. The first
    /// only says when the second began.
    samples: VecDeque<(Duration, u64)>,
}

/// How a migration goes on at a dirty rate and a bandwidth that stay as they are.
/// [`DirtyRate::estimate`] makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Estimate {
    /// The downtime if the guest is stopped now: what remains, divided by the bandwidth.
    /// QEMU calls it the expected downtime.
    pub downtime_now: Duration,
    /// How many rounds go before the guest can be stopped, or `None` if the rest never
    /// fits the downtime limit: too much becomes dirty for the bandwidth. More than 1000
    /// rounds count as never.
    pub rounds: Option<u32>,
    /// How long these rounds take together, or `None` as `rounds`.
    pub time: Option<Duration>,
    /// The downtime when the guest is stopped after these rounds, or `None` as `rounds`.
    pub downtime: Option<Duration>,
}

impl DirtyRate {
    /// Creates a rate without samples, over the last `window` of time. A window of 0 has
    /// the last two samples.
    #[must_use]
    pub fn new(window: Duration) -> Self {
        DirtyRate {
            window,
            samples: VecDeque::new(),
        }
    }

    /// Records that `bytes` became dirty between the sample before and the time `at`. Of
    /// the first sample only the time counts. [`Report::bytes`](crate::guest::Report::bytes)
    /// of a report that was clear before the take has the bytes.
    ///
    /// A time that is not later than that of the sample before adds its bytes to that
    /// sample.
    pub fn record(&mut self, at: Duration, bytes: u64) {
        match self.samples.back_mut() {
            Some((last, sum)) if at <= *last => *sum = sum.saturating_add(bytes),
            _ => self.samples.push_back((at, bytes)),
        }
        let from = at.saturating_sub(self.window);
        // A sample covers the time since the one before. So the last one that is at the
        // window's edge or before it stays.
        let too_old = |(next, _): &(Duration, u64)| *next <= from;
        while self.samples.len() > 2
            && (self.samples.get(1).is_some_and(too_old) || self.samples.len() > MOST_SAMPLES)
        {
            self.samples.pop_front();
        }
    }

    /// Forgets all samples, as when a migration begins anew.
    pub fn clear(&mut self) {
        self.samples.clear();
    }

    /// Returns how many bytes became dirty in a second, or `None` before the second
    /// sample.
    #[must_use]
    pub fn bytes_per_second(&self) -> Option<u64> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        let bytes = self.samples.iter().skip(1).map(|(_, bytes)| *bytes);
        let bytes = bytes.fold(0, u64::saturating_add);
        let time = last.0.checked_sub(first.0)?.as_nanos();
        let rate = (u128::from(bytes) * NANOS).checked_div(time)?;
        Some(u64::try_from(rate).unwrap_or(u64::MAX))
    }

    /// Estimates how a migration goes on that has `remaining` bytes to send, sends
    /// `bandwidth` bytes a second, and may stop the guest for `limit`. Each round sends
    /// what became dirty in the round before. It is `None` before the second sample, or
    /// if the bandwidth is 0.
    ///
    /// Pages that are written again and again become dirty less often than the rate of
    /// short rounds says, and a round never has more than all memory. So a guest that
    /// writes the same few pages may do better.
    #[must_use]
    pub fn estimate(&self, remaining: u64, bandwidth: u64, limit: Duration) -> Option<Estimate> {
        let rate = self.bytes_per_second()?;
        let downtime_now = time_for(remaining, bandwidth)?;
        let mut estimate = Estimate {
            downtime_now,
            rounds: None,
            time: None,
            downtime: None,
        };
        let (mut left, mut time) = (downtime_now, Duration::ZERO);
        for rounds in 0..=MOST_ROUNDS {
            if left <= limit {
                estimate.rounds = Some(rounds);
                estimate.time = Some(time);
                estimate.downtime = Some(left);
                break;
            }
            time = time.saturating_add(left);
            let next = time_for(bytes_in(left, rate), bandwidth)?;
            if next >= left {
                break;
            }
            left = next;
        }
        Some(estimate)
    }
}

/// How long `bytes` take at `bandwidth` bytes a second.
fn time_for(bytes: u64, bandwidth: u64) -> Option<Duration> {
    let nanos = (u128::from(bytes) * NANOS).checked_div(bandwidth.into())?;
    let seconds = u64::try_from(nanos / NANOS).ok()?; // at most 2^64 - 1
    Some(Duration::new(seconds, (nanos % NANOS) as u32))
}

/// The bytes that become dirty in a time, at most 2^64 - 1.
fn bytes_in(time: Duration, rate: u64) -> u64 {
    // The time is at most 2^64 seconds, so the product may be too large.
    let bytes = time.as_nanos().saturating_mul(rate.into()) / NANOS;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A rate over samples that are `step` apart, each of `bytes`.
    fn steady(step: Duration, bytes: u64) -> DirtyRate {
        let mut rate = DirtyRate::new(ms(1000));
        (0..4).for_each(|n| rate.record(step * n, bytes));
        rate
    }

    #[test]
    fn a_rate_needs_two_samples() {
        let mut rate = DirtyRate::new(ms(1000));
        assert_eq!(rate.bytes_per_second(), None);
        rate.record(ms(5), 1 << 40);
        assert_eq!(rate.bytes_per_second(), None);
        assert_eq!(rate.estimate(1, 1, ms(1)), None);
        rate.record(ms(505), 3 * MIB);
        assert_eq!(rate.bytes_per_second(), Some(6 * MIB));
        rate.clear();
        assert_eq!(rate.bytes_per_second(), None);
    }

    /// What happened before the window does not count; the sample that reaches into it
    /// does.
    #[test]
    fn the_window_moves() {
        let mut rate = DirtyRate::new(ms(100));
        rate.record(ms(0), 0);
        rate.record(ms(100), 1000 * MIB);
        rate.record(ms(150), MIB);
        rate.record(ms(200), MIB);
        assert_eq!(rate.bytes_per_second(), Some(20 * MIB));
        // A sample that is longer than the window is all there is.
        rate.record(ms(2200), 2 * MIB);
        assert_eq!(rate.bytes_per_second(), Some(MIB));
        // Time that stands still divides by nothing.
        rate.record(ms(2200), 2 * MIB);
        assert_eq!(rate.bytes_per_second(), Some(2 * MIB));
    }

    #[test]
    fn rounds_shrink_by_rate_and_bandwidth() {
        // A quarter of each round becomes dirty in it.
        let rate = steady(ms(100), 10 * MIB);
        let estimate = rate.estimate(400 * MIB, 400 * MIB, ms(63)).unwrap();
        assert_eq!(estimate.downtime_now, ms(1000));
        assert_eq!(estimate.rounds, Some(2));
        assert_eq!(estimate.time, Some(ms(1250)));
        assert_eq!(estimate.downtime, Some(Duration::from_micros(62_500)));
        // What fits already takes no round.
        let estimate = rate.estimate(4 * MIB, 400 * MIB, ms(10)).unwrap();
        assert_eq!(estimate.rounds, Some(0));
        assert_eq!(estimate.time, Some(ms(0)));
        assert_eq!(estimate.downtime, Some(ms(10)));
    }

    #[test]
    fn a_guest_that_writes_too_fast_never_fits() {
        let rate = steady(ms(100), 10 * MIB);
        let estimate = rate.estimate(400 * MIB, 100 * MIB, ms(10)).unwrap();
        assert_eq!(estimate.downtime_now, ms(4000));
        assert_eq!((estimate.rounds, estimate.downtime), (None, None));
        assert_eq!(rate.estimate(1, 0, ms(10)), None);
    }

    /// Nothing overflows or panics, and the numbers agree with each other.
    #[test]
    fn any_numbers_will_do() {
        proptest!(|(
            window: u64,
            samples in prop::collection::vec((any::<u64>(), 0..1_000_000_000u32, any::<u64>()), 0..400),
            remaining: u64, bandwidth: u64, limit: u64,
        )| {
            let mut rate = DirtyRate::new(Duration::from_nanos(window));
            for (seconds, nanos, bytes) in samples {
                rate.record(Duration::new(seconds, nanos), bytes);
                prop_assert!(rate.samples.len() <= MOST_SAMPLES);
            }
            let limit = Duration::from_nanos(limit);
            if let Some(estimate) = rate.estimate(remaining, bandwidth, limit) {
                prop_assert!(estimate.downtime.is_none_or(|downtime| downtime <= limit));
                prop_assert_eq!(estimate.rounds.is_some(), estimate.downtime.is_some());
                prop_assert_eq!(estimate.rounds == Some(0), estimate.downtime_now <= limit);
            }
        });
    }
}
