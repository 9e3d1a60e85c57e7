// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random runs of the tracker, compared with a set of pages.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, Mapping, Slot};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// A step of a random run. Addresses are numbers of pages, of which there are 16.
#[derive(Clone, Debug)]
enum Op {
    Map {
        iova: u64,
        gpa: u64,
        n: u64,
    },
    Unmap {
        iova: u64,
        n: u64,
    },
    /// Marks through a handle taken earlier, whose mapping may be gone.
    Late {
        handle: usize,
        at: u64,
        n: u64,
    },
    Mark {
        iova: u64,
        n: u64,
    },
    /// A device with a log of its own writes. The log is read later.
    Log {
        iova: u64,
    },
    /// The log has pages of this size from now on.
    Pages {
        shift: u32,
    },
    Vmm {
        gpa: u64,
        n: u64,
    },
    Foreign {
        words: u64,
        shift: u32,
    },
    Take,
}

fn ops() -> impl Strategy<Value = Op> {
    let page = 0..16u64;
    prop_oneof![
        (page.clone(), page.clone(), 1..6u64).prop_map(|(iova, gpa, n)| Op::Map { iova, gpa, n }),
        (page.clone(), 1..8u64).prop_map(|(iova, n)| Op::Unmap { iova, n }),
        (0..4usize, page.clone(), 1..4u64).prop_map(|(handle, at, n)| Op::Late { handle, at, n }),
        (page.clone(), 1..4u64).prop_map(|(iova, n)| Op::Mark { iova, n }),
        page.clone().prop_map(|iova| Op::Log { iova }),
        (0..3u32).prop_map(|shift| Op::Pages { shift }),
        (page, 1..4u64).prop_map(|(gpa, n)| Op::Vmm { gpa, n }),
        (any::<u64>(), 0..3u32).prop_map(|(words, shift)| Op::Foreign { words, shift }),
        Just(Op::Take),
    ]
}

/// Two slots of 6 and of 9 pages, by first page and length. Page 6 is a hole.
const SLOTS: [(u64, u64); 2] = [(0, 6), (7, 9)];

fn in_slot(page: u64) -> bool {
    SLOTS
        .iter()
        .any(|(first, n)| (*first..first + n).contains(&page))
}

#[derive(Default)]
struct Model {
    /// The pages that are dirty, without those that are only in a log.
    dirty: BTreeSet<u64>,
    /// Where each page of IOVAs leads.
    live: Vec<Option<u64>>,
    /// The dirty pages of IOVAs in the devices' logs.
    log: BTreeSet<u64>,
    /// The guest's pages that were really written behind `log`.
    logged: BTreeSet<u64>,
}

fn run(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let tracker = Tracker::new(None);
    for (id, (first, n)) in (0..).zip(SLOTS) {
        tracker.add_slot(id, first * PAGE, None, n * PAGE).unwrap();
    }
    let bits: Vec<Slot> = tracker.slots();
    let view: IovaView = tracker.iova_view();
    let log = Arc::new(Mutex::new((0, 0)));
    let read = Arc::clone(&log);
    let read = move |_: &[IovaRange], dirty: &mut DirtyIovas| {
        let (words, shift) = &mut *read.lock().unwrap();
        dirty.or_bitmap(&[*words], extent(0, 16, PAGE << *shift))?;
        *words = 0;
        Ok(())
    };
    tracker.add_log("log", &view, 0, read).unwrap();
    tracker.start().unwrap();
    let mut handles: Vec<(Mapping, u64, u64)> = Vec::new();
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    let mut m = Model {
        live: vec![None; 32],
        ..Model::default()
    };
    // A report is exact without logs. With logs it may have more pages, but not fewer.
    let mut exact = true;
    for op in ops.into_iter().chain([Op::Take]) {
        match op {
            Op::Map { iova, gpa, n } => {
                let free = (iova..iova + n).all(|page| m.live[page as usize].is_none());
                let done = view.map(iova * PAGE, gpa * PAGE, n * PAGE);
                prop_assert_eq!(done.is_ok(), free);
                if let Ok(mapping) = done {
                    handles.push((mapping, iova, n));
                    (0..n).for_each(|k| m.live[(iova + k) as usize] = Some(gpa + k));
                }
            }
            Op::Unmap { iova, n } => {
                let unmapped = view.unmap(iova * PAGE, n * PAGE).unwrap();
                let hit = (iova..iova + n).filter_map(|k| m.live[k as usize].take());
                prop_assert_eq!(unmapped, hit.count() as u64 * PAGE);
            }
            Op::Late { handle, at, n } => {
                let Some((mapping, iova, pages)) = handles.iter().rev().nth(handle) else {
                    continue;
                };
                let at = iova + at % pages;
                let result = mapping.mark(at * PAGE + 7, n * PAGE - 7);
                prop_assert_eq!(result.is_ok(), at + n <= iova + pages);
                let first = mapping.gpa() / PAGE + at - iova;
                let marked = first..first + n.min(iova + pages - at);
                m.dirty.extend(marked.filter(|page| in_slot(*page)));
            }
            Op::Mark { iova, n } => {
                let hit: Vec<_> = (iova..iova + n).map(|k| m.live[k as usize]).collect();
                let result = view.mark(iova * PAGE + 1, n * PAGE - 1);
                prop_assert_eq!(result.is_ok(), hit.iter().all(Option::is_some));
                let hit = hit.into_iter().flatten();
                m.dirty.extend(hit.filter(|page| in_slot(*page)));
            }
            Op::Log { iova } => {
                if let Some(page) = m.live[iova as usize] {
                    m.log.insert(iova);
                    m.logged.extend(Some(page).filter(|page| in_slot(*page)));
                }
            }
            Op::Pages { shift } => log.lock().unwrap().1 = shift,
            Op::Vmm { gpa, n } => {
                for slot in &bits {
                    let (first, end) = (slot.gpa / PAGE, (slot.gpa + slot.bits.len()) / PAGE);
                    for page in (gpa..gpa + n).filter(|page| (first..end).contains(page)) {
                        slot.bits.mark((page - first) * PAGE + 4095, 1).unwrap();
                        m.dirty.insert(page);
                    }
                }
            }
            Op::Foreign { words, shift } => {
                let words = words & 0xffff >> (16 - (16 >> shift));
                let hit = |page: &u64| words >> (page >> shift) & 1 != 0;
                let coarse = |bit: u64| (bit << shift..(bit + 1) << shift).any(in_slot);
                let result = report.or_bitmap(&[words], extent(0, 16, PAGE << shift));
                let all = (0..16).filter(|bit| words >> bit & 1 != 0).all(coarse);
                prop_assert_eq!(result.is_ok(), all);
                m.dirty
                    .extend((0..16).filter(hit).filter(|page| in_slot(*page)));
            }
            Op::Take => {
                exact &= m.log.is_empty();
                {
                    let (words, shift) = &mut *log.lock().unwrap();
                    let bits = m.log.iter().map(|page| 1 << (page >> *shift));
                    *words = bits.fold(0, |words, bit| words | bit);
                }
                m.log.clear();
                m.dirty.append(&mut m.logged);
                tracker.take(&mut report).unwrap();
                let found: BTreeSet<u64> = pages(&report).iter().map(|at| at / PAGE).collect();
                match exact {
                    true => prop_assert_eq!(&found, &m.dirty),
                    false => prop_assert!(found.is_superset(&m.dirty)),
                }
                exact = true;
                report.clear();
                m.dirty.clear();
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn any_run_agrees_with_a_set_of_pages(ops in vec(ops(), 1..40)) {
        run(ops)?;
    }
}
