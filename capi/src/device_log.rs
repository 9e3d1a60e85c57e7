// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's own log of what it wrote, by IOVA.

use adapter_user::device_log::{self, Holes, LogOptions};
use libc::{c_int, c_ulong};

use crate::border::border;
use crate::failure::Failure;
use crate::pointer::Pointers;
use crate::range::{argument, Range};

/// The log of what a device wrote, by IOVA: VFIO's DMA logging and iommufd's dirty
/// tracking, for a device that is emulated, vfio-user or vDPA. Any thread may call it.
pub struct DeviceLog {
    pub(crate) inner: device_log::DeviceLog,
}

/// A report answers that a page is clean which was to be logged and is not mapped, as
/// Linux's drivers do. Without this flag the report fails with -EINVAL.
pub const VFIO_DIRTY_LOG_HOLES_CLEAN: u32 = 1;

/// The options of a device's log. Make it zero, set `argsz`, and set what you need.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DeviceLogOptions {
    /// `sizeof(struct vfio_dirty_device_log_options)`
    pub argsz: u32,
    /// VFIO_DIRTY_LOG_HOLES_CLEAN, or 0.
    pub flags: u32,
    /// How many bytes the bitmaps of mapped ranges may take in all. 0 sets no limit.
    pub budget: u64,
    /// About how many bytes the log may keep for removed ranges that were not reported
    /// yet. Beyond it the log becomes coarser and forgets nothing. 0 is 16 MiB.
    pub removed: u64,
}

impl DeviceLogOptions {
    fn check(self) -> Result<LogOptions, Failure> {
        if (self.argsz as usize) < size_of::<Self>() {
            return Err(Failure::argument(
                "options",
                "has an argsz that is too small",
            ));
        }
        if self.flags & !VFIO_DIRTY_LOG_HOLES_CLEAN != 0 {
            return Err(Failure::argument("options", "has an unknown flag"));
        }
        let default = LogOptions::default();
        Ok(LogOptions {
            budget: (self.budget != 0).then_some(self.budget),
            removed: match self.removed {
                0 => default.removed,
                bytes => bytes,
            },
            holes: match self.flags & VFIO_DIRTY_LOG_HOLES_CLEAN {
                0 => Holes::Refused,
                _ => Holes::Clean,
            },
        })
    }
}

/// Creates a log that is off and has no ranges. NULL for `options` is all zero.
///
/// -EINVAL if `argsz` is too small, or if a flag is unknown.
///
/// # Safety
///
/// `options` is NULL or has `argsz` bytes. There is room for a pointer at `log`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_new(
    options: *const DeviceLogOptions,
    log: *mut *mut DeviceLog,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let options = match options.is_null() {
                true => LogOptions::default(),
                false => c.read(options, "options")?.check()?,
            };
            let out = c.out(log, "log")?;
            let inner = device_log::DeviceLog::with_options(options);
            c.give(out, DeviceLog { inner });
            Ok(0)
        })
    }
}

/// Frees the handle to a log. A source that has the log keeps it. NULL is ignored.
///
/// # Safety
///
/// Nobody uses the handle any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_free(log: *mut DeviceLog) {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            drop(c.take_back(log, "log")?);
            Ok(0)
        })
    };
}

/// Adds the `size` bytes of IOVAs from `iova` on, which the device gets mapped, whether
/// the log is on or off. Call it before the device can reach them. If the log is on, the
/// range is logged from now on, and it is clean. A device that does not know its map adds
/// once all that it may ever write.
///
/// Errors, in this order; nothing changes then:
///
/// - -EINVAL unless both are multiples of 4 KiB, or if `size` is 0.
/// - -EOVERFLOW if the IOVAs wrap.
/// - -EEXIST if another range has some of them.
/// - -ENOMEM, if the log is on, beyond the budget, or if there is no memory.
///
/// # Safety
///
/// `log` is a log.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_add_range(
    log: *const DeviceLog,
    iova: u64,
    size: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            c.handle(log, "log")?.inner.add_range(iova, size)?;
            Ok(0)
        })
    }
}

/// Removes the range that starts at `iova` and has `size` bytes. Call it when the device
/// can no longer reach them. If the log is on, the dirty pages of the range stay until a
/// report has had them.
///
/// Errors, in this order; nothing changes then:
///
/// - -EINVAL if `size` is 0.
/// - -EOVERFLOW if the IOVAs wrap.
/// - -ENOENT if there is no range with exactly these bounds.
///
/// # Safety
///
/// `log` is a log.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_remove_range(
    log: *const DeviceLog,
    iova: u64,
    size: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            c.handle(log, "log")?.inner.remove_range(iova, size)?;
            Ok(0)
        })
    }
}

/// Switches the log on for what is mapped, or will be, in the `nranges` ranges of IOVAs
/// at `ranges`. NULL and 0 log all that is mapped or will be. Every page is clean.
///
/// `pgsize` is a hint, in bytes: the log's pages have this size, or 4 KiB if it is
/// smaller.
///
/// Errors, in this order; nothing changes then:
///
/// - -EINVAL if there are no ranges at an address that is not NULL.
/// - -E2BIG if there are more than 256 ranges.
/// - -EINVAL unless `pgsize` is a power of two.
/// - For one range after the other: -EINVAL unless its first IOVA and its length are
///   multiples of `pgsize`, or if it has no bytes; -EOVERFLOW if it wraps; -EINVAL if it
///   overlaps one before it.
/// - -EINVAL if the log is on.
/// - -ENOMEM beyond the budget, or if there is no memory.
///
/// # Safety
///
/// There are `nranges` ranges.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_start(
    log: *const DeviceLog,
    ranges: *const Range,
    nranges: usize,
    pgsize: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let log = c.handle(log, "log")?;
            if ranges.is_null() && nranges == 0 {
                log.inner.start_all(pgsize)?;
                return Ok(0);
            }
            let ranges = c.slice(ranges, nranges, "ranges")?.iter();
            let ranges: Vec<_> = ranges.map(|range| (range.addr, range.size)).collect();
            log.inner.start(&ranges, pgsize)?;
            Ok(0)
        })
    }
}

/// Switches the log off, and forgets what was dirty. The ranges stay. A log that is off
/// may be stopped.
///
/// # Safety
///
/// `log` is a log.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_stop(log: *const DeviceLog) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            c.handle(log, "log")?.inner.stop();
            Ok(0)
        })
    }
}

/// Marks as dirty every page that the `len` bytes at IOVA `iova` touch, which may span
/// ranges. No bytes mark nothing, and neither do bytes that the log was not started for.
/// Call it after the write, and before you tell anybody that the write is done.
///
/// Errors, in this order:
///
/// - -EOVERFLOW if the IOVAs wrap; nothing is marked then.
/// - -EINVAL if the log is off.
/// - -EINVAL if some of the bytes are in no range; the others are marked all the same.
///
/// # Safety
///
/// `log` is a log.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_mark(
    log: *const DeviceLog,
    iova: u64,
    len: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            c.handle(log, "log")?.inner.mark(iova, len)?;
            Ok(0)
        })
    }
}

/// ORs the dirty pages of the `size` bytes of IOVAs from `iova` on into `words`, and
/// makes them clean: bit k % 64 of word k / 64 is the page of `pgsize` bytes at
/// `iova + k * pgsize`. It is DMA_LOGGING_REPORT. Copy the pages after this call.
///
/// Errors, in this order. Nothing is cleared then, and every page of the report counts as
/// dirty:
///
/// - -EINVAL unless `pgsize` is a power of two of at least 4 KiB, or if `size` is 0.
/// - -EOVERFLOW if the IOVAs wrap.
/// - -EINVAL unless `iova` is a multiple of `pgsize`, or if `nwords` is too few, or if the
///   log is off or was not started for an IOVA.
/// - -EINVAL if an IOVA is not mapped, without VFIO_DIRTY_LOG_HOLES_CLEAN.
///
/// # Safety
///
/// `words` has `nwords` words, which have values.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_report(
    log: *const DeviceLog,
    iova: u64,
    size: u64,
    pgsize: u64,
    words: *mut u64,
    nwords: usize,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let log = c.handle(log, "log")?;
            let words = c.slice_mut(words, nwords, "words")?;
            log.inner.report(iova, size, pgsize, words)?;
            Ok(0)
        })
    }
}

/// Answers an ioctl as the kernel would: VFIO_DEVICE_FEATURE of a device's file (the
/// features DMA_LOGGING_START, DMA_LOGGING_STOP and DMA_LOGGING_REPORT), and
/// IOMMU_HWPT_SET_DIRTY_TRACKING and IOMMU_HWPT_GET_DIRTY_BITMAP of an iommufd. `arg` is
/// the address of its structure.
///
/// -ENOTTY for another ioctl or feature. A bad address is -EFAULT and no signal. The
/// other errors are those of the ioctl in Linux.
///
/// # Safety
///
/// The structure at `arg`, and the ranges and the bitmap that it names, are memory that
/// nobody else uses meanwhile, or addresses without memory.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_ioctl(
    log: *const DeviceLog,
    nr: u32,
    arg: c_ulong,
) -> c_int {
    let answer = |c: &Pointers| {
        let log = c.handle(log, "log")?;
        // SAFETY: the caller keeps the contract, which is that of this call.
        unsafe { log.inner.ioctl(nr, argument(arg)) }?;
        Ok(0)
    };
    // SAFETY: the caller keeps the contract.
    unsafe { border(answer) }
}
