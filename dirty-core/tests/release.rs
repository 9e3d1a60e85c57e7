// SPDX-License-Identifier: MIT OR Apache-2.0
//! Releasing memory, pins and charges cannot fail, and what stays pinned stays
//! charged (rules A9 and A10 of docs/rules.md).

mod support;

use dirty_core::host::{DeviceId, GroupId, PageKind, Prot};
use dirty_core::{Errno, Error, Map, Target};
use support::rig::{errno, vaddr, Via};
use support::{Rig, Spec, PAGE};

const BASE: u64 = 0x4000_0000;

#[test]
fn what_takes_things_away_needs_no_memory() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 10 * PAGE).expect("map");
    rig.map(BASE + 300 * PAGE, 70 * PAGE).expect("map");
    rig.pin(BASE, 3).expect("pin");
    rig.start();
    rig.host.add_memory(vaddr(BASE), 10 * PAGE);
    let live = rig.mem.live();
    rig.mem.fault().arm(1);
    for via in Via::ALL {
        let got = rig.get(via, BASE, 1024 * PAGE, PAGE, &mut [0; 16]);
        assert_eq!(got, Ok(()));
    }
    let got = rig.get(Via::Words, BASE, 1024 * PAGE, 8 * PAGE, &mut [0; 16]);
    assert_eq!(got, Ok(()), "at another page size");
    rig.write(BASE, &[1; 5000]).expect("write");
    rig.mark(BASE);
    rig.pin(BASE, 1).expect("one more pin of a page");
    rig.unpin(BASE, 1);
    assert_eq!(rig.mem.live(), live);
    let got = rig.harvest(Via::Ioctl, BASE, 10 * PAGE, PAGE, &mut [0; 16]);
    assert_eq!(got, Ok(10 * PAGE));
    rig.stop();
    rig.unmap_with(Target::All, |rig, iova, size| rig.unpin(iova, size / PAGE))
        .expect("unmap");
    assert!(rig.mem.fault().pending());
    rig.mem.fault().arm(0);
}

#[test]
fn detach_cannot_fail() {
    let spec = Spec {
        joins: false,
        aperture: (0, 1 << 40),
        reserved: vec![(0, 0xfff), (0x5000, 0x5fff)],
        ..Spec::pages(PAGE)
    };
    let mut narrow = 0;
    for n in 0..10 {
        let mut rig = Rig::with(&[Some(spec.clone()), Some(Spec::pages(PAGE)), None]);
        rig.map(BASE, 10 * PAGE).expect("map");
        rig.start();
        rig.mem.fault().arm(n);
        rig.detach(1);
        rig.detach(0);
        rig.mem.fault().arm(0);
        assert_eq!(rig.host.books.pinned(), 0, "{n}");
        assert_eq!(rig.host.books.locked(0), 0, "{n}");
        assert!(rig.host.books.domains.is_empty(), "{n}");
        assert_eq!(rig.dirty(BASE, 10 * PAGE).len(), 10, "{n}");
        rig.map(BASE + 10 * PAGE, PAGE).expect("map");
        // If there was no memory for new ranges, the old and narrower ones
        // stay.
        match rig.map(0, PAGE) {
            Ok(()) => {}
            Err(e) => {
                assert_eq!(e, Error::ForbiddenIova, "{n}");
                narrow += 1;
            }
        }
    }
    assert_eq!(narrow, 1, "one allocation decides");
}

#[test]
fn a_type_goes_with_the_last_group_and_takes_everything_along() {
    let separate = Spec {
        joins: false,
        ..Spec::pages(PAGE)
    };
    let mut rig = Rig::with(&[Some(separate.clone()), Some(separate)]);
    rig.map(BASE, 10 * PAGE).expect("map");
    rig.start();
    rig.pin(BASE, 2).expect("pin");
    rig.detach(1);
    assert_eq!(rig.host.books.pinned(), 12);
    rig.detach(0);
    assert_eq!(rig.host.books, Default::default());
    assert!(!rig.container.has_group(GroupId(0)));
    assert_eq!(rig.tracking(), None);
    assert_eq!(rig.try_start(), Err(Error::NoIommu));
}

/// A group that was attached to the backend behind the container's back.
#[test]
fn a_group_that_the_container_does_not_know_leaves_nothing() {
    let mut rig = Rig::emulated();
    rig.host.specs.insert(7, Spec::pages(PAGE));
    let backend = rig.container.backend_mut().expect("type1");
    let attached = backend.attach_group(&mut rig.host, GroupId(7), false);
    attached.expect("attach");
    rig.map(BASE, 10 * PAGE).expect("map");
    assert_eq!(rig.host.books.pinned(), 10);
    rig.detach(0);
    assert_eq!(rig.host.books, Default::default());
}

#[test]
fn a10_who_pays_for_which_page() {
    let locked = |rig: &Rig| rig.host.books.locked(0);
    let mut rig = Rig::emulated();
    let reserved = rig.host.pfn(0, vaddr(BASE + PAGE));
    rig.host.kinds = vec![(reserved..reserved + 1, PageKind::Reserved)];
    rig.map(BASE, 8 * PAGE).expect("map");
    assert_eq!(locked(&rig), 0);
    rig.pin(BASE, 3).expect("pin");
    rig.pin(BASE, 3).expect("again");
    assert_eq!(locked(&rig), 2, "not twice, and not for a reserved page");
    rig.attach(1, Some(Spec::pages(PAGE))).expect("attach");
    assert_eq!(locked(&rig), 7, "pinned pages are paid already");
    rig.pin(BASE + 5 * PAGE, 1).expect("pin");
    assert_eq!(locked(&rig), 7, "the domain has paid");
    (0..2).for_each(|_| rig.unpin(BASE, 1));
    assert_eq!(locked(&rig), 7, "the domain still has the page");
    rig.detach(1);
    assert_eq!(locked(&rig), 2, "pages 2 and 5 are pinned");
    rig.unpin(BASE + 5 * PAGE, 1);
    assert_eq!(locked(&rig), 1);
    // Two mappings of one page pay twice. CAP_IPC_LOCK lets them exceed the
    // limit.
    rig.host.lock_cap = true;
    rig.host.limit.insert(0, 1);
    let map = Map {
        iova: BASE + 64 * PAGE,
        vaddr: vaddr(BASE + 2 * PAGE),
        size: PAGE,
        prot: Some(Prot::READ),
    };
    rig.try_map(&map).expect("map");
    rig.host.lock_cap = false; // what counts is whether the mapper had it
    rig.pin(BASE + 64 * PAGE, 1).expect("pin");
    assert_eq!(locked(&rig), 2);
    let refused = rig.pin(BASE + 3 * PAGE, 1);
    assert_eq!(errno(refused), Errno::ENOMEM);
    rig.unpin(BASE + 64 * PAGE, 1);
    assert_eq!(locked(&rig), 1);
}

#[test]
fn a10_a_pin_inside_a_page_is_paid_for_when_the_last_domain_goes() {
    // A pin at an iova inside a page is a pin of its own, which the domain's
    // pin of the page does not pay for.
    for (before, after) in [(true, true), (true, false), (false, true)] {
        let mut rig = Rig::emulated();
        rig.map(BASE, 2 * PAGE).expect("map");
        if before {
            rig.pin(BASE + 0x10, 1).expect("pin");
            assert_eq!(rig.host.books.locked(0), 1);
        }
        rig.attach(1, Some(Spec::pages(PAGE))).expect("attach");
        match (before, after) {
            (false, true) => rig.pin(BASE + 0x10, 1).map(|_| ()).expect("pin"),
            (true, false) => rig.unpin(BASE + 0x10, 1),
            _ => {}
        }
        rig.detach(1);
        let due = u64::from(after);
        assert_eq!(rig.host.books.pinned(), due, "{before} {after}");
        assert_eq!(rig.host.books.locked(0), due, "{before} {after}");
        rig.unpin(BASE + 0x10, 1);
        assert_eq!(rig.host.books.locked(0), 0, "{before} {after}");
    }
}

#[test]
fn a10_what_was_never_paid_is_not_paid_back() {
    let mut rig = Rig::with(&[None, Some(Spec::pages(PAGE))]);
    rig.map(BASE, 2 * PAGE).expect("map");
    rig.pin(BASE + 0x10, 1).expect("pin");
    rig.host.limit.insert(0, 0);
    rig.detach(1);
    assert_eq!(rig.host.books.pinned(), 1, "the pin stays");
    assert_eq!(rig.host.books.locked(0), 0, "beyond the limit");
    rig.unpin(BASE + 0x10, 1);
    assert_eq!(rig.host.books.locked(0), 0);
}

#[test]
fn pins_take_few_allocations_and_give_them_back() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 128 * PAGE).expect("map");
    let before = rig.mem.live();
    rig.pin(BASE, 64).expect("pin");
    assert!(rig.mem.live() <= before + 4);
    rig.pin(BASE + 64 * PAGE, 64).expect("pin");
    assert!(rig.mem.live() <= before + 4);
    rig.unpin(BASE, 128);
    assert_eq!(rig.mem.live(), before);
}

/// A pin takes at most 28 bytes, wherever the pins are.
#[test]
fn pins_are_small() {
    for step in [1, 7] {
        let mut rig = Rig::emulated();
        rig.map(BASE, 100_000 * PAGE).expect("map");
        let before = rig.mem.bytes();
        for k in 0..10_000 {
            rig.pin(BASE + k * step * PAGE, 1).expect("pin");
        }
        let bytes = rig.mem.bytes() - before;
        assert!(bytes <= 28 * 10_000, "{bytes} at each {step}th page");
    }
}

/// A caller that counts its own pins learns where an unpin stopped.
#[test]
fn unpin_tells_how_many_pages_it_went_over() {
    let mut rig = Rig::emulated();
    rig.map(BASE, 2 * PAGE).expect("map");
    rig.map(BASE + 3 * PAGE, PAGE).expect("map");
    let mut unpin = |iova, n| {
        let device = DeviceId(0);
        rig.container.unpin_pages(&mut rig.host, device, iova, n)
    };
    assert_eq!(unpin(BASE, 2), Ok(2), "mapped, though not pinned");
    assert_eq!(unpin(BASE, 4), Ok(2), "up to the hole");
    assert_eq!(unpin(BASE + 2 * PAGE, 2), Ok(0), "from the hole on");
    assert_eq!(unpin(BASE + 3 * PAGE, u64::MAX), Ok(1));
    assert_eq!(unpin(BASE, 0), Ok(0));
    // A page that starts outside the mapping and ends inside it does not stop it.
    assert_eq!(unpin(BASE + 2 * PAGE + 0x10, 1), Ok(1));
    assert_eq!(unpin(0u64.wrapping_sub(PAGE), 2), Ok(0));
}

/// The runs of a mapping start anywhere, whatever the host pins at a time.
#[test]
fn runs_are_found_again() {
    for (piece, first, batch) in [(8, 0, 0), (8, 4, 0), (8, 3, 5), (6, 1, 0), (6, 0, 4)] {
        let mut rig = Rig::with(&[Some(Spec::pages(PAGE))]);
        let before = rig.host.books.clone();
        rig.host.piece = piece;
        rig.host.pin_batch = batch;
        let at = BASE + first * PAGE;
        rig.map(at, 40 * PAGE).expect("map");
        assert_eq!(rig.host.books.pinned(), 40, "{piece} {first} {batch}");
        assert_eq!(rig.host.books.locked(0), 40, "{piece} {first} {batch}");
        rig.unmap(at, 40 * PAGE).expect("unmap");
        assert_eq!(rig.host.books, before, "{piece} {first} {batch}");
    }
}

/// Scattered pages are unmapped 512 at a time, or one by one if there is no memory to
/// note them in.
#[test]
fn scattered_pages_are_unmapped_together() {
    for (fault, unmaps) in [(0, 2), (1, 600)] {
        let mut rig = Rig::with(&[Some(Spec::pages(PAGE))]);
        let before = rig.host.books.clone();
        rig.host.scattered = true;
        rig.map(BASE, 600 * PAGE).expect("map");
        rig.mem.fault().arm(fault);
        rig.unmap(BASE, 600 * PAGE).expect("unmap");
        assert!(!rig.mem.fault().pending(), "it needs memory");
        assert_eq!(rig.host.unmaps, unmaps);
        assert_eq!(rig.host.books, before);
    }
}
