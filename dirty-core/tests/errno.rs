// SPDX-License-Identifier: MIT OR Apache-2.0
//! The order of checks in ioctls: each row breaks two rules or more, and the
//! errno shows which was checked first. The numbers in the rows are the steps
//! of rules A2 to A6 in docs/rules.md.

mod support;

use std::collections::BTreeSet;

use dirty_core::host::{Prot, UserMemory};
use dirty_core::uapi::*;
use dirty_core::{Dest, Errno, Error, Map, Options, Target, Unmap};
use support::conditions::{prepare, But, FREE, MAPPED, OK, RESERVED, TOP};
use support::rig::{pgsize, BITMAP_BYTES};
use support::{errno, pack, Rig, ARG, BITMAP, PAGE};

/// A user address where nothing is mapped.
const HOLE: u64 = BITMAP + BITMAP_BYTES;
/// An address that is not a user address.
const KERNEL: u64 = 1 << 63;

const READ: u32 = 1;
const VADDR: u32 = 4;

/// Makes an ioctl with an argument of which only the first `readable` bytes can
/// be read.
fn ioctl(rig: &mut Rig, nr: u32, arg: &[u8], readable: u64) -> Errno {
    let addr = ARG + PAGE - readable;
    let head = &arg[..arg.len().min(readable as usize)];
    rig.host.copy_to_user(addr, head).expect("argument");
    errno(rig.ioctl_at(nr, addr, |_, _, _| {}))
}

#[test]
fn a3_get_info() {
    let table = [
        (Errno::EFAULT, "1 before 2", 0, 15),
        (Errno::EINVAL, "2 before 6", 15, 16),
        (OK, "no more than argsz is written", 16, 16),
        (OK, "no room for capabilities", 24, 24),
        (OK, "one byte too few for them", 24 + 80 + 15, 24),
        (Errno::EFAULT, "6", 24 + 80 + 16, 24),
        (OK, "room for everything", 24 + 80 + 16, 24 + 80 + 16),
    ];
    for (expected, why, argsz, readable) in table {
        let mut rig = prepare(VFIO_TYPE1v2_IOMMU, But::Nothing);
        let arg = pack(&[argsz, 0], &[0; 14]);
        let got = ioctl(&mut rig, VFIO_IOMMU_GET_INFO, &arg, readable);
        assert_eq!(got, expected, "{why}");
    }
}

#[test]
fn a4_map_dma() {
    use But::*;
    let many = PAGE << 31;
    // Errno, why, condition; readable, argsz, flags; vaddr, iova, size.
    type Row = (Errno, &'static str, But, [u32; 3], [u64; 3]);
    #[rustfmt::skip]
    let table: [Row; 31] = [
        (Errno::EFAULT, "1 before 2", Nothing, [31, 0, 8], [0, FREE, PAGE]),
        (Errno::EINVAL, "2 before 5, argsz", Nothing, [32, 31, READ], [0, TOP, 2 * PAGE]),
        (Errno::EINVAL, "2 before 5, flags", Nothing, [32, 32, 8 | READ], [0, TOP, 2 * PAGE]),
        (Errno::EINVAL, "4 before 8", Nothing, [32, 32, VADDR], [0, FREE, 0]),
        (Errno::EINVAL, "4 before 9", Nothing, [32, 32, READ], [0, MAPPED, 0]),
        (Errno::EOVERFLOW, "5 before 6, no flag", Nothing, [32, 32, 0], [0, TOP, 2 * PAGE]),
        (Errno::EOVERFLOW, "5 before 6, all flags", Nothing, [32, 32, 7], [0, TOP, 2 * PAGE]),
        (Errno::EOVERFLOW, "5 before 6, vaddr", Nothing, [32, 32, 7], [TOP, FREE, 2 * PAGE]),
        (Errno::EOVERFLOW, "5 before 7", Nothing, [32, 32, READ], [0, TOP + 1, PAGE]),
        (Errno::EOVERFLOW, "5 before 7, vaddr", Nothing, [32, 32, READ], [TOP + 1, FREE, PAGE]),
        (Errno::EOVERFLOW, "5 before 8", Nothing, [32, 32, VADDR], [TOP, FREE, 2 * PAGE]),
        (Errno::EINVAL, "6 before 8", Nothing, [32, 32, VADDR | READ], [0, FREE, PAGE]),
        (Errno::EINVAL, "6 before 9", Nothing, [32, 32, 0], [0, MAPPED, PAGE]),
        (Errno::EINVAL, "7 before 8, vaddr", Nothing, [32, 32, VADDR], [1, FREE, PAGE]),
        (Errno::EINVAL, "7 before 8, iova", Nothing, [32, 32, VADDR], [0, FREE + 1, PAGE]),
        (Errno::EINVAL, "7 before 9, iova", Nothing, [32, 32, READ], [0, MAPPED + 1, PAGE]),
        (Errno::EINVAL, "7 before 9, size", Nothing, [32, 32, READ], [0, MAPPED, PAGE + 1]),
        (Errno::EINVAL, "7 before 10", Full, [32, 32, READ], [0, FREE + 1, PAGE]),
        (Errno::ENOENT, "8 before 10, 11", Full, [32, 32, VADDR], [0, RESERVED, PAGE]),
        (Errno::EINVAL, "8, valid, before 9, 10", Full, [32, 32, VADDR], [0, MAPPED, 2 * PAGE]),
        (Errno::EINVAL, "8, other range, before pay", OtherMm, [32, 32, VADDR], [0, MAPPED, PAGE]),
        (Errno::ENOMEM, "8, pay", OtherMm, [32, 32, VADDR], [0, MAPPED, 2 * PAGE]),
        (OK, "8, all well, and 9 to 14 do not count", VaddrInvalid, [32, 32, VADDR], [0, MAPPED, 2 * PAGE]),
        (Errno::EEXIST, "9 before 10", Full, [32, 32, READ], [0, MAPPED, PAGE]),
        (Errno::EEXIST, "9 before 11", Nothing, [32, 32, READ], [0, MAPPED, RESERVED]),
        (Errno::EEXIST, "9 before 12", NoMemory, [32, 32, READ], [0, MAPPED, PAGE]),
        (Errno::ENOSPC, "10 before 11", Full, [32, 32, READ], [0, RESERVED, PAGE]),
        (Errno::EINVAL, "11 before 12", NoMemory, [32, 32, READ], [0, RESERVED, PAGE]),
        (Errno::EINVAL, "11 before 13", NoPin, [32, 32, READ], [0, RESERVED, PAGE]),
        (Errno::EINTR, "13, pay", NoCharge, [32, 32, READ], [0, FREE, PAGE]),
        (Errno::EFAULT, "13 before 14", NoPin, [32, 32, READ], [0, 1 << 32, many]),
    ];
    for (expected, why, but, [readable, argsz, flags], words) in table {
        let mut rig = prepare(VFIO_TYPE1v2_IOMMU, but);
        if words[2] == many {
            rig.start();
        }
        let before = rig.host.books.clone();
        let arg = pack(&[argsz, flags], &words);
        let got = ioctl(&mut rig, VFIO_IOMMU_MAP_DMA, &arg, readable.into());
        assert_eq!(got, expected, "{why}");
        rig.mem.fault().arm(0);
        assert!(got == OK || rig.host.books == before, "{why}");
        rig.host.mm = 0;
    }
    // 12 before 13: without memory no page is pinned.
    let mut rig = prepare(VFIO_TYPE1v2_IOMMU, NoMemory);
    rig.host.pin_fault.arm(1);
    assert_eq!(errno(rig.map(FREE, PAGE)), Errno::ENOMEM);
    assert!(rig.host.pin_fault.pending());
}

#[test]
fn a5_unmap_dma() {
    use But::*;
    const GET: u32 = 1;
    const ALL: u32 = 2;
    let half = MAPPED + PAGE;
    // Errno, why, condition; readable, argsz, flags; iova, size, pgsize, bytes,
    // data.
    type Row = (Errno, &'static str, But, [u32; 3], [u64; 5]);
    #[rustfmt::skip]
    let table: [Row; 32] = [
        (Errno::EFAULT, "1 before 2", Nothing, [23, 0, 8], [0; 5]),
        (Errno::EINVAL, "2 before 4, argsz", Nothing, [24, 23, GET], [0; 5]),
        (Errno::EINVAL, "2 before 4, flags", Nothing, [24, 48, 8 | GET], [0; 5]),
        (Errno::EINVAL, "2 before 5", Emulated, [24, 23, VADDR], [0; 5]),
        (Errno::EINVAL, "3 before 4", Nothing, [24, 48, GET | ALL], [0; 5]),
        (Errno::EINVAL, "3 before 5", Emulated, [48, 48, GET | VADDR], [MAPPED, 2 * PAGE, PAGE, 8, BITMAP]),
        (Errno::EINVAL, "4: argsz before copy", Nothing, [24, 47, GET], [MAPPED, PAGE, 0, 0, 0]),
        (Errno::EFAULT, "4: copy before range", Nothing, [47, 48, GET], [MAPPED, PAGE, PAGE, 8, KERNEL]),
        (Errno::EFAULT, "4 before 7", Nothing, [47, 48, GET], [1, PAGE, 0, 0, 0]),
        (Errno::EINVAL, "4, range, before 8", Nothing, [48, 48, GET], [TOP, 2 * PAGE, PAGE, 8, KERNEL]),
        (Errno::EINVAL, "4, test T, before 8", Nothing, [48, 48, GET], [TOP, 2 * PAGE, PAGE, 7, BITMAP]),
        (Errno::EINVAL, "4, pgsize 0, before 8", Nothing, [48, 48, GET], [TOP, 2 * PAGE, 0, 8, BITMAP]),
        (Errno::EBUSY, "5 before 7", Emulated, [24, 24, VADDR], [1, PAGE, 0, 0, 0]),
        (Errno::EBUSY, "5 before 8, ALL", Emulated, [24, 24, VADDR | ALL], [PAGE, PAGE, 0, 0, 0]),
        (Errno::EBUSY, "5 before 8, wraps", Emulated, [24, 24, VADDR], [TOP, 2 * PAGE, 0, 0, 0]),
        (Errno::EBUSY, "5 before 10", Emulated, [24, 24, VADDR], [half, PAGE, 0, 0, 0]),
        (Errno::EINVAL, "7 before 8", Nothing, [24, 24, 0], [TOP + 1, PAGE, 0, 0, 0]),
        (Errno::EINVAL, "8: size before wrap", Nothing, [24, 24, 0], [TOP, PAGE + 1, 0, 0, 0]),
        (Errno::EINVAL, "8: size 0 before 10", Nothing, [24, 24, 0], [half, 0, 0, 0, 0]),
        (Errno::EINVAL, "8: ALL takes no range, before 11", Pinned, [24, 24, ALL], [0, PAGE, 0, 0, 0]),
        (Errno::EOVERFLOW, "8 before 9, tracking", Nothing, [48, 48, GET], [TOP, 2 * PAGE, PAGE, 8, BITMAP]),
        (Errno::EOVERFLOW, "8 before 9, pgsize", Tracking, [48, 48, GET], [TOP, 2 * PAGE, 2048, 8, BITMAP]),
        (Errno::EOVERFLOW, "8 before 10", Nothing, [24, 24, 0], [half, PAGE.wrapping_neg(), 0, 0, 0]),
        (Errno::EINVAL, "9, tracking, before 11", Nothing, [48, 48, GET], [MAPPED, 2 * PAGE, PAGE, 8, HOLE]),
        (Errno::EINVAL, "9, pgsize, before 11", Pinned, [48, 48, GET], [MAPPED, 2 * PAGE, 2048, 8, HOLE]),
        (Errno::EINVAL, "10, start, before 11", Pinned, [24, 24, 0], [half, PAGE, 0, 0, 0]),
        (Errno::EINVAL, "10, end, before 11", Pinned, [48, 48, GET], [MAPPED, PAGE, PAGE, 8, HOLE]),
        (Errno::EINVAL, "11: invalid already", VaddrInvalid, [24, 24, VADDR], [MAPPED, 2 * PAGE, 0, 0, 0]),
        (Errno::EBUSY, "11: pins before copy", Pinned, [48, 48, GET], [MAPPED, 2 * PAGE, PAGE, 8, HOLE]),
        (Errno::EFAULT, "11: copy", Tracking, [48, 48, GET], [MAPPED, 2 * PAGE, PAGE, 8, HOLE]),
        (OK, "a hole is no error", Tracking, [48, 48, GET], [FREE, 2 * PAGE, PAGE, 8, HOLE]),
        (OK, "ALL and VADDR", Nothing, [24, 24, ALL | VADDR], [0; 5]),
    ];
    for (expected, why, but, [readable, argsz, flags], words) in table {
        let mut rig = prepare(VFIO_TYPE1v2_IOMMU, but);
        let arg = pack(&[argsz, flags], &words);
        let before = rig.host.books.clone();
        let got = ioctl(&mut rig, VFIO_IOMMU_UNMAP_DMA, &arg, readable.into());
        assert_eq!(got, expected, "{why}");
        assert_eq!(rig.host.books, before, "{why}");
    }
}

#[test]
fn a6_dirty_pages() {
    use But::*;
    const START: u32 = 1;
    const STOP: u32 = 2;
    const GET: u32 = 4;
    let (v1, v2) = (VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU);
    // Errno, why, type, condition; readable, argsz, flags; iova, size, pgsize,
    // bytes, data.
    type Row = (Errno, &'static str, u64, But, [u32; 3], [u64; 5]);
    #[rustfmt::skip]
    let table: [Row; 25] = [
        (Errno::EACCES, "0 before 1", v1, Nothing, [0, 0, 0], [0; 5]),
        (Errno::EACCES, "0 before 2", v1, Nothing, [48, 0, 0], [0; 5]),
        (Errno::EFAULT, "1 before 2", v2, Nothing, [7, 0, 8], [0; 5]),
        (Errno::EINVAL, "2 before 5, argsz", v2, Nothing, [8, 7, GET], [0; 5]),
        (Errno::EINVAL, "2 before 5, flags", v2, Nothing, [8, 48, 8 | GET], [0; 5]),
        (Errno::EINVAL, "3 before 5, START and GET", v2, Nothing, [8, 48, START | GET], [0; 5]),
        (Errno::EINVAL, "3 before 5, STOP and GET", v2, Nothing, [8, 48, STOP | GET], [0; 5]),
        (Errno::EINVAL, "3: START and STOP", v2, Nothing, [8, 8, START | STOP], [0; 5]),
        (Errno::EINVAL, "3: no flag", v2, Nothing, [8, 8, 0], [0; 5]),
        (Errno::EINVAL, "4 before 5", v2, Nothing, [8, 47, GET], [0; 5]),
        (Errno::EFAULT, "5 before 7", v2, Nothing, [47, 48, GET], [0; 5]),
        (Errno::EINVAL, "7 before 16", v2, Tracking, [48, 48, GET], [MAPPED, 0, PAGE, 8, HOLE]),
        (Errno::EOVERFLOW, "8 before 9", v2, Tracking, [48, 48, GET], [TOP, 2 * PAGE, PAGE, 8, KERNEL]),
        (Errno::EOVERFLOW, "8 before 10", v2, Tracking, [48, 48, GET], [TOP, 2 * PAGE, PAGE, 0, BITMAP]),
        (Errno::EOVERFLOW, "8 before 11", v2, Tracking, [48, 48, GET], [TOP, 2 * PAGE, 0, 8, BITMAP]),
        (Errno::EOVERFLOW, "8 before 12", v2, Tracking, [48, 48, GET], [TOP + 1, PAGE, PAGE, 8, BITMAP]),
        (Errno::EOVERFLOW, "8 before 14", v2, Nothing, [48, 48, GET], [TOP, 2 * PAGE, PAGE, 8, BITMAP]),
        (Errno::EINVAL, "10 before 16", v2, Tracking, [48, 48, GET], [MAPPED, 2 * PAGE, PAGE, 7, HOLE]),
        (Errno::EINVAL, "11 before 16", v2, Tracking, [48, 48, GET], [MAPPED, 2 * PAGE, 2048, 8, HOLE]),
        (Errno::EINVAL, "12 before 16", v2, Tracking, [48, 48, GET], [MAPPED - 1, 3 * PAGE, PAGE, 8, HOLE]),
        (Errno::EINVAL, "13 before 16", v2, Tracking, [48, 48, GET], [MAPPED, 2 * PAGE + 1, PAGE, 8, HOLE]),
        (Errno::EINVAL, "14 before 16", v2, Nothing, [48, 48, GET], [MAPPED, 2 * PAGE, PAGE, 8, HOLE]),
        (Errno::EINVAL, "15 before 16", v2, Tracking, [48, 48, GET], [MAPPED, PAGE, PAGE, 8, HOLE]),
        (Errno::EFAULT, "16", v2, Tracking, [48, 48, GET], [MAPPED, 2 * PAGE, PAGE, 8, HOLE]),
        (OK, "16: nothing to copy", v2, Tracking, [48, 48, GET], [FREE, 2 * PAGE, PAGE, 8, HOLE]),
    ];
    for (expected, why, kind, but, [readable, argsz, flags], words) in table {
        let mut rig = prepare(kind, but);
        let arg = pack(&[argsz, flags], &words);
        let got = ioctl(&mut rig, VFIO_IOMMU_DIRTY_PAGES, &arg, readable.into());
        assert_eq!(got, expected, "{why}");
    }
    let mut rig = Rig::emulated();
    rig.map(0, PAGE << 31).expect("map");
    rig.mem.fault().arm(1);
    assert_eq!(
        errno(rig.try_start()),
        Errno::EINVAL,
        "too many pages before no memory"
    );
    rig.mem.fault().arm(0);
}

#[test]
fn a2_set_iommu_and_the_generic_layer() {
    let set = |rig: &mut Rig, kind| errno(rig.ioctl_at(VFIO_SET_IOMMU, kind, |_, _, _| {}));
    let mut rig = Rig::empty(Options::default());
    assert_eq!(set(&mut rig, 6), Errno::EINVAL, "no group");
    rig.attach(0, None).expect("attach");
    for kind in [0, 2, 4, 6, 7, 8, 10, u64::MAX] {
        assert_eq!(set(&mut rig, kind), Errno::ENODEV, "type {kind}");
    }
    assert_eq!(set(&mut rig, 9), Errno::EINVAL, "an extension");
    let ioctls = [0x3b70, 0x3b71, 0x3b72, 0x3b75, 0x3b76, 0];
    for nr in ioctls {
        let got = errno(rig.ioctl_at(nr, 0, |_, _, _| {}));
        assert_eq!(got, Errno::EINVAL, "{nr:#x} without a type");
    }
    assert_eq!(rig.open(0), Err(Error::NoIommu));
    assert_eq!(set(&mut rig, VFIO_TYPE1v2_IOMMU), OK);
    for kind in [1, 3, 6, 9] {
        assert_eq!(set(&mut rig, kind), Errno::EINVAL, "set already");
    }
    for nr in [0x3b76, 0x3b67, 0x3b74, 0] {
        let got = errno(rig.ioctl_at(nr, 0, |_, _, _| {}));
        assert_eq!(got, Errno::ENOTTY, "{nr:#x}");
    }
    rig.detach(0);
    let got = errno(rig.ioctl_at(0x3b76, 0, |_, _, _| {}));
    assert_eq!(got, Errno::EINVAL, "the type goes with the last group");
}

#[test]
fn a_typed_unmap_reports_only_mappings_of_a_range_that_go() {
    let mut rig = prepare(VFIO_TYPE1v2_IOMMU, But::Tracking);
    let target = Target::Range {
        iova: MAPPED,
        size: 2 * PAGE,
    };
    for mut unmap in [Unmap::new(Target::All), Unmap::vaddr(target)] {
        let mut words = [0];
        let report = Dest::Words(&mut words);
        let page = pgsize(PAGE);
        let backend = rig.container.backend_mut().expect("type1");
        let step = backend.unmap_dirty(&mut rig.host, &mut unmap, page, report);
        assert_eq!(step, Err(Error::FlagCombination));
    }
}

#[test]
fn an_errno_prints_as_its_name() {
    for (errno, text) in [(Errno::EIO, "EIO"), (Errno(1234), "E1234")] {
        assert_eq!(errno.to_string(), text);
        assert_eq!(format!("{errno:?}"), text);
    }
}

#[test]
fn every_cause_has_an_errno_and_a_text_of_its_own() {
    let carried = [
        Error::Pin(Errno::EIO),
        Error::Charge(Errno::EIO),
        Error::Iommu(Errno::EIO),
        Error::Mm(Errno::EIO),
    ];
    let mut texts = BTreeSet::new();
    for error in Error::ALL.iter().chain(&carried) {
        assert!(error.errno().name().is_some(), "{error:?}");
        assert!(error.errno().0 > 0, "{error:?}");
        assert!(texts.insert(error.to_string()), "{error:?}: {error}");
    }
    assert_eq!(texts.len(), Error::ALL.len() + carried.len());
}

#[test]
fn typed_calls_check_in_the_same_order() {
    let mut rig = prepare(VFIO_TYPE1v2_IOMMU, But::Nothing);
    let mut map = |iova, size, prot| {
        let vaddr = 0;
        let map = Map {
            iova,
            vaddr,
            size,
            prot,
        };
        errno(rig.try_map(&map))
    };
    assert_eq!(map(TOP, 2 * PAGE, Some(Prot(8))), Errno::EOVERFLOW);
    assert_eq!(map(MAPPED, PAGE, Some(Prot(8))), Errno::EINVAL);
    assert_eq!(map(MAPPED, PAGE, Some(Prot(0))), Errno::EINVAL);
    assert_eq!(map(FREE + 1, PAGE, None), Errno::EINVAL);
    assert_eq!(map(FREE, PAGE, None), Errno::ENOENT);
}
