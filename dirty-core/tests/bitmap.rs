// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compares the bitmap of one mapping with a naive list of pages.

mod support;

use std::sync::Barrier;
use std::thread;

use bitvec::prelude::*;
use dirty_core::uapi::DIRTY_BITMAP_PAGES_MAX;
use dirty_core::{Bitmap, Error};
use proptest::collection::vec;
use proptest::prelude::*;
use support::words::garbage;
use support::TestMemory;

/// The naive bitmap: which pages are dirty, and which are pinned.
struct Model {
    dirty: BitVec<u64>,
    pinned: BitVec<u64>,
}

impl Model {
    fn new(npages: u64) -> Self {
        let clean = bitvec![u64, Lsb0; 0; npages as usize];
        Model {
            dirty: clean.clone(),
            pinned: clean,
        }
    }

    fn set(&mut self, first: u64, n: u64) {
        for page in first..first.saturating_add(n).min(self.dirty.len() as u64) {
            self.dirty.set(page as usize, true);
        }
    }

    /// The words of a report in which page 0 is at bit `shift`.
    fn image(&self, shift: u32) -> Vec<u64> {
        let mut image = bitvec![u64, Lsb0; 0; shift as usize];
        image.extend_from_bitslice(&(self.dirty.clone() | &self.pinned));
        image.set_uninitialized(false);
        image.into_vec()
    }
}

#[derive(Clone, Debug)]
enum Op {
    Set(u64, u64),
    Mark(u64, u64),
    SetAll,
    Pin(u64),
    Unpin(u64),
    Clear,
    Take(u32),
    TakeSparse(u32),
    /// Shift, first word, number of words.
    Image(u32, usize, usize),
}

/// Pages that one word of the bitmap's summary stands for.
const BLOCK: u64 = 64 * 512;

/// Sizes of bitmaps, mostly near the ends of words, lines (512 pages) and
/// blocks.
fn npages() -> impl Strategy<Value = u64> {
    let blocks = (1..4u64, 0..140u64).prop_map(|(blocks, n)| blocks * BLOCK + n - 70);
    prop_oneof![0..130u64, 500..530u64, 0..1200u64, blocks]
}

/// Pages, some beyond the end of the bitmap: small numbers, pages near the ends
/// of lines and blocks, and any others.
fn page() -> impl Strategy<Value = u64> {
    let ends = BLOCK - 10..BLOCK + 10;
    prop_oneof![
        0..8u64,
        500..520u64,
        0..1300u64,
        ends,
        0..3 * BLOCK,
        Just(u64::MAX)
    ]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(1u64),
        0..70u64,
        Just(512u64),
        0..1300u64,
        0..2 * BLOCK,
        Just(u64::MAX)
    ]
}

/// Whole lines: one, or many of three blocks.
fn lines() -> impl Strategy<Value = (u64, u64)> {
    let some = (
        prop_oneof![0..4u64, 60..68u64, 0..192u64],
        prop_oneof![Just(1u64), 0..130u64],
    );
    some.prop_map(|(line, n)| (line * 512, n * 512))
}

/// An index or a number of words in a report.
fn place() -> impl Strategy<Value = usize> {
    prop_oneof![0..40usize, 500..520usize, 0..1600usize]
}

fn op() -> impl Strategy<Value = Op> {
    let shift = || prop_oneof![Just(0u32), 0..64u32];
    prop_oneof![
        4 => (page(), length()).prop_map(|(first, n)| Op::Set(first, n)),
        4 => (page(), length()).prop_map(|(first, n)| Op::Mark(first, n)),
        3 => lines().prop_map(|(first, n)| Op::Set(first, n)),
        3 => lines().prop_map(|(first, n)| Op::Mark(first, n)),
        1 => Just(Op::SetAll),
        4 => page().prop_map(Op::Pin),
        4 => page().prop_map(Op::Unpin),
        1 => Just(Op::Clear),
        2 => shift().prop_map(Op::Take),
        2 => shift().prop_map(Op::TakeSparse),
        4 => (shift(), place(), place()).prop_map(|(s, f, n)| Op::Image(s, f, n)),
    ]
}

fn apply(op: &Op, mem: &TestMemory, bitmap: &mut Bitmap<TestMemory>, model: &mut Model) {
    let npages = bitmap.npages();
    match *op {
        Op::Set(first, n) => {
            bitmap.set(first, n);
            model.set(first, n);
        }
        Op::Mark(first, n) => {
            bitmap.mark(first, n);
            model.set(first, n);
        }
        Op::SetAll => {
            bitmap.set_all();
            model.dirty.fill(true);
        }
        Op::Pin(page) => {
            bitmap.pin(mem, page).expect("memory");
            if page < npages {
                model.pinned.set(page as usize, true);
            }
        }
        Op::Unpin(page) => {
            bitmap.unpin(page);
            if page < npages && model.pinned.replace(page as usize, false) {
                model.dirty.set(page as usize, true);
            }
        }
        Op::Clear => {
            bitmap.clear();
            model.dirty.fill(false);
        }
        Op::Take(shift) => {
            let expected = model.image(shift);
            let mut out = garbage(expected.len() + 2);
            bitmap.take(shift, &mut out).expect("room");
            assert_image(&out, &expected);
            model.dirty.fill(false);
        }
        Op::TakeSparse(shift) => {
            let expected = model.image(shift);
            let mut out = garbage(expected.len() + 2);
            out[..expected.len()].fill(0);
            bitmap.take_sparse(shift, &mut out).expect("room");
            assert_image(&out, &expected);
            model.dirty.fill(false);
        }
        Op::Image(shift, first, n) => {
            let expected = model.image(shift);
            let first = first.min(expected.len());
            let expected = &expected[first..(first + n).min(expected.len())];
            let mut out = garbage(expected.len());
            bitmap.copy(shift, first, &mut out);
            assert_eq!(out, expected);
        }
    }
}

/// Words behind an image are left alone.
fn assert_image(out: &[u64], expected: &[u64]) {
    let (image, behind) = out.split_at(expected.len());
    assert!(image == expected);
    assert_eq!(behind, &garbage(out.len())[expected.len()..]);
}

proptest! {
    #[test]
    fn a_bitmap_is_what_was_done_to_it(
        npages in npages(),
        ops in vec(op(), 0..50),
    ) {
        let mem = TestMemory::default();
        let mut bitmap = Bitmap::new(&mem, npages).expect("memory");
        prop_assert_eq!(Bitmap::<TestMemory>::bytes(npages), mem.bytes() as u64);
        let mut model = Model::new(npages);
        for op in &ops {
            apply(op, &mem, &mut bitmap, &mut model);
            // Compares all pages without changing anything.
            apply(&Op::Image(0, 0, usize::MAX / 2), &mem, &mut bitmap, &mut model);
        }
        let pinned = ops.iter().any(|op| matches!(op, Op::Pin(page) if *page < npages));
        let more = if pinned { Bitmap::<TestMemory>::pinned_bytes(npages) } else { 0 };
        prop_assert_eq!(Bitmap::<TestMemory>::bytes(npages) + more, mem.bytes() as u64);
        apply(&Op::TakeSparse(1), &mem, &mut bitmap, &mut model);
        apply(&Op::Take(0), &mem, &mut bitmap, &mut model);
        drop(bitmap);
        prop_assert_eq!(mem.live(), 0);
    }
}

#[test]
fn every_shift_of_every_word() {
    let mem = TestMemory::default();
    for npages in [1, 63, 64, 65, 127, 128, 129, 200] {
        let mut bitmap = Bitmap::new(&mem, npages).expect("memory");
        let mut model = Model::new(npages);
        for page in (0..npages).filter(|page| page % 3 != 1) {
            bitmap.mark(page, 1);
            model.set(page, 1);
        }
        for shift in 0..64 {
            let expected = model.image(shift);
            for first in 0..expected.len() {
                let mut out = garbage(expected.len() - first);
                bitmap.copy(shift, first, &mut out);
                assert_eq!(out, expected[first..], "{npages} pages, shift {shift}");
            }
        }
    }
}

#[test]
fn words_behind_an_image_are_left_alone() {
    let mut bitmap = Bitmap::new(&TestMemory::default(), 130).expect("memory");
    bitmap.set_all();
    for (shift, first) in [(0, 3), (63, 4), (63, usize::MAX)] {
        let mut out = garbage(2);
        bitmap.copy(shift, first, &mut out);
        assert_eq!(out, garbage(2), "shift {shift}, from word {first} on");
    }
}

/// Reports of 16 MiB and more are written past the caches.
#[test]
fn large_images() {
    let mem = TestMemory::default();
    let npages = (1 << 27) + 64 * 3 + 5;
    let mut bitmap = Bitmap::new(&mem, npages).expect("memory");
    let words = npages.div_ceil(64) as usize;
    for (shift, at) in [(0, 0), (0, 1), (1, 0), (13, 1), (63, 1)] {
        // Every other block has dirty pages in all its lines, the last block in
        // few. Some blocks are full, some have full lines.
        for first in (0..npages).step_by(2 * BLOCK as usize) {
            for line in 0..64 {
                bitmap.set(first + 512 * line + line, 100);
            }
        }
        bitmap.set(10 * BLOCK, 2 * BLOCK);
        bitmap.set(21 * BLOCK + 512, 30 * 512);
        bitmap.set(npages - 3, 3);
        bitmap.pin(&mem, BLOCK * 2 + 7).expect("memory");
        let mut before = garbage(words);
        bitmap.copy(0, 0, &mut before);
        let mut out = vec![0x5555; at + words + 1];
        bitmap.take(shift, &mut out[at..]).expect("room");
        let mut carry = 0;
        for (at, (out, word)) in out[at..].iter().zip(before).enumerate() {
            assert_eq!(*out, word << shift | carry, "word {at}, shift {shift}");
            carry = word.checked_shr(64 - shift).unwrap_or(0);
        }
        bitmap.copy(0, 0, &mut out);
        assert_eq!(out.iter().position(|w| *w != 0), Some(BLOCK as usize / 32));
        bitmap.unpin(BLOCK * 2 + 7);
        bitmap.clear();
    }
}

#[test]
fn too_many_pages_and_no_memory() {
    let mem = TestMemory::default();
    let most = DIRTY_BITMAP_PAGES_MAX;
    assert_eq!(most, (1 << 31) - 1);
    let too_many = Bitmap::new(&mem, most + 1).err();
    assert_eq!(too_many, Some(Error::TooManyPages));
    mem.fault().arm(1);
    assert_eq!(Bitmap::new(&mem, most).err(), Some(Error::NoMemory));
    assert_eq!(Bitmap::new(&mem, most).map(|b| b.npages()), Ok(most));
    assert_eq!(mem.live(), 0);
}

#[test]
fn a_first_pin_without_memory_changes_nothing() {
    let mem = TestMemory::default();
    let mut bitmap = Bitmap::new(&mem, 1000).expect("memory");
    bitmap.set(7, 1);
    let before = mem.bytes();
    for _ in 0..2 {
        mem.fault().arm(1);
        assert_eq!(bitmap.pin(&mem, 999), Err(Error::NoMemory));
        assert_eq!(mem.bytes(), before);
        bitmap.unpin(999); // it is not pinned, so it does not become dirty
        assert!(bitmap.pages().eq([7]));
    }
    bitmap.pin(&mem, 999).expect("memory");
    mem.fault().arm(1);
    bitmap.pin(&mem, 998).expect("it has its memory");
    bitmap.clear();
    assert!(bitmap.pages().eq([998, 999]));
}

/// Whole lines are dirty beside pages of them, and all of them are clean after a
/// report, whichever came first.
#[test]
fn whole_lines_and_pages_of_them() {
    const NPAGES: u64 = 3 * 512 + 70;
    let mem = TestMemory::default();
    let mut bitmap = Bitmap::new(&mem, NPAGES).expect("memory");
    let mut model = Model::new(NPAGES);
    let marks = [
        (0, 512),
        (512, 1024),
        (100, 1),
        (500, 600),
        (1536, 70),
        (3, 1),
        (0, NPAGES),
    ];
    for (first, second) in marks.iter().flat_map(|a| marks.map(|b| (*a, b))) {
        for op in [Op::Set, Op::Mark] {
            for shift in [0, 1, 63] {
                for (first, n) in [first, second] {
                    apply(&op(first, n), &mem, &mut bitmap, &mut model);
                }
                apply(&Op::Image(shift, 1, 9), &mem, &mut bitmap, &mut model);
                apply(&Op::Take(shift), &mem, &mut bitmap, &mut model);
                apply(&Op::Take(shift), &mem, &mut bitmap, &mut model);
            }
        }
    }
}

/// A tracked GiB without pins takes at most 3 % more than its dirty bits.
#[test]
fn a_bitmap_without_pins_takes_one_bit_for_each_page() {
    let npages = 1 << 18;
    assert!(Bitmap::<TestMemory>::bytes(npages) * 8 <= npages * 103 / 100);
    assert_eq!(Bitmap::<TestMemory>::pinned_bytes(npages) * 8, npages);
}

#[test]
fn marks_of_several_threads_are_all_there() {
    const THREADS: u64 = 4;
    const PAGES: u64 = 64 * 4096;
    let mem = TestMemory::default();
    let mut bitmap = Bitmap::new(&mem, PAGES).expect("memory");
    for round in 0..8 {
        // Together the threads mark every page but the last of each word. Each
        // thread marks every fourth page, and all start at the same time, so
        // that they write to the same words. In odd rounds they also mark runs
        // that cross words.
        let barrier = Barrier::new(THREADS as usize);
        let (shared, barrier) = (&bitmap, &barrier);
        thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    barrier.wait();
                    for page in (thread..PAGES).step_by(THREADS as usize) {
                        if page % 64 != 63 {
                            shared.mark(page, 1);
                        } else if round % 2 != 0 {
                            shared.mark(page, 130);
                        }
                    }
                });
            }
        });
        let mut out = vec![0; (PAGES / 64) as usize];
        bitmap.take_sparse(0, &mut out).expect("room");
        let expected = if round % 2 != 0 { !0 } else { !0 >> 1 };
        assert!(out.iter().all(|w| *w == expected), "round {round}");
        bitmap.take(0, &mut out).expect("room");
        assert!(out.iter().all(|w| *w == 0), "round {round}");
    }
}

#[test]
fn nothing_is_taken_into_too_few_words() {
    let mut bitmap = Bitmap::new(&TestMemory::default(), 128).expect("memory");
    bitmap.set(127, 1);
    for (shift, words) in [(0, 1), (1, 2), (64, 3)] {
        let mut out = vec![0; words];
        assert_eq!(bitmap.take(shift, &mut out), Err(Error::BitmapSize));
        assert_eq!(bitmap.take_sparse(shift, &mut out), Err(Error::BitmapSize));
    }
    let mut out = [0; 2];
    bitmap.take_sparse(0, &mut out).expect("room");
    assert_eq!(out, [0, 1 << 63]);
}

/// Clearing leaves the words of a line as they were until a page of the line is
/// marked again; the old bits must not come back then.
#[test]
fn what_was_cleared_never_comes_back() {
    const NPAGES: u64 = 3 * 512 + 70; // the last line has two words
    let runs = [0, 1, 63, 64, 511, 512, 1023, 1535, 1536, NPAGES - 1]
        .into_iter()
        .flat_map(|first| [1, 2, 64, 65, 512, 513, 1100].map(|n| (first, n)));
    for (first, n) in runs {
        let pages = first..(first + n).min(NPAGES);
        for way in ["set", "mark", "pin", "unpin"] {
            let mem = TestMemory::default();
            let mut bitmap = Bitmap::new(&mem, NPAGES).expect("memory");
            (0..NPAGES).for_each(|page| bitmap.set(page, 1)); // by words
            bitmap.clear();
            bitmap.set_all();
            bitmap.clear();
            match way {
                "set" => bitmap.set(first, n),
                "mark" => bitmap.mark(first, n),
                _ => pages
                    .clone()
                    .for_each(|page| bitmap.pin(&mem, page).expect("memory")),
            }
            if way == "unpin" {
                pages.clone().for_each(|page| bitmap.unpin(page));
            }
            assert!(
                bitmap.pages().eq(pages.clone()),
                "{n} pages from {first} on"
            );
            let mut out = garbage(NPAGES.div_ceil(64) as usize);
            bitmap.take(0, &mut out).expect("room");
            assert!(dirty_core::pages(&out).eq(pages.clone()));
        }
    }
}
