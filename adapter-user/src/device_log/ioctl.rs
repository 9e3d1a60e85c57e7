// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's log by ioctls, whose structures are in this process's memory.

use std::mem::size_of;

use dirty_core::host::Fault;
use dirty_core::migration::{DeviceFeature, LoggingCall, Offers};
use dirty_core::Error;

use super::ask::Ask;
use super::log::{DeviceLog, MAX_RANGES};
use super::uapi::{
    iommu_hwpt_get_dirty_bitmap, iommu_hwpt_set_dirty_tracking,
    vfio_device_feature_dma_logging_control, vfio_device_feature_dma_logging_range,
    vfio_device_feature_dma_logging_report, IOMMU_HWPT_DIRTY_TRACKING_ENABLE,
    IOMMU_HWPT_GET_DIRTY_BITMAP, IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
    IOMMU_HWPT_SET_DIRTY_TRACKING, VFIO_DEVICE_FEATURE,
};
use crate::error::TrackError;
use crate::process_memory::{read_process, write_process};

/// The highest last IOVA that VFIO's ioctls take: Linux refuses a range whose end,
/// the IOVA after it, does not fit 64 bits.
const LIMIT: u64 = u64::MAX - 1;

impl DeviceLog {
    /// Answers an ioctl as the kernel would. `nr` is the ioctl's number, and `arg` is
    /// the address of its structure in this process.
    ///
    /// The ioctls are VFIO_DEVICE_FEATURE of a device's file (the features
    /// DMA_LOGGING_START, DMA_LOGGING_STOP and DMA_LOGGING_REPORT), and
    /// IOMMU_HWPT_SET_DIRTY_TRACKING and IOMMU_HWPT_GET_DIRTY_BITMAP of an iommufd.
    /// The number of the page table, `hwpt_id`, is ignored: the caller knows which
    /// log it stands for.
    ///
    /// A report ORs its bits into the bitmap, which may start at any byte, and
    /// changes no byte after the one that holds the last bit.
    ///
    /// # Safety
    ///
    /// The call reads and writes this process's memory as the ioctl says: the
    /// structure at `arg`, and the ranges and the bitmap that the structure points
    /// to. For as long as the call takes, each of these addresses must
    ///
    /// - have memory that the caller may read and, for a bitmap and for the structure
    ///   of a START, write; that nobody else uses; and to which there is no
    ///   reference, or only the one that the address was made from, or
    /// - have no memory. The call then fails with [`Error::BadAddress`].
    ///
    /// A bitmap has `length / page_size` bits, rounded up to whole bytes.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::UnknownIoctl`].
    /// - [`Error::BadAddress`] if the structure cannot be read.
    /// - [`Error::ShortArgsz`] if `argsz` or `size` says that it is too short.
    /// - For VFIO_DEVICE_FEATURE: [`Error::UnknownFlags`];
    ///   [`Error::FlagCombination`] for GET with SET but without PROBE;
    ///   [`Error::UnknownFeature`]; [`Error::FlagCombination`] for a GET of START or
    ///   STOP, a SET of REPORT, or none of GET, SET and PROBE;
    ///   [`Error::ShortArgsz`] if the feature's data do not fit.
    /// - For iommufd: [`TrackError::NotSupported`].
    /// - The errors of [`start`](DeviceLog::start), [`report`](DeviceLog::report),
    ///   [`set_tracking`](DeviceLog::set_tracking) and
    ///   [`dirty_bitmap`](DeviceLog::dirty_bitmap).
    /// - [`Error::BadAddress`] if the ranges or the bitmap cannot be read, or the
    ///   answer cannot be written. The log is then off again after a START, and a
    ///   report has cleared nothing.
    ///
    /// As in Linux, DMA_LOGGING_START and DMA_LOGGING_REPORT answer [`Error::Wraps`]
    /// also for a range that ends at 2^64. The typed calls accept it, and so does
    /// iommufd's.
    ///
    /// Linux ignores an error inside the report of an iommufd (a hole, a bad
    /// address); this call returns it. [`LogOptions::holes`](super::LogOptions::holes)
    /// says what it answers for a hole.
    pub unsafe fn ioctl(&self, nr: u32, arg: u64) -> Result<(), TrackError> {
        match nr {
            VFIO_DEVICE_FEATURE => self.feature(arg),
            IOMMU_HWPT_SET_DIRTY_TRACKING => self.hwpt_set(arg),
            IOMMU_HWPT_GET_DIRTY_BITMAP => self.hwpt_get(arg),
            _ => Err(Error::UnknownIoctl.into()),
        }
    }

    fn feature(&self, arg: u64) -> Result<(), TrackError> {
        let offers = Offers {
            migration: None,
            logging: true,
        };
        let read = |addr, to: &mut [u8]| read_process(addr, to).map_err(|_| Fault { done: 0 });
        match DeviceFeature::read(offers, arg, read)? {
            DeviceFeature::Logging(call) => self.logging(call),
            // unreachable: a device that does not migrate is only probed besides.
            DeviceFeature::Probe | DeviceFeature::Migration(_) => Ok(()),
        }
    }

    /// Answers a call of DMA logging that was read. The caller keeps what
    /// [`ioctl`](DeviceLog::ioctl) says of the memory that the call points to.
    pub(crate) fn logging(&self, call: LoggingCall) -> Result<(), TrackError> {
        match call {
            LoggingCall::Start { addr, control } => self.logging_start(addr, control),
            LoggingCall::Stop => {
                self.stop();
                Ok(())
            }
            LoggingCall::Report(report) => self.logging_report(report),
        }
    }

    fn logging_start(
        &self,
        arg: u64,
        mut control: vfio_device_feature_dma_logging_control,
    ) -> Result<(), TrackError> {
        let count = control.num_ranges as usize;
        if count == 0 {
            return Err(TrackError::NoRanges);
        }
        if count > MAX_RANGES {
            return Err(TrackError::TooManyRanges);
        }
        let mut ranges = Vec::new();
        for at in 0..count as u64 {
            let size = size_of::<vfio_device_feature_dma_logging_range>() as u64;
            let at = control.ranges.checked_add(at * size);
            let range = get(at.ok_or(Error::BadAddress)?)?;
            let range = vfio_device_feature_dma_logging_range::from_bytes(&range);
            ranges.push((range.iova, range.length));
        }
        control.page_size = self.start_below(LIMIT, &ranges, control.page_size)?.bytes();
        put(arg, &control.page_size.to_ne_bytes()).inspect_err(|_| self.stop())
    }

    fn logging_report(
        &self,
        report: vfio_device_feature_dma_logging_report,
    ) -> Result<(), TrackError> {
        let ask = Ask::logging(LIMIT, report.iova, report.length, report.page_size)?;
        self.report_to_user(ask, true, report.bitmap)
    }

    fn hwpt_set(&self, arg: u64) -> Result<(), TrackError> {
        let set = iommu_hwpt_set_dirty_tracking::from_bytes(&get(arg)?);
        if (set.size as usize) < size_of::<iommu_hwpt_set_dirty_tracking>() {
            return Err(Error::ShortArgsz.into());
        }
        if set.flags & !IOMMU_HWPT_DIRTY_TRACKING_ENABLE != 0 || set.__reserved != 0 {
            return Err(TrackError::NotSupported);
        }
        self.set_tracking(set.flags & IOMMU_HWPT_DIRTY_TRACKING_ENABLE != 0)
    }

    fn hwpt_get(&self, arg: u64) -> Result<(), TrackError> {
        let get = iommu_hwpt_get_dirty_bitmap::from_bytes(&get(arg)?);
        if (get.size as usize) < size_of::<iommu_hwpt_get_dirty_bitmap>() {
            return Err(Error::ShortArgsz.into());
        }
        if get.flags & !IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR != 0 || get.__reserved != 0 {
            return Err(TrackError::NotSupported);
        }
        let ask = Ask::iommufd(get.iova, get.length, get.page_size)?;
        let clear = get.flags & IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR == 0;
        self.report_to_user(ask, clear, get.data)
    }

    /// ORs a report into the bitmap at address `data`, which may have any alignment.
    /// Only the bytes that hold its bits are touched.
    fn report_to_user(&self, ask: Ask, clear: bool, data: u64) -> Result<(), TrackError> {
        let end = ask.npages().div_ceil(8);
        self.report_windows(ask, clear, |at, words| {
            let offset = at as u64 * 8;
            let len = (end - offset).min(words.len() as u64 * 8);
            let mut bytes = vec![0; len as usize];
            let addr = data.checked_add(offset).ok_or(Error::BadAddress)?;
            read_process(addr, &mut bytes).map_err(|_| Error::BadAddress)?;
            let dirty = words.iter().flat_map(|word| word.to_le_bytes());
            bytes.iter_mut().zip(dirty).for_each(|(a, b)| *a |= b);
            put(addr, &bytes)
        })
    }
}

fn get<const N: usize>(addr: u64) -> Result<[u8; N], TrackError> {
    let mut bytes = [0; N];
    read_process(addr, &mut bytes).map_err(|_| Error::BadAddress)?;
    Ok(bytes)
}

fn put(addr: u64, bytes: &[u8]) -> Result<(), TrackError> {
    Ok(write_process(addr, bytes).map_err(|_| Error::BadAddress)?)
}

/// Gives each structure a `from_bytes` that reads its fields one after another, as
/// they lie in memory.
macro_rules! from_bytes {
    ($($name:ident { $($field:ident),* })*) => {$(
        impl $name {
            fn from_bytes(bytes: &[u8; size_of::<$name>()]) -> Self {
                let mut rest = &bytes[..];
                let mut value = Self::default();
                $(value.$field = {
                    let (field, tail) = rest.split_at(std::mem::size_of_val(&value.$field));
                    rest = tail;
                    let mut wide = [0; 8];
                    wide[..field.len()].copy_from_slice(field);
                    u64::from_le_bytes(wide) as _
                };)*
                debug_assert!(rest.is_empty());
                value
            }
        }
    )*};
}

from_bytes! {
    iommu_hwpt_set_dirty_tracking { size, flags, hwpt_id, __reserved }
    iommu_hwpt_get_dirty_bitmap { size, hwpt_id, flags, __reserved, iova, length, page_size, data }
}
