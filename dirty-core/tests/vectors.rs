// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fixed vectors: bits, limits and the life of a dirty bit (rules A6 to A8 of
//! docs/rules.md).

mod support;

use dirty_core::uapi::*;
use dirty_core::{Dest, Error, Options};
use support::rig::{pgsize, Via};
use support::words::{bits, garbage};
use support::{pack, Rig, Spec, PAGE};

const BASE: u64 = 0x4000_0000;

/// Mappings: first page, number of pages, and the dirty pages in it.
type Layout<'a> = &'a [(u64, u64, &'a [u64])];

/// The golden vectors of rule A7: mappings, pages in the range, words.
const GOLDEN: [(Layout<'_>, u64, &[u64]); 4] = [
    (
        &[(0, 5, &[0, 4]), (5, 3, &[0, 2]), (8, 100, &[0, 55, 56, 99])],
        108,
        &[0x8000_0000_0000_01b1, 0x0000_0800_0000_0001],
    ),
    (
        &[(0, 64, &[63]), (64, 64, &[0])],
        128,
        &[0x8000_0000_0000_0000, 1],
    ),
    (
        &[(0, 1, &[0]), (70, 130, &[0, 57, 58])],
        200,
        &[1, 0x8000_0000_0000_0040, 1, 0],
    ),
    (
        &[(0, 5, &ALL_PAGES), (5, 3, &ALL_PAGES), (8, 100, &ALL_PAGES)],
        108,
        &[!0, 0x0000_0fff_ffff_ffff],
    ),
];

/// Every page of any mapping of the golden vectors.
const ALL_PAGES: [u64; 100] = {
    let mut pages = [0; 100];
    let mut k = 0;
    while k < 100 {
        pages[k] = k as u64;
        k += 1;
    }
    pages
};

fn lay_out(layout: Layout<'_>) -> Rig {
    let mut rig = Rig::emulated();
    for (page, npages, _) in layout {
        let iova = BASE + page * PAGE;
        rig.map(iova, npages * PAGE).expect("map");
    }
    rig.start();
    for (page, npages, dirty) in layout {
        let pages = dirty.iter().filter(|k| **k < *npages);
        pages.for_each(|k| rig.mark(BASE + (page + k) * PAGE));
    }
    rig
}

#[test]
fn a7_golden_vectors_by_get() {
    for (n, (layout, npages, expected)) in GOLDEN.iter().enumerate() {
        for via in Via::ALL {
            let mut rig = lay_out(layout);
            let mut words = vec![0; expected.len()];
            let size = npages * PAGE;
            rig.get(via, BASE, size, PAGE, &mut words).expect("get");
            assert_eq!(words, *expected, "vector {} by {via:?}", n + 1);
            words.fill(0);
            rig.get(via, BASE, size, PAGE, &mut words).expect("again");
            assert_eq!(bits(&words), [], "vector {} twice by {via:?}", n + 1);
        }
    }
}

#[test]
fn a7_golden_vectors_by_unmap() {
    for (n, (layout, npages, expected)) in GOLDEN.iter().enumerate() {
        for via in Via::ALL {
            let mut rig = lay_out(layout);
            let mut words = vec![0; expected.len()];
            let unmapped = rig.harvest(via, BASE, npages * PAGE, PAGE, &mut words);
            let mapped: u64 = layout.iter().map(|(_, n, _)| n * PAGE).sum();
            assert_eq!(unmapped, Ok(mapped));
            assert_eq!(words, *expected, "vector {} by {via:?}", n + 1);
            assert_eq!(rig.dma_avail(), 65535);
        }
    }
}

#[test]
fn a7_words_inside_a_hole_stay_and_none_is_written_past_the_end() {
    for via in [Via::Ioctl, Via::Words] {
        let mut rig = lay_out(&[(0, 1, &[0]), (200, 10, &[9])]);
        let before = garbage(8);
        let mut words = before.clone();
        let size = 210 * PAGE;
        rig.get(via, BASE, size, PAGE, &mut words).expect("get");
        let expected = [1, before[1], before[2], 1 << (209 - 192)];
        assert_eq!(words[..4], expected, "{via:?}");
        assert_eq!(words[4..], before[4..], "{via:?}");
    }
}

#[test]
fn a8_a_write_marks_every_page_it_touches() {
    let table: [(u64, usize, &[u64]); 8] = [
        (0, 1, &[0]),
        (0xfff, 2, &[0, 1]),
        (0, 4096, &[0]),
        (1, 4096, &[0, 1]),
        (4095, 4098, &[0, 1, 2]),
        (0x1fff, 1, &[1]),
        // These go on in the next mapping.
        (0x3fff, 2, &[3, 4]),
        (0x2001, 0x3000, &[2, 3, 4, 5]),
    ];
    let mut rig = Rig::emulated();
    rig.map_memory(BASE, 4 * PAGE);
    rig.map_memory(BASE + 4 * PAGE, 4 * PAGE);
    rig.start();
    for (offset, len, pages) in table {
        rig.write(BASE + offset, &vec![7; len]).expect("write");
        assert_eq!(
            rig.dirty(BASE, 8 * PAGE),
            pages,
            "{len} bytes at {offset:#x}"
        );
    }
}

#[test]
fn a0_sizes_of_bitmaps() {
    let good = Ok(());
    let bad = Err(Error::BitmapSize);
    let table = [
        (64, 0, bad),
        (64, 7, bad),
        (64, 8, good),
        (64, 16, good),
        (64, 1 << 28, good),
        (64, (1 << 28) + 8, bad),
        (65, 8, bad),
        (65, 15, bad),
        (65, 16, good),
    ];
    for (npages, bytes, expected) in table {
        let mut rig = Rig::emulated();
        let size = npages * PAGE;
        rig.map(BASE, size).expect("map");
        rig.start();
        rig.mark(BASE);
        let get = Rig::get_arg(BASE, size, PAGE, bytes);
        let got = rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &get).map(|_| ());
        assert_eq!(got, expected, "GET of {npages} pages in {bytes} bytes");
        assert_eq!(rig.read_words(1), [u64::from(expected == good)]);
        let unmap = Rig::unmap_arg(BASE, size, PAGE, bytes);
        let got = rig.ioctl(VFIO_IOMMU_UNMAP_DMA, &unmap).map(|_| ());
        assert_eq!(got, expected, "UNMAP of {npages} pages in {bytes} bytes");
        if bytes % 8 == 0 {
            let mut rig = Rig::emulated();
            rig.map(BASE, size).expect("map");
            rig.start();
            let mut words = vec![0; bytes as usize / 8];
            let got = rig.get(Via::Zeroed, BASE, size, PAGE, &mut words);
            assert_eq!(got, expected, "report of {npages} pages in {bytes} bytes");
        }
    }
}

#[test]
fn a0_a_mapping_of_2_to_31_minus_1_pages_is_tracked() {
    let npages = (1u64 << 31) - 1;
    let size = npages * PAGE;
    let mut rig = Rig::emulated();
    rig.map(0, size).expect("map");
    rig.start();
    rig.mark(0);
    rig.mark(size - 1);
    let mut words = vec![0; 1 << 25];
    rig.get(Via::Zeroed, 0, size, PAGE, &mut words)
        .expect("get");
    assert_eq!(words.iter().filter(|w| **w != 0).count(), 2);
    assert_eq!((words[0], words[(1 << 25) - 1]), (1, 1 << 62));
}

#[test]
fn a0_a_mapping_of_2_to_31_pages_is_not_tracked() {
    let size = (1u64 << 31) * PAGE;
    let mut rig = Rig::emulated();
    rig.map(0, size).expect("map");
    assert_eq!(rig.try_start(), Err(Error::TooManyPages));
    assert_eq!(rig.tracking(), None);
    rig.unmap(0, size).expect("unmap");
    rig.start();
    assert_eq!(rig.map(0, size), Err(Error::TooManyPages));
    assert_eq!(rig.dma_avail(), 65535);
    rig.map(0, PAGE).expect("the place is free");
}

#[test]
fn ranges_may_end_with_the_address_space() {
    let start = 0u64.wrapping_sub(3 * PAGE);
    for via in Via::ALL {
        let mut rig = Rig::emulated();
        rig.map_memory(start, 2 * PAGE);
        rig.map_memory(start + 2 * PAGE, PAGE);
        rig.start();
        rig.write(u64::MAX, &[1]).expect("the last byte");
        rig.backend().mark(start, 3 * PAGE).expect("mark");
        let mut words = [0];
        rig.get(via, start, 3 * PAGE, PAGE, &mut words)
            .expect("get");
        assert_eq!(words, [7], "{via:?}");
        // A write beyond the end goes on at 0, where nothing is mapped. It
        // fails, but the last page has been written.
        assert_eq!(rig.write(u64::MAX, &[1, 2]), Err(Error::Unmapped));
        let mut words = [0];
        let unmapped = rig.harvest(via, start, 3 * PAGE, PAGE, &mut words);
        assert_eq!((unmapped, words), (Ok(3 * PAGE), [4]), "{via:?}");
    }
}

#[test]
fn a_write_that_passes_the_end_goes_on_at_0() {
    let mut rig = Rig::emulated();
    let last = 0u64.wrapping_sub(PAGE);
    rig.map_memory(last, PAGE);
    rig.map_memory(0, PAGE);
    rig.start();
    rig.write(u64::MAX, &[1, 2]).expect("write");
    assert_eq!(rig.dirty(last, PAGE), [0]);
    assert_eq!(rig.dirty(0, PAGE), [0]);
}

#[test]
fn start_twice_and_stop_twice() {
    let start = pack(&[8, 1], &[]);
    let stop = pack(&[8, 2], &[]);
    let mut rig = Rig::emulated();
    rig.map(BASE, 4 * PAGE).expect("map");
    assert_eq!(rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &stop), Ok(0));
    assert_eq!(rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &start), Ok(0));
    rig.mark(BASE + PAGE);
    assert_eq!(rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &start), Ok(0));
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [1], "START twice has no effect");
    rig.mark(BASE);
    assert_eq!(rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &stop), Ok(0));
    assert_eq!(rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &stop), Ok(0));
    for via in Via::ALL {
        let got = rig.get(via, BASE, 4 * PAGE, PAGE, &mut [0]);
        assert_eq!(got, Err(Error::NotTracking));
    }
    rig.start();
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [], "STOP forgets");
}

#[test]
fn a8_start_reports_what_is_pinned() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 200 * PAGE).expect("map");
    rig.pin(BASE + 63 * PAGE, 2).expect("pin");
    rig.pin(BASE + 199 * PAGE, 1).expect("pin");
    rig.start();
    for _ in 0..3 {
        assert_eq!(rig.dirty(BASE, 200 * PAGE), [63, 64, 199]);
    }
    rig.stop();
    assert_eq!(rig.tracking(), None);
    rig.start();
    assert_eq!(rig.dirty(BASE, 200 * PAGE), [63, 64, 199]);
}

#[test]
fn a8_an_unpinned_page_is_dirty_once_more() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 8 * PAGE).expect("map");
    rig.start();
    rig.pin(BASE + 3 * PAGE, 1).expect("pin");
    rig.unpin(BASE + 3 * PAGE, 1);
    assert_eq!(rig.dirty(BASE, 8 * PAGE), [3]);
    assert_eq!(rig.dirty(BASE, 8 * PAGE), []);
    rig.pin(BASE + 3 * PAGE, 1).expect("pin");
    rig.pin(BASE + 3 * PAGE, 1).expect("once more");
    assert_eq!(rig.dirty(BASE, 8 * PAGE), [3]);
    rig.unpin(BASE + 3 * PAGE, 1);
    assert_eq!(rig.dirty(BASE, 8 * PAGE), [3], "one of two pins is left");
    assert_eq!(rig.dirty(BASE, 8 * PAGE), [3], "one of two pins is left");
    rig.unpin(BASE + 3 * PAGE, 1);
    rig.unpin(BASE + 3 * PAGE, 1); // not pinned: no effect
    assert_eq!(rig.dirty(BASE, 8 * PAGE), [3]);
    assert_eq!(rig.dirty(BASE, 8 * PAGE), []);
}

#[test]
fn a8_a_mapping_made_while_tracking_is_clean() {
    let mut rig = Rig::emulated();
    rig.start();
    rig.map(BASE, 8 * PAGE).expect("map");
    assert_eq!(rig.dirty(BASE, 8 * PAGE), []);
    rig.mark(BASE + PAGE);
    rig.unmap(BASE, 8 * PAGE).expect("unmap");
    rig.map(BASE, 8 * PAGE).expect("map");
    assert_eq!(rig.dirty(BASE, 8 * PAGE), [], "bits go with their mapping");
}

#[test]
fn a8_groups_that_write_unseen_make_everything_dirty() {
    let spec = Spec::pages(PAGE);
    let mut rig = Rig::with(&[None]);
    rig.map(BASE, 3 * PAGE).expect("map");
    rig.map(BASE + 8 * PAGE, 2 * PAGE).expect("map");
    rig.start();
    rig.mark(BASE);
    assert_eq!(rig.dirty(BASE, 16 * PAGE), [0]);
    rig.attach(1, Some(spec.clone())).expect("attach");
    for _ in 0..3 {
        assert_eq!(rig.dirty(BASE, 16 * PAGE), [0, 1, 2, 8, 9]);
    }
    rig.attach(2, Some(spec)).expect("attach");
    rig.detach(1);
    for _ in 0..3 {
        assert_eq!(rig.dirty(BASE, 16 * PAGE), [0, 1, 2, 8, 9]);
    }
    rig.detach(2);
    assert_eq!(rig.dirty(BASE, 16 * PAGE), [0, 1, 2, 8, 9], "detach fills");
    assert_eq!(rig.dirty(BASE, 16 * PAGE), []);
    rig.attach(3, None).expect("attach");
    rig.detach(3);
    assert_eq!(rig.dirty(BASE, 16 * PAGE), [], "emulated groups do not");
}

#[test]
fn a9_a_group_that_pinned_is_in_the_scope_of_pins_for_good() {
    let spec = Spec::pages(PAGE);
    let other = Spec {
        joins: false,
        ..spec.clone()
    };
    let mut rig = Rig::with(&[Some(spec), Some(other)]);
    rig.map(BASE, 4 * PAGE).expect("map");
    rig.start();
    rig.pin_by(0, BASE, 1).expect("pin");
    rig.dirty(BASE, 4 * PAGE);
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1, 2, 3], "group 1 has not");
    rig.pin_by(1, BASE + PAGE, 1).expect("pin");
    rig.dirty(BASE, 4 * PAGE);
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1], "both have");
    rig.detach(1);
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1], "nothing was unseen");
}

#[test]
fn typed_reports_and_ioctl_agree_on_a_range_without_mappings() {
    let mut rig = Rig::emulated();
    rig.start();
    for via in [Via::Ioctl, Via::Words] {
        let mut words = garbage(2);
        rig.get(via, BASE, 128 * PAGE, PAGE, &mut words)
            .expect("get");
        assert_eq!(words, garbage(2), "{via:?}");
    }
}

#[test]
fn a_report_of_more_words_than_are_copied_at_a_time() {
    // Words are copied 2048 at a time. The second mapping starts inside a word.
    let npages = 2048 * 64 + 200;
    let marked = [4, 5, 5 + 58, 2048 * 64 - 1, 2048 * 64, 5 + npages - 1];
    for group in [None, Some(Spec::pages(PAGE))] {
        let everything = group.is_some();
        let mut rig = Rig::with(&[group]);
        rig.map(BASE, 5 * PAGE).expect("map");
        rig.map(BASE + 5 * PAGE, npages * PAGE).expect("map");
        rig.start();
        marked.iter().for_each(|page| rig.mark(BASE + page * PAGE));
        let dirty = rig.dirty(BASE, (5 + npages) * PAGE);
        if everything {
            assert!(dirty.into_iter().eq(0..5 + npages));
        } else {
            assert_eq!(dirty, marked);
        }
    }
}

#[test]
fn the_mapping_limit_counts_down_and_up() {
    let mut options = Options::default();
    options.dma_entry_limit = 2;
    let mut rig = Rig::new(options, VFIO_TYPE1v2_IOMMU, &[None]);
    for (k, avail) in [(0, 1), (1, 0)] {
        rig.map(BASE + k * PAGE, PAGE).expect("map");
        assert_eq!(rig.dma_avail(), avail);
    }
    assert_eq!(rig.map(0, PAGE), Err(Error::MappingLimit));
    rig.unmap(BASE, 2 * PAGE).expect("unmap");
    assert_eq!(rig.dma_avail(), 2);
}

#[test]
fn a_report_needs_a_page_size_that_fits() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 4 * PAGE).expect("map");
    rig.start();
    // The ioctl takes one page size, a typed call any.
    for page in [2048, 8192] {
        let got = rig.get(Via::Ioctl, BASE, 4 * PAGE, page, &mut [0]);
        assert_eq!(got, Err(Error::WrongPageSize));
        let got = rig.get(Via::Words, BASE, 4 * PAGE, page, &mut [0]);
        assert_eq!(got, Ok(()));
    }
    let mut words = [0];
    let report = Dest::Words(&mut words);
    let backend = rig.container.backend_mut().expect("an IOMMU type");
    let got = backend.get_bitmap(&mut rig.host, BASE, 4 * PAGE, pgsize(8 * PAGE), report);
    assert_eq!(got, Err(Error::BitmapSize), "half a page has no bit");
}
