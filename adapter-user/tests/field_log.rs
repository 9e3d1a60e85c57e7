// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bug reports of other projects and findings of a hostile review, about logs of
//! devices whose map changes. Each test says where it comes from.
//!
//! What changed in the calls since they were found:
//!
//! - Only what is mapped is logged, so a device without a map adds its ranges before
//!   it starts the log (f09, h02, l4, r05).
//! - A start over IOVAs that are not mapped costs nothing, so it fails no more for
//!   want of memory (h02, l4); it fails if so much is mapped.
//! - `ioctl` is `unsafe`, and answers EOVERFLOW for a range that ends at 2^64 (l4).

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Instant;

use adapter_user::device_log::{DeviceLog, Holes, LogOptions};
use adapter_user::guest::{Report, Tracker};
use adapter_user::{Error, Extent, PageSize, TrackError};

const PAGE: u64 = 4096;

/// The system's allocator. It counts what each thread has.
struct Counted;

thread_local! {
    static BYTES: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    BYTES.with(|all| all.set(all.get() + bytes));
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTED: Counted = Counted;

/// The bytes that this thread has allocated and not freed.
fn heap() -> i64 {
    BYTES.with(Cell::get)
}

/// The memory of this process, in MiB.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * PAGE >> 20
}

fn on() -> DeviceLog {
    let log = DeviceLog::new(None);
    log.set_tracking(true).unwrap();
    log
}

// ---- the row "map and unmap on a running DeviceLog"

/// 200,000 cycles of map, mark and unmap, with a report each 1,000.
#[test]
fn map_and_unmap_on_a_running_log_stays_small() {
    let log = on();
    let (before, start) = (heap(), Instant::now());
    let mut most = 0;
    for cycle in 0..200_000u64 {
        // Near IOVAs, and IOVAs that are far from each other.
        let iova = (cycle % 1000) << [12, 30][(cycle / 1000 % 2) as usize];
        log.add_range(iova, PAGE).unwrap();
        log.mark(iova, 1).unwrap();
        log.remove_range(iova, PAGE).unwrap();
        most = most.max(heap() - before);
        if cycle % 1000 == 999 {
            let mut told = 0;
            for n in 0..1000u64 {
                let mut words = [0];
                let iova = n << [12, 30][(cycle / 1000 % 2) as usize];
                log.report(iova, PAGE, PAGE, &mut words).unwrap();
                told += words[0];
            }
            assert_eq!(told, 1000);
        }
    }
    println!(
        "200,000 cycles: {:?}, at most {most} bytes",
        start.elapsed()
    );
    assert!(most < 4 << 20, "{most}");
    assert!(heap() - before < 4 << 10, "all is told");
}

/// Each cycle maps another IOVA, and nobody ever asks for a report.
#[test]
fn removed_ranges_that_nobody_asks_for_stay_within_the_cap() {
    let cap = 64 << 10;
    let log = DeviceLog::with_options(LogOptions {
        removed: cap,
        ..LogOptions::default()
    });
    log.set_tracking(true).unwrap();
    let before = heap();
    let written = |n: u64| n * 0x9e37_79b9_7f4a_7c15 >> 13 << 12; // all over the IOVA space
    for n in 0..100_000 {
        log.add_range(written(n), PAGE).unwrap();
        log.mark(written(n), 1).unwrap();
        log.remove_range(written(n), PAGE).unwrap();
    }
    let more = heap() - before;
    assert!(more < 2 * cap as i64, "{more} bytes for a cap of {cap}");
    // No page is forgotten.
    for n in 0..100_000 {
        let mut words = [0];
        log.dirty_bitmap(written(n), PAGE, PAGE, false, &mut words)
            .unwrap();
        assert_eq!(words, [1], "page {n}");
    }
    let mut ranges = Vec::new();
    log.take_removed(|iova, size| {
        ranges.push((iova, iova + (size - 1)));
        Ok(())
    })
    .unwrap();
    for n in 0..100_000 {
        let has = |range: &(u64, u64)| range.0 <= written(n) && written(n) <= range.1;
        assert!(ranges.iter().any(has), "page {n}");
    }
    let mut words = [0];
    assert!(log.report(written(7), PAGE, PAGE, &mut words).is_err());
    assert!(heap() - before < (100 << 10), "all is told");
}

/// What a report of a part had is freed, and the rest stays.
#[test]
fn a_removed_range_that_is_told_in_parts_is_freed_in_parts() {
    let log = on();
    let size = 1 << 30;
    log.add_range(0, size).unwrap();
    for page in (0..size / PAGE).step_by(2) {
        log.mark(page * PAGE, 1).unwrap();
    }
    let before = heap();
    log.remove_range(0, size).unwrap();
    let full = heap();
    let mut words = [0; 1 << 11];
    for part in 0..8 {
        words.fill(0);
        log.report(part * (size / 8), size / 8, PAGE, &mut words[..1 << 9])
            .unwrap();
        assert!(words[..1 << 9]
            .iter()
            .all(|word| *word == 0x5555_5555_5555_5555));
        let left = (full - before) * (7 - part as i64) / 8;
        assert!(heap() - before <= left + 4096, "after part {part}");
    }
}

/// 65,535 maps, which is what a vfio-user server allows, and as many unmaps.
#[test]
fn a_running_log_takes_65_535_maps() {
    let log = on();
    let start = Instant::now();
    for n in 0..65_535u64 {
        log.add_range(n << 13, PAGE).unwrap();
    }
    println!("65,535 maps: {:?}", start.elapsed());
    log.mark(0, 65_535 << 13).unwrap_err(); // there are gaps
    let start = Instant::now();
    for n in 0..65_535u64 {
        log.remove_range(n << 13, PAGE).unwrap();
    }
    println!("65,535 unmaps: {:?}", start.elapsed());
    let mut pages = 0;
    log.take_removed(|_, size| {
        pages += size / PAGE;
        Ok(())
    })
    .unwrap();
    assert_eq!(pages, 65_535);
}

/// l1: a virtual IOMMU maps and unmaps one page a million times between two reports.
#[test]
fn l1_ranges_that_come_and_go_between_reports_stay_bounded() {
    let log = on();
    let before = heap();
    let start = Instant::now();
    for _ in 0..1_000_000 {
        log.add_range(0x8000, PAGE).unwrap();
        log.remove_range(0x8000, PAGE).unwrap();
    }
    println!("1,000,000 cycles: {:?}", start.elapsed());
    log.report(0x8000, PAGE, PAGE, &mut [0]).unwrap();
    assert!(heap() - before < 4 << 10);
}

/// l2: reports in pieces never dropped a removed range.
#[test]
fn l2_reports_in_pieces_forget_removed_ranges() {
    let log = DeviceLog::new(Some(64 << 10));
    log.set_tracking(true).unwrap();
    let before = heap();
    for _ in 0..2000 {
        log.add_range(0, 16 << 20).unwrap();
        log.mark(0x5000, 1).unwrap();
        log.remove_range(0, 16 << 20).unwrap();
        let mut words = [0u64; 32];
        log.report(0, 8 << 20, PAGE, &mut words).unwrap();
        assert_eq!(words[0], 1 << 5);
        log.report(8 << 20, 8 << 20, PAGE, &mut words).unwrap();
        assert!(heap() - before < 4 << 10, "nothing is left");
    }
}

/// l3, and the example log_quadratic: ranges added one by one, and one range added
/// and removed. The times are for people to read.
#[test]
fn l3_adding_ranges_is_not_quadratic() {
    for n in [5_000u64, 10_000, 20_000, 40_000] {
        let (log, start) = (on(), Instant::now());
        for k in 0..n {
            log.add_range(k << 13, PAGE).unwrap();
        }
        let each = start.elapsed().as_nanos() as u64 / n;
        println!("{n} ranges added: {each} ns each");
        let (log, start) = (on(), Instant::now());
        for _ in 0..n {
            log.add_range(0, PAGE).unwrap();
            log.remove_range(0, PAGE).unwrap();
        }
        let each = start.elapsed().as_nanos() as u64 / n;
        println!("{n} times added and removed: {each} ns each");
    }
}

/// f06, libvfio-user#852 and #539: what unmapping costs while a log runs.
#[test]
fn f06_map_and_unmap_while_logging() {
    for n in [5_000u64, 10_000, 20_000, 40_000] {
        let (log, before) = (on(), heap());
        for k in 0..n {
            log.add_range(0x10_0000 + k % 16 * PAGE, PAGE).unwrap();
            log.remove_range(0x10_0000 + k % 16 * PAGE, PAGE).unwrap();
        }
        assert!(heap() - before < 4 << 10);
        log.report(0x10_0000, 16 * PAGE, PAGE, &mut [0]).unwrap();
    }
}

/// f08: one page that is mapped and unmapped used up a budget of 64 KiB.
#[test]
fn f08_churn_under_a_budget() {
    let log = DeviceLog::new(Some(1 << 16));
    log.set_tracking(true).unwrap();
    for _ in 0..20_000u64 {
        log.add_range(0x10_0000, PAGE).unwrap();
        log.mark(0x10_0000, 1).unwrap();
        log.remove_range(0x10_0000, PAGE).unwrap();
    }
    let mut words = [0];
    log.report(0x10_0000, PAGE, PAGE, &mut words).unwrap();
    assert_eq!(words, [1]);
}

// ---- the row "START over 56 TiB"

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

// ---- pages taken out

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

// ---- logs of cloud-hypervisor

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
