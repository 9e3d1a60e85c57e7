// SPDX-License-Identifier: MIT OR Apache-2.0
//! A set of numbers, as few spans as possible.

use std::collections::BTreeMap;

/// Disjoint spans of numbers by their first number, each with its last. No two of
/// them touch.
#[derive(Debug, Default)]
pub(super) struct Spans {
    spans: BTreeMap<u64, u64>,
}

impl Spans {
    /// The number of spans.
    pub(super) fn len(&self) -> usize {
        self.spans.len()
    }

    /// The parts of the spans that are between `first` and `last`, ascending.
    pub(super) fn within(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let below = self.spans.range(..first).next_back();
        let below = below.filter(move |(_, end)| **end >= first);
        let all = below.into_iter().chain(self.spans.range(first..=last));
        all.map(move |(start, end)| ((*start).max(first), (*end).min(last)))
    }

    /// Whether a number between `first` and `last` is in the set.
    pub(super) fn touches(&self, first: u64, last: u64) -> bool {
        let below = self.spans.range(..=last).next_back();
        below.is_some_and(|(_, end)| *end >= first)
    }

    /// Adds the numbers from `first` to `last`. If `may_grow` is false, the number of
    /// spans does not grow, unless there was none: a span that stands alone joins the
    /// nearest one, with all that is between them.
    pub(super) fn insert(&mut self, first: u64, last: u64, may_grow: bool) {
        let (mut first, mut last) = (first, last);
        if !may_grow {
            (first, last) = self.joined(first, last);
        }
        // Spans that overlap or touch become one.
        while let Some((start, end)) = self.spans.range(..=last.saturating_add(1)).next_back() {
            let (start, end) = (*start, *end);
            if end.saturating_add(1) < first {
                break;
            }
            self.spans.remove(&start);
            (first, last) = (first.min(start), last.max(end));
        }
        self.spans.insert(first, last);
    }

    /// The span from `first` to `last`, made larger until it reaches another one.
    fn joined(&self, first: u64, last: u64) -> (u64, u64) {
        if self.touches(first.saturating_sub(1), last.saturating_add(1)) {
            return (first, last);
        }
        let below = self.spans.range(..first).next_back().map(|(_, end)| *end);
        let above = self.spans.range(last..).next().map(|(start, _)| *start);
        match (below, above) {
            (Some(below), Some(above)) if first - below > above - last => (first, above),
            (None, Some(above)) => (first, above),
            (Some(below), _) => (below, last),
            (None, None) => (first, last),
        }
    }

    /// Removes the numbers from `first` to `last`. If `may_grow` is false, a span
    /// that would become two stays whole.
    pub(super) fn remove(&mut self, first: u64, last: u64, may_grow: bool) {
        while let Some((start, end)) = self.spans.range(..=last).next_back() {
            let (start, end) = (*start, *end);
            if end < first || (start < first && last < end && !may_grow) {
                return;
            }
            self.spans.remove(&start);
            if last < end {
                self.spans.insert(last + 1, end);
            }
            if start < first {
                self.spans.insert(start, first - 1);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Numbers at both ends of the space.
    fn number(at: u64) -> u64 {
        match at < 20 {
            true => at,
            false => u64::MAX - (39 - at),
        }
    }

    proptest! {
        #[test]
        fn spans_are_a_set(ops in prop::collection::vec((any::<bool>(), 0..40u64, 0..9u64, any::<bool>()), 1..40)) {
            let mut spans = Spans::default();
            let mut set = BTreeSet::new();
            for (insert, at, more, may_grow) in ops {
                let (first, end) = (number(at), (at + more).min(if at < 20 { 19 } else { 39 }));
                let last = number(end);
                let before = spans.len();
                match insert {
                    true => spans.insert(first, last, may_grow),
                    false => spans.remove(first, last, may_grow),
                }
                if may_grow {
                    for at in at..=end {
                        if insert { set.insert(at); } else { set.remove(&at); }
                    }
                } else {
                    prop_assert!(spans.len() <= before.max(1));
                    let now: BTreeSet<u64> = (0..40).filter(|at| spans.touches(number(*at), number(*at))).collect();
                    for at in 0..40u64 {
                        let named = (at..=at).all(|a| (number(a) >= first) && number(a) <= last);
                        if insert && named { prop_assert!(now.contains(&at)); }
                        if set.contains(&at) && (insert || !named) { prop_assert!(now.contains(&at)); }
                        if !insert { prop_assert!(set.contains(&at) || !now.contains(&at)); }
                    }
                    set = now;
                }
                let seen: Vec<(u64, u64)> = spans.within(0, u64::MAX).collect();
                prop_assert_eq!(seen.len(), spans.len());
                prop_assert!(seen.windows(2).all(|two| two[0].1 < two[1].0 - 1));
                for at in 0..40 {
                    let there = seen.iter().any(|(f, l)| *f <= number(at) && number(at) <= *l);
                    prop_assert_eq!(there, set.contains(&at));
                    prop_assert_eq!(spans.touches(number(at), number(at)), there);
                }
            }
        }
    }
}
