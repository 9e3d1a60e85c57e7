// SPDX-License-Identifier: MIT OR Apache-2.0
//! Granularity larger than a page, and reports and marks at page sizes other
//! than the bitmap's own, compared with a naive set of granules.

mod support;

use std::collections::BTreeSet;

use dirty_core::uapi::VFIO_TYPE1v2_IOMMU;
use dirty_core::{Errno, Error, Extent, Options};
use proptest::collection::vec;
use proptest::prelude::*;
use support::rig::{errno, pgsize, vaddr, Via};
use support::words::{bits, garbage};
use support::{Rig, Spec, PAGE};

const K64: u64 = 0x10000;
const M1: u64 = 0x10_0000;
const BASE: u64 = 0x4000_0000;

/// A container with an emulated group that tracks at `granule` bytes, because a
/// group with such an IOMMU was there at START and left. Then maps `mappings`
/// (offset, size).
fn rig(granule: u64, mappings: &[(u64, u64)]) -> Rig {
    let mut rig = Rig::with(&[None, Some(Spec::pages(granule))]);
    rig.start();
    rig.detach(1);
    for (offset, size) in mappings {
        rig.map(BASE + offset, *size).expect("map");
    }
    assert_eq!(rig.tracking(), Some(pgsize(granule)));
    rig
}

#[test]
fn a_granule_stays_pinned_as_long_as_any_page_in_it_is() {
    let mut rig = rig(K64, &[(0, 4 * K64)]);
    rig.pin(BASE + K64, 1).expect("pin");
    rig.pin(BASE + K64 + 15 * PAGE, 2)
        .expect("pin, the second in granule 2");
    assert_eq!(rig.dirty(BASE, 4 * K64), [1, 2]);
    rig.unpin(BASE + K64, 1);
    assert_eq!(rig.dirty(BASE, 4 * K64), [1, 2], "one of two is left");
    rig.unpin(BASE + 2 * K64, 1);
    assert_eq!(rig.dirty(BASE, 4 * K64), [1, 2], "unpinned: once more");
    assert_eq!(rig.dirty(BASE, 4 * K64), [1]);
    rig.unpin(BASE + K64 + 15 * PAGE, 1);
    assert_eq!(rig.dirty(BASE, 4 * K64), [1]);
    assert_eq!(rig.dirty(BASE, 4 * K64), []);
}

#[test]
fn a_granule_inside_the_first_chunk_of_pins() {
    let mut rig = rig(K64, &[]);
    rig.map(0, 4 * K64).expect("map");
    rig.pin(K64, 2).expect("pin");
    rig.unpin(K64, 1);
    for _ in 0..3 {
        assert_eq!(rig.dirty(0, 4 * K64), [1], "the other one is left");
    }
}

#[test]
fn pins_of_a_granule_that_spans_chunks_of_pins() {
    // A granule of 2M has 512 pages.
    let granule = 2 * M1;
    let mut rig = rig(granule, &[(0, 2 * granule)]);
    rig.pin(BASE, 1).expect("pin");
    rig.pin(BASE + granule - PAGE, 1).expect("pin");
    rig.dirty(BASE, 2 * granule);
    rig.unpin(BASE, 1);
    assert_eq!(rig.dirty(BASE, 2 * granule), [0], "the last page is left");
    assert_eq!(rig.dirty(BASE, 2 * granule), [0], "the last page is left");
    rig.unpin(BASE + granule - PAGE, 1);
    assert_eq!(rig.dirty(BASE, 2 * granule), [0]);
    assert_eq!(rig.dirty(BASE, 2 * granule), []);
}

#[test]
fn start_finds_every_granule_with_a_pin() {
    let mut rig = Rig::with(&[None]);
    rig.map(BASE, 8 * K64).expect("map");
    rig.pin(BASE + 3 * K64 + PAGE, 2).expect("pin");
    rig.pin(BASE + 7 * K64 + 15 * PAGE, 1).expect("pin");
    rig.attach(1, Some(Spec::pages(K64))).expect("attach");
    rig.start();
    rig.detach(1);
    rig.dirty(BASE, 8 * K64); // drops what the IOMMU's group may have written
    assert_eq!(rig.dirty(BASE, 8 * K64), [3, 7]);
    rig.unpin(BASE + 3 * K64 + PAGE, 1);
    assert_eq!(rig.dirty(BASE, 8 * K64), [3, 7], "one of two is left");
}

#[test]
fn an_iommu_with_large_pages_is_mapped_and_unmapped_in_large_pages() {
    for smallest in [PAGE, K64, 2 * M1] {
        let separate = Spec {
            joins: false,
            ..Spec::pages(smallest)
        };
        let mut rig = Rig::with(&[Some(Spec::pages(smallest)), None]);
        rig.map(BASE, 2 * smallest).expect("map");
        rig.attach(2, Some(separate)).expect("attach");
        rig.map(BASE + 4 * smallest, smallest).expect("map");
        assert_eq!(rig.host.books.pinned(), 3 * smallest / PAGE);
        rig.detach(2);
        assert_eq!(rig.unmap(BASE, 2 * smallest), Ok(2 * smallest));
        rig.detach(0);
        assert_eq!(rig.host.books.pinned(), 0);
    }
}

/// The real driver pins a mapping before it brings it into a new domain, so a page that
/// is not there comes before a mapping that is not aligned.
#[test]
fn a_page_that_cannot_be_pinned_gives_the_errno() {
    let mut rig = Rig::emulated();
    rig.map(BASE, K64 + PAGE).expect("map");
    let before = rig.snapshot();
    rig.host.pin_fault.arm(1);
    let attached = rig.attach(1, Some(Spec::pages(K64)));
    assert!(matches!(attached, Err(Error::Pin(_))), "{attached:?}");
    assert_eq!(rig.snapshot(), before);
    assert_eq!(errno(rig.attach(1, Some(Spec::pages(K64)))), Errno::EINVAL);
    assert_eq!(rig.snapshot(), before);
}

#[test]
fn a_page_size_that_does_not_fit_the_mappings_is_refused() {
    let mut rig = Rig::emulated();
    rig.map(BASE, K64 + PAGE).expect("map");
    let before = rig.snapshot();
    let attached = rig.attach(1, Some(Spec::pages(K64)));
    assert_eq!(errno(attached), Errno::EINVAL);
    assert_eq!(rig.snapshot(), before);
    let other = Spec {
        pgsize_bitmap: 1 << 12,
        ..Spec::pages(PAGE)
    };
    rig.attach(1, Some(other)).expect("attach");
    let before = rig.snapshot();
    let nothing_in_common = rig.attach(2, Some(Spec::pages(K64)));
    assert_eq!(nothing_in_common, Err(Error::NoPageSize), "D13");
    assert_eq!(rig.snapshot(), before);
}

#[test]
fn a_range_is_aligned_to_the_larger_of_both_page_sizes() {
    let mut rig = rig(K64, &[(0, 4 * K64)]);
    for (offset, size, page, expected) in [
        (PAGE, K64, PAGE, Err(Error::Misaligned)),
        (8 * K64 + PAGE, K64, PAGE, Err(Error::Misaligned)),
        (8 * K64 + PAGE, K64 + PAGE, PAGE, Err(Error::Misaligned)),
        (0, K64 + PAGE, PAGE, Err(Error::Misaligned)),
        (K64, 2 * K64, 2 * K64, Err(Error::Misaligned)),
        (0, 3 * K64, 2 * K64, Err(Error::Misaligned)),
        (0, 2 * K64, 2 * K64, Err(Error::Bisects)),
        (0, 4 * K64, PAGE, Ok(())),
        (0, 8 * K64, 4 * K64, Ok(())),
    ] {
        for via in [Via::Words, Via::Zeroed] {
            let got = rig.get(via, BASE + offset, size, page, &mut [0; 4]);
            assert_eq!(got, expected, "{offset:#x} {size:#x} {page:#x}");
            let harvested = rig.harvest(via, BASE + offset, size, page, &mut [0; 4]);
            assert_eq!(harvested.is_ok(), expected.is_ok());
            if harvested == Ok(4 * K64) {
                rig.map(BASE, 4 * K64).expect("map");
            }
        }
    }
}

#[test]
fn pages_smaller_than_the_cpus_do_not_count() {
    let mut rig = Rig::with(&[Some(Spec::pages(512))]);
    rig.start();
    assert_eq!(rig.tracking(), Some(pgsize(PAGE)));
    assert_eq!(rig.map(BASE, 512), Err(Error::Misaligned));
}

#[test]
fn a_cpu_may_have_larger_pages() {
    let mut options = Options::default();
    options.page_size = pgsize(K64);
    let spec = Some(Spec::pages(PAGE));
    let mut rig = Rig::new(options, VFIO_TYPE1v2_IOMMU, &[None, spec]);
    assert_eq!(rig.map(BASE, PAGE), Err(Error::Misaligned));
    rig.map(BASE, 100 * K64).expect("map");
    assert_eq!(rig.host.books.pinned(), 100, "pages of the CPU");
    assert_eq!(rig.host.books.locked(0), 100);
    rig.start();
    rig.detach(1);
    rig.dirty(BASE, 100 * K64); // drops what the IOMMU's group may have written
    let pfns = rig.pin(BASE + 62 * K64, 3).expect("pin");
    assert_eq!(
        pfns,
        [62, 63, 64].map(|k| rig.host.pfn(0, vaddr(BASE + k * K64)))
    );
    rig.host.add_memory(vaddr(BASE), K64);
    rig.write(BASE + PAGE, &[1; 2]).expect("write");
    assert_eq!(rig.dirty(BASE, 100 * K64), [0, 62, 63, 64]);
    rig.unpin(BASE + 62 * K64, 100);
    assert_eq!(rig.host.books.pinned(), 0);
    assert_eq!(rig.dirty(BASE, 100 * K64), [62, 63, 64]);
    assert_eq!(rig.pin(BASE, 8192), Err(Error::Unmapped), "a page of pfns");
    assert_eq!(rig.pin(BASE, 8193), Err(Error::TooManyPins));
}

/// Dirty and pinned granules of some mappings.
struct Model<'a> {
    granule: u64,
    mappings: &'a [(u64, u64)],
    dirty: BTreeSet<u64>,
    /// Offsets of pinned pages.
    pins: BTreeSet<u64>,
}

impl Model<'_> {
    fn mapped(&self, first: u64, last: u64) -> bool {
        let hit = |(start, size): &(u64, u64)| *start <= last && first < start + size;
        self.mappings.iter().any(hit)
    }

    /// Marks the mapped part of `size` bytes. Returns whether all of it is
    /// mapped.
    fn mark(&mut self, offset: u64, size: u64) -> bool {
        let first = offset / self.granule;
        let last = (offset + size - 1) / self.granule;
        let all = first..=last;
        let granule = self.granule;
        let hits = all
            .clone()
            .filter(|g| self.mapped(g * granule, g * granule));
        let hits: Vec<u64> = hits.collect();
        let whole = hits.len() as u64 == last - first + 1;
        self.dirty.extend(hits);
        whole
    }

    /// Writes the report of `size` bytes from `offset` on to `words`. Words
    /// that overlap no mapping are left alone.
    fn report(&mut self, offset: u64, size: u64, page: u64, words: &mut [u64]) {
        let pinned = self.pins.iter().map(|pin| pin / self.granule);
        let all: BTreeSet<u64> = pinned.chain(self.dirty.iter().copied()).collect();
        let span = 64 * page;
        for (at, word) in (offset..offset + size).step_by(span as usize).zip(words) {
            let last = (at + span - 1).min(offset + size - 1);
            if !self.mapped(at, last) {
                continue;
            }
            *word = 0;
            for bit in 0..64 {
                let first = at + bit * page;
                let shares = |g: &&u64| {
                    let start = **g * self.granule;
                    start < first + page && first < start + self.granule
                };
                if first <= last && all.iter().any(|g| shares(&g)) {
                    *word |= 1 << bit;
                }
            }
        }
        let (granule, end) = (self.granule, offset + size);
        let stays = |g: &u64| g * granule < offset || g * granule >= end;
        self.dirty.retain(stays);
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Offset and bytes.
    Mark(u64, u64),
    /// Marks by a bitmap: page shift, first page, number of pages, words.
    MarkBitmap(u32, u64, u64, Vec<u64>),
    Pin(u64),
    Unpin(u64),
    /// Which call, page shift, and which of [`PARTS`].
    Get(Via, u32, usize),
}

/// The size of everything that is reported: 4M.
const WHOLE: u64 = 4 * M1;

/// Mappings with holes between them; some neighbours share a page of 128K, or a
/// word.
const MAPPINGS: [(u64, u64); 6] = [
    (0, K64),
    (K64, 2 * K64),
    (4 * K64, K64),
    (M1, M1 + K64),
    (2 * M1 + K64, 3 * K64),
    (3 * M1 + 15 * K64, K64),
];

/// Ranges to report. They bisect no mapping, and page sizes up to 1M divide
/// their ends.
const PARTS: [(u64, u64); 4] = [(0, WHOLE), (0, M1), (3 * M1, M1), (M1, 3 * M1)];

fn op() -> impl Strategy<Value = Op> {
    let offset = || 0..WHOLE / PAGE;
    let word = prop_oneof![Just(0u64), any::<u64>(), Just(1 << 63)];
    let via = prop::sample::select(&Via::ALL[1..]);
    prop_oneof![
        (offset(), 1..2 * K64).prop_map(|(page, size)| Op::Mark(page * PAGE, size)),
        (9..20u32, 0..WHOLE / PAGE, 0..9u64, vec(word, 1..4))
            .prop_map(|(shift, at, bit, words)| Op::MarkBitmap(shift, at, bit, words)),
        offset().prop_map(|page| Op::Pin(page * PAGE)),
        offset().prop_map(|page| Op::Unpin(page * PAGE)),
        (via, 11..21u32, 0..PARTS.len()).prop_map(|(via, shift, part)| Op::Get(via, shift, part)),
    ]
}

fn apply(op: &Op, rig: &mut Rig, model: &mut Model<'_>) {
    match op {
        Op::Mark(offset, size) => {
            let whole = model.mark(*offset, *size);
            let got = rig.backend().mark(BASE + offset, *size);
            let expected = if whole { Ok(()) } else { Err(Error::Unmapped) };
            assert_eq!(got, expected, "{op:?}");
        }
        Op::MarkBitmap(shift, at, bit, words) => {
            let page = 1u64 << shift;
            let offset = (at * PAGE) & !(page - 1);
            let extent = Extent {
                bit: *bit,
                iova: BASE + offset,
                npages: words.len() as u64 * 64 - bit,
                pgsize: pgsize(page),
            };
            let mut whole = true;
            for k in bits(words).into_iter().filter(|k| k >= bit) {
                whole &= model.mark(offset + (k - bit) * page, page);
            }
            let got = rig.backend().mark_bitmap(words, extent);
            let expected = if whole { Ok(()) } else { Err(Error::Unmapped) };
            assert_eq!(got, expected, "{op:?}");
        }
        Op::Pin(offset) => {
            let fresh = !model.pins.contains(offset);
            if model.mapped(*offset, *offset) && fresh {
                rig.pin(BASE + offset, 1).expect("pin");
                model.pins.insert(*offset);
            }
        }
        Op::Unpin(offset) => {
            // Takes the next pin at or after the offset, so that there often is
            // one.
            let Some(pin) = model.pins.range(offset..).next().copied() else {
                return;
            };
            rig.unpin(BASE + pin, 1);
            model.pins.remove(&pin);
            model.dirty.insert(pin / model.granule);
        }
        Op::Get(via, shift, part) => {
            let page = 1 << shift;
            let (offset, size) = PARTS[*part];
            let n = (size / page).div_ceil(64) as usize + 1;
            let mut words = match via {
                Via::Zeroed => vec![0; n],
                _ => garbage(n),
            };
            let mut expected = words.clone();
            model.report(offset, size, page, &mut expected);
            let got = rig.get(*via, BASE + offset, size, page, &mut words);
            assert_eq!(got, Ok(()), "{op:?}");
            assert_eq!(words, expected, "{op:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn reports_at_any_page_size_tell_what_was_marked_and_pinned(
        granule in prop::sample::select(&[PAGE, K64][..]),
        ops in vec(op(), 1..40),
    ) {
        let mut rig = rig(granule, &MAPPINGS);
        let mut model = Model {
            granule,
            mappings: &MAPPINGS,
            dirty: BTreeSet::new(),
            pins: BTreeSet::new(),
        };
        for op in &ops {
            apply(op, &mut rig, &mut model);
        }
        apply(&Op::Get(Via::Words, granule.trailing_zeros(), 0), &mut rig, &mut model);
        let pins: Vec<u64> = model.pins.iter().copied().collect();
        pins.iter().for_each(|pin| rig.unpin(BASE + pin, 1));
    }
}

#[test]
fn a_report_at_another_page_size_when_everything_is_dirty() {
    for granule in [PAGE, K64] {
        for (via, shift) in [Via::Words, Via::Zeroed]
            .into_iter()
            .flat_map(|via| (11..21u32).map(move |shift| (via, shift)))
        {
            let mut rig = Rig::with(&[Some(Spec::pages(granule))]);
            for (offset, size) in MAPPINGS {
                rig.map(BASE + offset, size).expect("map");
            }
            rig.start();
            let mut model = Model {
                granule,
                mappings: &MAPPINGS,
                dirty: BTreeSet::new(),
                pins: BTreeSet::new(),
            };
            model.mark(0, WHOLE);
            let page = 1 << shift;
            let n = (WHOLE / page).div_ceil(64) as usize;
            let mut words = vec![0; n];
            let mut expected = vec![0; n];
            model.report(0, WHOLE, page, &mut expected);
            rig.get(via, BASE, WHOLE, page, &mut words).expect("get");
            assert_eq!(words, expected, "{granule:#x} {via:?} {page:#x}");
        }
    }
}

#[test]
fn a_mapping_larger_than_what_is_rescaled_at_a_time() {
    // Words are rescaled 2048 at a time, which are 512M.
    let size = 1280 * M1;
    for via in [Via::Words, Via::Zeroed] {
        let mut rig = rig(PAGE, &[(0, size)]);
        let marks = [0, 511 * M1 + 0xff000, 512 * M1, 1024 * M1, size - 1];
        marks.iter().for_each(|at| rig.mark(BASE + at));
        let mut words = vec![0; 20];
        rig.get(via, BASE, size, M1, &mut words).expect("get");
        assert_eq!(bits(&words), [0, 511, 512, 1024, 1279], "{via:?}");
        // The ioctl passes words through the same buffer.
        marks.iter().for_each(|at| rig.mark(BASE + at));
        let pages = marks.map(|at| at / PAGE);
        assert_eq!(rig.dirty(BASE, size), pages);
        assert_eq!(rig.dirty(BASE, size), []);
    }
}

#[test]
fn unmap_reports_at_any_page_size() {
    for (via, page, expected) in [
        (Via::Words, PAGE, vec![16, 47]),
        (Via::Zeroed, 2 * PAGE, vec![8, 23]),
        (Via::Words, K64, vec![1, 2]),
    ] {
        let mut rig = Rig::emulated();
        rig.map(BASE, 2 * K64).expect("map");
        rig.map(BASE + 2 * K64, K64).expect("map");
        rig.start();
        rig.mark(BASE + K64);
        rig.pin(BASE + 3 * K64 - PAGE, 1).expect("pin");
        let size = 3 * K64;
        let mut words = vec![0; (size / page).div_ceil(64) as usize];
        let got = rig.harvest(via, BASE, size, page, &mut words);
        assert_eq!(got, Ok(size));
        assert_eq!(bits(&words), expected, "{page:#x}");
    }
}
