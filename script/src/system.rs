// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a script drives: a VFIO container with its groups and devices, and the
//! process that uses it.

use dirty_core::Errno;

use crate::op::{Action, Caller, DeviceIndex, FaultKind, New, ReportArg};

/// The result of a system call: its value, or an errno.
pub type Answer = Result<u32, Errno>;

/// The counters of a device's driver, from when the device was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Calls of the dma_unmap callback.
    pub unmap_calls: u32,
    /// The range of the last call: first address and bytes.
    pub last: (u64, u64),
    /// Pages that it has pinned, each counted as often as it is pinned.
    pub pinned: usize,
}

/// The return value of a call inside the kernel: `value`, or minus the errno.
pub fn returned<T>(result: Result<T, Errno>, value: i32) -> i32 {
    result.map_or_else(|e| -e.0, |_| value)
}

/// Why a group could not be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachError {
    /// The step that failed: `open` or `set_container`.
    pub step: &'static str,
    /// The step's errno.
    pub errno: Errno,
}

/// A container, its devices, and the memory of the process that uses them.
/// Devices are named by their index in [`DEVICES`](crate::op::DEVICES).
pub trait System {
    /// Closes everything and opens an empty container.
    fn open(&mut self, new: &New);

    /// Opens the group of a device and puts it into the container.
    ///
    /// # Errors
    ///
    /// The step that failed, and its errno.
    fn attach(&mut self, device: DeviceIndex) -> Result<(), AttachError>;

    /// Closes a device and takes its group out of the container.
    ///
    /// # Errors
    ///
    /// EBADF if the group is not in the container.
    fn detach(&mut self, device: DeviceIndex) -> Answer;

    /// Opens a device. Its driver's counters start at zero.
    ///
    /// # Errors
    ///
    /// EBADF if its group is not in the container, EINVAL before an IOMMU type
    /// is set.
    fn open_device(&mut self, device: DeviceIndex) -> Result<(), Errno>;

    /// Closes a device. Its driver unpins everything first.
    fn close_device(&mut self, device: DeviceIndex);

    /// Makes an ioctl on the container. Pointers are user addresses.
    ///
    /// # Errors
    ///
    /// Linux's errno.
    fn ioctl(&mut self, nr: u32, arg: u64) -> Answer;

    /// GET_BITMAP as a typed call, into `words`, which hold what `arg.fill`
    /// says.
    ///
    /// # Errors
    ///
    /// Linux's errno.
    fn report(&mut self, arg: &ReportArg, words: &mut [u64]) -> Answer;

    /// UNMAP_DMA with a bitmap as a typed call; returns the bytes unmapped.
    ///
    /// # Errors
    ///
    /// Linux's errno.
    fn harvest(&mut self, arg: &ReportArg, words: &mut [u64]) -> Result<u64, Errno>;

    /// vfio_pin_pages by a device's driver; returns what the call returned.
    ///
    /// # Errors
    ///
    /// The call is not made: EBADF for a closed device, ENOTTY for one whose
    /// driver cannot be told to make it.
    fn pin(&mut self, device: DeviceIndex, iova: u64, n: i32, prot: u32) -> Result<i32, Errno>;

    /// vfio_unpin_pages by a device's driver.
    ///
    /// # Errors
    ///
    /// As [`pin`](System::pin).
    fn unpin(&mut self, device: DeviceIndex, iova: u64, n: i32) -> Result<i32, Errno>;

    /// vfio_dma_rw by a device's driver; writes bytes 0x5a. Returns what the
    /// call returned.
    ///
    /// # Errors
    ///
    /// As [`pin`](System::pin).
    fn rw(
        &mut self,
        device: DeviceIndex,
        iova: u64,
        len: u64,
        write: bool,
        caller: Caller,
    ) -> Result<i32, Errno>;

    /// Marks a range that a device has written by itself.
    ///
    /// # Errors
    ///
    /// EINVAL without an IOMMU type, for 0 bytes, or if a part is unmapped;
    /// EOVERFLOW if the range wraps.
    fn mark(&mut self, iova: u64, len: u64) -> Answer;

    /// Has a device write by DMA, by way of its IOMMU. Only dirty pages come of it,
    /// memory does not change. If `late` is set, each page is written during the next
    /// operation, just before that unmaps it in the device's IOMMU, or not at all.
    /// Only the [simulated host](crate::sim) and the model can do that.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP on every other system. EBADF if the device's group is not in the
    /// container, ENOTTY if it has no IOMMU, EINVAL for 0 bytes or a range that
    /// wraps, EFAULT unless the IOMMU lets the device write all of it (not if `late`
    /// is set).
    fn dma(&mut self, _device: DeviceIndex, _iova: u64, _len: u64, _late: bool) -> Answer {
        Err(Errno::EOPNOTSUPP)
    }

    /// Sets what a device's dma_unmap callback does.
    ///
    /// # Errors
    ///
    /// As [`pin`](System::pin).
    fn on_unmap(&mut self, device: DeviceIndex, actions: &[Action]) -> Answer;

    /// Makes the `n`-th thing of a kind fail during the next operation. Only
    /// the [simulated host](crate::sim) can do that.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP on every other system.
    fn fault(&mut self, _kind: FaultKind, _n: u64) -> Answer {
        Err(Errno::EOPNOTSUPP)
    }

    /// Ends the operation that faults and late writes were ordered for: those that
    /// were not met are forgotten.
    fn end_faults(&mut self) {}

    /// The counters of a device's driver.
    fn stat(&self, device: DeviceIndex) -> Stat;

    /// Limits locked memory to `limit` bytes and, unless `keep_cap`, gives up
    /// CAP_IPC_LOCK. Returns what the reply says: nothing, or what went wrong.
    fn limit_locked(&mut self, limit: u64, keep_cap: bool) -> String;

    /// The pages that are charged as locked memory.
    fn locked_pages(&self) -> u64;

    /// Sets the module parameter `dma_entry_limit` for containers opened from
    /// now on.
    fn set_entry_limit(&mut self, limit: u32);

    /// Maps fresh user memory at an address.
    ///
    /// # Errors
    ///
    /// The kernel's errno.
    fn map_memory(&mut self, addr: u64, size: u64, write: bool) -> Result<(), Errno>;

    /// Reads user memory; returns false, with `buf` in any state, if a byte
    /// cannot be read.
    fn peek(&mut self, addr: u64, buf: &mut [u8]) -> bool;

    /// Writes user memory; returns false if a byte cannot be written. Bytes
    /// before it may have been.
    fn poke(&mut self, addr: u64, buf: &[u8]) -> bool;
}
