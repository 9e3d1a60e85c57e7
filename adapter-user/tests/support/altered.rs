// SPDX-License-Identifier: MIT OR Apache-2.0
//! A random tracker is saved, the bytes are altered, and another tracker is restored from
//! them. The property test, the seeds of the fuzz target `restore` and the target share it.
//!
//! Bytes that a save did not return are an error, and then every page is dirty. A forger
//! may compute the checksum anew. Then the dirty pages are those that the bytes say, read
//! here in a naive way from the format that docs/live-upgrade.md describes.

#[path = "allocated.rs"]
mod allocated;

use std::collections::BTreeSet;
use std::mem::take;
use std::sync::{Arc, Mutex};

use adapter_user::guest::{DirtyIovas, IovaRange, IovaView, Report, RestoreError, Slot};
use adapter_user::guest::{Source, SourceError, Tracker};
use adapter_user::{DirtyBits, PageSize};

pub(crate) use allocated::allocated;

const PAGE: u64 = 4096;
/// Each slot has a place of its own in guest memory.
const PLACE: u64 = 1 << 20;
const PLACES: u64 = 8;

/// The first two bytes are options and the number of steps. The steps and then the changes
/// of the saved bytes have four bytes each.
pub(crate) fn check(input: &[u8]) {
    let Some(([options, nsteps], rest)) = input.split_first_chunk() else {
        return;
    };
    let mut rest = rest
        .chunks_exact(4)
        .map(|four| [four[0], four[1], four[2], four[3]]);
    let options = Options(*options);
    let mut guest = Guest::new(options);
    rest.by_ref()
        .take((*nsteps).into())
        .for_each(|step| guest.step(step));

    let saved = guest.tracker.save(&guest.report).unwrap();
    *guest.logs.lock().unwrap() = Logs {
        all: options.logs_tell_all(),
        ..Logs::default()
    };
    let mut bytes = saved.clone();
    rest.for_each(|change| alter(&mut bytes, change));
    if options.forged() {
        bytes = sealed(words(&bytes));
    }
    let new = guest.again();
    options.change_slots(&new);
    let unaltered = bytes == saved && slots(&new) == slots(&guest.tracker);

    let before = allocated();
    let result = new.restore(&bytes);
    let taken = allocated() - before;
    assert!(taken <= bound(&bytes), "{taken} bytes for {}", bytes.len());
    let restored = match result {
        Ok(restored) => restored,
        Err(cause) => {
            assert!(!unaltered, "{cause}");
            assert!(!matches!(cause, RestoreError::Start(_)), "{cause}");
            assert_eq!(dirty(&new, Report::new()), everything(&new), "{cause}");
            return;
        }
    };
    let said = Said::read(&bytes);
    assert_eq!(new.is_on(), said.on);
    assert_eq!(restored.sources.len(), said.sources);
    if !said.on {
        return;
    }
    for source in &restored.sources {
        match &source.view {
            Some(view) => {
                let log = log(&guest.logs, 0);
                new.add_log(&source.name, view, 0, log).unwrap();
            }
            None => drop(new.add_source(&source.name, |_| Ok(()))),
        }
    }
    let told = dirty(&new, Report::new());
    let unknown = new
        .slots()
        .into_iter()
        .filter(|slot| !said.slots.contains(&slot.id));
    let unknown = unknown.flat_map(|slot| pages(slot.gpa, 0, slot.size - 1));
    let wanted: BTreeSet<u64> = said.dirty.iter().copied().chain(unknown).collect();
    match options.logs_tell_all() {
        true => assert!(told.is_superset(&wanted) && told.is_superset(&said.logged)),
        false => assert_eq!(told, wanted),
    }
    if unaltered {
        assert_eq!(told, dirty(&guest.tracker, take(&mut guest.report)));
    }
}

/// What restoring may take: 32 bytes for each byte, and a little for itself.
pub(crate) fn bound(bytes: &[u8]) -> usize {
    32 * bytes.len() + 4096
}

/// The whole words of some bytes.
pub(crate) fn words(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.chunks_exact(8);
    words
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .collect()
}

/// The bytes of words, with the length and the checksum that docs/live-upgrade.md has for
/// them. Fewer words than a header stay as they are.
pub(crate) fn sealed(mut words: Vec<u64>) -> Vec<u8> {
    if words.len() > 4 {
        words[2] = words.len() as u64 * 8;
        let others = words.iter().enumerate().filter(|(at, _)| *at != 3);
        words[3] = others.fold(0x9e37_79b9_7f4a_7c15, |sum, (_, word)| {
            (sum ^ word)
                .wrapping_mul(0xd6e8_feb8_6659_fd93)
                .rotate_left(29)
        });
    }
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[derive(Clone, Copy)]
struct Options(u8);

impl Options {
    /// Whether the tracker is never started.
    fn off(self) -> bool {
        self.0 & 0xf == 0xf
    }

    /// Whether the logs tell all that they are asked for, after the save.
    fn logs_tell_all(self) -> bool {
        self.0 & 0x10 != 0
    }

    /// Whether the altered bytes get the right checksum.
    fn forged(self) -> bool {
        self.0 & 0x20 != 0
    }

    /// Lets the new tracker have other slots than the old one had.
    fn change_slots(self, new: &Tracker) {
        let first = new.slots().first().map(|slot| (slot.id, slot.size));
        // Of those that fail, as a move to a place that is taken, nothing comes.
        let _ = match (self.0 >> 6, first) {
            (0 | 1, _) | (_, None) => Ok(()),
            (2, _) => new.add_slot(77, PLACES * PLACE, None, 3 * PAGE).map(drop),
            (_, Some((id, size))) => match self.0 & 3 {
                0 => new.remove_slot(id).map(drop),
                1 => new.move_slot(id, (PLACES + 1) * PLACE),
                _ => new.grow_slot(id, size + PAGE),
            },
        };
    }

    /// The pages that slot `id` has at first.
    fn npages(self, id: u32) -> u64 {
        1 + u64::from(self.0 & 0xf) * 11 % (64 + u64::from(id))
    }
}

/// A tracker that is going to be saved, with all that it may have.
struct Guest {
    tracker: Tracker,
    views: [IovaView; 2],
    sources: Vec<Source>,
    logs: SharedLogs,
    report: Report,
}

/// What the logs of others have.
#[derive(Default)]
struct Logs {
    /// Guest addresses.
    kvm: Vec<u64>,
    /// The IOVAs of each view.
    iovas: [Vec<u64>; 2],
    /// Whether the next read fails: of each view's log, and of KVM's.
    fails: [bool; 3],
    /// Whether a log by IOVA tells all that it is asked for.
    all: bool,
}

type SharedLogs = Arc<Mutex<Logs>>;

/// KVM's log, as a source.
fn kvm(logs: &SharedLogs) -> impl FnMut(&mut Report) -> Result<(), SourceError> {
    let logs = Arc::clone(logs);
    move |report| {
        let mut logs = logs.lock().unwrap();
        if take(&mut logs.fails[2]) {
            return Err("KVM fails".into());
        }
        for gpa in take(&mut logs.kvm) {
            let _ = report.or_range(gpa, 1); // it may be in no slot
        }
        Ok(())
    }
}

/// The log of the devices behind a view.
fn log(
    logs: &SharedLogs,
    view: usize,
) -> impl FnMut(&[IovaRange], &mut DirtyIovas) -> Result<(), SourceError> {
    let logs = Arc::clone(logs);
    move |ask, dirty| {
        let mut logs = logs.lock().unwrap();
        if take(&mut logs.fails[view]) {
            return Err("a log fails".into());
        }
        let all = logs.all;
        for range in ask.iter().filter(|_| all) {
            dirty.or_range(range.iova, range.size)?;
        }
        for iova in take(&mut logs.iovas[view]) {
            if ask
                .iter()
                .any(|ask| (ask.iova..=ask.last()).contains(&iova))
            {
                dirty.or_range(iova, 1)?;
            }
        }
        Ok(())
    }
}

impl Guest {
    /// A tracker with three slots, of which the last has larger pages, and two views.
    fn new(options: Options) -> Guest {
        let tracker = Tracker::new(None);
        for id in 0..3 {
            let (gpa, size) = (u64::from(id) * PLACE, options.npages(id) * PAGE);
            let pgsize = if id == 2 { 16 * PAGE } else { PAGE };
            tracker.add(new_slot(id, gpa, size, pgsize)).unwrap();
        }
        if !options.off() {
            tracker.start().unwrap();
        }
        Guest {
            views: [tracker.iova_view(), tracker.iova_view()],
            sources: Vec::new(),
            logs: SharedLogs::default(),
            report: Report::new(),
            tracker,
        }
    }

    fn step(&mut self, [kind, a, b, c]: [u8; 4]) {
        let [a, b, c] = [a, b, c].map(u64::from);
        let (id, place) = ((a % 3) as u32, b % PLACES * PLACE);
        let (at, view) = (a as usize % 2, &self.views[a as usize % 2]);
        let (iova, gpa, size) = (b * PAGE, c * 8 * PAGE, (a / 2 % 32 + 1) * PAGE);
        let slots = self.tracker.slots();
        let mut logs = self.logs.lock().unwrap();
        // Steps that are refused change nothing: a mark beyond a slot, a map of what is
        // mapped, a move to a place that is taken.
        match kind % 16 {
            0..=2 => {
                let slot = slots.iter().find(|slot| slot.id == id);
                let _ = slot.map(|slot| slot.bits.mark(b * PAGE, c + 1));
            }
            3 | 4 => drop(view.map(iova, gpa, size)),
            5 => drop(view.unmap(iova, size)),
            6 => logs.iovas[at].push(iova),
            7 => logs.kvm.push(gpa),
            8 if self.sources.len() < 4 => {
                let (name, gap) = (["log", "another log"][at], b % 2 * PAGE);
                let source = self.tracker.add_log(name, view, gap, log(&self.logs, at));
                self.sources.push(source.unwrap());
            }
            9 if self.sources.len() < 4 => {
                let source = self.tracker.add_source("kvm", kvm(&self.logs));
                self.sources.push(source);
            }
            10 => drop(self.tracker.move_slot(id, place)),
            11 => {
                drop(logs); // which the sources lock
                let _ = self.tracker.take(&mut self.report);
                if b % 2 != 0 {
                    self.report.clear();
                }
            }
            12 if b % 2 == 0 => drop(self.tracker.remove_slot(id)),
            12 => {
                drop(logs);
                let _ = self.sources.pop().map(Source::remove);
            }
            13 => logs.fails[id as usize] = true,
            14 => drop(self.tracker.grow_slot(id, b * PAGE)),
            15 => drop(view.mark(iova, c * 64)),
            _ => {} // there are enough sources
        }
    }

    /// A tracker that is off and has the same slots.
    fn again(&self) -> Tracker {
        let new = Tracker::new(None);
        for slot in self.tracker.slots() {
            let pgsize = slot.bits.pgsize().bytes();
            new.add(new_slot(slot.id, slot.gpa, slot.size, pgsize))
                .unwrap();
        }
        new
    }
}

fn new_slot(id: u32, gpa: u64, size: u64, pgsize: u64) -> Slot {
    let bits = DirtyBits::new(size, PageSize::new(pgsize).unwrap());
    Slot::new(id, gpa, size, bits.unwrap())
}

fn slots(tracker: &Tracker) -> Vec<(u32, u64, u64)> {
    let slots = tracker.slots().into_iter();
    slots.map(|slot| (slot.id, slot.gpa, slot.size)).collect()
}

/// Changes bytes at a place that `a` and `b` say.
fn alter(bytes: &mut Vec<u8>, [kind, a, b, c]: [u8; 4]) {
    if bytes.is_empty() {
        return;
    }
    let at = usize::from(u16::from_le_bytes([a, b])) % bytes.len();
    let word = at / 8 * 8;
    let there = bytes.get(word..word + 8).map(|there| words(there)[0]);
    let shift = c % 64;
    let edge = match c / 64 {
        0 => 1 << shift,
        1 => (1 << shift) - 1,
        2 => u64::from(shift) * PAGE,
        _ => u64::MAX - u64::from(shift),
    };
    let new = match (kind % 8, there) {
        (0, Some(_)) => edge,
        (1, Some(there)) => there.wrapping_add_signed(i64::from(c as i8)),
        (2, Some(there)) => there.wrapping_add(edge),
        (3, _) => return bytes.truncate(at),
        (4, Some(_)) => {
            let end = (word + usize::from(c % 8) * 8).min(bytes.len());
            return drop(bytes.drain(word..end));
        }
        (5, Some(there)) => {
            let again = there.to_le_bytes().repeat(usize::from(c % 8));
            return drop(bytes.splice(word..word, again));
        }
        (6, _) => return bytes.resize(bytes.len() + usize::from(c), 0),
        _ => return bytes[at] ^= 1 << (c % 8),
    };
    bytes[word..word + 8].copy_from_slice(&new.to_le_bytes());
}

/// What bytes say that were restored.
#[derive(Default)]
struct Said {
    on: bool,
    slots: Vec<u32>,
    dirty: BTreeSet<u64>,
    /// The pages that the sources' logs may still tell.
    logged: BTreeSet<u64>,
    sources: usize,
}

impl Said {
    fn read(bytes: &[u8]) -> Said {
        let words = words(bytes);
        assert_eq!(bytes, sealed(words.clone()), "length and checksum");
        assert_eq!(words[..2], [u64::from_le_bytes(*b"vfdirty\0"), 1]);
        let mut words = words.into_iter().skip(4);
        let mut next = || words.next().unwrap();
        let mut said = Said {
            on: next() == 1,
            ..Said::default()
        };
        if said.on {
            said.read_rest(&mut next);
        }
        assert_eq!(words.next(), None);
        said
    }

    fn read_rest(&mut self, next: &mut impl FnMut() -> u64) {
        let mut places = Vec::new();
        for _ in 0..next() {
            let [id, gpa, size, pgsize] = [(); 4].map(|()| next());
            self.slots.push(id as u32);
            places.push(gpa);
            let npages = size.div_ceil(pgsize);
            for at in 0..npages.div_ceil(64) {
                let word = next();
                let set = (0..64).filter(|bit| word >> bit & 1 != 0);
                for page in set.map(|bit| at * 64 + bit).filter(|page| *page < npages) {
                    let end = size.min((page + 1) * pgsize);
                    self.dirty.extend(pages(gpa, page * pgsize, end - 1));
                }
            }
        }
        for _ in 0..3 * next() {
            next(); // where slots were
        }
        self.sources = next() as usize;
        let mut logs = BTreeSet::new();
        for _ in 0..self.sources {
            logs.insert(next());
            for _ in 0..next().div_ceil(8) {
                next();
            }
        }
        for view in 1..=next() {
            for _ in 0..next() {
                let [_iova, _gpa, _size, nparts] = [(); 4].map(|()| next());
                for _ in 0..nparts {
                    let [first, last, slot, at] = [(); 4].map(|()| next());
                    if logs.contains(&view) {
                        let gpa = places[slot as usize];
                        self.logged.extend(pages(gpa, at, at + (last - first)));
                    }
                }
            }
        }
    }
}

/// The addresses of the pages that the bytes `first` to `last` of what is at `gpa` touch.
fn pages(gpa: u64, first: u64, last: u64) -> impl Iterator<Item = u64> {
    (first / PAGE..=last / PAGE).map(move |page| gpa + page * PAGE)
}

fn everything(tracker: &Tracker) -> BTreeSet<u64> {
    let slots = tracker.slots().into_iter();
    slots
        .flat_map(|slot| pages(slot.gpa, 0, slot.size - 1))
        .collect()
}

/// Takes into a report, and returns the addresses of its dirty pages.
fn dirty(tracker: &Tracker, mut report: Report) -> BTreeSet<u64> {
    tracker.take(&mut report).unwrap();
    let ranges = report.ranges(PAGE).unwrap();
    ranges
        .flat_map(|range| pages(range.gpa, 0, range.size - 1))
        .collect()
}
