// SPDX-License-Identifier: MIT OR Apache-2.0
//! The memory that a server reaches by messages.

use std::sync::Arc;

use dirty_core::Errno;

/// The memory behind the IOVAs of a device, as the VMM has it.
///
/// The server reads and writes it by the messages DMA_READ and DMA_WRITE: what the client
/// mapped without a descriptor, and whatever else the server chooses. The calls come from the
/// client's own threads, at any time, also while the VMM waits in a call.
///
/// What is written here is written by this process. So it is the VMM's memory that marks it
/// dirty, as vm-memory does with [`DirtyBits`](crate::DirtyBits). It is in no log of the
/// device.
pub trait DmaMemory: Send + Sync {
    /// Reads as many bytes at `iova` as `data` has.
    ///
    /// # Errors
    ///
    /// Any. The device gets the error number, as EFAULT for an IOVA that is not mapped, or
    /// ENODEV while the device may not be bus master.
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes `data` at `iova`, and marks it dirty before it returns.
    ///
    /// # Errors
    ///
    /// As `read`.
    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno>;
}

impl<M: DmaMemory + ?Sized> DmaMemory for Arc<M> {
    fn read(&self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        M::read(self, iova, data)
    }

    fn write(&self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        M::write(self, iova, data)
    }
}
