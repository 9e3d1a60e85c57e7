// SPDX-License-Identifier: MIT OR Apache-2.0
//! How often each page is pinned, by IOVA.

use std::collections::BTreeMap;

use dirty_core::PageSize;

/// Pages that follow each other and are pinned equally often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    npages: u64,
    count: u64,
}

/// Pins that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pins {
    /// Where the first starts.
    pub(super) iova: u64,
    pub(super) npages: u64,
    /// How often each of them is pinned.
    pub(super) count: u64,
}

impl Pins {
    /// Where the page after the last one starts, if there is one.
    pub(super) fn end(&self, page: PageSize) -> Option<u64> {
        self.iova.checked_add(self.npages << page.shift())
    }
}

/// A count for each IOVA that pins start at.
///
/// INVARIANT: each map has the pins that start at one offset in a page. Its keys are
/// page numbers, no two runs in it overlap, no count and no length is 0, and no map is
/// empty.
#[derive(Debug)]
pub(super) struct Counts {
    page: PageSize,
    by_offset: BTreeMap<u64, Runs>,
}

type Runs = BTreeMap<u64, Run>;

/// Cuts a run in two, so that one starts at page `at`.
fn split(runs: &mut Runs, at: u64) {
    let Some((&start, run)) = runs.range_mut(..at).next_back() else {
        return;
    };
    let (head, whole) = (at - start, *run);
    if head < whole.npages {
        run.npages = head;
        let npages = whole.npages - head;
        runs.insert(at, Run { npages, ..whole });
    }
}

/// Joins the runs from the one before page `first` to the one that starts at `end`,
/// where they follow each other and have the same count.
fn join(runs: &mut Runs, first: u64, end: u64) {
    let before = runs.range(..first).next_back().map_or(first, |(at, _)| *at);
    let mut at = before;
    while at <= end {
        let Some((&start, &run)) = runs.range(at..=end).next() else {
            break;
        };
        at = start + run.npages;
        if let Some(next) = runs.get(&at).filter(|next| next.count == run.count) {
            let npages = run.npages + next.npages;
            runs.remove(&at);
            runs.insert(start, Run { npages, ..run });
            at = start;
        }
    }
}

impl Counts {
    pub(super) fn new(page: PageSize) -> Self {
        let by_offset = BTreeMap::new();
        Counts { page, by_offset }
    }

    /// The numbers of the `npages` pages from the one at `iova` on, as far as there are
    /// so many, and where in a page it starts.
    fn pages(&self, iova: u64, npages: u64) -> (u64, u64, u64) {
        let (first, past) = (
            self.page.pages(iova),
            self.page.pages(u64::MAX).saturating_add(1),
        );
        let end = first.saturating_add(npages).min(past);
        (first, end, iova % self.page.bytes())
    }

    /// Adds a pin of the page at `iova` and of each page after it, `npages` in all.
    pub(super) fn add(&mut self, iova: u64, npages: u64) {
        let (first, end, offset) = self.pages(iova, npages);
        if first == end {
            return;
        }
        let runs = self.by_offset.entry(offset).or_default();
        split(runs, first);
        split(runs, end);
        let mut at = first;
        while at < end {
            let next = runs.range_mut(at..end).next();
            let gap = next.as_ref().map_or(end, |(start, _)| **start) - at;
            if gap != 0 {
                let (npages, count) = (gap, 1);
                runs.insert(at, Run { npages, count });
                at += gap;
            } else if let Some((_, run)) = next {
                run.count += 1;
                at += run.npages;
            }
        }
        join(runs, first, end);
    }

    /// Removes a pin of the page at `iova` and of each page after it, `npages` in all.
    /// It passes over pages that have none.
    pub(super) fn remove(&mut self, iova: u64, npages: u64) {
        let (first, end, offset) = self.pages(iova, npages);
        let Some(runs) = self.by_offset.get_mut(&offset) else {
            return;
        };
        split(runs, first);
        split(runs, end);
        let mut at = first;
        while let Some((&start, run)) = runs.range_mut(at..end).next() {
            at = start + run.npages;
            run.count -= 1;
            if run.count == 0 {
                runs.remove(&start);
            }
        }
        join(runs, first, end);
        if runs.is_empty() {
            self.by_offset.remove(&offset);
        }
    }

    /// Removes and returns the pins that start at an IOVA from `first` to `last`.
    pub(super) fn take(&mut self, first: u64, last: u64) -> Vec<Pins> {
        let mut taken = Vec::new();
        let page_size = self.page;
        self.by_offset.retain(|offset, runs| {
            // The pages p with first <= p * page_size + offset <= last.
            let start = first.saturating_sub(*offset).div_ceil(page_size.bytes());
            let last = last.checked_sub(*offset);
            let end = last.map_or(0, |last| page_size.pages(last) + 1);
            if start >= end {
                return true;
            }
            split(runs, start);
            split(runs, end);
            let first = taken.len();
            taken.extend(runs.range(start..end).map(|(page, run)| Pins {
                iova: (page << page_size.shift()) + offset,
                npages: run.npages,
                count: run.count,
            }));
            for pins in &taken[first..] {
                runs.remove(&page_size.pages(pins.iova));
            }
            !runs.is_empty()
        });
        taken
    }

    /// How many pins there are.
    pub(super) fn total(&self) -> u64 {
        let runs = self.by_offset.values().flat_map(BTreeMap::values);
        runs.fold(0, |sum, run| {
            sum.saturating_add(run.npages.saturating_mul(run.count))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    impl Counts {
        fn check(&self) {
            for runs in self.by_offset.values() {
                let all: Vec<_> = runs.iter().map(|(at, run)| (*at, *run)).collect();
                assert!(!all.is_empty());
                assert!(all.iter().all(|(_, run)| run.npages != 0 && run.count != 0));
                for pair in all.windows(2) {
                    let end = pair[0].0 + pair[0].1.npages;
                    let joined = end == pair[1].0 && pair[0].1.count == pair[1].1.count;
                    assert!(end <= pair[1].0 && !joined, "{pair:?}");
                }
            }
        }
    }

    /// Random calls, against a count for each page.
    #[test]
    fn runs_count_as_single_pages_do() {
        const N: u64 = 40;
        for seed in 0..300 {
            let mut rng = StdRng::seed_from_u64(seed);
            let size = PageSize::new(4096 << (seed / 3 % 3 * 2)).expect("a power of two");
            let bytes = size.bytes();
            let base = [0, 1 << 20, 0u64.wrapping_sub(N * bytes)][seed as usize % 3];
            let mut counts = Counts::new(size);
            let mut naive: BTreeMap<u64, u64> = BTreeMap::new();
            for _ in 0..100 {
                let offset = [0, 0, 0x10][rng.random_range(0..3)];
                let first = rng.random_range(0..N);
                let n = rng.random_range(0..=N - first);
                let pages: Vec<u64> = (first..first + n)
                    .map(|p| base + p * bytes + offset)
                    .collect();
                let iova = base + first * bytes + offset;
                match rng.random_range(0..5) {
                    0 | 1 => {
                        counts.add(iova, n);
                        pages
                            .iter()
                            .for_each(|p| *naive.entry(*p).or_default() += 1);
                    }
                    2 | 3 => {
                        counts.remove(iova, n);
                        for page in pages {
                            naive.entry(page).and_modify(|n| *n = n.saturating_sub(1));
                        }
                    }
                    _ => {
                        let last = iova.saturating_add((n * bytes).saturating_sub(1));
                        for pins in counts.take(iova, last) {
                            for page in 0..pins.npages {
                                let was = naive.remove(&(pins.iova + page * bytes));
                                assert_eq!(was, Some(pins.count));
                            }
                        }
                        let left = naive.range(iova..=last).find(|(_, n)| **n != 0);
                        assert_eq!(left, None);
                    }
                }
                naive.retain(|_, n| *n != 0);
                counts.check();
                assert_eq!(counts.total(), naive.values().sum::<u64>());
            }
            let mut all = BTreeMap::new();
            for pins in counts.take(0, u64::MAX) {
                all.extend((0..pins.npages).map(|p| (pins.iova + p * bytes, pins.count)));
            }
            assert_eq!(all, naive);
        }
    }
}
