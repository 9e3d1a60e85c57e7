// SPDX-License-Identifier: MIT OR Apache-2.0
//! Single calls of a domain: what they reach, and what a failure leaves.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use adapter_user::device_log::LogOptions;
use adapter_user::{Error, TrackError};

/// The bitmap of `npages` pages from IOVA 0 on that a log reports.
fn of_log(log: &DeviceLog, npages: u64) -> u64 {
    let mut words = [0];
    log.report(0, npages * PAGE, PAGE, &mut words).unwrap();
    words[0]
}

fn of_container(container: &Container, npages: u64) -> u64 {
    let mut words = [0];
    container
        .dirty_bitmap(0, npages * PAGE, PAGE, &mut words)
        .unwrap();
    words[0]
}

#[test]
fn one_mark_reaches_all() {
    let (tracker, log, container) = (tracker(8), DeviceLog::new(None), container());
    let domain = domain(&tracker, Some(&log), Some(&container));
    domain.map(0, 4 * PAGE, 4 * PAGE, RW).unwrap();
    assert_eq!(domain.mark(0, 0), Ok(()));
    assert_eq!(domain.mark(0, 1), Ok(())); // nobody has started
    log.start_all(PAGE).unwrap();
    container.start().unwrap();
    tracker.start().unwrap();
    domain.mark(PAGE, PAGE + 1).unwrap();
    assert_eq!(take(&tracker), set([5, 6]));
    assert_eq!(of_log(&log, 4), 0b110);
    assert_eq!(of_container(&container, 4), 0b110);

    let device = domain.open_device(GROUP, None).unwrap();
    device.write(3 * PAGE, &[1]).unwrap();
    device.mark(0, 1).unwrap();
    assert_eq!(take(&tracker), set([4, 7]));
    assert_eq!(of_log(&log, 4), 0b1001);
    assert_eq!(of_container(&container, 4), 0b1001);

    let gone = domain.mark(3 * PAGE, 2 * PAGE);
    assert_eq!(gone, Err(TrackError::Unmapped { addr: 4 * PAGE }));
    assert_eq!(take(&tracker), set([7]));
    assert_eq!(domain.mark(u64::MAX, 2), Err(Error::Wraps.into()));
    let unmapped = device.mark(4 * PAGE, 1);
    assert_eq!(unmapped, Err(Error::Unmapped));
}

#[test]
fn an_unmap_takes_all_mappings_in_its_range_and_no_part_of_one() {
    let (tracker, log, container) = (tracker(8), DeviceLog::new(None), container());
    let domain = domain(&tracker, Some(&log), Some(&container));
    for page in [0, 1, 3] {
        domain.map(page * PAGE, page * PAGE, PAGE, RW).unwrap();
    }
    domain.map(4 * PAGE, 4 * PAGE, 2 * PAGE, RW).unwrap();
    let bisects = Err(Error::Bisects.into());
    assert_eq!(domain.unmap(0, 5 * PAGE), bisects);
    assert_eq!(domain.unmap(5 * PAGE, 4 * PAGE), bisects);
    assert_eq!(domain.unmap(0, 1), Err(Error::Misaligned.into()));
    assert_eq!(domain.unmap(0, 0), Err(Error::ZeroSize.into()));
    let wraps = domain.unmap(2 * PAGE, u64::MAX - 4095);
    assert_eq!(wraps, Err(Error::Wraps.into()));
    for page in [0, 1, 3, 4, 5] {
        assert_eq!(domain.view().translate(page * PAGE), Some(page * PAGE));
        container.mark(page * PAGE, 1).unwrap();
    }
    // All IOVAs but the last page: far more than a bitmap of VFIO may have.
    assert_eq!(domain.unmap(0, u64::MAX - 4095), Ok(5 * PAGE));
    assert_eq!(domain.unmap(0, PAGE), Ok(0));
    assert_eq!(domain.view().translate(0), None);
    assert_eq!(container.mark(0, 1), Err(Error::Unmapped));
    domain.map(0, 0, 8 * PAGE, RW).unwrap(); // the log has room, too
}

#[test]
fn a_container_maps_the_slots_behind_a_mapping_and_nothing_else() {
    let (tracker, container) = (tracker(4), container());
    // Page 4 is a device's BAR.
    tracker
        .add_slot(1, 5 * PAGE, Some(leaked(1)), PAGE)
        .unwrap();
    let domain = domain(&tracker, None, Some(&container));
    domain.map(0, 0, 6 * PAGE, RW).unwrap();
    container.start().unwrap();
    tracker.start().unwrap();
    assert_eq!(domain.mark(0, 6 * PAGE), Ok(()));
    assert_eq!(take(&tracker), set([0, 1, 2, 3, 5]));
    assert_eq!(of_container(&container, 6), 0b10_1111);
    assert_eq!(container.mark(4 * PAGE, 1), Err(Error::Unmapped));
    assert_eq!(domain.unmap(0, 6 * PAGE), Ok(6 * PAGE));
    assert_eq!(container.mark(5 * PAGE, 1), Err(Error::Unmapped));
}

#[test]
fn a_map_that_fails_in_one_of_them_leaves_all_as_they_were() {
    let tracker = tracker(4);
    tracker.add_slot(1, 4 * PAGE, None, PAGE).unwrap(); // no host address
    let log = DeviceLog::with_options(LogOptions {
        budget: Some(16),
        ..LogOptions::default()
    });
    let container = container();
    let domain = domain(&tracker, Some(&log), Some(&container));
    log.start_all(PAGE).unwrap();
    container.start().unwrap();
    tracker.start().unwrap();
    let nothing = |iova: u64| {
        assert_eq!(domain.view().translate(iova), None);
        assert!(log.range(iova).is_none());
        assert_eq!(container.mark(iova, 1), Err(Error::Unmapped));
        assert_eq!(take(&tracker), set([]));
    };
    // The log has no budget for 200 words.
    let budget = domain.map(0, 0, 12800 * PAGE, RW).unwrap_err();
    assert!(matches!(budget, TrackError::Budget { .. }));
    nothing(0);
    // The view refuses a guest address.
    let misaligned = domain.map(0, 1, PAGE, RW);
    assert_eq!(misaligned.unwrap_err(), Error::Misaligned.into());
    nothing(0);
    let wraps = domain.map(0, u64::MAX - 4095, 2 * PAGE, RW);
    assert_eq!(wraps.unwrap_err(), Error::Wraps.into());
    nothing(0);
    // The container refuses the second part, after the first one was mapped.
    let no_host = domain.map(0, 3 * PAGE, 2 * PAGE, RW);
    assert_eq!(no_host.unwrap_err(), Error::BadAddress.into());
    nothing(0);
    nothing(PAGE);
    domain.map(0, 0, PAGE, RW).unwrap();
}

#[test]
fn pins_that_stay_refuse_the_unmap_and_lose_nothing() {
    let (tracker, log, container) = (tracker(4), DeviceLog::new(None), container());
    let domain = domain(&tracker, Some(&log), Some(&container));
    let stubborn = Box::new(|_: &adapter_user::Device, _, _| {});
    let device = container.open_device(GROUP, Some(stubborn)).unwrap();
    domain.map(0, 0, 2 * PAGE, RW).unwrap();
    log.start_all(PAGE).unwrap();
    container.start().unwrap();
    tracker.start().unwrap();
    let pin = device.pin(PAGE, 1, RW).unwrap();
    device.write(0, &[1]).unwrap();
    log.mark(0, 1).unwrap();
    let refused = domain.unmap(0, 2 * PAGE);
    assert_eq!(refused, Err(Error::StillPinned.into()));
    assert_eq!(domain.view().translate(0), Some(0));
    assert!(log.range(0).is_some());
    // The container's bits are in the view now.
    assert_eq!(take(&tracker), set([0, 1]));
    pin.write(0, &[2]).unwrap();
    drop(pin);
    assert_eq!(domain.unmap(0, 2 * PAGE), Ok(2 * PAGE));
    assert_eq!(take(&tracker), set([1]));
}

/// A device pins in the part that was mapped before the container refused the next.
#[test]
fn a_map_that_cannot_be_undone_stays_until_it_is_unmapped() {
    let tracker = tracker(1);
    tracker.add_slot(1, PAGE, None, PAGE).unwrap(); // no host address
    let (log, container) = (DeviceLog::new(None), container());
    let domain = domain(&tracker, Some(&log), Some(&container));
    let stubborn = Box::new(|_: &adapter_user::Device, _, _| {});
    let device = container.open_device(GROUP, Some(stubborn)).unwrap();
    log.start_all(PAGE).unwrap();
    container.start().unwrap();
    tracker.start().unwrap();
    let stop = AtomicBool::new(false);
    let (pin, pinned) = std::thread::scope(|scope| {
        let pinner = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                if let Ok(pin) = device.pin(0, 1, RW) {
                    return Some(pin);
                }
            }
            None
        });
        let mut refused = Err(Error::BadAddress.into());
        while refused == Err(Error::BadAddress.into()) && !pinner.is_finished() {
            refused = domain.map(0, 0, 2 * PAGE, RW).map(|_| ());
        }
        stop.store(true, Ordering::Relaxed);
        (pinner.join().unwrap(), refused)
    });
    assert_eq!(pinned, Err(Error::StillPinned.into()));
    let pin = pin.unwrap();
    pin.write(0, &[1]).unwrap();
    assert_eq!(domain.view().translate(0), Some(0));
    assert!(log.range(0).is_some());
    assert_eq!(domain.unmap(0, 2 * PAGE), Err(Error::StillPinned.into()));
    pin.write(0, &[2]).unwrap();
    drop(pin);
    assert_eq!(domain.unmap(0, 2 * PAGE), Ok(2 * PAGE));
    assert_eq!(take(&tracker), set([0]));
}

/// Between the check of tracking and the unmap, nobody can start it.
#[test]
fn an_unmap_tells_what_the_container_has_and_no_more() {
    let (tracker, container) = (tracker(4), container());
    let domain = domain(&tracker, None, Some(&container));
    tracker
        .add_log("container", domain.view(), 0, container.clone())
        .unwrap();
    domain.map(0, PAGE, 2 * PAGE, RW).unwrap();
    assert_eq!(domain.unmap(0, 2 * PAGE), Ok(2 * PAGE)); // nothing tracks
    domain.map(0, PAGE, 2 * PAGE, RW).unwrap();
    container.start().unwrap();
    tracker.start().unwrap();
    let device = container.open_device(GROUP, None).unwrap(); // it marks the container alone
    device.write(PAGE, &[1]).unwrap();
    domain.unmap(0, 2 * PAGE).unwrap();
    domain.map(0, 0, 2 * PAGE, RW).unwrap(); // other memory at the same IOVAs
    assert_eq!(take(&tracker), set([2]));
}
