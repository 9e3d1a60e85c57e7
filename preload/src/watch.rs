// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is traced of the program's ioctls, and what a test makes of them.

use std::fmt;

use adapter_user::device_log::uapi as log;
use adapter_user::uapi;
use adapter_user::{Errno, Error};

use crate::container::Held;
use crate::faults::{failure, is_lost, Report};
use crate::trace::trace;
use crate::user::{self, words};

/// A bitmap that an ioctl is to answer with.
struct Bitmap {
    report: Report,
    addr: u64,
    bytes: u64,
}

impl Bitmap {
    /// How many pages the answer says are dirty; none if they are to be lost, which the
    /// program's bitmap says too from now on.
    fn dirty(&self) -> u64 {
        let Ok(mut bytes) = user::bytes(self.addr, self.bytes as usize) else {
            return 0;
        };
        let dirty = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
        if !is_lost(self.report) {
            return dirty;
        }
        bytes.fill(0);
        let lost = user::write(self.addr, &bytes);
        trace!("lost dirty={dirty} {lost:?}");
        0
    }

    /// Makes the call `name`, which reports `size` bytes of IOVAs into the bitmap.
    fn follow(
        &self,
        name: &str,
        iova: u64,
        size: u64,
        call: impl FnOnce() -> Result<i32, Errno>,
    ) -> Result<i32, Errno> {
        let result = run(name, call);
        match result {
            Ok(_) => trace!(
                "{name} iova={iova:#x} size={size:#x} dirty={} ok",
                self.dirty()
            ),
            Err(_) => trace!("{name} iova={iova:#x} size={size:#x} {}", Shown(&result)),
        }
        result
    }
}

/// The result of a call, as the trace has it.
struct Shown<'a, E>(&'a Result<E, Errno>);

impl<E> fmt::Display for Shown<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Ok(_) => f.write_str("ok"),
            Err(errno) => write!(f, "{errno}"),
        }
    }
}

/// Makes an ioctl of a container.
pub(crate) fn container(
    held: &Held,
    nr: u32,
    arg: u64,
    call: impl FnOnce() -> Result<u32, Error>,
) -> Result<i32, Errno> {
    let call = || held.ioctl(nr, arg, call);
    let flags = || (words::<1>(arg)[0] >> 32) as u32;
    match nr {
        uapi::VFIO_IOMMU_MAP_DMA => {
            let [_, _vaddr, iova, size] = words(arg);
            let flags = flags();
            let result = run("map", call);
            trace!(
                "map iova={iova:#x} size={size:#x} flags={flags} {}",
                Shown(&result)
            );
            result
        }
        uapi::VFIO_IOMMU_UNMAP_DMA => {
            let [_, iova, size] = words(arg);
            let flags = flags();
            let with_bitmap = flags & uapi::VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0;
            let result = run("unmap", call);
            if with_bitmap && result.is_ok() {
                let [_pgsize, bytes, addr] = words(arg.wrapping_add(24));
                let report = Report::Unmap;
                let bitmap = Bitmap {
                    report,
                    addr,
                    bytes,
                };
                trace!(
                    "unmap iova={iova:#x} size={size:#x} dirty={} ok",
                    bitmap.dirty()
                );
            } else {
                trace!(
                    "unmap iova={iova:#x} size={size:#x} flags={flags} {}",
                    Shown(&result)
                );
            }
            result
        }
        uapi::VFIO_IOMMU_DIRTY_PAGES => match flags() {
            uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP => {
                let [iova, size, _pgsize, bytes, addr] = words(arg.wrapping_add(8));
                let report = Report::Get;
                let bitmap = Bitmap {
                    report,
                    addr,
                    bytes,
                };
                bitmap.follow("get", iova, size, call)
            }
            flags => {
                let name = match flags {
                    uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_START => "start",
                    uapi::VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP => "stop",
                    _ => "dirty pages",
                };
                let result = run(name, call);
                trace!("{name} {}", Shown(&result));
                result
            }
        },
        _ => {
            let result = call();
            trace!("container {nr:#x} {}", Shown(&result));
            result
        }
    }
}

/// Makes the call, unless it is to fail.
fn run(name: &str, call: impl FnOnce() -> Result<i32, Errno>) -> Result<i32, Errno> {
    match failure(name) {
        Some(errno) => Err(errno),
        None => call(),
    }
}

/// Makes an ioctl of a device.
pub(crate) fn device(
    nr: u32,
    arg: u64,
    call: impl FnOnce() -> Result<i32, Errno>,
) -> Result<i32, Errno> {
    if nr != log::VFIO_DEVICE_FEATURE {
        let result = call();
        trace!("device {nr:#x} {}", Shown(&result));
        return result;
    }
    let flags = (words::<1>(arg)[0] >> 32) as u32;
    let feature = flags & log::VFIO_DEVICE_FEATURE_MASK;
    if flags & log::VFIO_DEVICE_FEATURE_PROBE != 0 {
        let result = call();
        trace!("probe {feature} {}", Shown(&result));
        return result;
    }
    match feature {
        log::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT => {
            let [iova, size, pgsize, addr] = words(arg.wrapping_add(8));
            let bytes = size.checked_div(pgsize).unwrap_or(0).div_ceil(8);
            let report = Report::Log;
            let bitmap = Bitmap {
                report,
                addr,
                bytes,
            };
            bitmap.follow("report", iova, size, call)
        }
        log::VFIO_DEVICE_FEATURE_DMA_LOGGING_START => {
            let result = run("log start", call);
            trace!("log start {}", Shown(&result));
            result
        }
        log::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP => {
            let result = run("log stop", call);
            trace!("log stop {}", Shown(&result));
            result
        }
        _ => {
            let wanted = words::<1>(arg.wrapping_add(8))[0] as u32;
            let result = call();
            let kind = match flags & log::VFIO_DEVICE_FEATURE_SET {
                0 => "get",
                _ => "set",
            };
            trace!("feature {feature} {kind} {wanted} {}", Shown(&result));
            result
        }
    }
}

/// Follows a read or a write of a data file.
pub(crate) fn data(what: &str, done: Result<usize, Errno>) -> Result<usize, Errno> {
    match done {
        Ok(bytes) => trace!("data {what} {bytes}"),
        Err(errno) => trace!("data {what} {errno}"),
    }
    done
}
