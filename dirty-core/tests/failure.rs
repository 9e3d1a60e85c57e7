// SPDX-License-Identifier: MIT OR Apache-2.0
//! The n-th allocation, pin, IOMMU mapping or charge of a call fails, for every
//! n from 1 until the call succeeds. A call that fails must change nothing, and
//! must succeed when it is made again.

mod support;

use std::ops::Range;

use dirty_core::host::PageKind;
use dirty_core::uapi::*;
use dirty_core::{Dest, Errno, Error, Map, Options, Target, Unmap};
use support::rig::{errno, vaddr, Snapshot};
use support::{Rig, Spec, ARG, PAGE};

const BASE: u64 = 0x4000_0000;
/// The number of pages whose dirty bits are compared.
const SPAN: u64 = 1024;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Alloc,
    Pin,
    Map,
    Charge,
    /// The limit of locked memory leaves room for n - 1 pages.
    Limit,
}

impl Fault {
    fn arm(self, rig: &mut Rig, n: u64) {
        match self {
            Fault::Alloc => rig.mem.fault().arm(n),
            Fault::Pin => rig.host.pin_fault.arm(n),
            Fault::Map => rig.host.map_fault.arm(n),
            Fault::Charge => rig.host.charge_fault.arm(n),
            Fault::Limit => {
                let mm = rig.host.mm;
                let limit = rig.host.books.locked(mm) + n - 1;
                rig.host.limit.insert(mm, limit);
            }
        }
    }

    /// Disarms everything. Returns whether an armed fault has struck.
    fn disarm(rig: &mut Rig) -> bool {
        let faults = [
            rig.mem.fault(),
            &rig.host.pin_fault,
            &rig.host.map_fault,
            &rig.host.charge_fault,
        ];
        let limited = !rig.host.limit.is_empty();
        let pending = faults.iter().any(|fault| fault.pending());
        faults.iter().for_each(|fault| fault.arm(0));
        rig.host.limit.clear();
        !pending && !limited
    }

    fn errno(self) -> Errno {
        match self {
            Fault::Alloc | Fault::Limit => Errno::ENOMEM,
            Fault::Pin => Errno::EFAULT,
            Fault::Map => Errno::EIO,
            Fault::Charge => Errno::EINTR,
        }
    }
}

/// A call that may fail, and the state it is made in.
struct Scenario<'a> {
    setup: &'a dyn Fn() -> Rig,
    call: &'a dyn Fn(&mut Rig) -> Result<(), Error>,
    /// The faults, and how many values of n each must have at least.
    faults: &'a [(Fault, u64)],
    /// How many allocations a failed call may keep, as spare room in lists.
    spare: usize,
    /// Pages that a failed call may leave dirty.
    touched: Range<u64>,
}

impl Scenario<'_> {
    fn observe(rig: &mut Rig) -> (Snapshot, Vec<u64>) {
        let dirty = match rig.tracking() {
            Some(page) => {
                let mut words = vec![0; SPAN.div_ceil(64) as usize];
                let report = Dest::Words(&mut words);
                let size = SPAN * PAGE;
                let backend = rig.container.backend_mut().expect("an IOMMU type");
                backend
                    .get_bitmap(&mut rig.host, BASE, size, page, report)
                    .expect("get");
                support::words::bits(&words)
            }
            None => Vec::new(),
        };
        (rig.snapshot(), dirty)
    }

    fn check(&self) {
        let mut control = (self.setup)();
        let before = Self::observe(&mut control);
        (self.call)(&mut control).expect("no fault");
        let after = Self::observe(&mut control);
        for (fault, least) in self.faults {
            let struck = (1..).find(|n| !self.strike(*fault, *n, &before, &after));
            let struck = struck.unwrap_or(0) - 1;
            assert!(struck >= *least, "{fault:?} struck {struck} times");
        }
    }

    /// Makes the call twice with the `n`-th thing failing, then once without a
    /// fault. Returns false if there is no n-th.
    fn strike(
        &self,
        fault: Fault,
        n: u64,
        before: &(Snapshot, Vec<u64>),
        after: &(Snapshot, Vec<u64>),
    ) -> bool {
        let mut rig = (self.setup)();
        let mut live = rig.mem.live() + self.spare;
        for round in 0..2 {
            fault.arm(&mut rig, n);
            let result = (self.call)(&mut rig);
            let reached = Fault::disarm(&mut rig);
            if result.is_ok() {
                assert!(!reached, "{fault:?} {n} went unnoticed");
                assert_eq!(Self::observe(&mut rig).0, after.0, "{fault:?} {n}");
                // In the second round memory that the first has kept may
                // suffice.
                assert!(round == 0 || fault == Fault::Alloc, "{fault:?} {n}");
                return round != 0;
            }
            assert_eq!(errno(result), fault.errno(), "{fault:?} {n}");
            assert!(rig.mem.live() <= live, "{fault:?} {n}: memory");
            live = rig.mem.live();
            let (snapshot, mut dirty) = Self::observe(&mut rig);
            assert_eq!(snapshot, before.0, "{fault:?} {n}");
            if round == 0 {
                let may = |page: &u64| self.touched.contains(page);
                dirty.retain(|page| !may(page) || before.1.contains(page));
                assert_eq!(dirty, before.1, "{fault:?} {n}");
            }
        }
        (self.call)(&mut rig).expect("the fault is over");
        assert_eq!(Self::observe(&mut rig), *after, "{fault:?} {n}");
        true
    }
}

/// Two IOMMU groups with a domain each. The host pins few pages at a time, none
/// of them neighbours, and one page is reserved.
fn two_domains() -> Rig {
    let separate = Spec {
        joins: false,
        ..Spec::pages(PAGE)
    };
    let mut rig = Rig::with(&[Some(separate.clone()), Some(separate)]);
    scatter(&mut rig);
    rig.map(BASE + 512 * PAGE, 3 * PAGE).expect("map");
    rig
}

fn scatter(rig: &mut Rig) {
    rig.host.scattered = true;
    rig.host.pin_batch = 3;
    let pfn = rig.host.pfn(0, vaddr(BASE + PAGE));
    rig.host.kinds = vec![(pfn..pfn + 1, PageKind::Reserved)];
}

/// Emulated groups and several mappings with pins; with dirty pages if
/// `tracking`.
fn pinned(tracking: bool) -> Rig {
    let mut rig = Rig::emulated();
    scatter(&mut rig);
    rig.map(BASE, 10 * PAGE).expect("map");
    rig.map(BASE + 10 * PAGE, 100 * PAGE).expect("map");
    rig.map(BASE + 300 * PAGE, 70 * PAGE).expect("map");
    rig.pin(BASE, 3).expect("pin");
    rig.pin(BASE + 9 * PAGE, 2).expect("pin");
    rig.pin(BASE + 9 * PAGE, 1).expect("pin twice");
    if tracking {
        rig.start();
        rig.mark(BASE + 5 * PAGE);
        rig.mark(BASE + 369 * PAGE);
    }
    rig
}

#[test]
fn start() {
    Scenario {
        setup: &|| pinned(false),
        call: &|rig| rig.try_start(),
        faults: &[(Fault::Alloc, 4)],
        spare: 0,
        touched: 0..0,
    }
    .check();
}

#[test]
fn map_without_a_domain() {
    for (tracking, allocations) in [(false, 1), (true, 2)] {
        Scenario {
            setup: &|| pinned(tracking),
            call: &|rig| rig.map(BASE + 200 * PAGE, 5 * PAGE),
            faults: &[(Fault::Alloc, allocations)],
            spare: 0,
            touched: 0..0,
        }
        .check();
    }
}

#[test]
fn map_with_domains() {
    for (tracking, allocations) in [(false, 1), (true, 2)] {
        for neighbours in [false, true] {
            let setup = || {
                let mut rig = two_domains();
                rig.host.scattered = !neighbours;
                if neighbours {
                    rig.host.pin_batch = 0;
                }
                if tracking {
                    rig.start();
                }
                rig
            };
            let maps = if neighbours { 2 } else { 20 };
            let charges = if neighbours { 1 } else { 4 };
            Scenario {
                setup: &setup,
                call: &|rig| rig.map(BASE, 10 * PAGE),
                faults: &[
                    (Fault::Alloc, allocations),
                    (Fault::Pin, 10),
                    (Fault::Map, maps),
                    (Fault::Charge, charges),
                    (Fault::Limit, 9),
                ],
                spare: 0,
                touched: 0..0,
            }
            .check();
        }
    }
}

#[test]
fn map_of_more_than_a_batch() {
    // Neighbouring pages, in batches of 64, so that runs go on in the next
    // batch.
    let setup = || {
        let mut rig = two_domains();
        rig.host.scattered = false;
        rig.host.pin_batch = 64;
        rig
    };
    Scenario {
        setup: &setup,
        call: &|rig| rig.map(BASE, 150 * PAGE),
        faults: &[(Fault::Pin, 150), (Fault::Map, 2), (Fault::Charge, 3)],
        spare: 0,
        touched: 0..0,
    }
    .check();
}

#[test]
fn attach_the_first_domain_with_mappings_to_replay() {
    for tracking in [false, true] {
        Scenario {
            setup: &|| pinned(tracking),
            call: &|rig| rig.attach(1, Some(Spec::pages(PAGE))),
            // 180 pages: 5 are pinned already, and one of the others is
            // reserved.
            faults: &[
                (Fault::Alloc, 2),
                (Fault::Pin, 180),
                (Fault::Map, 180),
                (Fault::Charge, 60),
                (Fault::Limit, 175),
            ],
            spare: 3,
            touched: 0..0,
        }
        .check();
    }
}

#[test]
fn attach_one_more_domain_with_mappings_to_replay() {
    let setup = || {
        let mut rig = two_domains();
        // The two mappings are neighbours.
        rig.map(BASE, 70 * PAGE).expect("map");
        rig.map(BASE + 70 * PAGE, 2 * PAGE).expect("map");
        // These fill the list of groups, so that one more needs memory.
        (2..4).for_each(|group| rig.attach(group, None).expect("attach"));
        rig.start();
        rig
    };
    let spec = Spec {
        reserved: vec![(0, 1), (BASE - 2, BASE - 1)],
        ..Spec::pages(PAGE)
    };
    Scenario {
        setup: &setup,
        call: &|rig| rig.attach(4, Some(spec.clone())),
        faults: &[(Fault::Alloc, 3), (Fault::Map, 75)],
        spare: 0,
        touched: 0..0,
    }
    .check();
}

#[test]
fn attach_before_a_type_is_set() {
    Scenario {
        setup: &|| Rig::empty(Options::default()),
        call: &|rig| rig.attach(0, None),
        faults: &[(Fault::Alloc, 1)],
        spare: 0,
        touched: 0..0,
    }
    .check();
}

#[test]
fn set_iommu_with_several_groups() {
    let setup = || {
        let mut rig = Rig::empty(Options::default());
        let separate = Spec {
            joins: false,
            reserved: vec![(0x1000, 0x1fff), (0x5000, 0x5fff)],
            ..Spec::pages(PAGE)
        };
        for group in 0..6 {
            let spec = (group % 3 != 0).then(|| separate.clone());
            rig.attach(group, spec).expect("attach");
        }
        rig
    };
    Scenario {
        setup: &setup,
        call: &|rig| rig.container.set_iommu(&mut rig.host, VFIO_TYPE1v2_IOMMU),
        faults: &[(Fault::Alloc, 7)],
        spare: 0,
        touched: 0..0,
    }
    .check();
}

#[test]
fn pin_pages() {
    // 100 pages from page 8 on, in two mappings. 3 are pinned already; some lie
    // in chunks of pins that exist, some in chunks that do not.
    for tracking in [false, true] {
        Scenario {
            setup: &|| pinned(tracking),
            call: &|rig| rig.pin(BASE + 8 * PAGE, 100).map(|_| ()),
            faults: &[
                (Fault::Alloc, 3),
                (Fault::Pin, 98),
                (Fault::Charge, 98),
                (Fault::Limit, 98),
            ],
            spare: 1,
            touched: 8..108,
        }
        .check();
    }
}

#[test]
fn the_first_pins_of_tracked_mappings() {
    // Both mappings get memory for pinned bits, before their first page is pinned.
    // What fails later gives it back.
    let setup = || {
        let mut rig = Rig::emulated();
        scatter(&mut rig);
        rig.map(BASE, 10 * PAGE).expect("map");
        rig.map(BASE + 10 * PAGE, 700 * PAGE).expect("map");
        rig.start();
        rig.mark(BASE + 5 * PAGE);
        rig
    };
    Scenario {
        setup: &setup,
        call: &|rig| rig.pin(BASE + 8 * PAGE, 5).map(|_| ()),
        faults: &[
            (Fault::Alloc, 4),
            (Fault::Pin, 5),
            (Fault::Charge, 4),
            (Fault::Limit, 4),
        ],
        spare: 0,
        touched: 8..13,
    }
    .check();
    // The host is not asked to pin a page without a place for its pinned bit.
    let mut rig = setup();
    rig.mem.fault().arm(1);
    rig.host.pin_fault.arm(1);
    assert_eq!(rig.pin(BASE, 1).err(), Some(Error::NoMemory));
    assert!(rig.host.pin_fault.pending());
}

#[test]
fn open_device() {
    Scenario {
        setup: &|| {
            let mut rig = Rig::empty(Options::default());
            rig.attach(0, None).expect("attach");
            let set = rig.container.set_iommu(&mut rig.host, VFIO_TYPE1v2_IOMMU);
            set.expect("type");
            rig
        },
        call: &|rig| rig.open(0),
        faults: &[(Fault::Alloc, 1)],
        spare: 0,
        touched: 0..0,
    }
    .check();
    // Four devices fill the list of devices.
    Scenario {
        setup: &|| {
            let mut rig = Rig::with(&[None, None, None, None]);
            rig.attach(4, None).expect("attach");
            rig
        },
        call: &|rig| rig.open(4),
        faults: &[(Fault::Alloc, 1)],
        spare: 0,
        touched: 0..0,
    }
    .check();
}

#[test]
fn a_new_vaddr_from_another_address_space() {
    let setup = || {
        let mut rig = Rig::with(&[Some(Spec::pages(PAGE))]);
        rig.map(BASE, 10 * PAGE).expect("map");
        let mut unmap = Unmap::vaddr(Target::All);
        let step = rig.unmap_step(&mut unmap);
        step.expect("invalidate");
        rig.host.mm = 1;
        rig.host.add_memory(ARG, PAGE);
        rig
    };
    let map = Map {
        iova: BASE,
        vaddr: 0x7000_0000,
        size: 10 * PAGE,
        prot: None,
    };
    Scenario {
        setup: &setup,
        call: &|rig| rig.try_map(&map),
        faults: &[(Fault::Charge, 1), (Fault::Limit, 10)],
        spare: 0,
        touched: 0..0,
    }
    .check();
    let mut rig = setup();
    rig.try_map(&map).expect("map");
    assert_eq!(rig.host.books.locked(0), 0);
    assert_eq!(rig.host.books.locked(1), 10);
    assert_eq!(rig.host.books.grabbed.get(&1), Some(&1));
    assert_eq!(rig.host.books.grabbed.get(&0), None);
}
