// SPDX-License-Identifier: MIT OR Apache-2.0
//! The order of checks in calls by devices and on groups (rule A9 of
//! docs/rules.md). Each row breaks two rules or more, as in `errno.rs`.

mod support;

use dirty_core::host::{DeviceId, GroupId, PageKind, Prot};
use dirty_core::uapi::*;
use dirty_core::{Errno, Error, Target, Unmap};
use support::conditions::{prepare, But, FREE, MAPPED, OK, TOP};
use support::rig::vaddr;
use support::{errno, Rig, Spec, PAGE};

#[test]
fn a9_pin_pages() {
    let device = DeviceId(9); // without a dma_unmap callback
    let pin = |rig: &mut Rig, device: DeviceId, iova, prot, n| {
        let mut pfns = vec![0; n];
        let pinned = rig
            .container
            .pin_pages(&mut rig.host, device, iova, prot, &mut pfns);
        errno(pinned)
    };
    let open = |kind, but| {
        let mut rig = prepare(kind, but);
        rig.container
            .open_device(device, GroupId(0), false)
            .expect("open");
        rig
    };
    use But::*;
    let (v1, v2) = (VFIO_TYPE1_IOMMU, VFIO_TYPE1v2_IOMMU);
    let zero = DeviceId(0);
    let wrap = TOP;
    #[rustfmt::skip]
    let table = [
        (Errno::EINVAL, "no pages before v1", v1, Nothing, zero, FREE, 0),
        (Errno::EINVAL, "no dma_unmap before the limit", v1, Nothing, device, FREE, 513),
        (Errno::E2BIG, "the limit before v1", v1, Nothing, zero, wrap, 513),
        (Errno::EACCES, "v1 before wrap", v1, Nothing, zero, wrap, 2),
        (Errno::EOVERFLOW, "wrap before vaddr", v2, VaddrInvalid, zero, wrap, 2),
        (Errno::EBUSY, "vaddr before unmapped", v2, VaddrInvalid, zero, FREE, 512),
        (Errno::EINVAL, "unmapped before the host", v2, NoPin, zero, FREE, 512),
        (Errno::EFAULT, "the page before memory", v2, NoPin, zero, MAPPED, 1),
    ];
    for (expected, why, kind, but, device, iova, n) in table {
        let mut rig = open(kind, but);
        let before = rig.host.books.clone();
        assert_eq!(
            pin(&mut rig, device, iova, Prot::READ, n),
            expected,
            "{why}"
        );
        assert_eq!(rig.host.books, before, "{why}");
    }

    let mut rig = Rig::emulated();
    rig.map_prot(MAPPED, PAGE, Prot::READ).expect("map");
    rig.host.pin_fault.arm(1);
    let both = Prot::READ_WRITE;
    assert_eq!(
        pin(&mut rig, zero, MAPPED, both, 1),
        Errno::EPERM,
        "rights before the host"
    );
    rig.host.charge_fault.arm(1);
    assert_eq!(
        pin(&mut rig, zero, MAPPED, Prot::READ, 1),
        Errno::EFAULT,
        "the page before pay"
    );
    assert_eq!(
        pin(&mut rig, zero, MAPPED, Prot::READ, 1),
        Errno::EINTR,
        "pay"
    );
    let pfn = rig.host.pfn(0, vaddr(MAPPED));
    rig.host.kinds = vec![(pfn..pfn + 1, PageKind::NoPage)];
    rig.mem.fault().arm(1);
    rig.host.charge_fault.arm(1);
    assert_eq!(
        pin(&mut rig, zero, MAPPED, Prot::READ, 1),
        Errno::EINVAL,
        "no struct page before memory"
    );
    rig.host.kinds.clear();
    rig.host.charge_fault.arm(0);
    assert_eq!(
        pin(&mut rig, zero, MAPPED, Prot::READ, 1),
        Errno::ENOMEM,
        "memory"
    );
    assert_eq!(pin(&mut rig, zero, MAPPED, Prot::READ, 1), OK);
    rig.host.pin_fault.arm(1);
    rig.host.charge_fault.arm(1);
    assert_eq!(
        pin(&mut rig, zero, MAPPED, Prot::READ, 1),
        OK,
        "a page is pinned once"
    );
    assert_eq!(
        pin(&mut rig, zero, MAPPED, both, 1),
        Errno::EPERM,
        "rights before reuse"
    );
    rig.host.gone = vec![0];
    rig.map(FREE, PAGE).expect_err("no address space");
    (0..2).for_each(|_| rig.unpin(MAPPED, 1));
    assert_eq!(
        pin(&mut rig, zero, MAPPED, Prot::READ, 1),
        Errno::ENODEV,
        "the address space is gone"
    );
}

#[test]
fn a9_dma_rw() {
    use But::*;
    let v2 = VFIO_TYPE1v2_IOMMU;
    let rw = |rig: &mut Rig, iova, data: &mut [u8]| {
        let zero = DeviceId(0);
        let wrote = errno(rig.container.write(&mut rig.host, zero, iova, data));
        let read = errno(rig.container.read(&mut rig.host, zero, iova, data));
        (wrote, read)
    };
    for (expected, but, iova, len) in [
        (Errno::EINVAL, VaddrInvalid, FREE, 0),
        (Errno::EBUSY, VaddrInvalid, FREE, 1),
        (Errno::EINVAL, Nothing, FREE, 1),
    ] {
        let mut rig = prepare(v2, but);
        let got = rw(&mut rig, iova, &mut vec![0; len]);
        assert_eq!(got, (expected, expected), "{len} bytes, {but:?}");
    }
    // The mapping has no memory, so a fault is the last error of all.
    let mut rig = prepare(v2, Nothing);
    for (prot, k) in [(Prot::READ, 0), (Prot::WRITE, 1)] {
        rig.unmap(FREE, PAGE).expect("unmap");
        rig.map_prot(FREE, PAGE, prot).expect("map");
        for other in [0, 1] {
            rig.host.mm = other;
            let got = rw(&mut rig, FREE, &mut [0]);
            let expected = [(Errno::EPERM, Errno::EFAULT), (Errno::EPERM, Errno::EPERM)];
            assert_eq!(got, expected[k], "rights before another's memory");
        }
        rig.host.mm = 0;
    }
    let denied = |e: Error| (e, e.errno());
    let why = |rig: &mut Rig| rig.write(MAPPED, &[0]).map_err(denied);
    rig.host.mm = 1;
    assert_eq!(why(&mut rig), Err((Error::OtherMm, Errno::EFAULT)));
    rig.host.kthread = true;
    assert_eq!(why(&mut rig), Err((Error::BadAddress, Errno::EFAULT)));
    rig.host.gone = vec![0];
    assert_eq!(why(&mut rig), Err((Error::MmGone, Errno::EPERM)));
    rig.host.mm = 0;
}

#[test]
fn a9_attach_group() {
    let conflict = Spec {
        reserved: vec![(MAPPED, MAPPED)],
        isolated_msi: false,
        ..Spec::pages(PAGE)
    };
    let narrow = Spec {
        aperture: (FREE, u64::MAX),
        isolated_msi: false,
        ..Spec::pages(PAGE)
    };
    let shared_msi = Spec {
        isolated_msi: false,
        ..Spec::pages(PAGE)
    };
    let separate = Spec {
        joins: false,
        ..Spec::pages(PAGE)
    };
    use But::*;
    let v2 = VFIO_TYPE1v2_IOMMU;
    let table = [
        (Errno::EBUSY, "vaddr before the IOMMU", VaddrInvalid, None),
        (Errno::ENODEV, "the IOMMU", Nothing, None),
        (
            Errno::EINVAL,
            "reserved before interrupts",
            Nothing,
            Some(conflict),
        ),
        (
            Errno::EINVAL,
            "aperture before interrupts",
            Nothing,
            Some(narrow),
        ),
        (
            Errno::EPERM,
            "interrupts before replay",
            Nothing,
            Some(shared_msi),
        ),
        (Errno::EIO, "replay", Nothing, Some(separate)),
    ];
    for (expected, why, but, spec) in table {
        let mut rig = prepare(v2, but);
        if let Some(spec) = spec {
            rig.host.specs.insert(1, spec);
        }
        let before = rig.host.books.clone();
        rig.host.map_fault.arm(1);
        let got = rig.container.attach_group(&mut rig.host, GroupId(1), false);
        assert_eq!(errno(got), expected, "{why}");
        assert_eq!(rig.host.books, before, "{why}");
        assert!(!rig.container.has_group(GroupId(1)), "{why}");
    }
    let mut rig = prepare(v2, Nothing);
    let again = rig.attach(0, None);
    assert_eq!(again, Err(Error::DuplicateGroup));
}

#[test]
fn a9_attach_looks_at_vaddr_before_it_needs_memory() {
    let mut rig = prepare(VFIO_TYPE1v2_IOMMU, But::Nothing);
    // These fill the list of groups, so that one more needs memory.
    (1..4).for_each(|group| rig.attach(group, Some(Spec::pages(PAGE))).expect("attach"));
    let mut unmap = Unmap::vaddr(Target::All);
    rig.unmap_step(&mut unmap).expect("invalidate");
    rig.mem.fault().arm(1);
    let got = errno(rig.attach(4, Some(Spec::pages(PAGE))));
    rig.mem.fault().arm(0);
    assert_eq!(got, Errno::EBUSY);
}
