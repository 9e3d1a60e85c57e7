// SPDX-License-Identifier: MIT OR Apache-2.0
//! Threads write and mark while another thread reports, starts and stops.
//! `loom` runs every order of their steps, and lets each relaxed load return
//! every value that the memory model allows.
//!
//! The bitmap is the core's own source, compiled once more on `loom`'s atomics.
//! The models in which a write is lost show that these tests can fail.

// The names that the core's source of the bitmap imports.
#[path = "../../src/bitmap/mod.rs"]
#[allow(dead_code, unreachable_pub)]
mod bitmap;
#[path = "../../src/bits/mod.rs"]
#[allow(dead_code, unreachable_pub)]
mod bits;
mod mem;
mod error {
    pub(crate) use dirty_core::Error;
}
mod host {
    pub(crate) use crate::mem::Memory;
}
mod uapi {
    pub(crate) use dirty_core::uapi::DIRTY_BITMAP_PAGES_MAX;
}

mod guest;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use std::sync::Arc;

use guest::{Guest, ALL};
use mem::Or;

/// Sizes of bitmaps in pages: three words, two lines of which the second is cut
/// off, and a block of lines, from which on a report visits single lines.
const THREE_WORDS: u64 = 192;
const LINE: u64 = 512;
const TWO_LINES: u64 = LINE + 1;
const BLOCK: u64 = 64 * LINE;

/// Runs a model in which two threads write and mark pages of a guest while a
/// third makes a report. At the end the copies of the `watched` pages must be
/// up to date.
fn two_writers(npages: u64, watched: &'static [u64], or: Or, runs: [(u64, u64); 2]) {
    two_writers_and(Guest::harvest, npages, watched, or, runs);
}

/// As [`two_writers`], with what the third thread does as `owner`. A last
/// report follows at the end.
fn two_writers_and(
    owner: fn(&Guest, &mut [u64]),
    npages: u64,
    watched: &'static [u64],
    or: Or,
    runs: [(u64, u64); 2],
) {
    loom::model(move || {
        let guest = Arc::new(Guest::new(npages, watched, or));
        guest.start();
        let writers = [0, 1].map(|slot| {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                let (first, n) = runs[slot];
                guest.write(first, n);
                guest.mark(slot, first, n);
            })
        });
        let mut copy = guest.copy();
        owner(&guest, &mut copy);
        for writer in writers {
            writer.join().expect("writer");
        }
        guest.finish(&mut copy);
    });
}

#[test]
fn two_pages_of_one_word() {
    two_writers(64, &[3, 60], Or::Atomic, [(3, 1), (60, 1)]);
}

#[test]
fn two_writes_to_one_page() {
    two_writers(64, &[3], Or::Atomic, [(3, 1), (3, 1)]);
}

/// The run sets every bit of the word in the middle.
#[test]
fn a_run_across_words_and_a_page_in_its_middle() {
    let watched = &[63, 64, 100, 128];
    two_writers(THREE_WORDS, watched, Or::Atomic, [(63, 66), (100, 1)]);
}

#[test]
fn two_runs_that_overlap() {
    let watched = &[65, 70, 100];
    two_writers(THREE_WORDS, watched, Or::Atomic, [(10, 61), (70, 61)]);
}

/// The summary bits of the two share a word, which is changed only if a load
/// shows that it must be.
#[test]
fn pages_of_different_lines() {
    two_writers(BLOCK, &[0, 1030], Or::Atomic, [(0, 1), (1030, 1)]);
}

#[test]
fn pages_of_one_line() {
    two_writers(BLOCK, &[512, 600], Or::Atomic, [(512, 1), (600, 1)]);
}

/// One of the two wipes both lines, whichever it marks.
#[test]
fn pages_of_two_lines_of_a_batch() {
    two_writers(2 * LINE, &[3, 600], Or::Atomic, [(3, 1), (600, 1)]);
}

#[test]
fn a_run_across_lines_and_a_page_of_one() {
    two_writers(
        TWO_LINES,
        &[510, 511, 512],
        Or::Atomic,
        [(511, 2), (510, 1)],
    );
}

#[test]
#[should_panic(expected = "a write is lost")]
fn words_without_an_atomic_or_lose_writes() {
    two_writers(64, &[3, 60], Or::Torn, [(3, 1), (60, 1)]);
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_summary_without_an_atomic_or_loses_writes() {
    two_writers(BLOCK, &[0, 1030], Or::Torn, [(0, 1), (1030, 1)]);
}

/// The mark of a page may find the line in the dirty summary before or after the
/// mark of the whole line, or wipe it in between.
#[test]
fn a_whole_line_and_a_page_of_it() {
    let watched = &[0, 100, 511];
    two_writers(LINE, watched, Or::Atomic, [(0, LINE), (100, 1)]);
}

#[test]
fn a_whole_line_and_a_run_across_its_end() {
    let watched = &[0, 511, 512];
    two_writers(TWO_LINES, watched, Or::Atomic, [(0, LINE), (511, 2)]);
}

#[test]
fn a_whole_line_and_more_and_a_page_of_the_next() {
    let watched = &[0, 511, 512, 600];
    two_writers(2 * LINE, watched, Or::Atomic, [(0, LINE + 1), (600, 1)]);
}

#[test]
fn a_whole_line_twice() {
    two_writers(LINE, &[0, 511], Or::Atomic, [(0, LINE), (0, LINE)]);
}

/// Their bits share a word in each summary.
#[test]
fn two_whole_lines() {
    let runs = [(0, LINE), (LINE, LINE)];
    two_writers(2 * LINE, &[0, LINE], Or::Atomic, runs);
}

#[test]
#[should_panic(expected = "a write is lost")]
fn whole_lines_without_an_atomic_or_lose_writes() {
    let runs = [(0, LINE), (LINE, LINE)];
    two_writers(2 * LINE, &[0, LINE], Or::Torn, runs);
}

/// The mark of many lines stores words of the summaries without reading them, in
/// whose lines another thread marks.
#[test]
fn words_of_the_summaries_and_a_page_in_their_middle() {
    let page = 70 * LINE + 3;
    let watched = &[63 * LINE, 70 * LINE + 3, 129 * LINE - 1];
    let run = (63 * LINE, 66 * LINE);
    two_writers(129 * LINE, watched, Or::Atomic, [run, (page, 1)]);
}

/// One thread makes a line full while two others mark its pages, of which one
/// wipes it: what the wipe takes away is dirty with the line.
#[test]
fn a_wipe_beside_a_whole_line_and_a_page_of_it() {
    three_writers(LINE, &[3, 100], [(0, LINE), (100, 1), (3, 1)]);
}

/// As before, but the wipe is for a page of another line of the batch.
#[test]
fn a_wipe_for_one_line_beside_a_whole_line_and_a_page_of_it() {
    let runs = [(LINE, LINE), (LINE + 100, 1), (3, 1)];
    three_writers(2 * LINE, &[3, LINE + 100], runs);
}

/// Runs a model in which three threads write and mark pages of a guest before a
/// report.
fn three_writers(npages: u64, watched: &'static [u64], runs: [(u64, u64); 3]) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3); // days without
    model.check(move || {
        let guest = Arc::new(Guest::new(npages, watched, Or::Atomic));
        guest.start();
        let [mine, others @ ..] = runs;
        let writers = others.map(|(first, n)| {
            let guest = Arc::clone(&guest);
            thread::spawn(move || {
                guest.write(first, n);
                guest.mark_without_lock(first, n);
            })
        });
        guest.write(mine.0, mine.1);
        guest.mark_without_lock(mine.0, mine.1);
        for writer in writers {
            writer.join().expect("writer");
        }
        guest.finish(&mut guest.copy());
    });
}

/// Runs a model in which one thread writes page 3 and this one reports.
fn one_writer(
    writer: impl Fn(&Guest) + Send + Sync + 'static,
    owner: impl Fn(&Guest, &mut [u64]) + Send + Sync + 'static,
) {
    one_writer_of(64, &[3], writer, owner);
}

/// As [`one_writer`], of a guest of `npages`.
fn one_writer_of(
    npages: u64,
    watched: &'static [u64],
    writer: impl Fn(&Guest) + Send + Sync + 'static,
    owner: impl Fn(&Guest, &mut [u64]) + Send + Sync + 'static,
) {
    let writer = Arc::new(writer);
    loom::model(move || {
        let guest = Arc::new(Guest::new(npages, watched, Or::Atomic));
        guest.start();
        let thread = thread::spawn({
            let (guest, writer) = (Arc::clone(&guest), Arc::clone(&writer));
            move || writer(&guest)
        });
        let mut copy = guest.copy();
        owner(&guest, &mut copy);
        thread.join().expect("writer");
        guest.finish(&mut copy);
    });
}

fn write_then_mark(guest: &Guest) {
    guest.write(3, 1);
    guest.mark(0, 3, 1);
}

#[test]
fn a_page_written_again_and_again() {
    let twice = |guest: &Guest| (0..2).for_each(|_| write_then_mark(guest));
    one_writer(twice, |guest, copy| {
        (0..3).for_each(|_| guest.harvest(copy));
    });
}

/// A report may come between the mark of a whole line and that of a page in it,
/// whose words are stale then.
#[test]
fn a_whole_line_and_then_a_page_of_it() {
    let writer = |guest: &Guest| {
        for (first, n) in [(3, 1), (0, LINE), (100, 1)] {
            guest.write(first, n);
            guest.mark(0, first, n);
        }
    };
    one_writer_of(LINE, &[3, 100, 511], writer, |guest, copy| {
        (0..2).for_each(|_| guest.harvest(copy));
    });
}

/// The batch is wiped when the second page is marked, or stale once more by a
/// report in between.
#[test]
fn a_page_and_then_a_page_of_another_line_of_its_batch() {
    let writer = |guest: &Guest| {
        for page in [3, 600] {
            guest.write(page, 1);
            guest.mark(0, page, 1);
        }
    };
    one_writer_of(2 * LINE, &[3, 600], writer, |guest, copy| {
        (0..2).for_each(|_| guest.harvest(copy));
    });
}

#[test]
fn many_writes_and_one_mark() {
    let writer = |guest: &Guest| {
        guest.write(3, 1);
        write_then_mark(guest);
    };
    one_writer(writer, |guest, copy| {
        (0..2).for_each(|_| guest.harvest(copy));
    });
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_mark_before_the_write_loses_it() {
    let writer = |guest: &Guest| {
        guest.mark(0, 3, 1);
        guest.write(3, 1);
    };
    one_writer(writer, Guest::harvest);
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_copy_before_the_report_loses_writes() {
    one_writer(write_then_mark, |guest, copy| {
        guest.copy_pages(&ALL, copy);
        guest.report();
    });
}

/// Only the lock keeps a mark from racing with a report.
#[test]
#[should_panic(expected = "Causality violation")]
fn a_mark_without_the_lock_races_with_the_report() {
    let writer = |guest: &Guest| {
        guest.write(3, 1);
        guest.mark_without_lock(3, 1);
    };
    one_writer(writer, Guest::harvest);
}

#[test]
fn a_pinned_page_needs_no_mark() {
    let writer = |guest: &Guest| {
        guest.pin(3);
        guest.write(3, 1);
        guest.write(3, 1);
        guest.unpin(3);
    };
    one_writer(writer, |guest, copy| {
        (0..2).for_each(|_| guest.harvest(copy));
    });
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_write_after_the_unpin_is_lost() {
    let writer = |guest: &Guest| {
        guest.pin(3);
        guest.unpin(3);
        guest.write(3, 1);
    };
    one_writer(writer, Guest::harvest);
}

/// No report has what was written before START or dropped by STOP, so the owner
/// copies everything after START.
#[test]
fn everything_is_copied_after_start() {
    one_writer(write_then_mark, |guest, copy| {
        guest.stop();
        guest.start();
        guest.copy_pages(&ALL, copy);
    });
}

#[test]
fn stop_and_start_between_reports() {
    let twice = |guest: &Guest| (0..2).for_each(|_| write_then_mark(guest));
    one_writer(twice, |guest, copy| {
        guest.harvest(copy);
        guest.stop();
        guest.start();
        guest.copy_pages(&ALL, copy);
        guest.harvest(copy);
    });
}

#[test]
fn stop_and_start_beside_two_writers() {
    let owner = |guest: &Guest, copy: &mut [u64]| {
        guest.stop();
        guest.start();
        guest.copy_pages(&ALL, copy);
    };
    two_writers_and(owner, 64, &[3, 60], Or::Atomic, [(3, 1), (60, 1)]);
}

/// The thread whose report has a bit copies the page. Of two copies the later
/// one counts.
#[test]
fn two_threads_that_report() {
    loom::model(|| {
        let guest = Arc::new(Guest::new(64, &[3], Or::Atomic));
        guest.start();
        let writer = thread::spawn({
            let guest = Arc::clone(&guest);
            move || write_then_mark(&guest)
        });
        let reporter = thread::spawn({
            let guest = Arc::clone(&guest);
            move || {
                let mut copy = guest.copy();
                guest.harvest(&mut copy);
                copy
            }
        });
        let mut copy = guest.copy();
        guest.harvest(&mut copy);
        writer.join().expect("writer");
        let other = reporter.join().expect("reporter");
        copy.iter_mut().zip(other).for_each(|(a, b)| *a = b.max(*a));
        guest.finish(&mut copy);
    });
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_copy_before_start_loses_writes() {
    one_writer(write_then_mark, |guest, copy| {
        guest.stop();
        guest.copy_pages(&ALL, copy);
        guest.start();
    });
}

/// Runs a model in which the last report is made when the writer says that it
/// is done. The writer must mark before it says so.
fn says_done(writer: fn(&Guest, &AtomicBool)) {
    loom::model(move || {
        let guest = Arc::new(Guest::new(64, &[3], Or::Atomic));
        guest.start();
        let done = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (guest, done) = (Arc::clone(&guest), Arc::clone(&done));
            move || writer(&guest, &done)
        });
        if done.load(Ordering::Acquire) {
            guest.finish(&mut guest.copy());
        }
        thread.join().expect("writer");
    });
}

#[test]
fn a_mark_before_saying_done_is_in_the_last_report() {
    says_done(|guest, done| {
        write_then_mark(guest);
        done.store(true, Ordering::Release);
    });
}

#[test]
#[should_panic(expected = "a write is lost")]
fn a_mark_after_saying_done_is_too_late() {
    says_done(|guest, done| {
        guest.write(3, 1);
        done.store(true, Ordering::Release);
        guest.mark(0, 3, 1);
    });
}
