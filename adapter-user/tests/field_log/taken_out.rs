// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages that are taken out of a log, and logs of cloud-hypervisor.

use super::*;

/// Read now and clear later, as with KVM's manual clear (the manual-clear series of
/// VFIO, firecracker#1132).
#[test]
fn pages_are_read_now_and_cleared_later() {
    let log = on();
    log.add_range(0, 64 * PAGE).unwrap();
    log.mark(PAGE, 2 * PAGE).unwrap();
    log.mark(9 * PAGE, 1).unwrap();
    let mut read = [0];
    log.dirty_bitmap(0, 64 * PAGE, PAGE, false, &mut read)
        .unwrap();
    assert_eq!(read, [0b10_0000_0110]);
    log.mark(2 * PAGE, 1).unwrap(); // before the clear: its copy comes after it
    log.mark(20 * PAGE, 1).unwrap(); // not in what was read, so it must stay
    log.clear_bitmap(0, 64 * PAGE, PAGE, &read).unwrap();
    log.mark(9 * PAGE, 1).unwrap(); // after the clear
    let mut words = [0];
    log.report(0, 64 * PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [1 << 9 | 1 << 20]);
}

/// A balloon's pages, free-page hints, pages that were sent already (firecracker#5474,
/// cloud-hypervisor#8264): from ranges that are there and from removed ones.
#[test]
fn pages_are_discarded() {
    let log = on();
    for iova in [0, 64 * PAGE] {
        log.add_range(iova, 64 * PAGE).unwrap();
    }
    log.mark(60 * PAGE, 8 * PAGE).unwrap();
    log.remove_range(64 * PAGE, 64 * PAGE).unwrap();
    log.clear_range(61 * PAGE, 5 * PAGE).unwrap();
    assert_eq!(log.clear_range(1, PAGE), Err(Error::Misaligned.into()));
    assert_eq!(log.clear_range(0, 0), Err(Error::ZeroSize.into()));
    log.clear_range(1 << 40, PAGE).unwrap(); // nothing is mapped there
    let mut words = [0];
    log.report(0, 64 * PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [1 << 60]);
    let rest = log.report(64 * PAGE, 64 * PAGE, PAGE, &mut words);
    let addr = 64 * PAGE;
    assert_eq!(rest, Err(TrackError::Unmapped { addr }), "it has been told");
    words = [0];
    log.report(66 * PAGE, 62 * PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [0b11]);
    let short = log.clear_bitmap(0, 65 * PAGE, PAGE, &[0]);
    assert_eq!(short, Err(Error::BitmapSize.into()));
    log.stop();
    assert_eq!(log.clear_range(0, PAGE), Err(Error::NotTracking.into()));
}

/// r05: two ranges of a device in one table.
#[test]
fn r05_two_ranges_of_a_device_in_one_table() {
    let tracker = Tracker::new(None);
    let log = DeviceLog::new(None);
    for (id, gpa) in [(0, 1u64 << 32), (1, 2 << 32)] {
        tracker.add_slot(id, gpa, None, 64 * PAGE).unwrap();
        log.add_range(gpa, 64 * PAGE).unwrap();
    }
    log.start(&[(1 << 32, 64 * PAGE), (2 << 32, 64 * PAGE)], PAGE)
        .unwrap();
    tracker.start().unwrap();
    log.mark(1 << 32, PAGE).unwrap();
    log.mark(2 << 32, PAGE).unwrap();
    let device = log.clone();
    tracker.add_source("vfio", move |report| {
        for iova in [1u64 << 32, 2 << 32] {
            let mut words = [0];
            device.report(iova, 64 * PAGE, PAGE, &mut words)?;
            let pages = Extent {
                bit: 0,
                iova,
                npages: 64,
                pgsize: PageSize::new(PAGE).unwrap(),
            };
            report.or_bitmap(&words, pages)?;
        }
        Ok(())
    });
    let mut report = Report::new();
    tracker.take(&mut report).unwrap();
    let ranges: Vec<_> = report
        .ranges(PAGE)
        .unwrap()
        .map(|r| (r.gpa, r.size))
        .collect();
    assert_eq!(ranges, [(1 << 32, PAGE), (2 << 32, PAGE)]);
}

/// r06: a start without ranges is told.
#[test]
fn r06_a_start_without_ranges_is_told() {
    assert!(DeviceLog::new(None).start(&[], PAGE).is_err());
}
