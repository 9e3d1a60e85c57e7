// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a test wants to fail or to be lost.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

use adapter_user::Errno;

/// An answer whose dirty bits can be dropped before the program sees them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Report {
    /// Of VFIO_IOMMU_DIRTY_PAGES with GET_BITMAP.
    Get = 1,
    /// Of VFIO_IOMMU_UNMAP_DMA.
    Unmap = 2,
    /// Of DMA_LOGGING_REPORT.
    Log = 4,
    /// Of a server, of what its device wrote.
    Device = 8,
}

static LOST: AtomicU8 = AtomicU8::new(0);
static FAILS: Mutex<Option<(String, i32)>> = Mutex::new(None);

/// From now on the bits of these reports are lost: `get`, `unmap`, `log`, `device` or
/// `nothing`.
pub(crate) fn lose(what: &str) -> Result<(), String> {
    let lost = match what {
        "get" => Report::Get as u8,
        "unmap" => Report::Unmap as u8,
        "log" => Report::Log as u8,
        "device" => Report::Device as u8,
        "nothing" => 0,
        _ => {
            return Err(format!(
                "{what} is none of get, unmap, log, device, nothing"
            ))
        }
    };
    LOST.store(lost, Ordering::Relaxed);
    Ok(())
}

/// Whether the bits of a report are to be lost.
pub(crate) fn is_lost(report: Report) -> bool {
    LOST.load(Ordering::Relaxed) & report as u8 != 0
}

/// The next ioctl whose name is `name` fails with `errno`, and does nothing.
pub(crate) fn fail_next(name: &str, errno: i32) {
    *FAILS.lock().unwrap_or_else(PoisonError::into_inner) = Some((name.to_owned(), errno));
}

/// Returns the errno that this ioctl is to fail with.
pub(crate) fn failure(name: &str) -> Option<Errno> {
    let mut fails = FAILS.lock().unwrap_or_else(PoisonError::into_inner);
    let (_, errno) = fails.take_if(|(wanted, _)| wanted == name)?;
    Some(Errno(errno))
}
