// SPDX-License-Identifier: MIT OR Apache-2.0
//! The row "START over 56 TiB", and the end of the address space.

use super::*;

/// What QEMU with OVMF asks for.
const OVMF: [(u64, u64); 2] = [
    (0, 0x8080_0000),
    (0x1_0000_0000, 0x3838_0010_0000 - 0x1_0000_0000),
];

/// f09, QEMU with OVMF ("Failed to start DMA logging, err -95"), with 4 GiB mapped.
#[test]
fn f09_start_over_a_sparse_56_tib() {
    let log = DeviceLog::new(Some(256 << 10));
    log.add_range(0, 2 << 30).unwrap();
    log.add_range(0x1_0000_0000, 2 << 30).unwrap();
    let (before, start) = (heap(), Instant::now());
    log.start(&OVMF, PAGE).unwrap();
    println!("START over 56 TiB: {:?}", start.elapsed());
    assert!(
        heap() - before < 256 << 10,
        "bits of memory that is not there"
    );
    log.mark(0x1_0000_0000, 1).unwrap();
    let mut words = [0; 8192];
    log.report(0x1_0000_0000, 2 << 30, PAGE, &mut words)
        .unwrap();
    assert_eq!(words[0], 1);
}

/// f09 for a device that does not know its map: memory is used where it writes.
#[test]
fn f09_start_over_56_tib_that_are_all_mapped() {
    let log = DeviceLog::new(None);
    log.add_range(0, 1 << 48).unwrap();
    let (before, start) = (resident(), Instant::now());
    log.start(&OVMF, PAGE).unwrap();
    println!("START over 56 TiB, all mapped: {:?}", start.elapsed());
    log.mark(0x1_0000_0000, 1).unwrap();
    let mut words = vec![0; 8192 * 2];
    log.report(0x1_0000_0000, 4 << 30, PAGE, &mut words)
        .unwrap();
    assert_eq!(words[0], 1);
    let more = resident().saturating_sub(before);
    assert!(more < 256, "{more} MiB more are resident");
}

/// g02: a vfio-user client maps, starts with its own ranges, then maps and unmaps.
#[test]
fn g02_start_over_mapped_ranges_then_map_and_unmap() {
    let log = DeviceLog::new(None);
    log.add_range(0, 0xa_0000).unwrap(); // DMA_MAP
    log.add_range(0xc_0000, 0x4_0000).unwrap();
    log.start(&[(0, 0x10_0000)], PAGE).unwrap(); // DMA_LOGGING_START
    log.mark(0xc_0000, 1).unwrap();
    log.remove_range(0xc_0000, 0x4_0000).unwrap(); // DMA_UNMAP
    log.add_range(0xc_0000, 0x4_0000).unwrap(); // DMA_MAP
    log.mark(0xc_1000, 1).unwrap();
    let mut words = [0];
    log.report(0xc_0000, 0x4_0000, PAGE, &mut words).unwrap();
    assert_eq!(words, [0b11]);
    log.stop();
    log.set_tracking(true).unwrap();
    assert!(log.range(0).is_some(), "the ranges stay after STOP");
    log.remove_range(0, 0xa_0000).unwrap();
}

/// A range that is mapped later, partly or not at all in the ranges of START.
#[test]
fn start_is_a_filter_over_what_is_mapped() {
    let log = DeviceLog::new(None);
    log.start(&[(0x1_0000, 0x1_0000), (0x4_0000, 0x1_0000)], PAGE)
        .unwrap();
    log.add_range(0, 0x8_0000).unwrap();
    let part = log.range(0x1_8000).unwrap();
    assert_eq!((part.first(), part.last()), (0x1_0000, 0x1_ffff));
    assert!(log.range(0x3_0000).is_none());
    log.mark(0, 0x8_0000).unwrap(); // what is not to be logged needs no mark
    let mut words = [0];
    log.report(0x4_0000, 0x1_0000, PAGE, &mut words).unwrap();
    assert_eq!(words, [0xffff]);
    let outside = log.report(0x3_0000, 0x1_0000, PAGE, &mut words);
    assert_eq!(outside, Err(TrackError::Unmapped { addr: 0x3_0000 }));
    log.remove_range(0, 0x8_0000).unwrap();
    let mut ranges = Vec::new();
    log.take_removed(|iova, size| {
        ranges.push((iova, size));
        Ok(())
    })
    .unwrap();
    assert_eq!(ranges, [(0x1_0000, 0x1_0000)]);
}

/// Linux's drivers, and libvfio-user: a second START, START without ranges, and a
/// REPORT of what is not mapped.
#[test]
fn both_answers_of_linux_and_of_libvfio_user_can_be_given() {
    let log = |holes| {
        let log = DeviceLog::with_options(LogOptions {
            holes,
            ..LogOptions::default()
        });
        log.add_range(0, 16 * PAGE).unwrap();
        log
    };
    // Linux: EINVAL whatever the page size is, and holes are clean.
    let linux = log(Holes::Clean);
    assert_eq!(linux.start(&[], PAGE), Err(TrackError::NoRanges));
    linux.start(&[(0, 64 * PAGE)], PAGE).unwrap();
    assert_eq!(linux.start(&[(0, PAGE)], PAGE), Err(TrackError::Started));
    linux.mark(3 * PAGE, 1).unwrap();
    let mut words = [0; 2];
    linux.report(0, 64 * PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [1 << 3, 0]);
    let outside = linux.report(0, 65 * PAGE, PAGE, &mut words);
    let addr = 64 * PAGE;
    assert_eq!(outside, Err(TrackError::Unmapped { addr }));

    // libvfio-user: the same page size is no error and keeps what is dirty; another
    // one is EINVAL. What is not mapped is ENOENT.
    let start = |log: &DeviceLog, pgsize: u64| match log.start_all(pgsize) {
        Err(TrackError::Started) if log.pgsize().map(PageSize::bytes) == Some(pgsize) => Ok(()),
        other => other.map(drop),
    };
    let vfio_user = log(Holes::Refused);
    start(&vfio_user, PAGE).unwrap();
    vfio_user.mark(5 * PAGE, 1).unwrap();
    start(&vfio_user, PAGE).unwrap();
    assert_eq!(start(&vfio_user, 2 * PAGE), Err(TrackError::Started));
    let hole = vfio_user.report(0, 17 * PAGE, PAGE, &mut words);
    let addr = 16 * PAGE;
    assert_eq!(hole, Err(TrackError::Unmapped { addr }));
    words.fill(0);
    vfio_user.report(0, 16 * PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [1 << 5, 0]);
    // It forgets what was dirty when a range goes.
    vfio_user.mark(5 * PAGE, 1).unwrap();
    vfio_user.remove_range(0, 16 * PAGE).unwrap();
    vfio_user.clear_range(0, 16 * PAGE).unwrap();
    let gone = vfio_user.report(0, 16 * PAGE, PAGE, &mut words);
    assert_eq!(gone, Err(TrackError::Unmapped { addr: 0 }));
}

/// h02: a START over so much mapped memory that no machine can hold its bits is an
/// error, and not an abort.
#[test]
fn h02_start_over_everything() {
    let everything = |budget| {
        let log = DeviceLog::new(budget);
        log.add_range(0, u64::MAX - PAGE + 1).unwrap();
        log
    };
    let log = everything(None);
    let all = [(0, u64::MAX - PAGE + 1)];
    assert!(matches!(
        log.start(&all, PAGE),
        Err(TrackError::NoMemory { .. })
    ));
    assert!(!log.is_on());
    log.start(&[(0, 1 << 20)], PAGE).unwrap();
    let log = everything(Some(1 << 20));
    assert!(matches!(
        log.start(&[(0, 1 << 48)], PAGE),
        Err(TrackError::Budget { .. })
    ));
    // A larger page is a way out: 48 bits at 2 MiB are 16 MiB of bits.
    everything(Some(16 << 20))
        .start(&[(0, 1 << 48)], 2 << 20)
        .unwrap();
    // If nothing is mapped there is nothing to hold.
    DeviceLog::new(Some(0)).start(&all, PAGE).unwrap();
}

// ---- the row "a DMA-logging range that ends at 2^64"

/// l4, for the typed calls. `device_log/ioctl.rs` has what the ioctls answer.
#[test]
fn l4_ranges_that_end_with_the_address_space() {
    let log = DeviceLog::new(None);
    let top = 0u64.wrapping_sub(64 * PAGE);
    log.add_range(0, 1 << 63).unwrap();
    log.add_range(1 << 63, 1 << 63).unwrap();
    log.start(&[(top, 64 * PAGE)], PAGE).unwrap();
    log.mark(u64::MAX, 1).unwrap();
    log.mark(top - PAGE, 65 * PAGE).unwrap();
    let mut words = [0];
    log.report(top, 64 * PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [!0]);
    let odd = log.report(top + PAGE, PAGE, 2 * PAGE, &mut words);
    assert_eq!(odd, Err(Error::Misaligned.into()));
    log.stop();
    log.start(&[(0, 1 << 63), (1 << 63, 1 << 63)], 1 << 63)
        .unwrap();
    for removed in [false, true] {
        log.mark(u64::MAX, 1).unwrap();
        log.mark(0, u64::MAX).unwrap();
        if removed {
            log.remove_range(1 << 63, 1 << 63).unwrap();
        }
        for shift in 12..64 {
            let mut words = [0];
            let iova = u64::MAX << shift;
            log.dirty_bitmap(iova, 0u64.wrapping_sub(iova), 1 << shift, false, &mut words)
                .unwrap();
            assert_eq!(words, [1], "{shift}");
        }
        words = [0];
        log.report(0, u64::MAX, 1 << 63, &mut words).unwrap();
        assert_eq!(words, [0b11]);
    }
    words = [0];
    log.report(0, 1 << 63, 1 << 63, &mut words).unwrap();
    assert_eq!(words, [0]);
    let mut ranges = Vec::new();
    log.take_removed(|iova, size| {
        ranges.push((iova, size));
        Ok(())
    })
    .unwrap();
    assert_eq!(ranges, [(1 << 63, 1 << 63)], "its last byte is not told");
}
