// SPDX-License-Identifier: MIT OR Apache-2.0
//! The same log by ioctls, with the structures of Linux.

use adapter_user::device_log::uapi::*;
use adapter_user::Errno;
use nix::sys::mman::{mmap_anonymous, mprotect, munmap, MapFlags, ProtFlags};

use super::*;

/// Makes an ioctl.
fn ioctl(log: &DeviceLog, nr: u32, arg: u64) -> Result<(), TrackError> {
    // SAFETY: every address in these tests is of memory that only the test uses, or
    // has no memory.
    unsafe { log.ioctl(nr, arg) }
}

fn feature(log: &DeviceLog, flags: u32, data: &mut [u64]) -> Result<(), Errno> {
    let argsz = 8 + data.len() as u64 * 8;
    let mut bytes = vec![argsz | u64::from(flags) << 32];
    bytes.extend_from_slice(data);
    let result = ioctl(log, VFIO_DEVICE_FEATURE, bytes.as_mut_ptr() as u64);
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
    let log = unlimited(None);
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
    assert_eq!(
        bitmap,
        [1 | 1 << 5, !0],
        "the faults before cleared nothing"
    );
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
    assert_eq!(
        ioctl(&log, VFIO_DEVICE_FEATURE, 8),
        cause(Error::BadAddress)
    );
    let short = 7u64;
    let short = ioctl(&log, VFIO_DEVICE_FEATURE, &raw const short as u64);
    assert_eq!(short, cause(Error::ShortArgsz));
    assert_eq!(ioctl(&log, 1, 0).unwrap_err().errno(), Errno::ENOTTY);
}

/// A START whose answer cannot be written is undone.
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
    // The structure has a page of its own, which is read-only.
    let len = std::num::NonZeroUsize::new(4096).unwrap();
    let (prot, flags) = (
        ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
        MapFlags::MAP_PRIVATE,
    );
    // SAFETY: the kernel chooses a free address.
    let page = unsafe { mmap_anonymous(None, len, prot, flags) }.unwrap();
    // SAFETY: the page is ours, aligned, and larger than the words.
    unsafe { page.cast::<[u64; 4]>().write(words) };
    // SAFETY: the page is ours, and nobody writes it any more.
    unsafe { mprotect(page, 4096, ProtFlags::PROT_READ) }.unwrap();
    let result = ioctl(&log, VFIO_DEVICE_FEATURE, page.as_ptr() as u64);
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
    let result = ioctl(log, IOMMU_HWPT_GET_DIRTY_BITMAP, &raw const arg as u64);
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
        let result = ioctl(&log, IOMMU_HWPT_SET_DIRTY_TRACKING, &raw const arg as u64);
        result.map_err(TrackError::errno)
    };
    assert_eq!(set(15, 1, 0), Err(Errno::EINVAL));
    assert_eq!(set(16, 2, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(set(16, 1, 1), Err(Errno::EOPNOTSUPP));
    assert_eq!(set(16, 1, 0), Ok(()));
    log.mark(9 * PAGE, 3 * PAGE).unwrap();

    // The bitmap may start at any byte, and no byte after its bits changes.
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
    // A hole is an error here, where Linux ignores it.
    assert_eq!(
        hwpt_get(&log, 0, (0, 65 * PAGE, PAGE), data),
        Err(Errno::EINVAL)
    );
    assert_eq!(set(16, 0, 0), Ok(()));
    assert_eq!(hwpt_get(&log, 0, range, data), Err(Errno::EINVAL));
}

/// The report is longer than one window of words, and its bitmap ends in bad memory
/// after the first window.
#[test]
fn a_fault_in_the_middle_clears_nothing() {
    let log = unlimited(None);
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
    // SAFETY: the second half starts inside the mapping.
    let second = unsafe { bitmap.byte_add(32 << 10) };
    // SAFETY: it is ours, and nobody uses it.
    unsafe { mprotect(second, 32 << 10, ProtFlags::PROT_NONE) }.unwrap();
    let result = report_by_ioctl(&log, 0, npages * PAGE, bitmap.as_ptr() as u64);
    // SAFETY: it is ours, and no reference to it is left.
    unsafe { munmap(bitmap, 64 << 10) }.unwrap();
    assert_eq!(result, Err(Errno::EFAULT));
    assert_eq!(report(&log, 0, npages), Ok(vec![7, npages - 1]));
}

/// Row "a DMA-logging range that ends at 2^64": Linux refuses it, in START and in
/// REPORT, and accepts it in iommufd's GET_DIRTY_BITMAP.
#[test]
fn a_dma_logging_range_that_ends_at_2_64_overflows() {
    let log = unlimited(None);
    let overflow = Err(Errno::EOVERFLOW);
    assert_eq!(
        start_by_ioctl(&log, &[[END, PAGE]], PAGE).map(drop),
        overflow
    );
    let order = start_by_ioctl(&log, &[[0, PAGE], [END, PAGE], [1, 1]], PAGE);
    assert_eq!(order.map(drop), overflow);
    let order = start_by_ioctl(&log, &[[0, PAGE], [1, 1], [END, PAGE]], PAGE);
    assert_eq!(order, Err(Errno::EINVAL));
    assert!(!log.is_on());
    let log = DeviceLog::new(None);
    log.add_range(END - PAGE, 2 * PAGE).unwrap();
    log.start_all(PAGE).unwrap();
    log.mark(END, 1).unwrap();
    let mut bitmap = 0u64;
    let data = &raw mut bitmap as u64;
    assert_eq!(report_by_ioctl(&log, END, PAGE, data), overflow);
    assert_eq!(hwpt_get(&log, 0, (END, PAGE, PAGE), data), Ok(()));
    assert_eq!(bitmap, 1);
    assert_eq!(report_by_ioctl(&log, END - PAGE, PAGE, data), Ok(()));
}
