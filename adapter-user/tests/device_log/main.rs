// SPDX-License-Identifier: MIT OR Apache-2.0
//! A device's log: the errors of VFIO's DMA logging and of iommufd's dirty tracking,
//! and a comparison of its reports with a naive model of pages of 4 KiB.

mod ioctl;
mod model;
mod recorded;
mod scripts;
mod typed;

use adapter_user::device_log::DeviceLog;
use adapter_user::{Error, TrackError};

const PAGE: u64 = 4096;
const END: u64 = 0u64.wrapping_sub(PAGE);

fn cause(error: Error) -> Result<(), TrackError> {
    Err(TrackError::Cause(error))
}

fn unmapped(addr: u64) -> Result<(), TrackError> {
    Err(TrackError::Unmapped { addr })
}

/// A log whose device may write any IOVA.
fn unlimited(budget: Option<u64>) -> DeviceLog {
    let log = DeviceLog::new(budget);
    log.add_range(0, END).unwrap();
    log.add_range(END, PAGE).unwrap();
    log
}

/// A log of pages 0 to 99 and 200 to 299.
fn started() -> DeviceLog {
    let log = DeviceLog::new(None);
    log.add_range(0, 100 * PAGE).unwrap();
    log.add_range(200 * PAGE, 100 * PAGE).unwrap();
    log.start(&[(0, 100 * PAGE), (200 * PAGE, 100 * PAGE)], PAGE)
        .unwrap();
    log
}

/// Takes a report of `n` pages from page `first` on, and returns the dirty ones.
fn report(log: &DeviceLog, first: u64, n: u64) -> Result<Vec<u64>, TrackError> {
    let mut words = vec![0; n.div_ceil(64) as usize];
    log.report(first * PAGE, n * PAGE, PAGE, &mut words)?;
    let dirty =
        (0..words.len() as u64 * 64).filter(|k| words[(k / 64) as usize] >> (k % 64) & 1 != 0);
    Ok(dirty.map(|k| first + k).collect())
}
