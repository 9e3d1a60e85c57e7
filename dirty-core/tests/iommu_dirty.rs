// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty pages that IOMMUs know of (D12).

mod support;

use dirty_core::host::Prot;
use dirty_core::uapi::*;
use dirty_core::{Error, Options};
use support::rig::Via;
use support::{words, Rig, Spec, BITMAP, PAGE};

const ALL: u64 = 256 * PAGE;

fn tracking() -> Spec {
    Spec {
        dirty_tracking: true,
        ..Spec::pages(PAGE)
    }
}

/// A container that asks IOMMUs, with these groups, an emulated one, and a mapping of
/// 256 pages. The groups' domains are 1, 2, ...
fn rig(groups: &[Spec]) -> Rig {
    let mut options = Options::default();
    options.iommu_dirty_tracking = true;
    let groups: Vec<Option<Spec>> = groups.iter().cloned().map(Some).chain([None]).collect();
    let mut rig = Rig::new(options, VFIO_TYPE1v2_IOMMU, &groups);
    rig.map(0, ALL).expect("map");
    rig
}

fn unmap_dirty(rig: &mut Rig, via: Via) -> Result<Vec<u64>, Error> {
    let mut words = [0; 4];
    rig.harvest(via, 0, ALL, PAGE, &mut words)?;
    Ok(words::bits(&words))
}

fn pages() -> Vec<u64> {
    (0..256).collect()
}

#[test]
fn what_was_written_is_told_once() {
    let mut rig = rig(&[tracking()]);
    rig.host.dma(1, 9 * PAGE);
    rig.start();
    assert_eq!(rig.dirty(0, ALL), [], "written before START");
    for page in [3, 70, 71, 255] {
        rig.host.dma(1, page * PAGE);
    }
    assert_eq!(rig.dirty(0, ALL), [3, 70, 71, 255]);
    assert_eq!(rig.dirty(0, ALL), []);
    rig.host.dma(1, 70 * PAGE);
    rig.mark(PAGE);
    rig.pin_by(1, 200 * PAGE, 1).expect("pin");
    assert_eq!(rig.dirty(0, ALL), [1, 70, 200], "with marks and pins");
}

#[test]
fn a_report_that_faulted_loses_nothing() {
    let mut rig = rig(&[tracking()]);
    rig.start();
    rig.host.dma(1, 3 * PAGE);
    rig.host.dma(1, 130 * PAGE);
    rig.host.no_write = Some(BITMAP + 17);
    let got = rig.get(Via::Ioctl, 0, ALL, PAGE, &mut [0; 4]);
    assert_eq!(got, Err(Error::BadAddress));
    assert_eq!(unmap_dirty(&mut rig, Via::Ioctl), Err(Error::BadAddress));
    rig.host.no_write = None;
    rig.host.dma(1, 131 * PAGE);
    assert_eq!(rig.dirty(0, ALL), [3, 130, 131]);
}

#[test]
fn an_unmap_tells_what_is_written_until_it_is_done() {
    for via in Via::ALL {
        let mut rig = rig(&[tracking()]);
        rig.start();
        rig.host.dma(1, 70 * PAGE);
        rig.host.late = Some(5 * PAGE);
        assert_eq!(unmap_dirty(&mut rig, via), Ok(vec![5, 70]), "{via:?}");
        rig.host.late = None;
        rig.map(0, ALL).expect("map");
        assert_eq!(rig.dirty(0, ALL), []);
    }
}

#[test]
fn an_unmap_without_a_bitmap_forgets() {
    let mut rig = rig(&[tracking()]);
    rig.start();
    rig.host.dma(1, 70 * PAGE);
    rig.host.late = Some(5 * PAGE);
    rig.unmap(0, ALL).expect("unmap");
    rig.host.late = None;
    rig.map(0, ALL).expect("map");
    assert_eq!(rig.dirty(0, ALL), []);
}

/// The user's bitmap goes away between the first copy and that of the last pages.
#[test]
fn an_unmap_that_cannot_tell_the_last_page_keeps_it() {
    let mut rig = rig(&[tracking()]);
    rig.start();
    rig.host.dma(1, 70 * PAGE);
    rig.host.late = Some(130 * PAGE);
    rig.host.no_write_late = Some(BITMAP + 17);
    assert_eq!(unmap_dirty(&mut rig, Via::Ioctl), Err(Error::BadAddress));
    rig.host.late = None;
    rig.host.no_write = None;
    assert_eq!(rig.host.books.pinned(), 0, "no device reaches the mapping");
    assert_eq!(unmap_dirty(&mut rig, Via::Ioctl), Ok(vec![70, 130]));
    rig.map(0, ALL).expect("the mapping is gone");
}

/// The same where another IOMMU makes everything dirty.
#[test]
fn an_unmap_that_cannot_tell_the_last_page_keeps_all_that_may_be_dirty() {
    let mut rig = rig(&[tracking(), Spec::pages(PAGE)]);
    rig.start();
    rig.host.late = Some(130 * PAGE);
    rig.host.no_write_late = Some(BITMAP + 17);
    assert_eq!(unmap_dirty(&mut rig, Via::Ioctl), Err(Error::BadAddress));
    rig.host.late = None;
    rig.host.no_write = None;
    assert_eq!(unmap_dirty(&mut rig, Via::Ioctl), Ok(pages()));
}

#[test]
fn a_large_entry_is_dirty_as_a_whole_inside_its_mapping() {
    let mut rig = rig(&[tracking()]);
    rig.map(ALL, 8 * PAGE).expect("map");
    rig.start();
    rig.host.entry_pages = 16;
    rig.host.dma(1, 37 * PAGE);
    rig.host.dma(1, ALL + 2 * PAGE);
    assert_eq!(rig.dirty(0, ALL), (32..48).collect::<Vec<_>>());
    assert_eq!(rig.dirty(ALL, 8 * PAGE), (0..8).collect::<Vec<_>>());
}

#[test]
fn everything_is_dirty_while_a_domain_does_not_track() {
    let mut rig = rig(&[tracking(), Spec::pages(PAGE)]);
    assert_eq!(rig.host.books.domains.len(), 2, "they share no domain");
    rig.start();
    assert_eq!(rig.dirty(0, ALL), pages());
    rig.detach(1);
    assert_eq!(rig.dirty(0, ALL), pages(), "what it wrote");
    rig.host.dma(1, 9 * PAGE);
    assert_eq!(rig.dirty(0, ALL), [9]);
}

#[test]
fn a_group_that_leaves_has_told_what_it_wrote() {
    // With a domain of another kind beside it, without, and with one that shares it.
    let other = Spec {
        kind: 1,
        ..tracking()
    };
    for (beside, late) in [
        (vec![other], true),
        (vec![], true),
        (vec![tracking()], false),
    ] {
        let mut rig = rig(&[vec![tracking()], beside.clone()].concat());
        rig.start();
        rig.host.dma(1, 9 * PAGE);
        rig.host.late = Some(12 * PAGE).filter(|_| late);
        rig.detach(0);
        rig.host.late = None;
        let told = if late { vec![9, 12] } else { vec![9] };
        assert_eq!(rig.dirty(0, ALL), told, "{beside:?}");
    }
}

#[test]
fn tracking_is_switched_with_start_stop_and_attach() {
    let mut rig = rig(&[tracking()]);
    assert!(rig.host.tracking.is_empty());
    rig.start();
    assert_eq!(rig.host.tracking.len(), 1);
    let other = Spec {
        kind: 1,
        ..tracking()
    };
    rig.attach(7, Some(other.clone())).expect("attach");
    assert_eq!(rig.host.tracking.len(), 2);
    rig.attach(8, Some(tracking())).expect("attach");
    assert_eq!(rig.host.tracking.len(), 2, "it shares a domain");
    rig.host.dma(2, 4 * PAGE);
    rig.host.dma(1, 5 * PAGE);
    assert_eq!(rig.dirty(0, ALL), [4, 5]);
    rig.host.dma(2, 4 * PAGE);
    rig.stop();
    assert!(rig.host.tracking.is_empty());
    rig.start();
    assert_eq!(rig.dirty(0, ALL), []);
}

#[test]
fn switching_that_fails_changes_nothing() {
    let other = Spec {
        kind: 1,
        ..tracking()
    };
    let mut rig = rig(&[tracking(), other.clone()]);
    let before = rig.snapshot();
    rig.host.track_fault.arm(2);
    let eio = Err(Error::Iommu(dirty_core::Errno::EIO));
    assert_eq!(rig.try_start(), eio);
    assert!(rig.host.tracking.is_empty());
    assert_eq!(rig.snapshot(), before);
    rig.start();
    let before = rig.snapshot();
    rig.host.track_fault.arm(1);
    let third = Spec { kind: 2, ..other };
    assert_eq!(rig.attach(7, Some(third)), eio);
    assert_eq!(rig.snapshot(), before);
    assert_eq!(rig.host.tracking.len(), 2);
}

#[test]
fn without_the_option_nobody_asks() {
    let mut rig = Rig::with(&[Some(tracking()), Some(Spec::pages(PAGE)), None]);
    rig.map(0, ALL).expect("map");
    rig.map_prot(ALL, PAGE, Prot::READ).expect("map");
    rig.start();
    assert!(rig.host.tracking.is_empty());
    assert_eq!(rig.dirty(0, ALL), pages());
    assert_eq!(rig.dirty(0, ALL), pages());
}
