// SPDX-License-Identifier: MIT OR Apache-2.0
//! The defects of today's driver, U1 to U13 in docs/rules.md: each test fails
//! if its defect is put into the core.
//!
//! Two defects cannot occur here in their own form:
//!
//! - U9: the core has 64-bit words only and does not build for 32-bit
//!   addresses. The test compares the bytes that the user sees.
//! - U13: a scan from the first mapping costs time but gives the same answers,
//!   and tests do not assert times. It has no test.

mod support;

use dirty_core::uapi::*;
use dirty_core::{Bitmap, Errno, Error, Options};
use support::rig::{errno, pgsize, vaddr, Via};
use support::words::{bits, garbage};
use support::{pack, Rig, Spec, TestMemory, ARG, BITMAP, PAGE};

const BASE: u64 = 0x4000_0000;
const K64: u64 = 0x10000;

/// A container with an emulated group and these mappings (first page, number of
/// pages), with tracking on.
fn tracked(mappings: &[(u64, u64)]) -> Rig {
    let mut rig = Rig::emulated();
    for (page, npages) in mappings {
        rig.map(BASE + page * PAGE, npages * PAGE).expect("map");
    }
    rig.start();
    rig
}

#[test]
fn u1_no_bit_is_left_over_for_later_reports() {
    for via in Via::ALL {
        let mut rig = tracked(&[(0, 5), (5, 3), (8, 100)]);
        for (pages, expected) in [(vec![5, 7], 0xa0), (vec![5], 0x20), (vec![5], 0x20)] {
            pages.iter().for_each(|page| rig.mark(BASE + page * PAGE));
            let mut words = [0; 2];
            let got = rig.get(via, BASE, 108 * PAGE, PAGE, &mut words);
            assert_eq!((got, words), (Ok(()), [expected, 0]), "{via:?}");
        }
    }
}

#[test]
fn u2_a_report_after_one_that_faulted_is_the_same() {
    let mut rig = tracked(&[(0, 3), (3, 5), (128, 64)]);
    let dirty = [0, 3, 130];
    dirty.iter().for_each(|page| rig.mark(BASE + page * PAGE));
    for bad in [0, 7, 16, 23] {
        rig.host.no_write = Some(BITMAP + bad);
        let got = rig.get(Via::Ioctl, BASE, 192 * PAGE, PAGE, &mut [0; 3]);
        assert_eq!(errno(got), Errno::EFAULT, "byte {bad}");
    }
    rig.host.no_write = None;
    assert_eq!(rig.dirty(BASE, 192 * PAGE), dirty);
}

#[test]
fn u3_stop_while_an_unmap_with_bitmap_waits() {
    let mut rig = tracked(&[(0, 2)]);
    rig.pin(BASE, 1).expect("pin");
    rig.put(&Rig::unmap_arg(BASE, 2 * PAGE, PAGE, 8));
    let unmapped = rig.ioctl_at(VFIO_IOMMU_UNMAP_DMA, ARG, |rig, iova, size| {
        rig.unpin(iova, size / PAGE);
        rig.stop();
    });
    assert_eq!(errno(unmapped), Errno::EINVAL);
    assert_eq!(rig.dma_avail(), 65534, "nothing was removed");
}

#[test]
fn u4_a_domain_with_larger_pages_goes_while_tracking() {
    let mut rig = Rig::with(&[None, Some(Spec::pages(K64))]);
    rig.map(BASE, 2 * K64).expect("map");
    rig.map(BASE + 3 * K64, K64).expect("map");
    rig.start();
    rig.detach(1);
    let all = 8 * K64;
    assert_eq!(rig.dirty(BASE, all), [0, 1, 3], "filled at 64K");
    rig.mark(BASE + 2 * K64 - 1);
    rig.mark(BASE + 3 * K64 + PAGE);
    assert_eq!(rig.dirty(BASE, all), [1, 3], "and marked at 64K");
    let got = rig.get(Via::Ioctl, BASE, all, PAGE, &mut [0; 2]);
    assert_eq!(got, Err(Error::WrongPageSize));
    let mut words = [0];
    rig.mark(BASE + K64 - 1);
    let harvested = rig.harvest(Via::Ioctl, BASE, all, K64, &mut words);
    assert_eq!((harvested, words), (Ok(3 * K64), [1]));
}

#[test]
fn u5_a_write_that_faults_in_the_next_mapping_marks_what_changed() {
    let mut rig = tracked(&[(0, 2), (2, 2)]);
    rig.host.add_memory(vaddr(BASE), 4 * PAGE);
    rig.host.no_write = Some(vaddr(BASE) + 3 * PAGE + 8);
    let wrote = rig.write(BASE + PAGE + 1, &vec![1; 3 * PAGE as usize - 1]);
    assert_eq!(errno(wrote), Errno::EFAULT);
    let mut bytes = [0; 2];
    for offset in [PAGE + 1, 3 * PAGE] {
        let read = rig.host.copy_from_user(vaddr(BASE) + offset, &mut bytes);
        assert_eq!((read, bytes), (Ok(()), [1; 2]), "changed at {offset:#x}");
    }
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [1, 2, 3]);
}

#[test]
fn u6_a_pin_that_narrows_the_scope_reports_everything_once() {
    let mut rig = Rig::with(&[Some(Spec::pages(PAGE))]);
    rig.map(BASE, 3 * PAGE).expect("map");
    rig.start();
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [0, 1, 2]);
    rig.pin(BASE, 1).expect("pin"); // before it, any page may have been written
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [0, 1, 2]);
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [0]);
}

#[test]
fn u7_a_map_takes_no_more_memory_than_the_budget() {
    let size = 64 * PAGE;
    let mut options = Options::default();
    options.bitmap_budget = Some(2 * Bitmap::<TestMemory>::bytes(64));
    let mut rig = Rig::new(options, VFIO_TYPE1v2_IOMMU, &[None]);
    rig.start();
    (0..2).for_each(|k| rig.map(BASE + k * size, size).expect("map"));
    let before = (rig.snapshot(), rig.mem.bytes());
    for _ in 0..2 {
        assert_eq!(errno(rig.map(0, PAGE)), Errno::ENOMEM);
        assert_eq!((rig.snapshot(), rig.mem.bytes()), before);
    }
    rig.unmap(BASE, size).expect("unmap");
    rig.map(0, PAGE).expect("there is room again");
}

#[test]
fn u8_what_was_in_user_memory_enters_no_report() {
    for via in [Via::Ioctl, Via::Words] {
        let mut rig = tracked(&[(3, 20), (40, 70)]);
        rig.mark(BASE + 41 * PAGE);
        let mut words = garbage(2);
        let got = rig.get(via, BASE, 128 * PAGE, PAGE, &mut words);
        assert_eq!((got, words), (Ok(()), vec![1 << 41, 0]), "{via:?}");
        let mut words = vec![0; 2];
        let got = rig.get(via, BASE, 128 * PAGE, PAGE, &mut words);
        assert_eq!((got, words), (Ok(()), vec![0; 2]), "{via:?} again");
        let mut words = garbage(2);
        let harvested = rig.harvest(via, BASE, 128 * PAGE, PAGE, &mut words);
        assert_eq!((harvested, words), (Ok(90 * PAGE), vec![0; 2]), "{via:?}");
    }
}

#[test]
fn u9_page_k_is_bit_k_of_the_bytes() {
    let mappings = [(0, 3), (31, 2), (96, 3), (200, 8)];
    let mut rig = tracked(&mappings);
    for (page, npages) in mappings {
        let (iova, size) = (BASE + page * PAGE, npages * PAGE);
        rig.backend().mark(iova, size).expect("mark");
    }
    rig.dirty(BASE, 256 * PAGE);
    let mut bytes = [0; 32];
    rig.host.copy_from_user(BITMAP, &mut bytes).expect("bitmap");
    for page in 0..256 {
        let dirty = bytes[page / 8] >> (page % 8) & 1 != 0;
        let mapped = |(first, n): (u64, u64)| (first..first + n).contains(&(page as u64));
        assert_eq!(dirty, mappings.into_iter().any(mapped), "page {page}");
    }
}

#[test]
fn u10_a_device_that_does_not_unpin_makes_unmap_fail() {
    let mut rig = tracked(&[(0, 1), (1, 1)]);
    rig.pin(BASE + PAGE, 1).expect("pin");
    rig.mark(BASE);
    let before = rig.snapshot();
    rig.put(&Rig::unmap_arg(BASE, 2 * PAGE, PAGE, 8));
    let mut calls = 0;
    let unmapped = rig.ioctl_at(VFIO_IOMMU_UNMAP_DMA, ARG, |_, _, _| {
        calls += 1;
        assert!(calls < 100, "asked for ever");
    });
    assert_eq!(errno(unmapped), Errno::EBUSY);
    assert!(calls > 0, "it was never asked");
    assert_eq!(rig.snapshot(), before);
    assert_eq!(rig.dirty(BASE, 2 * PAGE), [0, 1]);
}

#[test]
fn u11_a_fault_in_the_middle_of_an_unmap_leaves_everything() {
    let mut rig = tracked(&[(0, 64), (64, 64), (192, 64)]);
    let dirty = [1, 65, 193];
    dirty.iter().for_each(|page| rig.mark(BASE + page * PAGE));
    let size = 256 * PAGE;
    for word in [0, 1, 3] {
        rig.host.no_write = Some(BITMAP + 8 * word);
        let harvested = rig.harvest(Via::Ioctl, BASE, size, PAGE, &mut [0; 4]);
        assert_eq!(errno(harvested), Errno::EFAULT, "word {word}");
        rig.host.no_write = None;
        assert_eq!(rig.dma_avail(), 65532, "word {word}");
    }
    let mut words = [0; 4];
    let harvested = rig.harvest(Via::Ioctl, BASE, size, PAGE, &mut words);
    assert_eq!(harvested, Ok(192 * PAGE));
    assert_eq!(bits(&words), dirty);
}

#[test]
fn u12_page_size_0_is_einval_and_2g_is_no_int() {
    let mut rig = tracked(&[(0, 1)]);
    rig.mark(BASE);
    for page in [0, 1, 3 * PAGE, 1 << 63] {
        for (nr, flags) in [(VFIO_IOMMU_DIRTY_PAGES, 4), (VFIO_IOMMU_UNMAP_DMA, 1)] {
            let arg = pack(&[48, flags], &[BASE, PAGE, page, 8, BITMAP]);
            let got = rig.ioctl(nr, &arg);
            assert_eq!(errno(got), Errno::EINVAL, "{nr:#x} {page:#x}");
        }
    }
    assert_eq!(rig.dirty(BASE, PAGE), [0]);
    for shift in [31, 32, 63] {
        let mut rig = Rig::with(&[Some(Spec::pages(1 << shift))]);
        rig.start();
        assert_eq!(rig.tracking(), Some(pgsize(1 << shift)));
        assert_eq!(rig.dirty(0, 1 << shift), [], "2^{shift}");
        let half = rig.get(Via::Words, 0, 1 << (shift - 1), 1 << shift, &mut [0]);
        assert_eq!(half, Err(Error::BitmapSize), "2^{shift}");
    }
}
