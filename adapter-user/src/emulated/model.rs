// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the author of a device writes.

use std::io::{self, Read, Write};

/// An emulated PCI device, without its DMA: a [`Dma`](super::Dma) does that.
///
/// A [`DeviceFile`](super::DeviceFile) makes a VFIO device of it. It calls the model from
/// any thread, also from several at once. It does so with no lock held, except that of
/// changes of the migration state: the calls from [`reset`](DeviceModel::reset) on come one
/// at a time.
///
/// Between [`quiesce`](DeviceModel::quiesce) and [`resume`](DeviceModel::resume) the device
/// may not write guest memory. Its state is saved and loaded only then.
pub trait DeviceModel: Send + Sync {
    /// Returns the size in bytes of a region, 0 if the device does not have it. Regions 0
    /// to 5 are the BARs, 6 is the ROM, and 7 is the configuration space: see
    /// [`ConfigSpace`](super::ConfigSpace). The size never changes.
    fn region_size(&self, region: u32) -> u64;

    /// Returns how many interrupts the device has of an index: 1 is MSI, and 2 MSI-X. The
    /// configuration space must have the capability. The number never changes.
    fn irq_count(&self, index: u32) -> u32 {
        let _ = index;
        0
    }

    /// The VMM reads `data` at byte `offset` of a region. The bytes are inside the region.
    fn read(&self, region: u32, offset: u64, data: &mut [u8]);

    /// The VMM writes `data` at byte `offset` of a region. The bytes are inside the region.
    fn write(&self, region: u32, offset: u64, data: &[u8]);

    /// Pages of the IOVAs from `iova` to `iova + size - 1` were pinned, and are about to be
    /// unmapped. The pins go when this returns, and writes through a
    /// [`PinGuard`](crate::PinGuard) fail from then on.
    ///
    /// It may call the device's `Dma`.
    fn unmapped(&self, iova: u64, size: u64) {
        let _ = (iova, size);
    }

    /// Puts the device into the state that it had at first.
    fn reset(&self);

    /// Ends the device's DMA: when this returns, no write to guest memory is under way, and
    /// all are marked. What the device was about to do is part of its state.
    fn quiesce(&self);

    /// Lets the device do DMA again.
    fn resume(&self);

    /// Returns about how many bytes [`save`](DeviceModel::save) will write. A VMM judges by
    /// it whether the state can be sent in the downtime that it may have, and allocates its
    /// buffer by it.
    fn state_size(&self) -> u64;

    /// Writes the device's state to a stream.
    ///
    /// # Errors
    ///
    /// Any; the migration fails then, and the device goes back to the state before.
    fn save(&self, stream: &mut dyn Write) -> io::Result<()>;

    /// Takes the state that [`save`](DeviceModel::save) wrote, perhaps in another process
    /// and from an older version of the device.
    ///
    /// # Errors
    ///
    /// Any, and [`io::ErrorKind::InvalidData`] if the bytes are no such state. The VMM gets
    /// EINVAL then, and the device must be reset.
    fn load(&self, stream: &mut dyn Read) -> io::Result<()>;

    /// Returns how many bytes [`save_early`](DeviceModel::save_early) would write now. It
    /// is called if the device has [`Features::PRE_COPY`](super::Features).
    fn early_size(&self) -> u64 {
        0
    }

    /// Writes what can be sent of the state while the device runs. It is called at the start
    /// of the pre-copy phase, and again when all of that was read and
    /// [`early_size`](DeviceModel::early_size) is not 0.
    ///
    /// # Errors
    ///
    /// Any; the migration fails then.
    fn save_early(&self, stream: &mut dyn Write) -> io::Result<()> {
        let _ = stream;
        Ok(())
    }

    /// Takes what one call of [`save_early`](DeviceModel::save_early) wrote.
    ///
    /// # Errors
    ///
    /// As [`load`](DeviceModel::load).
    fn load_early(&self, stream: &mut dyn Read) -> io::Result<()> {
        let _ = stream;
        Ok(())
    }
}
