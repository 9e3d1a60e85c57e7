// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a script drives: something that behaves like a VFIO container with its
//! groups, devices and user memory.

use dirty_core::Errno;

use crate::op::{Action, Caller, DeviceIndex, FaultKind, New, ReportArg};

/// The result of a system call: a value, or an errno.
pub type Answer = Result<u32, Errno>;

/// What a device's driver has counted since the device was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Calls of its dma_unmap callback.
    pub unmap_calls: u32,
    /// Range of the last one: first address and bytes.
    pub last: (u64, u64),
    /// Pages it has pinned, counting each pin.
    pub pinned: usize,
}

/// What a call inside the kernel returns: `value`, or minus the errno.
pub fn returned<T>(result: Result<T, Errno>, value: i32) -> i32 {
    result.map_or_else(|e| -e.0, |_| value)
}

/// A step of attaching a group that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachError {
    /// `open` or `set_container`.
    pub step: &'static str,
    /// Why.
    pub errno: Errno,
}

/// A container, its devices and the memory of the process that uses them.
/// Devices are indices into [`DEVICES`](crate::op::DEVICES).
pub trait System {
    /// Closes everything and opens an empty container.
    fn open(&mut self, new: &New);

    /// Opens the group of a device and puts it into the container.
    ///
    /// # Errors
    ///
    /// Which step failed.
    fn attach(&mut self, device: DeviceIndex) -> Result<(), AttachError>;

    /// Closes a device and takes its group out of the container.
    ///
    /// # Errors
    ///
    /// EBADF if it is not there.
    fn detach(&mut self, device: DeviceIndex) -> Answer;

    /// Opens a device, whose driver counts from zero.
    ///
    /// # Errors
    ///
    /// EBADF without a group; EINVAL before an IOMMU type is set.
    fn open_device(&mut self, device: DeviceIndex) -> Result<(), Errno>;

    /// Closes a device: its driver unpins.
    fn close_device(&mut self, device: DeviceIndex);

    /// An ioctl on the container; pointers are user addresses.
    ///
    /// # Errors
    ///
    /// Linux's errno.
    fn ioctl(&mut self, nr: u32, arg: u64) -> Answer;

    /// GET_BITMAP as a typed call; `words` hold what `arg` says.
    ///
    /// # Errors
    ///
    /// Linux's errno.
    fn report(&mut self, arg: &ReportArg, words: &mut [u64]) -> Answer;

    /// UNMAP_DMA with bitmap as a typed call, which answers the bytes.
    ///
    /// # Errors
    ///
    /// Linux's errno.
    fn harvest(&mut self, arg: &ReportArg, words: &mut [u64]) -> Result<u64, Errno>;

    /// vfio_pin_pages by a device's driver: what it returns.
    ///
    /// # Errors
    ///
    /// EBADF for a closed device, ENOTTY for another driver.
    fn pin(&mut self, device: DeviceIndex, iova: u64, n: i32, prot: u32) -> Result<i32, Errno>;

    /// vfio_unpin_pages.
    ///
    /// # Errors
    ///
    /// As [`pin`](System::pin).
    fn unpin(&mut self, device: DeviceIndex, iova: u64, n: i32) -> Result<i32, Errno>;

    /// vfio_dma_rw of bytes 0x5a: what it returns.
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

    /// Marks what a device has written by itself.
    ///
    /// # Errors
    ///
    /// The cause's errno.
    fn mark(&mut self, iova: u64, len: u64) -> Answer;

    /// Says what a device's dma_unmap callback does.
    ///
    /// # Errors
    ///
    /// As [`pin`](System::pin).
    fn on_unmap(&mut self, device: DeviceIndex, actions: &[Action]) -> Answer;

    /// Makes something fail during the next operation: only a
    /// [simulation](crate::sim) can.
    ///
    /// # Errors
    ///
    /// EOPNOTSUPP where nothing can be made to fail.
    fn fault(&mut self, _kind: FaultKind, _n: u64) -> Answer {
        Err(Errno::EOPNOTSUPP)
    }

    /// The next operation is over: what has not failed will not.
    fn end_faults(&mut self) {}

    /// What a device's driver has counted.
    fn stat(&self, device: DeviceIndex) -> Stat;

    /// Limits locked memory, and gives up the right to exceed it; says what
    /// went wrong.
    fn limit_locked(&mut self, limit: u64, keep_cap: bool) -> String;

    /// Pages charged as locked.
    fn locked_pages(&self) -> u64;

    /// Sets the driver's module parameter for containers opened from now on.
    fn set_entry_limit(&mut self, limit: u32);

    /// Maps fresh user memory.
    ///
    /// # Errors
    ///
    /// The kernel's errno.
    fn map_memory(&mut self, addr: u64, size: u64, write: bool) -> Result<(), Errno>;

    /// Reads user memory; false, and nothing is read, at a bad address.
    fn peek(&mut self, addr: u64, buf: &mut [u8]) -> bool;

    /// Writes user memory; false at a bad address.
    fn poke(&mut self, addr: u64, buf: &[u8]) -> bool;
}
