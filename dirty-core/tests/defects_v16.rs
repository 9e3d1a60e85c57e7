// SPDX-License-Identifier: MIT OR Apache-2.0
//! The defects of the v16 patch series, V1 to V25 in docs/rules.md: each test
//! fails if its defect is put into the core.
//!
//! Some defects cannot occur here in their own form. What their tests assert
//! instead:
//!
//! - V1, V2: the core holds no lock, so it cannot wait for a lock that it
//!   holds. The tests make the calls that never returned.
//! - V5: memory is freed with the layout that it was allocated with. The test's
//!   allocator compares the two.
//! - V10: a call has `&mut` from its first check to its last, except while an
//!   unmap waits for devices. The test changes the page size then.
//! - V19: the core has no lock to copy under, but the ioctl does copy while it
//!   has the container. Callers who mind take a typed report, which needs no
//!   user memory.
//! - V20: the core follows no address; its host does. The host's fault must
//!   count.
//! - V22: the pages of a failed pin are reported once too often here too, which
//!   is harmless. No page may be dirty for ever.
//! - V25: the pointer to a bitmap has 64 bits by its type; there is no 32-bit
//!   layout.

mod support;

use std::mem::{offset_of, size_of};

use dirty_core::host::{DeviceId, Prot};
use dirty_core::uapi::*;
use dirty_core::{Bitmap, Errno, Error, Map, Options};
use support::rig::{errno, pgsize, vaddr, Via};
use support::words::bits;
use support::{pack, Rig, Spec, TestMemory, ARG, BITMAP, PAGE};

const BASE: u64 = 0x4000_0000;
const K64: u64 = 0x10000;

/// A container with an emulated group and one mapping of `npages` pages of
/// memory, with tracking on.
fn tracked(npages: u64) -> Rig {
    let mut rig = Rig::emulated();
    rig.map_memory(BASE, npages * PAGE);
    rig.start();
    rig
}

#[test]
fn v1_a_new_pin_while_tracking_returns() {
    let mut rig = tracked(8);
    rig.pin(BASE + 2 * PAGE, 3).expect("pin");
    assert_eq!(rig.dirty(BASE, 8 * PAGE), [2, 3, 4]);
}

#[test]
fn v2_a_write_while_tracking_returns() {
    let mut rig = tracked(8);
    rig.write(BASE + 2 * PAGE, &[1]).expect("write");
    assert_eq!(rig.dirty(BASE, 8 * PAGE), [2]);
}

#[test]
fn v3_a_new_pin_is_marked_by_its_iova() {
    let mut rig = Rig::emulated();
    rig.host.scattered = true; // so that a pfn cannot be computed from an iova
    rig.map(BASE, 70 * PAGE).expect("map");
    rig.map(BASE + 70 * PAGE, 70 * PAGE).expect("map");
    rig.start();
    for page in [0, 63, 64, 70, 139] {
        rig.pin(BASE + page * PAGE, 1).expect("pin");
        rig.unpin(BASE + page * PAGE, 1);
        assert_eq!(rig.dirty(BASE, 140 * PAGE), [page]);
    }
}

#[test]
fn v4_a_start_that_fails_leaves_no_bitmap() {
    let mut rig = Rig::emulated();
    (0..3).for_each(|k| rig.map(BASE + k * PAGE, PAGE).expect("map"));
    let before = (rig.mem.live(), rig.mem.bytes());
    for k in [1, 2, 3, 3, 3] {
        rig.mem.fault().arm(k);
        assert_eq!(rig.try_start(), Err(Error::NoMemory), "mapping {k}");
        assert_eq!((rig.mem.live(), rig.mem.bytes()), before, "mapping {k}");
        assert_eq!(rig.tracking(), None, "mapping {k}");
    }
    // One mapping that is too large makes START fail as often as a user likes.
    let large = 1 << 45;
    rig.map(large, PAGE << 31).expect("map");
    let before = (rig.mem.live(), rig.mem.bytes());
    for _ in 0..100 {
        assert_eq!(rig.try_start(), Err(Error::TooManyPages));
        assert_eq!((rig.mem.live(), rig.mem.bytes()), before);
    }
    rig.unmap(large, PAGE << 31).expect("unmap");
    rig.start();
}

#[test]
fn v5_bitmaps_of_any_size_are_given_back_as_what_they_were() {
    for npages in [1, 512, 513, 1 << 15, (1 << 24) + 1] {
        let mut rig = Rig::emulated();
        rig.map(BASE, npages * PAGE).expect("map");
        let before = (rig.mem.live(), rig.mem.bytes());
        rig.start();
        let cost = Bitmap::<TestMemory>::bytes(npages) as usize;
        assert!(rig.mem.bytes() >= before.1 + cost, "{npages} pages");
        rig.stop();
        assert_eq!((rig.mem.live(), rig.mem.bytes()), before, "{npages} pages");
        rig.start();
        let tracking = rig.mem.bytes();
        rig.unmap(BASE, npages * PAGE).expect("unmap");
        assert!(rig.mem.bytes() <= tracking - cost, "{npages} pages");
    }
}

#[test]
fn v6_a_write_of_two_bytes_over_a_page_edge_marks_both() {
    let table: [(u64, usize, &[u64]); 6] = [
        (0x000, 1, &[0]),
        (0xfff, 2, &[0, 1]),
        (0x000, 4096, &[0]),
        (0x001, 4096, &[0, 1]),
        (0xfff, 4098, &[0, 1, 2]),
        (0x2fff, 1, &[2]),
    ];
    let mut rig = tracked(4);
    for (offset, len, pages) in table {
        rig.write(BASE + offset, &vec![1; len]).expect("write");
        assert_eq!(rig.dirty(BASE, 4 * PAGE), pages, "{len} at {offset:#x}");
    }
}

#[test]
fn v7_a_write_that_faults_midway_marks_what_changed() {
    let mut rig = tracked(4);
    for (bad, pages) in [(1, vec![0]), (PAGE + 1, vec![0, 1]), (2 * PAGE, vec![0, 1])] {
        rig.host.no_write = Some(vaddr(BASE) + bad);
        let wrote = rig.write(BASE, &vec![1; 3 * PAGE as usize]);
        assert_eq!(errno(wrote), Errno::EFAULT, "byte {bad}");
        rig.host.no_write = None;
        assert_eq!(rig.dirty(BASE, 4 * PAGE), pages, "byte {bad}");
    }
}

#[test]
fn v8_exactly_one_flag_or_einval() {
    for flags in (0..=16).chain([1 << 31, u32::MAX]) {
        let mut rig = tracked(1);
        let arg = pack(&[48, flags], &[BASE, PAGE, PAGE, 8, BITMAP]);
        let got = rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &arg);
        let one = matches!(flags, 1 | 2 | 4);
        let expected = if one { Errno(0) } else { Errno::EINVAL };
        assert_eq!(errno(got), expected, "flags {flags:#x}");
        assert_eq!(rig.tracking().is_some(), flags != 2);
    }
}

#[test]
fn v9_pages_of_2g_and_more() {
    for shift in [30, 31, 32, 40] {
        let page = 1 << shift;
        let mut rig = Rig::with(&[None, Some(Spec::pages(page))]);
        rig.start();
        rig.detach(1); // the page size stays latched, and no page has to be pinned
        assert_eq!(rig.tracking(), Some(pgsize(page)));
        assert_eq!(rig.info()[40..48], page.to_ne_bytes(), "capability 2");
        rig.map(4 * page, 4 * page).expect("map");
        rig.mark(5 * page);
        rig.mark(8 * page - 1);
        assert_eq!(rig.dirty(4 * page, 4 * page), [1, 3], "2^{shift}");
    }
}

#[test]
fn v10_the_page_size_is_read_again_after_a_wait() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 2 * K64).expect("map");
    rig.start();
    rig.pin(BASE, 1).expect("pin");
    rig.put(&Rig::unmap_arg(BASE, 2 * K64, PAGE, 8));
    let unmapped = rig.ioctl_at(VFIO_IOMMU_UNMAP_DMA, ARG, |rig, iova, size| {
        rig.unpin(iova, size / PAGE);
        rig.attach(1, Some(Spec::pages(K64))).expect("attach");
        rig.stop();
        rig.start();
    });
    assert_eq!(unmapped, Err(Error::WrongPageSize));
    assert_eq!(rig.dma_avail(), 65534, "nothing was removed");
    assert_eq!(rig.dirty(BASE, 2 * K64), [0, 1]);
}

#[test]
fn v11_a_domain_with_larger_pages_comes_while_tracking() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 2 * K64).expect("map");
    rig.start();
    rig.attach(1, Some(Spec::pages(K64))).expect("attach");
    rig.open(1).expect("open");
    rig.pin_by(1, BASE, 1).expect("pin: narrows");
    rig.unpin(BASE, 1);
    assert_eq!(rig.dirty(BASE, 2 * K64).len(), 32);
    for page in [1, 17, 31] {
        rig.mark(BASE + page * PAGE);
        assert_eq!(rig.dirty(BASE, 2 * K64), [page]);
    }
}

#[test]
fn v12_a_range_may_hold_several_mappings_and_holes() {
    let mut rig = tracked(2);
    rig.map(BASE + 2 * PAGE, PAGE).expect("map");
    rig.map(BASE + 70 * PAGE, 2 * PAGE).expect("map");
    // First page and number of pages of the range, then its dirty pages.
    let table: [(u64, u64, &[u64]); 5] = [
        (0, 128, &[1, 2, 70]),
        (0, 3, &[1, 2]),
        (2, 100, &[0, 68]),
        (3, 67, &[]),
        (100, 10, &[]),
    ];
    for (first, npages, pages) in table {
        [1, 2, 70].iter().for_each(|k| rig.mark(BASE + k * PAGE));
        let dirty = rig.dirty(BASE + first * PAGE, npages * PAGE);
        assert_eq!(dirty, pages, "{npages} pages from {first} on");
    }
}

#[test]
fn v13_a_range_may_end_with_the_address_space() {
    let last = 0u64.wrapping_sub(PAGE);
    for via in Via::ALL {
        let mut rig = Rig::emulated();
        rig.start();
        rig.map_memory(last, PAGE);
        rig.write(u64::MAX, &[1]).expect("write");
        let mut words = [0];
        let got = rig.get(via, last - PAGE, 2 * PAGE, PAGE, &mut words);
        assert_eq!((got, words), (Ok(()), [2]), "{via:?}");
        let got = rig.get(via, last, 2 * PAGE, PAGE, &mut words);
        assert_eq!(errno(got), Errno::EOVERFLOW, "{via:?}");
        rig.mark(last);
        let mut words = [0];
        let harvested = rig.harvest(via, last, PAGE, PAGE, &mut words);
        assert_eq!((harvested, words), (Ok(PAGE), [1]), "{via:?}");
    }
}

#[test]
fn v14_more_than_2_to_32_pages_are_not_few() {
    let mut rig = tracked(1);
    rig.mark(BASE);
    for npages in [(1 << 32) + 1, (1 << 32) + 64] {
        let size = npages * PAGE;
        for via in Via::ALL {
            let got = rig.get(via, BASE, size, PAGE, &mut [0]);
            assert_eq!(got, Err(Error::BitmapSize), "{via:?}");
            let got = rig.harvest(via, BASE, size, PAGE, &mut [0]);
            assert_eq!(got, Err(Error::BitmapSize), "{via:?}");
        }
        let mapped = rig.map(1 << 46, size);
        assert_eq!(mapped, Err(Error::TooManyPages), "no short bitmap");
    }
    assert_eq!(rig.dirty(BASE, PAGE), [0]);
}

#[test]
fn v15_a_mapping_of_2_to_31_minus_1_pages_is_tracked() {
    let npages = (1u64 << 31) - 1;
    let mut rig = Rig::emulated();
    rig.map(0, npages * PAGE).expect("map");
    rig.start();
    rig.mark((npages - 1) * PAGE);
    let mut words = vec![0; 1 << 25];
    let got = rig.get(Via::Zeroed, 0, npages * PAGE, PAGE, &mut words);
    assert_eq!((got, words[(1 << 25) - 1]), (Ok(()), 1 << 62));
    rig.unmap(0, npages * PAGE).expect("unmap");
    assert_eq!(rig.map(0, PAGE << 31), Err(Error::TooManyPages));
}

#[test]
fn v16_start_takes_no_more_memory_than_the_budget() {
    let size = 256 << 20; // costs nothing to map, because nothing is pinned
    let cost = Bitmap::<TestMemory>::bytes(size / PAGE);
    let mut options = Options::default();
    options.bitmap_budget = Some(4 * cost - 1);
    let mut rig = Rig::new(options, VFIO_TYPE1v2_IOMMU, &[None]);
    (0..4).for_each(|k| rig.map(k * size, size).expect("map"));
    let before = (rig.snapshot(), rig.mem.bytes());
    for _ in 0..2 {
        assert_eq!(errno(rig.try_start()), Errno::ENOMEM);
        assert_eq!((rig.snapshot(), rig.mem.bytes()), before);
    }
    rig.unmap(0, size).expect("unmap");
    rig.start();
}

#[test]
fn v17_an_iommu_does_not_make_every_page_dirty_for_ever() {
    let mut options = Options::default();
    options.skip_read_only = true;
    let spec = Some(Spec::pages(PAGE));
    let mut rig = Rig::new(options, VFIO_TYPE1v2_IOMMU, &[spec]);
    rig.map(BASE, 3 * PAGE).expect("map");
    let read_only = BASE + 3 * PAGE;
    rig.map_prot(read_only, PAGE, Prot::READ).expect("map");
    rig.start();
    for _ in 0..2 {
        assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1, 2], "not read-only ones");
    }
    rig.pin(BASE + PAGE, 1).expect("pin");
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1, 2], "once more");
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [1], "its devices pin");
}

#[test]
fn v18_unmap_and_detach_lose_no_bits() {
    for via in Via::ALL {
        let mut rig = Rig::with(&[None, Some(Spec::pages(PAGE))]);
        rig.map(BASE, 4 * PAGE).expect("map");
        rig.start();
        rig.dirty(BASE, 4 * PAGE);
        rig.detach(1);
        assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1, 2, 3], "{via:?}");
        rig.mark(BASE + PAGE);
        rig.pin(BASE + 3 * PAGE, 1).expect("pin, until the unmap");
        let mut words = [0];
        let harvested = rig.harvest(via, BASE, 4 * PAGE, PAGE, &mut words);
        assert_eq!(harvested, Ok(4 * PAGE), "{via:?}");
        assert_eq!(bits(&words), [1, 3], "{via:?}");
    }
}

#[test]
fn v19_a_typed_report_needs_no_user_memory() {
    let mut rig = tracked(2);
    rig.mark(BASE + PAGE);
    rig.put(&Rig::get_arg(BASE, 2 * PAGE, PAGE, 8));
    rig.host.mm = 1; // an address space without any memory
    let got = rig.ioctl_at(VFIO_IOMMU_DIRTY_PAGES, ARG, |_, _, _| {});
    assert_eq!(got, Err(Error::BadAddress));
    let mut words = [0];
    let got = rig.get(Via::Words, BASE, 2 * PAGE, PAGE, &mut words);
    assert_eq!((got, words), (Ok(()), [2]));
    rig.mark(BASE);
    let mut words = [0];
    let harvested = rig.harvest(Via::Words, BASE, 2 * PAGE, PAGE, &mut words);
    assert_eq!((harvested, words), (Ok(2 * PAGE), [1]));
}

#[test]
fn v20_access_by_an_address_that_is_no_users_fails() {
    let mut rig = Rig::emulated();
    let map = Map {
        iova: BASE,
        vaddr: 0xffff_8000_0000_0000, // accepted, because nothing is pinned
        size: PAGE,
        prot: Some(Prot::READ_WRITE),
    };
    rig.try_map(&map).expect("map");
    rig.start();
    assert_eq!(errno(rig.write(BASE, &[1; 8])), Errno::EFAULT);
    let (host, device) = (&mut rig.host, DeviceId(0));
    let read = rig.container.read(host, device, BASE, &mut [0; 8]);
    assert_eq!(errno(read), Errno::EFAULT);
    assert_eq!(rig.dirty(BASE, PAGE), [], "nothing was written");
}

#[test]
fn v21_out_of_memory_after_a_pin_drops_it() {
    for n in 1.. {
        let mut rig = tracked(70);
        let before = rig.host.books.clone();
        rig.mem.fault().arm(n);
        let pinned = rig.pin(BASE, 70);
        if pinned.is_ok() {
            assert!(n > 2, "a node and a list at least");
            break;
        }
        assert_eq!(errno(pinned), Errno::ENOMEM, "allocation {n}");
        assert_eq!(rig.host.books, before, "allocation {n}");
    }
}

#[test]
fn v22_a_pin_of_several_pages_that_fails_is_forgotten() {
    let mut rig = tracked(4);
    rig.host.pin_fault.arm(3);
    assert_eq!(errno(rig.pin(BASE, 4)), Errno::EFAULT);
    assert_eq!(rig.host.books.pinned(), 0);
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1], "once too often");
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [], "but not for ever");
}

#[test]
fn v23_no_mapping_is_smaller_than_a_bit() {
    let large = || Some(Spec::pages(K64));
    let mut rig = Rig::with(&[None, large()]);
    for tracking in [false, true] {
        assert_eq!(rig.map(BASE, PAGE), Err(Error::Misaligned), "{tracking}");
        rig.start();
    }
    rig.detach(1);
    assert_eq!(rig.map(BASE, PAGE), Err(Error::Misaligned), "latched");
    rig.stop();
    rig.map(BASE, PAGE).expect("map");
    assert_eq!(errno(rig.attach(1, large())), Errno::EINVAL);
    rig.start();
    rig.mark(BASE);
    assert_eq!(rig.dirty(BASE, PAGE), [0]);
}

#[test]
fn v24_a_bad_bitmap_pointer_is_einval_only_outside_user_addresses() {
    let table = [
        (1 << 47, Errno::EINVAL),
        ((1 << 47) - 7, Errno::EINVAL),
        (0xffff_8000_0000_0000, Errno::EINVAL),
        (u64::MAX, Errno::EINVAL),
        ((1 << 47) - 8, Errno::EFAULT),
        (0, Errno::EFAULT),
    ];
    let mut rig = tracked(1);
    rig.mark(BASE);
    for (data, expected) in table {
        for (nr, flags) in [(VFIO_IOMMU_DIRTY_PAGES, 4), (VFIO_IOMMU_UNMAP_DMA, 1)] {
            let arg = pack(&[48, flags], &[BASE, PAGE, PAGE, 8, data]);
            assert_eq!(errno(rig.ioctl(nr, &arg)), expected, "{nr:#x} {data:#x}");
        }
    }
    assert_eq!(rig.dirty(BASE, PAGE), [0]);
}

const _: () = assert!(size_of::<vfio_bitmap>() == 24);
const _: () = assert!(offset_of!(vfio_bitmap, data) == 16);
const _: () = assert!(size_of::<vfio_iommu_type1_dirty_bitmap_get>() == 40);

#[test]
fn v25_a_bitmap_pointer_has_64_bits() {
    let mut rig = tracked(1);
    rig.mark(BASE);
    let high = BITMAP + (1 << 40);
    rig.host.add_memory(high, PAGE);
    let short = pack(&[44, 4], &[BASE, PAGE, PAGE, 8, high]);
    let got = rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &short);
    assert_eq!(got, Err(Error::ShortArgsz), "36 bytes of payload");
    let arg = pack(&[48, 4], &[BASE, PAGE, PAGE, 8, high]);
    assert_eq!(rig.ioctl(VFIO_IOMMU_DIRTY_PAGES, &arg), Ok(0));
    assert_eq!((rig.read_u64(high), rig.read_u64(BITMAP)), (1, 0));
}
