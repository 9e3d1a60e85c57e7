// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rest of the interface: GET_INFO, CHECK_EXTENSION, version 1, new vaddrs,
//! and what devices read, write and pin (rules A2, A3, A5 and A9 of
//! docs/rules.md).

mod support;

use std::thread;

use dirty_core::host::{DeviceId, GroupId, Mm, PageKind, UserMemory};
use dirty_core::uapi::*;
use dirty_core::{Error, Map, Options, Progress, Target, Unmap};
use support::rig::{vaddr, Via};
use support::{pack, Rig, Spec, TestHost, ARG, PAGE};

const BASE: u64 = 0x4000_0000;

/// The answer of GET_INFO as 32-bit fields. Bytes that were not written are
/// 0xff.
fn info(rig: &mut Rig, argsz: u32) -> Vec<u32> {
    rig.put(&[0xff; 256]);
    rig.put(&pack(&[argsz], &[]));
    let got = rig.ioctl_at(VFIO_IOMMU_GET_INFO, ARG, |_, _, _| {});
    assert_eq!(got, Ok(0));
    let mut bytes = [0; 256];
    rig.host.copy_from_user(ARG, &mut bytes).expect("info");
    let words = bytes.chunks(4).map(|b| b.try_into().expect("4 bytes"));
    words.map(u32::from_ne_bytes).collect()
}

const UNTOUCHED: u32 = 0xffff_ffff;

#[test]
fn a3_info_is_as_long_as_the_caller_has_room() {
    let mut rig = Rig::emulated();
    rig.map(BASE, PAGE).expect("map");
    let sizes = 0u64.wrapping_sub(PAGE);
    let (low, high) = (sizes as u32, (sizes >> 32) as u32);
    let got = info(&mut rig, 16);
    assert_eq!(got[..5], [72, 3, low, high, UNTOUCHED]);
    let got = info(&mut rig, 23);
    assert_eq!(got[..4], [72, 3, low, high]);
    assert_eq!(got[4..6], [0, 0xff00_0000], "23 bytes");
    for argsz in [24, 71] {
        let got = info(&mut rig, argsz);
        assert_eq!(got[..7], [72, 3, low, high, 0, 0, UNTOUCHED]);
    }
    for argsz in [72, 200, u32::MAX] {
        let got = info(&mut rig, argsz);
        assert_eq!(got[..6], [argsz, 3, low, high, 24, 0]);
        let migration = [2 | 1 << 16, 56, 0, 0, 4096, 0, 1 << 28, 0];
        assert_eq!(got[6..14], migration);
        assert_eq!(got[14..18], [3 | 1 << 16, 0, 65534, 0]);
        assert_eq!(got[18], UNTOUCHED);
    }
}

#[test]
fn a3_valid_iovas_are_the_last_capability() {
    let spec = Spec {
        aperture: (0x1000, 0xffff_ffff),
        reserved: vec![(0, 0x1fff), (0x5000, 0x5fff), (0xfff0_0000, 0x1_ffff_ffff)],
        ..Spec::pages(0x10000)
    };
    let mut rig = Rig::with(&[Some(spec), None]);
    let got = info(&mut rig, 256);
    let sizes = [0xffff_0000, 0xffff_ffff];
    assert_eq!(got[..4], [256, 3, sizes[0], sizes[1]]);
    assert_eq!(got[10], 0x10000, "only the smallest page");
    assert_eq!(got[15], 72, "the next capability");
    assert_eq!(got[18..22], [1 | 1 << 16, 0, 2, 0]);
    let ranges = [0x2000, 0, 0x4fff, 0, 0x6000, 0, 0xffef_ffff, 0];
    assert_eq!(got[22..30], ranges);
    assert_eq!(got[30], UNTOUCHED);
    assert_eq!(info(&mut rig, 24)[0], 24 + 32 + 16 + 16 + 32);
    rig.detach(0);
    let got = info(&mut rig, 256);
    assert_eq!(got[20], 1);
    assert_eq!(got[22..26], [0, 0, UNTOUCHED, UNTOUCHED], "everything");
}

/// Ranges, as first and last address.
type Ranges<'a> = &'a [(u32, u32)];

#[test]
fn a3_reserved_regions_cut_the_valid_iovas() {
    const ALL: (u32, u32) = (0x1_0000, 0x1_ffff);
    let table: [((u64, u64), Ranges<'_>); 8] = [
        ((0, 0x7fff), &[ALL]),
        ((0, 0xffff), &[ALL]),
        ((0x8000, 0x1_0000), &[(0x1_0001, 0x1_ffff)]),
        ((0x1_0000, 0x1_0000), &[(0x1_0001, 0x1_ffff)]),
        (
            (0x1_4000, 0x1_7fff),
            &[(0x1_0000, 0x1_3fff), (0x1_8000, 0x1_ffff)],
        ),
        ((0x1_ffff, 0x2_ffff), &[(0x1_0000, 0x1_fffe)]),
        ((0x2_0000, 0x2_ffff), &[ALL]),
        ((0x2_8000, 0x2_ffff), &[ALL]),
    ];
    for (hole, ranges) in table {
        let spec = Spec {
            aperture: (u64::from(ALL.0), u64::from(ALL.1)),
            reserved: vec![hole],
            ..Spec::pages(PAGE)
        };
        let got = info(&mut Rig::with(&[Some(spec)]), 256);
        let expected: Vec<u32> = ranges.iter().flat_map(|r| [r.0, 0, r.1, 0]).collect();
        assert_eq!(got[20], ranges.len() as u32, "{hole:x?}");
        assert_eq!(got[22..22 + expected.len()], expected, "{hole:x?}");
    }
}

#[test]
fn a2_extensions() {
    let ask = |rig: &mut Rig| -> Vec<u64> {
        let there = |k: &u64| {
            let got = rig.ioctl_at(VFIO_CHECK_EXTENSION, *k, |_, _, _| {});
            got == Ok(1)
        };
        (0..20).filter(there).collect()
    };
    let incoherent = Spec {
        coherent: false,
        ..Spec::pages(PAGE)
    };
    let mut none = Rig::empty(Options::default());
    assert_eq!(ask(&mut none), [1, 3, 9]);
    assert_eq!(none.ioctl_at(VFIO_GET_API_VERSION, 7, |_, _, _| {}), Ok(0));
    none.attach(0, None).expect("attach");
    assert_eq!(ask(&mut none), [1, 3, 9]);
    assert_eq!(ask(&mut Rig::emulated()), [1, 3, 4, 9]);
    let mut rig = Rig::with(&[Some(Spec::pages(PAGE))]);
    assert_eq!(ask(&mut rig), [1, 3, 4, 9, 10]);
    rig.attach(1, Some(incoherent)).expect("attach");
    assert_eq!(ask(&mut rig), [1, 3, 9, 10]);
    rig.attach(2, None).expect("attach");
    assert_eq!(ask(&mut rig), [1, 3, 9]);
}

#[test]
fn a5_version_1_stops_at_a_mapping_that_starts_before_the_range() {
    let mut rig = Rig::new(Options::default(), VFIO_TYPE1_IOMMU, &[None]);
    for k in 0..3 {
        rig.map(BASE + k * 4 * PAGE, 4 * PAGE).expect("map");
    }
    assert_eq!(rig.unmap(BASE + PAGE, 11 * PAGE), Ok(0));
    assert_eq!(rig.unmap(BASE + PAGE, PAGE), Ok(0));
    // A mapping that reaches beyond the range goes as a whole.
    assert_eq!(rig.unmap(BASE, 5 * PAGE), Ok(8 * PAGE));
    assert_eq!(rig.unmap(BASE, 9 * PAGE), Ok(4 * PAGE));
    assert_eq!(rig.dma_avail(), 65535);
}

#[test]
fn a5_the_size_written_back_is_what_was_unmapped() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 4 * PAGE).expect("map");
    rig.map(BASE + 8 * PAGE, PAGE).expect("map");
    rig.pin(BASE, 1).expect("pin");
    let unmap = |rig: &mut Rig, flags, iova, size| {
        let got = rig.ioctl(VFIO_IOMMU_UNMAP_DMA, &pack(&[24, flags], &[iova, size]));
        assert_eq!(got, Ok(0));
        [ARG, ARG + 8, ARG + 16].map(|at| rig.read_u64(at))
    };
    let head = |flags: u64| flags << 32 | 24;
    let got = unmap(&mut rig, 0, BASE, 16 * PAGE);
    assert_eq!(got, [head(0), BASE, 5 * PAGE]);
    let got = unmap(&mut rig, 0, BASE, 16 * PAGE);
    assert_eq!(got, [head(0), BASE, 0]);
    rig.map(0, PAGE).expect("map");
    let last = 0u64.wrapping_sub(PAGE);
    rig.map(last, PAGE).expect("map");
    assert_eq!(unmap(&mut rig, 2, 0, 0), [head(2), 0, 2 * PAGE]);
    assert_eq!(rig.dma_avail(), 65535);
}

#[test]
fn a5_a_vaddr_is_taken_and_given_anew() {
    let mut rig = Rig::with(&[Some(Spec::pages(PAGE))]);
    let iova = |k: u64| BASE + k * PAGE;
    (0..3).for_each(|k| rig.map_memory(iova(k), PAGE));
    let invalidate = |rig: &mut Rig, first, n| {
        let mut unmap = Unmap::vaddr(Target::Range {
            iova: iova(first),
            size: n * PAGE,
        });
        rig.unmap_step(&mut unmap)
    };
    assert_eq!(invalidate(&mut rig, 1, 1), Ok(Progress::Done(PAGE)));
    assert_eq!(invalidate(&mut rig, 0, 3), Err(Error::VaddrMismatch));
    assert_eq!(rig.write(iova(0), &[1]), Err(Error::VaddrInvalid));
    assert_eq!(rig.pin(iova(0), 1), Err(Error::VaddrInvalid));
    let revive = |rig: &mut Rig, k, n| {
        let map = Map {
            iova: iova(k),
            vaddr: vaddr(iova(0)),
            size: n * PAGE,
            prot: None,
        };
        rig.try_map(&map)
    };
    assert_eq!(revive(&mut rig, 0, 1), Err(Error::VaddrMismatch), "valid");
    assert_eq!(revive(&mut rig, 1, 2), Err(Error::VaddrMismatch), "longer");
    assert_eq!(revive(&mut rig, 0, 2), Err(Error::VaddrMismatch), "longer");
    assert_eq!(revive(&mut rig, 1, 1), Ok(()));
    rig.write(iova(1), &[7]).expect("write");
    let mut byte = [0];
    let read = rig.host.read_mm(Mm(0), vaddr(iova(0)), &mut byte);
    assert_eq!((read, byte), (Ok(()), [7]), "at the new vaddr");
    // Once the mapping with the invalid vaddr is unmapped, the others can be
    // used.
    assert_eq!(invalidate(&mut rig, 0, 1), Ok(Progress::Done(PAGE)));
    assert_eq!(rig.unmap(iova(0), PAGE), Ok(PAGE));
    rig.write(iova(2), &[7]).expect("write");
}

#[test]
fn a9_bytes_go_where_the_mappings_say() {
    let mut rig = Rig::emulated();
    rig.map_memory(BASE, 2 * PAGE);
    rig.map_memory(BASE + 2 * PAGE, PAGE);
    let data: Vec<u8> = (0..9000).map(|k| (k % 251) as u8).collect();
    rig.write(BASE + 1000, &data).expect("write");
    let mut back = vec![0; 9000];
    let device = DeviceId(0);
    let read =
        |rig: &mut Rig, iova, buf: &mut [u8]| rig.container.read(&mut rig.host, device, iova, buf);
    read(&mut rig, BASE + 1000, &mut back).expect("read");
    assert_eq!(back, data);
    // The bytes before a hole are written even though the call fails.
    let last = BASE + 3 * PAGE - 1;
    assert_eq!(rig.write(last, &[0xee, 0xff]), Err(Error::Unmapped));
    let mut byte = [0];
    read(&mut rig, last, &mut byte).expect("read");
    assert_eq!(byte, [0xee]);
    let unknown = rig
        .container
        .read(&mut rig.host, DeviceId(5), BASE, &mut byte);
    assert_eq!(unknown, Err(Error::UnknownDevice.into()));
}

#[test]
fn a9_pins_in_detail() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 2 * PAGE).expect("map");
    rig.map(BASE + 2 * PAGE, PAGE).expect("map");
    rig.start();
    let pfns = rig.pin(BASE + PAGE, 2).expect("from mapping to mapping");
    let expected = [1, 2].map(|k| rig.host.pfn(0, vaddr(BASE + k * PAGE)));
    assert_eq!(pfns, expected);
    let before = rig.host.books.clone();
    assert_eq!(rig.pin(BASE, 4), Err(Error::Unmapped));
    assert_eq!(rig.host.books, before, "all pins of the call are undone");
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [0, 1, 2], "but their bits stay");
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [1, 2]);
    // Unpin stops at a page that is not mapped and passes over one that is not
    // pinned.
    rig.unpin(BASE + 3 * PAGE, 1);
    rig.unpin(BASE, 2);
    assert_eq!(rig.host.books.pinned(), 1);
    rig.unpin(BASE + PAGE, u64::MAX);
    assert_eq!(rig.host.books.pinned(), 0);
    // A pin at another iova in the same page is a pin of its own.
    let pfn = rig.pin(BASE + 0x10, 1).expect("pin")[0];
    assert_eq!(rig.pin(BASE + 0x20, 1), Ok(vec![pfn]));
    assert_eq!(rig.host.books.pins.get(&pfn), Some(&2));
    rig.dirty(BASE, 3 * PAGE);
    rig.unpin(BASE + 0x10, 1);
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [0], "one of two is left");
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [0], "one of two is left");
    rig.unpin(BASE, 1); // nothing was pinned at this iova
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [0], "one of two is left");
    rig.unpin(BASE + 0x20, 1);
    assert_eq!(rig.dirty(BASE, 3 * PAGE), [0]);
    assert_eq!(rig.dirty(BASE, 3 * PAGE), []);
    // A page without a struct page cannot be pinned.
    rig.host.kinds = vec![(pfn..pfn + 1, PageKind::NoPage)];
    assert_eq!(rig.pin(BASE, 1), Err(Error::NoStructPage));
    assert_eq!(rig.host.books.pinned(), 0);
}

/// Unpin stops at the end of the address space.
#[test]
fn a9_unpin_ends_with_the_address_space() {
    let mut rig = Rig::emulated();
    let last = 0u64.wrapping_sub(PAGE);
    rig.map(last, PAGE).expect("map");
    rig.map(0, PAGE).expect("map");
    rig.pin(0, 1).expect("pin");
    rig.pin(last, 1).expect("pin");
    rig.unpin(last, 3);
    assert_eq!(rig.host.books.pinned(), 1, "the first page is not the next");
}

#[test]
fn a4_ranges_must_lie_in_one_valid_range() {
    let spec = Spec {
        aperture: (0x1000, 0xf_ffff),
        reserved: vec![(0x8000, 0x8fff)],
        ..Spec::pages(PAGE)
    };
    let mut rig = Rig::with(&[Some(spec)]);
    let table = [
        (0x0000, 1, false),
        (0x7000, 3, false),
        (0x1000, 7, true),
        (0x8000, 1, false),
        (0x9000, 0xf7, true),
        (0x10_0000, 1, false),
    ];
    for (iova, npages, valid) in table {
        let expected = if valid {
            Ok(())
        } else {
            Err(Error::ForbiddenIova)
        };
        assert_eq!(rig.map(iova, npages * PAGE), expected, "{iova:#x}");
    }
    assert_eq!(rig.unmap(0, 1 << 20), Ok(0xfe * PAGE));
    assert_eq!(rig.map(0xf_f000, 2 * PAGE), Err(Error::ForbiddenIova));
}

#[test]
fn marks_and_writes_of_several_threads_are_all_there() {
    const THREADS: u64 = 4;
    const PAGES: u64 = 2000;
    let mut rig = Rig::emulated();
    rig.map(BASE, PAGES / 2 * PAGE).expect("map");
    rig.map(BASE + PAGES / 2 * PAGE, PAGES / 2 * PAGE)
        .expect("map");
    rig.start();
    for _ in 0..5 {
        let container = &rig.container;
        thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    let mut host = TestHost::default();
                    host.add_memory(vaddr(BASE), PAGES * PAGE);
                    for page in (thread..PAGES).step_by(THREADS as usize) {
                        let iova = BASE + page * PAGE;
                        let done = match page % 3 {
                            0 => container.backend().expect("type1").mark(iova, 1),
                            _ => {
                                let written = container.write(&mut host, DeviceId(0), iova, &[1]);
                                written.map_err(Error::from)
                            }
                        };
                        done.expect("mark");
                    }
                });
            }
        });
        let mut words = [0; PAGES.div_ceil(64) as usize];
        rig.get(Via::Zeroed, BASE, PAGES * PAGE, PAGE, &mut words)
            .expect("get");
        let marked: u32 = words.iter().map(|w| w.count_ones()).sum();
        assert_eq!(u64::from(marked), PAGES);
    }
}

#[test]
fn a9_groups_and_devices() {
    let mut rig = Rig::emulated();
    let zero = GroupId(0);
    let five = GroupId(5);
    let busy = rig.container.detach_group(&mut rig.host, zero);
    assert_eq!(busy, Err(Error::GroupBusy));
    let unknown = rig.container.detach_group(&mut rig.host, five);
    assert_eq!(unknown, Err(Error::UnknownGroup));
    assert_eq!(rig.open(0), Err(Error::DuplicateDevice));
    let unknown = rig.container.open_device(DeviceId(1), five, true);
    assert_eq!(unknown, Err(Error::UnknownGroup));
    rig.map(BASE, PAGE).expect("map");
    rig.start();
    rig.detach(0);
    rig.attach(0, None).expect("attach");
    let set = rig.container.set_iommu(&mut rig.host, VFIO_TYPE1v2_IOMMU);
    assert_eq!(set, Ok(()), "the type went with the last group");
    assert_eq!(rig.tracking(), None);
    assert_eq!(rig.dma_avail(), 65535, "and so did the mappings");
}

#[test]
fn a_closed_container_is_as_new() {
    let mut rig = Rig::with(&[None, Some(Spec::pages(PAGE))]);
    rig.map(BASE, PAGE).expect("map");
    rig.container.close(&mut rig.host);
    assert!(!rig.container.has_group(GroupId(0)));
    assert_eq!(rig.map(BASE, PAGE), Err(Error::NoIommu));
    let set = rig.container.set_iommu(&mut rig.host, VFIO_TYPE1v2_IOMMU);
    assert_eq!(set, Err(Error::NoGroup));
    rig.attach(0, None).expect("attach");
    let set = rig.container.set_iommu(&mut rig.host, VFIO_TYPE1v2_IOMMU);
    set.expect("type");
    assert_eq!(rig.map(BASE, PAGE), Ok(()));
    assert_eq!(rig.pin(BASE, 1), Err(Error::UnknownDevice));
}

#[test]
fn a9_groups_share_a_domain_if_they_are_alike() {
    let spec = Spec::pages(PAGE);
    let incoherent = Spec {
        coherent: false,
        ..spec.clone()
    };
    let of_another_kind = Spec {
        kind: 1,
        ..spec.clone()
    };
    let table = [
        (spec.clone(), 1),
        (spec, 1),
        (incoherent.clone(), 2),
        (of_another_kind, 3),
        (incoherent, 3),
    ];
    let mut rig = Rig::emulated();
    for (group, (spec, domains)) in (1..).zip(table) {
        rig.attach(group, Some(spec)).expect("attach");
        assert_eq!(rig.host.books.domains.len(), domains, "group {group}");
    }
}

#[test]
fn a9_a_group_must_reach_what_is_mapped() {
    let top = 0u64.wrapping_sub(PAGE);
    // Mappings, the addresses of a group that is attached, and whether it fits.
    let table: [(&[u64], (u64, u64), bool); 8] = [
        (&[], (BASE, u64::MAX), true),
        (&[0], (0, BASE), true),
        (&[0], (PAGE, u64::MAX), false),
        (&[BASE], (BASE, BASE + PAGE - 1), true),
        (&[BASE], (BASE + PAGE, u64::MAX), false),
        (&[BASE], (0, BASE - 1), false),
        (&[0, top], (0, u64::MAX), true),
        (&[top], (0, top - 1), false),
    ];
    for (mapped, aperture, fits) in table {
        let mut rig = Rig::with(&[Some(Spec::pages(PAGE)), None]);
        let mappings = mapped.iter();
        mappings.for_each(|iova| rig.map(*iova, PAGE).expect("map"));
        let spec = Spec {
            aperture,
            ..Spec::pages(PAGE)
        };
        let expected = if fits { Ok(()) } else { Err(Error::Aperture) };
        let attached = rig.attach(2, Some(spec));
        assert_eq!(attached, expected, "{mapped:x?} {aperture:x?}");
    }
    // Two groups without a common address do not fit.
    let low = Spec {
        aperture: (0, BASE - 1),
        ..Spec::pages(PAGE)
    };
    let high = Spec {
        aperture: (BASE, u64::MAX),
        ..Spec::pages(PAGE)
    };
    let mut rig = Rig::with(&[Some(low.clone())]);
    assert_eq!(rig.attach(1, Some(high.clone())), Err(Error::Aperture));
    let mut rig = Rig::with(&[Some(high)]);
    assert_eq!(rig.attach(1, Some(low)), Err(Error::Aperture));
}
