// SPDX-License-Identifier: MIT OR Apache-2.0
//! The deliberate differences from the Linux driver, D1 to D11 in
//! docs/rules.md: each test fails with the driver's behaviour.

mod support;

use dirty_core::host::Prot;
use dirty_core::uapi::*;
use dirty_core::{Bitmap, Errno, Error, Options, Target};
use support::rig::{errno, vaddr, Via};
use support::words::{bits, garbage};
use support::{Rig, Spec, TestMemory, ARG, BITMAP, PAGE};

const BASE: u64 = 0x4000_0000;
const K64: u64 = 0x10000;

#[test]
fn d1_bits_do_not_leak_from_report_to_report() {
    let mut rig = Rig::emulated();
    for (page, npages) in [(0, 5), (5, 3), (8, 100)] {
        rig.map(BASE + page * PAGE, npages * PAGE).expect("map");
    }
    rig.start();
    for via in [Via::Ioctl, Via::Words, Via::Ioctl] {
        rig.mark(BASE + 5 * PAGE);
        let mut words = [0; 2];
        let got = rig.get(via, BASE, 108 * PAGE, PAGE, &mut words);
        got.expect("get");
        assert_eq!(words, [0x20, 0], "{via:?}");
    }
}

#[test]
fn d1_what_was_in_user_memory_does_not_matter() {
    for via in [Via::Ioctl, Via::Words] {
        let mut rig = Rig::emulated();
        // Words 0 and 1 contain pages and a part of a hole; words 2 and 3 lie
        // in a hole.
        rig.map(BASE + 3 * PAGE, 70 * PAGE).expect("map");
        rig.map(BASE + 256 * PAGE, 2 * PAGE).expect("map");
        rig.start();
        rig.mark(BASE + 72 * PAGE);
        let mut words = garbage(6);
        let size = 320 * PAGE;
        rig.get(via, BASE, size, PAGE, &mut words).expect("get");
        assert_eq!(words[..2], [0, 1 << 8], "{via:?}");
        assert_eq!(words[2..4], garbage(6)[2..4], "{via:?}");
        assert_eq!(words[4], 0, "{via:?}");
        assert_eq!(words[5], garbage(6)[5], "{via:?}");
        // No garbage has entered the core's bitmap either.
        let mut words = [0; 5];
        rig.get(via, BASE, size, PAGE, &mut words).expect("again");
        assert_eq!(words, [0; 5], "{via:?}");
        rig.mark(BASE + 3 * PAGE);
        let mut words = garbage(6);
        let harvested = rig.harvest(via, BASE, size, PAGE, &mut words);
        assert_eq!(harvested, Ok(72 * PAGE));
        assert_eq!((words[0], words[1], words[4]), (8, 0, 0), "{via:?}");
        assert_eq!(words[2..4], garbage(6)[2..4], "{via:?}");
    }
}

#[test]
fn d2_a_fault_in_get_clears_and_moves_nothing() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 5 * PAGE).expect("map");
    rig.map(BASE + 5 * PAGE, 3 * PAGE).expect("map");
    rig.map(BASE + 128 * PAGE, 64 * PAGE).expect("map");
    rig.start();
    let dirty = [3, 6, 130];
    dirty.iter().for_each(|page| rig.mark(BASE + page * PAGE));
    let size = 192 * PAGE;
    for bad in [0, 7, 16, 23] {
        rig.host.no_write = Some(BITMAP + bad);
        for _ in 0..2 {
            let got = rig.get(Via::Ioctl, BASE, size, PAGE, &mut [0; 3]);
            assert_eq!(errno(got), Errno::EFAULT, "byte {bad}");
        }
    }
    rig.host.no_write = None;
    assert_eq!(rig.dirty(BASE, size), dirty);
    assert_eq!(rig.dirty(BASE, size), []);
}

#[test]
fn d3_a_fault_in_unmap_leaves_every_mapping_with_its_bits() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 64 * PAGE).expect("map");
    rig.map(BASE + 128 * PAGE, 64 * PAGE).expect("map");
    rig.start();
    rig.mark(BASE + PAGE);
    rig.mark(BASE + 130 * PAGE);
    rig.pin(BASE + 140 * PAGE, 1).expect("pin");
    let size = 192 * PAGE;
    // Faults in the second mapping's word, and where the size is written back.
    for bad in [BITMAP + 16, BITMAP + 23, ARG + 16] {
        let arg = Rig::unmap_arg(BASE, size, PAGE, 24);
        rig.host.no_write = None;
        assert_eq!(rig.dma_avail(), 65533);
        rig.put(&arg);
        rig.host.no_write = Some(bad);
        let unmapped = rig.ioctl_at(VFIO_IOMMU_UNMAP_DMA, ARG, |rig, iova, size| {
            rig.unpin(iova, size / PAGE);
        });
        assert_eq!(errno(unmapped), Errno::EFAULT, "at {bad:#x}");
        assert_eq!(rig.read_u64(ARG + 16), size, "nothing is written back");
    }
    rig.host.no_write = None;
    let mut words = [0; 3];
    let harvested = rig.harvest(Via::Ioctl, BASE, size, PAGE, &mut words);
    assert_eq!(harvested, Ok(128 * PAGE));
    assert_eq!(
        bits(&words),
        [1, 130, 140],
        "the pin is gone, its page is dirty"
    );
}

#[test]
fn d3_a_fault_in_write_back_unmaps_nothing() {
    let mut rig = Rig::emulated();
    rig.map(BASE, PAGE).expect("map");
    let arg = support::pack(&[24, 0], &[BASE, PAGE]);
    rig.put(&arg);
    rig.host.no_write = Some(ARG);
    let unmapped = rig.ioctl_at(VFIO_IOMMU_UNMAP_DMA, ARG, |_, _, _| {});
    rig.host.no_write = None;
    assert_eq!(errno(unmapped), Errno::EFAULT);
    assert_eq!(rig.dma_avail(), 65534);
}

#[test]
fn d4_a_write_that_faults_marks_what_it_touched() {
    // Page 2 of the mapping's memory is a hole; so is everything from page 4.
    let table: [(u64, usize, &[u64]); 6] = [
        (0x800, 0x1000, &[0, 1]),
        (0x1800, 0x1000, &[1]),
        (0x0fff, 0x2000, &[0, 1]),
        (0x2000, 1, &[]),
        (0x3fff, 2, &[3]),
        (0x1fff, 0x1000, &[1]),
    ];
    for (offset, len, pages) in table {
        let mut rig = Rig::emulated();
        rig.host.add_memory(vaddr(BASE), 2 * PAGE);
        rig.host.add_memory(vaddr(BASE) + 3 * PAGE, PAGE);
        rig.map(BASE, 8 * PAGE).expect("map");
        rig.start();
        let wrote = rig.write(BASE + offset, &vec![1; len]);
        let faults = offset + len as u64 > 2 * PAGE;
        let expected = if faults { Errno::EFAULT } else { Errno(0) };
        assert_eq!(errno(wrote), expected, "{len:#x} bytes at {offset:#x}");
        assert_eq!(
            rig.dirty(BASE, 8 * PAGE),
            pages,
            "{len:#x} bytes at {offset:#x}"
        );
    }
    // The fault is inside a page, after its first bytes.
    let mut rig = Rig::emulated();
    rig.map_memory(BASE, 2 * PAGE);
    rig.start();
    rig.host.no_write = Some(vaddr(BASE) + PAGE + 1);
    assert_eq!(errno(rig.write(BASE + PAGE, &[1; 8])), Errno::EFAULT);
    assert_eq!(rig.dirty(BASE, 2 * PAGE), [1]);
}

#[test]
fn d5_bitmaps_have_a_budget() {
    let cost = Bitmap::<TestMemory>::bytes(64);
    let mut options = Options::default();
    options.bitmap_budget = Some(2 * cost);
    let mut rig = Rig::new(options, VFIO_TYPE1v2_IOMMU, &[None]);
    for k in 0..3 {
        rig.map(BASE + k * 64 * PAGE, 64 * PAGE).expect("map");
    }
    let before = (rig.snapshot(), rig.mem.bytes());
    for _ in 0..2 {
        assert_eq!(rig.try_start(), Err(Error::BitmapBudget));
        assert_eq!((rig.snapshot(), rig.mem.bytes()), before);
    }
    rig.unmap(BASE, 64 * PAGE).expect("unmap");
    rig.start();
    let before = (rig.snapshot(), rig.mem.bytes());
    for _ in 0..2 {
        let mapped = rig.map(BASE, PAGE);
        assert_eq!(mapped, Err(Error::BitmapBudget));
        assert_eq!(errno(mapped), Errno::ENOMEM);
        assert_eq!((rig.snapshot(), rig.mem.bytes()), before);
    }
    rig.unmap(BASE + 64 * PAGE, 64 * PAGE).expect("unmap");
    rig.map(BASE, 64 * PAGE).expect("there is room again");
    rig.stop();
    rig.map(BASE + 64 * PAGE, 64 * PAGE).expect("no bitmap");
    assert_eq!(rig.try_start(), Err(Error::BitmapBudget));
    rig.unmap(BASE, 64 * PAGE).expect("unmap");
    rig.start();
}

#[test]
fn d5_pinned_bits_count_from_the_first_pin_on() {
    let (size, second) = (64 * PAGE, BASE + 64 * PAGE);
    let more = Bitmap::<TestMemory>::pinned_bytes(64);
    let mut options = Options::default();
    options.bitmap_budget = Some(2 * Bitmap::<TestMemory>::bytes(64) + more);
    let mut rig = Rig::new(options, VFIO_TYPE1v2_IOMMU, &[None]);
    rig.map(BASE, size).expect("map");
    rig.map(second, size).expect("map");
    rig.start();
    rig.pin(BASE, 3)
        .expect("room for the pinned bits of one mapping");
    let before = (rig.snapshot(), rig.mem.bytes());
    for _ in 0..2 {
        let pinned = rig.pin(second, 1);
        assert_eq!(pinned.err(), Some(Error::BitmapBudget));
        assert_eq!((rig.snapshot(), rig.mem.bytes()), before);
        assert_eq!(rig.dirty(second, size), []);
    }
    // A pin of both mappings keeps nothing of the second.
    let both = rig.pin(second - PAGE, 2);
    assert_eq!(both.err(), Some(Error::BitmapBudget));
    assert_eq!(rig.mem.bytes(), before.1);
    // The pinned bits stay when the last pin goes: devices pin and unpin often.
    rig.unpin(BASE, 3);
    assert_eq!(rig.pin(second, 1).err(), Some(Error::BitmapBudget));
    rig.unmap(BASE, size).expect("unmap");
    rig.pin(second, 1).expect("room again");
    // STOP frees all bits. Without tracking a pin needs none, but START does.
    rig.map(BASE, size).expect("map");
    rig.stop();
    rig.pin(BASE, 1).expect("pin");
    assert_eq!(rig.try_start(), Err(Error::BitmapBudget));
    rig.unpin(BASE, 1);
    rig.start();
    assert_eq!(rig.dirty(second, size), [0]);
}

#[test]
fn d6_granularity_is_latched_when_a_larger_page_comes() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 2 * K64).expect("map");
    rig.start();
    rig.mark(BASE + PAGE);
    rig.attach(1, Some(Spec::pages(K64))).expect("attach");
    rig.open(1).expect("open");
    rig.pin_by(1, BASE, 1).expect("pin"); // narrows the scope
    rig.unpin(BASE, 1);
    rig.dirty(BASE, 2 * K64);
    rig.mark(BASE + 17 * PAGE);
    let got = rig.get(Via::Ioctl, BASE, 2 * K64, K64, &mut [0]);
    assert_eq!(got, Err(Error::WrongPageSize));
    assert_eq!(rig.dirty(BASE, 2 * K64), [17], "still pages of 4K");
    // MAP_DMA wants alignment to the larger page.
    assert_eq!(rig.map(BASE + 2 * K64, PAGE), Err(Error::Misaligned));
    assert_eq!(rig.map(BASE + 2 * K64 + PAGE, K64), Err(Error::Misaligned));
    rig.map(BASE + 2 * K64, K64).expect("map");
    rig.mark(BASE + 2 * K64 + 15 * PAGE);
    let mut words = [0];
    let harvested = rig.harvest(Via::Ioctl, BASE, 3 * K64, PAGE, &mut words);
    assert_eq!((harvested, words), (Ok(3 * K64), [1 << 47]));
    // The next START takes the minimum page of now.
    rig.stop();
    rig.map(BASE, K64).expect("map");
    rig.start();
    rig.mark(BASE + PAGE);
    assert_eq!(rig.dirty(BASE, K64), [0]);
}

#[test]
fn d6_granularity_is_latched_when_a_larger_page_goes() {
    let mut rig = Rig::with(&[None, Some(Spec::pages(K64))]);
    rig.map(BASE, 2 * K64).expect("map");
    rig.start();
    rig.detach(1);
    assert_eq!(rig.dirty(BASE, 2 * K64), [0, 1], "detach fills");
    rig.mark(BASE + 17 * PAGE);
    let got = rig.get(Via::Ioctl, BASE, 2 * K64, PAGE, &mut [0]);
    assert_eq!(got, Err(Error::WrongPageSize));
    let got = rig.get(Via::Ioctl, BASE + PAGE, K64, K64, &mut [0]);
    assert_eq!(got, Err(Error::Misaligned));
    assert_eq!(rig.dirty(BASE, 2 * K64), [1]);
    assert_eq!(rig.map(BASE + 2 * K64, PAGE), Err(Error::Misaligned));
    rig.map(BASE + 2 * K64, K64).expect("map");
    rig.mark(BASE + 3 * K64 - 1);
    let mut words = [0];
    let harvested = rig.harvest(Via::Ioctl, BASE, 3 * K64, K64, &mut words);
    assert_eq!((harvested, words), (Ok(3 * K64), [4]));
    rig.stop();
    rig.map(BASE, PAGE).expect("4K again");
}

#[test]
fn d7_stop_while_an_unmap_waits() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 2 * PAGE).expect("map");
    rig.start();
    rig.pin(BASE, 1).expect("pin");
    let arg = Rig::unmap_arg(BASE, 2 * PAGE, PAGE, 8);
    rig.put(&arg);
    let unmapped = rig.ioctl_at(VFIO_IOMMU_UNMAP_DMA, ARG, |rig, iova, size| {
        rig.unpin(iova, size / PAGE);
        rig.stop();
    });
    assert_eq!(unmapped, Err(Error::NotTracking));
    assert_eq!(rig.dma_avail(), 65534, "nothing was removed");
    // An unmap without a bitmap does not mind a STOP.
    rig.start();
    rig.pin(BASE, 1).expect("pin");
    let target = Target::Range {
        iova: BASE,
        size: 2 * PAGE,
    };
    let unmapped = rig.unmap_with(target, |rig, iova, size| {
        rig.unpin(iova, size / PAGE);
        rig.stop();
    });
    assert_eq!(unmapped, Ok(2 * PAGE));
}

#[test]
fn d7_everything_is_checked_again_after_each_callback() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 2 * PAGE).expect("map");
    rig.pin(BASE, 1).expect("pin");
    let all = Target::Range {
        iova: BASE,
        size: 2 * PAGE,
    };
    // A callback replaces the mapping by one that reaches beyond the range.
    let unmapped = rig.unmap_with(all, |rig, _, _| {
        rig.unpin(BASE, 1);
        rig.unmap(BASE, 2 * PAGE).expect("unmap");
        rig.map(BASE + PAGE, 2 * PAGE).expect("map");
    });
    assert_eq!(unmapped, Err(Error::Bisects));
    rig.unmap(BASE + PAGE, 2 * PAGE).expect("unmap");
    // A callback removes the mapping.
    rig.map(BASE, 2 * PAGE).expect("map");
    rig.pin(BASE, 1).expect("pin");
    let unmapped = rig.unmap_with(all, |rig, _, _| {
        rig.unpin(BASE, 1);
        rig.unmap(BASE, 2 * PAGE).expect("unmap");
    });
    assert_eq!(unmapped, Ok(0));
}

#[test]
fn d8_a_device_that_does_not_unpin() {
    let mut rig = Rig::emulated();
    for k in 0..3 {
        rig.map(BASE + k * PAGE, PAGE).expect("map");
    }
    rig.pin(BASE + PAGE, 1).expect("pin");
    rig.start();
    let before = rig.snapshot();
    let mut calls = 0;
    let target = Target::Range {
        iova: BASE,
        size: 3 * PAGE,
    };
    let unmapped = rig.unmap_with(target, |_, iova, size| {
        assert_eq!((iova, size), (BASE + PAGE, PAGE));
        calls += 1;
    });
    assert_eq!(unmapped, Err(Error::StillPinned));
    assert_eq!(errno(unmapped), Errno::EBUSY);
    assert_eq!(calls, 11, "the 12th look gives up");
    assert_eq!(rig.snapshot(), before);
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [1]);
    let unmapped = rig.unmap_with(Target::All, |_, _, _| {});
    assert_eq!(unmapped, Err(Error::StillPinned));
    assert_eq!(rig.unmap(BASE, 3 * PAGE), Ok(3 * PAGE));
}

#[test]
fn d8_each_mapping_has_its_own_tries() {
    // By A5, step 11, the same mapping is looked at 12 times before the unmap
    // fails. Here each of three mappings needs 8 looks.
    let mut rig = Rig::emulated();
    for k in 0..3 {
        rig.map(BASE + k * PAGE, PAGE).expect("map");
        (0..7).for_each(|_| assert!(rig.pin(BASE + k * PAGE, 1).is_ok()));
    }
    let unmapped = rig.unmap(BASE, 3 * PAGE);
    (0..3).for_each(|k| (0..7).for_each(|_| rig.unpin(BASE + k * PAGE, 1)));
    assert_eq!(unmapped, Ok(3 * PAGE));
}

#[test]
fn d8_devices_that_pin_each_others_mapping_do_not_hang_an_unmap() {
    let mut rig = Rig::emulated();
    rig.map(BASE, PAGE).expect("map");
    rig.map(BASE + PAGE, PAGE).expect("map");
    rig.pin(BASE, 1).expect("pin");
    let mut calls = 0;
    let unmapped = rig.unmap_with(Target::All, |rig, iova, _| {
        calls += 1;
        assert!(calls < 1000, "asked for ever");
        rig.unpin(iova, 1);
        rig.pin(BASE + BASE + PAGE - iova, 1).expect("pin");
    });
    assert_eq!(unmapped, Err(Error::StillPinned));
    rig.unpin(BASE, 2);
}

#[test]
fn d9_a_report_looks_at_no_mapping_outside_its_range() {
    // As many mappings as a container takes, each reported by itself. If each
    // report looked at every mapping, this would take two thousand million
    // steps.
    let mut rig = Rig::emulated();
    let n = 65535;
    let iova = |k: u64| BASE + k * 2 * PAGE;
    for k in 0..n {
        rig.map(iova(k), PAGE).expect("map");
    }
    assert_eq!(rig.map(iova(n), PAGE), Err(Error::MappingLimit));
    rig.start();
    (0..n).step_by(3).for_each(|k| rig.mark(iova(k)));
    for k in 0..n {
        let mut words = [0];
        rig.get(Via::Words, iova(k), PAGE, PAGE, &mut words)
            .expect("get");
        assert_eq!(words, [u64::from(k % 3 == 0)], "mapping {k}");
    }
    for k in (0..n).rev() {
        assert_eq!(rig.unmap(iova(k), PAGE), Ok(PAGE), "mapping {k}");
    }
}

#[test]
fn d10_read_only_mappings_may_be_left_out_of_all_dirty() {
    for skip_read_only in [false, true] {
        let mut options = Options::default();
        options.skip_read_only = skip_read_only;
        let spec = Some(Spec::pages(PAGE));
        let mut rig = Rig::new(options, VFIO_TYPE1v2_IOMMU, &[None, spec]);
        rig.map_prot(BASE, PAGE, Prot::READ).expect("map");
        rig.map_prot(BASE + PAGE, PAGE, Prot::WRITE).expect("map");
        rig.map(BASE + 2 * PAGE, PAGE).expect("map");
        rig.start();
        let all: &[u64] = if skip_read_only { &[1, 2] } else { &[0, 1, 2] };
        assert_eq!(rig.dirty(BASE, 3 * PAGE), all);
        assert_eq!(rig.dirty(BASE, 3 * PAGE), all);
        let mut words = [0];
        rig.get(Via::Zeroed, BASE, 3 * PAGE, PAGE, &mut words)
            .expect("get");
        assert_eq!(bits(&words), all);
        rig.mark(BASE);
        assert_eq!(rig.dirty(BASE, 3 * PAGE), [0, 1, 2], "a mark is a mark");
        rig.detach(1);
        assert_eq!(rig.dirty(BASE, 3 * PAGE), all, "detach fills");
        assert_eq!(rig.dirty(BASE, 3 * PAGE), []);
        // Pins of read-only mappings are still reported (A8).
        rig.pin(BASE, 1).expect("pin");
        assert_eq!(rig.dirty(BASE, 3 * PAGE), [0]);
    }
}

#[test]
fn d11_what_was_written_before_a_pin_narrows_the_scope_is_reported() {
    let mut rig = Rig::with(&[Some(Spec::pages(PAGE)), None]);
    rig.map(BASE, 4 * PAGE).expect("map");
    rig.start();
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1, 2, 3]);
    // A pin that fails does not narrow the scope.
    rig.host.pin_fault.arm(2);
    rig.pin_by(0, BASE, 2).expect_err("the second page");
    rig.dirty(BASE, 4 * PAGE);
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1, 2, 3]);
    // A pin by an emulated device does not narrow the scope either.
    rig.pin_by(1, BASE, 1).expect("pin");
    rig.dirty(BASE, 4 * PAGE);
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1, 2, 3]);
    rig.pin_by(0, BASE + PAGE, 1).expect("pin");
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1, 2, 3], "once more");
    assert_eq!(rig.dirty(BASE, 4 * PAGE), [0, 1], "from now on the pins");
}
