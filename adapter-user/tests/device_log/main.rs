// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's log: the errors of VFIO's DMA logging and of iommufd's dirty
//! tracking, and what is told, against a naive model of pages of 4 KiB.

use std::collections::{BTreeMap, BTreeSet};

use adapter_user::device_log::uapi::*;
use adapter_user::device_log::{DeviceLog, LogRange};
use adapter_user::{Errno, Error, PageSize, TrackError};
use nix::sys::mman::{mmap_anonymous, mprotect, munmap, MapFlags, ProtFlags};
use proptest::collection::vec;
use proptest::prelude::*;

const PAGE: u64 = 4096;
const END: u64 = 0u64.wrapping_sub(PAGE);

fn cause(error: Error) -> Result<(), TrackError> {
    Err(TrackError::Cause(error))
}

fn unmapped(addr: u64) -> Result<(), TrackError> {
    Err(TrackError::Unmapped { addr })
}

/// A log of pages 0 to 99 and 200 to 299.
fn started() -> DeviceLog {
    let log = DeviceLog::new(None);
    log.start(&[(0, 100 * PAGE), (200 * PAGE, 100 * PAGE)], PAGE)
        .unwrap();
    log
}

/// The dirty pages of some, from page `first` on.
fn report(log: &DeviceLog, first: u64, n: u64) -> Result<Vec<u64>, TrackError> {
    let mut words = vec![0; n.div_ceil(64) as usize];
    log.report(first * PAGE, n * PAGE, PAGE, &mut words)?;
    let dirty =
        (0..words.len() as u64 * 64).filter(|k| words[(k / 64) as usize] >> (k % 64) & 1 != 0);
    Ok(dirty.map(|k| first + k).collect())
}

#[test]
fn start_checks_its_ranges_in_order() {
    let log = DeviceLog::new(Some(16));
    let start = |ranges: &[(u64, u64)], pgsize| log.start(ranges, pgsize).map(drop);
    assert_eq!(start(&[], 0), Err(TrackError::NoRanges));
    let many: Vec<_> = (0..257).map(|n| (n * PAGE, PAGE)).collect();
    assert_eq!(start(&many, 0), Err(TrackError::TooManyRanges));
    assert_eq!(TrackError::TooManyRanges.errno(), Errno::E2BIG);
    for pgsize in [0, 3, 12288] {
        assert_eq!(start(&[(0, PAGE)], pgsize), Err(TrackError::PageSize));
    }
    assert_eq!(start(&[(1, PAGE)], PAGE), cause(Error::Misaligned));
    assert_eq!(start(&[(0, 1)], PAGE), cause(Error::Misaligned));
    assert_eq!(start(&[(PAGE, PAGE)], 2 * PAGE), cause(Error::Misaligned));
    assert_eq!(start(&[(0, 0)], PAGE), cause(Error::ZeroSize));
    assert_eq!(start(&[(END, 2 * PAGE)], PAGE), cause(Error::Wraps));
    assert_eq!(Error::Wraps.errno(), Errno::EOVERFLOW);
    for overlap in [(PAGE, PAGE), (2 * PAGE, PAGE), (0, 9 * PAGE), (0, 2 * PAGE)] {
        let ranges = [(PAGE, 2 * PAGE), overlap];
        assert_eq!(start(&ranges, PAGE), Err(TrackError::RangesOverlap));
    }
    assert_eq!(TrackError::RangesOverlap.errno(), Errno::EINVAL);
    let over = TrackError::Budget {
        wanted: 24,
        left: 16,
    };
    assert_eq!(
        start(&[(0, PAGE), (PAGE, PAGE), (2 * PAGE, PAGE)], PAGE),
        Err(over)
    );
    assert_eq!(over.errno(), Errno::ENOMEM);
    assert!(!log.is_on());
    assert_eq!(start(&[(0, PAGE), (END, PAGE)], PAGE), Ok(()));
    assert_eq!(start(&[(0, PAGE)], PAGE), Err(TrackError::Started));
    assert_eq!(TrackError::Started.errno(), Errno::EINVAL);
    log.stop();
    log.stop();
    assert_eq!(
        start(&many[..256], PAGE).unwrap_err().errno(),
        Errno::ENOMEM
    );
    assert_eq!(
        start(&[(0, 2 << 40)], 1 << 40),
        Ok(()),
        "a larger page needs fewer bits"
    );
}

#[test]
fn the_page_size_is_a_hint() {
    let log = DeviceLog::new(None);
    let chosen = |hint| {
        let pgsize = log.start(&[(1 << 20, 1 << 20)], hint).map(PageSize::bytes);
        log.stop();
        pgsize
    };
    assert_eq!(chosen(512), Ok(4096));
    assert_eq!(chosen(4096), Ok(4096));
    assert_eq!(chosen(65536), Ok(65536));
}

#[test]
fn report_checks_its_arguments() {
    let log = started();
    let mut words = [0; 4];
    let mut ask = |iova, size, pgsize| log.report(iova, size, pgsize, &mut words);
    for pgsize in [0, 1, 2048, 12288] {
        assert_eq!(ask(0, PAGE, pgsize), Err(TrackError::PageSize));
    }
    assert_eq!(ask(END, 2 * PAGE, PAGE), cause(Error::Wraps));
    assert_eq!(ask(0, 0, PAGE), cause(Error::ZeroSize));
    assert_eq!(ask(1, PAGE, PAGE), cause(Error::Misaligned));
    assert_eq!(ask(0, 257 * PAGE, PAGE), cause(Error::BitmapSize));
    assert_eq!(ask(0, 101 * PAGE, PAGE), unmapped(100 * PAGE));
    assert_eq!(ask(150 * PAGE, PAGE, PAGE), unmapped(150 * PAGE));
    assert_eq!(ask(0, 100 * PAGE, PAGE), Ok(()));
    log.stop();
    assert_eq!(
        log.report(0, PAGE, PAGE, &mut words),
        cause(Error::NotTracking)
    );
    assert_eq!(log.mark(0, 1), cause(Error::NotTracking));
    assert!(log.range(0).is_none());
}

#[test]
fn an_error_clears_nothing() {
    let log = started();
    log.mark(99 * PAGE, 1).unwrap();
    assert_eq!(
        report(&log, 90, 20),
        Err(TrackError::Unmapped { addr: 100 * PAGE })
    );
    assert_eq!(report(&log, 90, 10), Ok(vec![99]));
    assert_eq!(report(&log, 90, 10), Ok(vec![]));
}

#[test]
fn reports_or_into_the_buffer_at_any_page_size() {
    let log = started();
    let ask = |pgsize: u64, clear| {
        let mut words = [1 << 40, 0];
        log.dirty_bitmap(64 * PAGE, 32 * PAGE, pgsize, clear, &mut words)
            .unwrap();
        assert_eq!(words[0] >> 40 & 1, 1, "what was there stays");
        words[0] ^= 1 << 40;
        words
    };
    log.mark(63 * PAGE, 1).unwrap(); // outside
    log.mark(65 * PAGE, 1).unwrap();
    log.mark(80 * PAGE, 1).unwrap();
    assert_eq!(ask(PAGE, false), [1 << 1 | 1 << 16, 0]);
    assert_eq!(ask(2 * PAGE, false), [1 << 0 | 1 << 8, 0]);
    assert_eq!(ask(8 * PAGE, false), [1 << 0 | 1 << 2, 0]);
    assert_eq!(ask(2048, false), [0b11 << 2 | 0b11 << 32, 0]);
    assert_eq!(ask(PAGE, true), [1 << 1 | 1 << 16, 0]);
    assert_eq!(ask(PAGE, true), [0, 0]);
    assert_eq!(report(&log, 0, 100), Ok(vec![63]));
}

#[test]
fn iommufd_checks_its_arguments() {
    let log = started();
    let ask = |iova, size, pgsize| log.dirty_bitmap(iova, size, pgsize, true, &mut [0; 64]);
    assert_eq!(ask(0, 0, 0), cause(Error::ZeroSize));
    assert_eq!(ask(END, 2 * PAGE, 0), cause(Error::Wraps));
    assert_eq!(ask(0, PAGE, 0), Err(TrackError::PageSize));
    assert_eq!(ask(0, PAGE, 3), Err(TrackError::PageSize));
    assert_eq!(ask(0, PAGE, 2 * PAGE), cause(Error::Misaligned));
    assert_eq!(ask(PAGE, 2 * PAGE, 2 * PAGE), cause(Error::Misaligned));
    assert_eq!(ask(2048, 2048, 1024), cause(Error::Misaligned));
    assert_eq!(ask(0, PAGE, 1024), Ok(()));
    assert_eq!(ask(100 * PAGE, PAGE, PAGE), unmapped(100 * PAGE));
}

/// A report of a part of a large page must not lose the rest of it.
#[test]
fn a_page_told_in_part_stays_dirty() {
    let log = DeviceLog::new(None);
    log.start(&[(0, 1 << 20)], 64 << 10).unwrap();
    log.mark(17 * PAGE, 1).unwrap();
    assert_eq!(report(&log, 16, 8), Ok((16..24).collect()));
    assert_eq!(report(&log, 24, 8), Ok((24..32).collect()));
    assert_eq!(report(&log, 0, 64), Ok((16..32).collect()));
    assert_eq!(report(&log, 0, 64), Ok(vec![]));
}

#[test]
fn tracking_starts_clean_and_keeps_its_ranges() {
    let log = DeviceLog::new(Some(16));
    log.add_range(0, 64 * PAGE).unwrap();
    log.add_range(END, PAGE).unwrap();
    assert_eq!(log.add_range(63 * PAGE, PAGE), cause(Error::Overlap));
    assert_eq!(log.add_range(1, PAGE), cause(Error::Misaligned));
    assert_eq!(log.add_range(END, 2 * PAGE), cause(Error::Wraps));
    assert_eq!(log.remove_range(0, PAGE), cause(Error::NoMapping));
    log.set_tracking(true).unwrap();
    let over = TrackError::Budget { wanted: 8, left: 0 };
    assert_eq!(log.add_range(100 * PAGE, PAGE), Err(over));
    let old = log.range(0).unwrap();
    old.mark(0, 1).unwrap();
    log.set_tracking(true).unwrap();
    assert_eq!(report(&log, 0, 64), Ok(vec![]), "clean again");
    old.mark(0, 1).unwrap();
    assert_eq!(report(&log, 0, 64), Ok(vec![0]));
    log.set_tracking(false).unwrap();
    assert_eq!(old.mark(0, 1), cause(Error::NotTracking));
    log.set_tracking(true).unwrap();
    assert_eq!(
        old.mark(0, 1),
        cause(Error::NotTracking),
        "a handle of the last time"
    );
    assert_eq!(report(&log, 0, 64), Ok(vec![]));
}

#[test]
fn ranges_come_and_go_while_the_log_is_on() {
    let log = started();
    let going = log.range(50 * PAGE).unwrap();
    assert_eq!((going.first(), going.last()), (0, 100 * PAGE - 1));
    going.mark(2 * PAGE, PAGE).unwrap();
    log.remove_range(0, 100 * PAGE).unwrap();
    assert!(log.range(0).is_none());
    assert_eq!(log.mark(0, 1), unmapped(0));
    going.mark(3 * PAGE, 1).unwrap(); // late, and in a report
    log.add_range(0, 10 * PAGE).unwrap();
    log.mark(9 * PAGE, 1).unwrap();
    assert_eq!(report(&log, 0, 10), Ok(vec![2, 3, 9]));
    going.mark(60 * PAGE, 1).unwrap(); // only a part of it was taken
    going.mark(4 * PAGE, 1).unwrap();
    assert_eq!(report(&log, 0, 100), Ok(vec![4, 60]));
    assert_eq!(
        going.mark(5 * PAGE, 1),
        cause(Error::NotTracking),
        "too late: refused"
    );
    assert_eq!(
        report(&log, 0, 100),
        Err(TrackError::Unmapped { addr: 10 * PAGE })
    );
    assert_eq!(report(&log, 0, 10), Ok(vec![]));
    // A mark outside tells so and marks the inside.
    let range = log.range(0).unwrap();
    assert_eq!(range.mark(9 * PAGE, 2 * PAGE), unmapped(9 * PAGE));
    assert_eq!(log.mark(9 * PAGE, 192 * PAGE), unmapped(10 * PAGE));
    assert_eq!(report(&log, 0, 10), Ok(vec![9]));
    assert_eq!(report(&log, 200, 100), Ok(vec![200]));
    log.remove_range(200 * PAGE, 100 * PAGE).unwrap();
    log.stop();
    assert_eq!(range.mark(0, 1), cause(Error::NotTracking));
}

// ---- by ioctls

fn feature(log: &DeviceLog, flags: u32, data: &mut [u64]) -> Result<(), Errno> {
    let argsz = 8 + data.len() as u64 * 8;
    let mut bytes = vec![argsz | u64::from(flags) << 32];
    bytes.extend_from_slice(data);
    let result = log.ioctl(VFIO_DEVICE_FEATURE, bytes.as_mut_ptr() as u64);
    data.copy_from_slice(&bytes[1..]);
    result.map_err(TrackError::errno)
}

const SET: u32 = VFIO_DEVICE_FEATURE_SET;
const GET: u32 = VFIO_DEVICE_FEATURE_GET;
const PROBE: u32 = VFIO_DEVICE_FEATURE_PROBE;

fn start_by_ioctl(log: &DeviceLog, ranges: &[[u64; 2]], pgsize: u64) -> Result<u64, Errno> {
    let mut control = [pgsize, ranges.len() as u64, ranges.as_ptr() as u64];
    feature(
        log,
        SET | VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
        &mut control,
    )?;
    Ok(control[0])
}

fn report_by_ioctl(log: &DeviceLog, iova: u64, size: u64, bitmap: u64) -> Result<(), Errno> {
    let flags = GET | VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT;
    feature(log, flags, &mut [iova, size, PAGE, bitmap])
}

#[test]
fn the_features_by_ioctl() {
    let log = DeviceLog::new(None);
    assert_eq!(start_by_ioctl(&log, &[], PAGE), Err(Errno::EINVAL));
    assert_eq!(
        start_by_ioctl(&log, &[[0, PAGE]; 257], PAGE),
        Err(Errno::E2BIG)
    );
    assert_eq!(
        start_by_ioctl(&log, &[[0, PAGE], [0, PAGE]], PAGE),
        Err(Errno::EINVAL)
    );
    assert_eq!(
        start_by_ioctl(&log, &[[END, 2 * PAGE]], PAGE),
        Err(Errno::EOVERFLOW)
    );
    assert_eq!(start_by_ioctl(&log, &[[0, 64 * PAGE]], 1024), Ok(4096));
    assert_eq!(
        start_by_ioctl(&log, &[[0, 64 * PAGE]], 1024),
        Err(Errno::EINVAL)
    );
    log.mark(5 * PAGE, 1).unwrap();
    let mut bitmap = [1u64, !0];
    assert_eq!(report_by_ioctl(&log, 0, 64 * PAGE, 8), Err(Errno::EFAULT));
    assert_eq!(
        report_by_ioctl(&log, 0, 64 * PAGE, u64::MAX - 3),
        Err(Errno::EFAULT)
    );
    assert_eq!(
        report_by_ioctl(&log, 0, 64 * PAGE, bitmap.as_mut_ptr() as u64),
        Ok(())
    );
    assert_eq!(bitmap, [1 | 1 << 5, !0], "after faults, all is told");
    let far = report_by_ioctl(&log, END, 2 * PAGE, bitmap.as_mut_ptr() as u64);
    assert_eq!(far, Err(Errno::EOVERFLOW));
    let stop = VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP;
    assert_eq!(feature(&log, SET | stop, &mut []), Ok(()));
    assert!(!log.is_on());
    assert_eq!(
        report_by_ioctl(&log, 0, PAGE, bitmap.as_mut_ptr() as u64),
        Err(Errno::EINVAL)
    );
}

#[test]
fn flags_are_checked() {
    let log = DeviceLog::new(None);
    let no = |flags| feature(&log, flags, &mut [0; 4]);
    for (id, good, bad) in [(6, SET, GET), (7, SET, GET), (8, GET, SET)] {
        assert_eq!(no(id | PROBE), Ok(()));
        assert_eq!(no(id | PROBE | good), Ok(()));
        assert_eq!(no(id | PROBE | bad), Err(Errno::EINVAL));
        assert_eq!(no(id | bad), Err(Errno::EINVAL));
        assert_eq!(no(id | GET | SET), Err(Errno::EINVAL));
        assert_eq!(no(id), Err(Errno::EINVAL));
        assert_eq!(no(id | good | 1 << 19), Err(Errno::EINVAL));
        if id != 7 {
            assert_eq!(
                feature(&log, id | good, &mut [0; 2]),
                Err(Errno::EINVAL),
                "argsz"
            );
        }
    }
    assert_eq!(no(1 | GET), Err(Errno::ENOTTY));
    assert_eq!(log.ioctl(VFIO_DEVICE_FEATURE, 8), cause(Error::BadAddress));
    let short = 7u64;
    let short = log.ioctl(VFIO_DEVICE_FEATURE, &raw const short as u64);
    assert_eq!(short, cause(Error::ShortArgsz));
    assert_eq!(log.ioctl(1, 0).unwrap_err().errno(), Errno::ENOTTY);
}

/// START whose answer cannot be written is undone.
#[test]
fn a_start_that_cannot_answer_is_off_again() {
    let log = DeviceLog::new(None);
    let range = [0, PAGE];
    let words = [
        32 | u64::from(SET | 6) << 32,
        PAGE,
        1,
        range.as_ptr() as u64,
    ];
    // Its own page, read-only.
    let len = std::num::NonZeroUsize::new(4096).unwrap();
    let (prot, flags) = (
        ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        MapFlags::MAP_PRIVATE,
    );
    // SAFETY: the kernel chooses a free address.
    let page = unsafe { mmap_anonymous(None, len, prot, flags) }.unwrap();
    // SAFETY: the page is ours, larger, and aligned.
    unsafe { page.cast::<[u64; 4]>().write(words) };
    // SAFETY: the page is ours, and nobody writes it any more.
    unsafe { mprotect(page, 4096, ProtFlags::PROT_READ) }.unwrap();
    let result = log.ioctl(VFIO_DEVICE_FEATURE, page.as_ptr() as u64);
    assert_eq!(result, cause(Error::BadAddress));
    assert!(!log.is_on());
    // SAFETY: the page is ours, and no reference to it is left.
    unsafe { munmap(page, 4096) }.unwrap();
}

fn hwpt_get(log: &DeviceLog, flags: u32, range: (u64, u64, u64), data: u64) -> Result<(), Errno> {
    let arg = iommu_hwpt_get_dirty_bitmap {
        size: 48,
        hwpt_id: 1,
        flags,
        __reserved: 0,
        iova: range.0,
        length: range.1,
        page_size: range.2,
        data,
    };
    let result = log.ioctl(IOMMU_HWPT_GET_DIRTY_BITMAP, &raw const arg as u64);
    result.map_err(TrackError::errno)
}

#[test]
fn iommufd_by_ioctl() {
    let log = DeviceLog::new(None);
    log.add_range(0, 64 * PAGE).unwrap();
    let set = |size, flags, __reserved| {
        let arg = iommu_hwpt_set_dirty_tracking {
            size,
            flags,
            hwpt_id: 1,
            __reserved,
        };
        let result = log.ioctl(IOMMU_HWPT_SET_DIRTY_TRACKING, &raw const arg as u64);
        result.map_err(TrackError::errno)
    };
    assert_eq!(set(15, 1, 0), Err(Errno::EINVAL));
    assert_eq!(set(16, 2, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(set(16, 1, 1), Err(Errno::EOPNOTSUPP));
    assert_eq!(set(16, 1, 0), Ok(()));
    log.mark(9 * PAGE, 3 * PAGE).unwrap();

    // Byte aligned, and not a byte beyond the bits.
    let mut bytes = [0x80u8; 6];
    let data = bytes.as_mut_ptr() as u64 + 1;
    let range = (0, 16 * PAGE, PAGE);
    assert_eq!(hwpt_get(&log, 2, range, data), Err(Errno::EOPNOTSUPP));
    assert_eq!(hwpt_get(&log, 1, range, data), Ok(()));
    assert_eq!(bytes, [0x80, 0x80, 0x8e, 0x80, 0x80, 0x80]);
    assert_eq!(hwpt_get(&log, 0, range, data), Ok(()));
    let mut clean = [0u8; 2];
    assert_eq!(hwpt_get(&log, 0, range, clean.as_mut_ptr() as u64), Ok(()));
    assert_eq!(clean, [0, 0]);
    assert_eq!(hwpt_get(&log, 0, (0, 0, PAGE), data), Err(Errno::EINVAL));
    assert_eq!(
        hwpt_get(&log, 0, (END, 2 * PAGE, PAGE), data),
        Err(Errno::EOVERFLOW)
    );
    // A hole is an error here, not a silence.
    assert_eq!(
        hwpt_get(&log, 0, (0, 65 * PAGE, PAGE), data),
        Err(Errno::EINVAL)
    );
    assert_eq!(set(16, 0, 0), Ok(()));
    assert_eq!(hwpt_get(&log, 0, range, data), Err(Errno::EINVAL));
}

/// A report longer than one window of words, into memory that ends in it.
#[test]
fn a_fault_in_the_middle_clears_nothing() {
    let log = DeviceLog::new(None);
    let npages = 64 * 4096 * 2;
    start_by_ioctl(&log, &[[0, npages * PAGE]], PAGE).unwrap();
    log.mark(7 * PAGE, 1).unwrap();
    log.mark((npages - 1) * PAGE, 1).unwrap();
    let len = std::num::NonZeroUsize::new(64 << 10).unwrap();
    let (prot, flags) = (
        ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        MapFlags::MAP_PRIVATE,
    );
    // SAFETY: the kernel chooses a free address.
    let bitmap = unsafe { mmap_anonymous(None, len, prot, flags) }.unwrap();
    // SAFETY: the second half is inside.
    let second = unsafe { bitmap.byte_add(32 << 10) };
    // SAFETY: it is ours, and nobody uses it.
    unsafe { mprotect(second, 32 << 10, ProtFlags::PROT_NONE) }.unwrap();
    let result = report_by_ioctl(&log, 0, npages * PAGE, bitmap.as_ptr() as u64);
    // SAFETY: it is ours, and no reference to it is left.
    unsafe { munmap(bitmap, 64 << 10) }.unwrap();
    assert_eq!(result, Err(Errno::EFAULT));
    assert_eq!(report(&log, 0, npages), Ok(vec![7, npages - 1]));
}

// ---- any run

#[derive(Clone, Debug)]
enum Op {
    Start {
        ranges: Vec<(u64, u64)>,
        hint: u32,
    },
    SetTracking(bool),
    Stop,
    Add {
        first: u64,
        n: u64,
    },
    Remove {
        which: usize,
    },
    Take {
        iova: u64,
    },
    Mark {
        first: u64,
        n: u64,
    },
    Late {
        which: usize,
        at: u64,
        n: u64,
    },
    Report {
        first: u64,
        n: u64,
        shift: u32,
        clear: bool,
    },
}

fn ops() -> impl Strategy<Value = Op> {
    let range = (0..40u64, 1..12u64);
    prop_oneof![
        1 => (vec(range.clone(), 1..4), 0..3u32).prop_map(|(ranges, hint)| Op::Start { ranges, hint }),
        1 => any::<bool>().prop_map(Op::SetTracking),
        1 => Just(Op::Stop),
        4 => range.clone().prop_map(|(first, n)| Op::Add { first, n }),
        3 => (0..4usize).prop_map(|which| Op::Remove { which }),
        3 => (0..50u64).prop_map(|iova| Op::Take { iova }),
        4 => range.clone().prop_map(|(first, n)| Op::Mark { first, n }),
        4 => (0..3usize, 0..12u64, 1..4u64).prop_map(|(which, at, n)| Op::Late { which, at, n }),
        8 => (0..40u64, 1..40u64, 0..3u32, any::<bool>())
            .prop_map(|(first, n, shift, clear)| Op::Report { first, n, shift, clear }),
    ]
}

/// One range of the model: its pages, and the dirty ones.
#[derive(Clone, Debug)]
struct Range {
    n: u64,
    dirty: BTreeSet<u64>,
    /// Which START it is of.
    epoch: u64,
    id: u64,
}

#[derive(Default)]
struct Model {
    on: bool,
    epoch: u64,
    next: u64,
    live: BTreeMap<u64, Range>,
    gone: Vec<(u64, Range)>,
}

impl Model {
    fn free(&self, first: u64, n: u64) -> bool {
        self.live
            .iter()
            .all(|(f, r)| f + r.n <= first || first + n <= *f)
    }

    fn add(&mut self, first: u64, n: u64) {
        self.next += 1;
        let range = Range {
            n,
            dirty: BTreeSet::new(),
            epoch: self.epoch,
            id: self.next,
        };
        self.live.insert(first, range);
    }

    fn switch(&mut self, on: bool) {
        self.on = on;
        self.epoch += 1;
        self.gone.clear();
        for range in self.live.values_mut() {
            range.dirty.clear();
            range.epoch = self.epoch;
        }
    }

    fn ranges(&mut self) -> impl Iterator<Item = (u64, &mut Range)> {
        let gone = self.gone.iter_mut().map(|(first, range)| (*first, range));
        self.live
            .iter_mut()
            .map(|(first, range)| (*first, range))
            .chain(gone)
    }
}

/// Only pages of 4 KiB are logged here; reports come at any size.
fn run(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let log = DeviceLog::new(None);
    let mut m = Model::default();
    let mut handles: Vec<(LogRange, u64, u64)> = Vec::new();
    for op in ops {
        match op {
            Op::Start { ranges, hint } => {
                let bytes: Vec<_> = ranges.iter().map(|(f, n)| (f * PAGE, n * PAGE)).collect();
                let done = log.start(&bytes, 1024 << hint).map(|pgsize| pgsize.bytes());
                let mut fresh = Model {
                    epoch: m.epoch,
                    next: m.next,
                    ..Model::default()
                };
                let mut disjoint = true;
                for (first, n) in ranges {
                    disjoint &= fresh.free(first, n);
                    fresh.add(first, n);
                }
                match disjoint && !m.on {
                    true => {
                        prop_assert_eq!(done, Ok(4096));
                        fresh.switch(true);
                        m = fresh;
                    }
                    false => prop_assert!(done.is_err()),
                }
            }
            Op::SetTracking(on) => {
                log.set_tracking(on).unwrap();
                // Again on keeps the handles.
                match on && m.on {
                    true => {
                        m.gone.clear();
                        m.live.values_mut().for_each(|range| range.dirty.clear());
                    }
                    false => m.switch(on),
                }
            }
            Op::Stop => {
                log.stop();
                m.switch(false);
                m.live.clear();
            }
            Op::Add { first, n } => {
                let done = log.add_range(first * PAGE, n * PAGE);
                prop_assert_eq!(done.is_ok(), m.free(first, n));
                if done.is_ok() {
                    m.add(first, n);
                }
            }
            Op::Remove { which } => {
                let Some((first, range)) = m.live.iter().nth(which).map(|(f, r)| (*f, r.clone()))
                else {
                    continue;
                };
                log.remove_range(first * PAGE, range.n * PAGE).unwrap();
                m.live.remove(&first);
                if m.on {
                    m.gone.push((first, range));
                }
            }
            Op::Take { iova } => {
                let found = m
                    .live
                    .iter()
                    .find(|(f, r)| (**f..**f + r.n).contains(&iova));
                let handle = log.range(iova * PAGE);
                prop_assert_eq!(handle.is_some(), m.on && found.is_some());
                if let (Some(handle), Some((_, range))) = (handle, found) {
                    handles.push((handle, range.id, range.epoch));
                }
            }
            Op::Mark { first, n } => {
                let done = log.mark(first * PAGE + 1, n * PAGE - 1);
                let mut all = m.on;
                for page in (first..first + n).filter(|_| m.on) {
                    let found = m
                        .live
                        .iter_mut()
                        .find(|(f, r)| (**f..**f + r.n).contains(&page));
                    match found {
                        Some((_, range)) => drop(range.dirty.insert(page)),
                        None => all = false,
                    }
                }
                prop_assert_eq!(done.is_ok(), all);
            }
            Op::Late { which, at, n } => {
                let Some((handle, id, epoch)) = handles.iter().rev().nth(which) else {
                    continue;
                };
                let first = handle.first() / PAGE + at;
                let done = handle.mark(first * PAGE, n * PAGE);
                let found = m.ranges().find(|(_, r)| r.id == *id && r.epoch == *epoch);
                let Some((start, range)) = found else {
                    prop_assert!(done.is_err(), "neither refused nor reported");
                    continue;
                };
                let end = start + range.n;
                prop_assert_eq!(done.is_ok(), first + n <= end);
                range
                    .dirty
                    .extend((first..first + n).filter(|page| *page < end));
            }
            Op::Report {
                first,
                n,
                shift,
                clear,
            } => {
                let (first, n) = (first >> shift << shift, (n >> shift).max(1) << shift);
                let mut words = [0];
                let done =
                    log.dirty_bitmap(first * PAGE, n * PAGE, PAGE << shift, clear, &mut words);
                let asked = first..first + n;
                let known = |page: u64| {
                    m.live.iter().any(|(f, r)| (*f..f + r.n).contains(&page))
                        || m.gone.iter().any(|(f, r)| (*f..f + r.n).contains(&page))
                };
                let all = m.on && asked.clone().all(known);
                prop_assert_eq!(done.is_ok(), all);
                if !all {
                    prop_assert_eq!(words, [0]);
                    continue;
                }
                let mut expected = 0;
                for (_, range) in m.ranges() {
                    for page in range.dirty.iter().filter(|page| asked.contains(page)) {
                        expected |= 1u64 << ((page - first) >> shift);
                    }
                    if clear {
                        range.dirty.retain(|page| !asked.contains(page));
                    }
                }
                prop_assert_eq!(words, [expected]);
                if clear {
                    m.gone
                        .retain(|(f, r)| *f < asked.start || f + r.n > asked.end);
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]
    #[test]
    fn any_run_agrees_with_the_model(ops in vec(ops(), 1..60)) {
        run(ops)?;
    }
}
