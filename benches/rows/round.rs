// SPDX-License-Identifier: MIT OR Apache-2.0
//! A round of a live migration: KVM's log and the VMM's writes, as a table of ranges.
//! The peer does as cloud-hypervisor: for each of its two pieces of memory, it ORs the
//! log with what it gets and resets of a bitmap of vm-memory, and walks over the bits
//! of the result.

use std::cell::LazyCell;
use std::hint::black_box;
use std::ops::Range;
use std::sync::Arc;

use adapter_user::guest::{Report, Tracker};
use adapter_user::DirtyBits;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

use crate::data::{huge_pages, naive, scattered, Size, GIB_64, TIB_1};
use crate::harness::{after, Bench};
use crate::host::PAGE;
use crate::report::row::{Row, Who};
use crate::sets::{Atomic, PageSet};

/// Pages below the hole in the addresses of a PC, and the first page above it.
const BELOW: u64 = 3 << 18;
const ABOVE: u64 = 4 << 18;

/// One of so many dirty runs is the VMM's; guest CPUs write the others.
const VMM: usize = 8;

pub(crate) fn run(bench: &mut Bench) {
    let scattered = |share| move |pages| scattered(pages, share);
    for size in [GIB_64, TIB_1] {
        round(bench, size, "clean", scattered(0.0));
        round(bench, size, "0.01 %", scattered(0.0001));
        round(bench, size, "1 %", scattered(0.01));
        round(bench, size, "50 % in 2M", |pages| huge_pages(pages, 0.5));
    }
}

/// A row with what `dirty` makes dirty of so many pages.
fn round(
    bench: &mut Bench,
    size: Size,
    case: &'static str,
    dirty: impl Fn(u64) -> Vec<Range<u64>>,
) {
    let mut row = Row::new("round", case, size.name);
    let wrote = LazyCell::new(|| Wrote::new(size, dirty(size.pages)));
    let setup = || {
        let mut ours = Ours::new(&wrote);
        ours.mark(&wrote);
        wrote.check("ours", &ours.round());
        ours
    };
    bench.time_on(&mut row, Who::Ours, "ours", setup, |ours, b| {
        let mark = |ours: &mut Ours| ours.mark(&wrote);
        after(b, ours, mark, |ours| {
            black_box(ours.round());
        });
    });
    let name = "cloud-hypervisor's";
    let setup = || {
        let theirs = Theirs::new(&wrote);
        theirs.mark(&wrote);
        wrote.check(name, &theirs.round());
        theirs
    };
    bench.time_on(&mut row, Who::Peer, name, setup, |theirs, b| {
        let mark = |theirs: &mut Theirs| theirs.mark(&wrote);
        after(b, theirs, mark, |theirs| {
            black_box(theirs.round());
        });
    });
    bench.add(row);
}

/// Dirty memory, as it is sent.
#[derive(Debug, PartialEq, Eq)]
struct MemoryRange {
    gpa: u64,
    length: u64,
}

/// A piece of memory, and what was written in it.
struct Piece {
    gpa: u64,
    pages: u64,
    /// KVM's bitmap.
    log: Vec<u64>,
    /// What the VMM wrote, counted from the first page of the piece.
    vmm: Vec<Range<u64>>,
}

impl Piece {
    /// KVM_GET_DIRTY_LOG, as kvm-ioctls gives it: fresh words, which the kernel fills.
    fn get_dirty_log(&self) -> Vec<u64> {
        let mut words = vec![0; self.log.len()];
        words.copy_from_slice(black_box(&self.log));
        words
    }
}

/// What was written before a round.
struct Wrote {
    /// Dirty runs, without the hole between the pieces.
    dirty: Vec<Range<u64>>,
    /// The memory below the hole and above it.
    pieces: [Arc<Piece>; 2],
}

impl Wrote {
    fn new(size: Size, dirty: Vec<Range<u64>>) -> Wrote {
        let piece = |gpa: u64, pages: Range<u64>| {
            let runs = (0..)
                .zip(&dirty)
                .filter(|(_, run)| pages.contains(&run.start));
            let runs = runs.map(|(k, run)| (k, run.start - pages.start..run.end - pages.start));
            let (vmm, kvm): (Vec<_>, Vec<_>) = runs.partition(|(k, _)| k % VMM == 0);
            let pages = pages.end - pages.start;
            Arc::new(Piece {
                gpa,
                pages,
                log: naive(pages, kvm.into_iter().flat_map(|(_, run)| run)),
                vmm: vmm.into_iter().map(|(_, run)| run).collect(),
            })
        };
        let below = piece(0, 0..BELOW);
        let above = piece(ABOVE * PAGE, BELOW..size.pages);
        Wrote {
            pieces: [below, above],
            dirty,
        }
    }

    /// Panics unless these are the dirty runs, merged where they touch.
    fn check(&self, name: &str, ranges: &[MemoryRange]) {
        let gpa = |page: u64| (page + if page < BELOW { 0 } else { ABOVE - BELOW }) * PAGE;
        let mut runs = self.dirty.clone();
        runs.sort_unstable_by_key(|run| run.start);
        let mut want: Vec<MemoryRange> = Vec::new();
        for run in runs {
            let (first, length) = (gpa(run.start), (run.end - run.start) * PAGE);
            match want.last_mut() {
                Some(last) if last.gpa + last.length == first => last.length += length,
                _ => want.push(MemoryRange { gpa: first, length }),
            }
        }
        assert!(ranges == want, "{name}: another table");
    }
}

struct Ours {
    tracker: Tracker,
    bits: Vec<DirtyBits>,
    report: Report,
}

impl Ours {
    fn new(wrote: &Wrote) -> Ours {
        let tracker = Tracker::new(None);
        let slots = (0..).zip(&wrote.pieces);
        let slot = |(id, piece): (u32, &Arc<Piece>)| {
            let bits = tracker.add_slot(id, piece.gpa, None, piece.pages * PAGE);
            bits.expect("memory for a bitmap")
        };
        let bits = slots.map(slot).collect();
        let pieces = wrote.pieces.clone();
        tracker.add_source("kvm", move |report| {
            for (id, piece) in (0..).zip(&pieces) {
                report.or_slot(id, &piece.get_dirty_log())?;
            }
            Ok(())
        });
        tracker.start().expect("the kernel has membarrier(2)");
        let report = Report::new();
        let mut ours = Ours {
            tracker,
            bits,
            report,
        };
        ours.round(); // gets the report's words
        ours
    }

    fn mark(&self, wrote: &Wrote) {
        for (bits, piece) in self.bits.iter().zip(&wrote.pieces) {
            for run in &piece.vmm {
                let (offset, len) = (run.start * PAGE, (run.end - run.start) * PAGE);
                bits.mark(offset, len).expect("inside");
            }
        }
    }

    fn round(&mut self) -> Vec<MemoryRange> {
        self.report.clear();
        let taken = self.tracker.take(&mut self.report);
        taken.expect("no source fails");
        let ranges = self.report.ranges(PAGE).expect("a page size");
        let range = |r: adapter_user::guest::Range| MemoryRange {
            gpa: r.gpa,
            length: r.size,
        };
        ranges.map(range).collect()
    }
}

struct Theirs(Vec<(Arc<Piece>, AtomicBitmap)>);

impl Theirs {
    fn new(wrote: &Wrote) -> Theirs {
        let pieces = wrote.pieces.iter().map(Arc::clone);
        Theirs(
            pieces
                .map(|p| (Arc::clone(&p), Atomic::new(p.pages).0))
                .collect(),
        )
    }

    fn mark(&self, wrote: &Wrote) {
        for ((_, bitmap), piece) in self.0.iter().zip(&wrote.pieces) {
            for run in &piece.vmm {
                let (offset, len) = (run.start * PAGE, (run.end - run.start) * PAGE);
                bitmap.mark_dirty(offset as usize, len as usize);
            }
        }
    }

    fn round(&self) -> Vec<MemoryRange> {
        let mut table = Vec::new();
        for (piece, bitmap) in &self.0 {
            let log = piece.get_dirty_log();
            let vmm = bitmap.get_and_reset();
            let dirty: Vec<u64> = log.iter().zip(&vmm).map(|(a, b)| a | b).collect();
            let ranges: Vec<_> = Merged::new(bits(&dirty), piece.gpa).collect();
            table.extend(ranges);
        }
        table
    }
}

/// The bits that are set, one by one.
fn bits(words: &[u64]) -> impl Iterator<Item = u64> + '_ {
    let words = (0..).zip(words).filter(|(_, word)| **word != 0);
    words.flat_map(|(at, word)| {
        let rest = std::iter::successors(Some(*word), |word| Some(word & (word - 1)));
        let rest = rest.take_while(|word| *word != 0);
        rest.map(move |word| at * 64 + u64::from(word.trailing_zeros()))
    })
}

/// Pages, merged where they touch.
struct Merged<I> {
    pages: I,
    gpa: u64,
    run: Option<Range<u64>>,
}

impl<I: Iterator<Item = u64>> Merged<I> {
    fn new(mut pages: I, gpa: u64) -> Self {
        let run = pages.next().map(|page| page..page + 1);
        Merged { pages, gpa, run }
    }
}

impl<I: Iterator<Item = u64>> Iterator for Merged<I> {
    type Item = MemoryRange;

    fn next(&mut self) -> Option<MemoryRange> {
        let mut run = self.run.take()?;
        for page in self.pages.by_ref() {
            if page != run.end {
                self.run = Some(page..page + 1);
                break;
            }
            run.end += 1;
        }
        Some(MemoryRange {
            gpa: self.gpa + run.start * PAGE,
            length: (run.end - run.start) * PAGE,
        })
    }
}
