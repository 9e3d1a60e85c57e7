// SPDX-License-Identifier: MIT OR Apache-2.0
//! What may stand between a device and its container.

use dirty_core::host::Prot;
use dirty_core::{Errno, Error};

use crate::container::{device::Device, guard::PinGuard};

/// Serves the DMA of a device that a client in another process uses. Some of the client's
/// memory is not in the container, and a device does no DMA before its driver lets it.
///
/// `device` is the device in its container.
pub(crate) trait Bus: Send + Sync {
    /// As [`Device::read`].
    fn read(&self, device: &Device, iova: u64, data: &mut [u8]) -> Result<(), Error>;

    /// As [`Device::write`]. What was written is marked when it returns.
    fn write(&self, device: &Device, iova: u64, data: &[u8]) -> Result<(), Error>;

    /// As [`Device::pin`].
    fn pin(&self, device: &Device, iova: u64, size: u64, prot: Prot) -> Result<PinGuard, Error>;

    /// The device wrote. Its log has that already. It may not call the device.
    fn wrote(&self, iova: u64, size: u64);

    /// Whether the device may do DMA.
    fn is_master(&self) -> bool;

    /// The device may do DMA from now on, or no longer. In the second case it returns when all
    /// reads and writes have ended, but for those through guards.
    fn set_master(&self, on: bool);

    /// The contents of what the device wrote and nobody was told of, if they belong to its
    /// state. The device has stopped.
    ///
    /// # Errors
    ///
    /// Any. The device's state is not complete then.
    fn save(&self, device: &Device) -> Result<Option<Vec<u8>>, Errno>;

    /// Writes what another one saved. The device has stopped, and its registers are loaded.
    ///
    /// # Errors
    ///
    /// Any. Some of it may be written then.
    fn load(&self, device: &Device, bytes: &[u8]) -> Result<(), Errno>;
}
