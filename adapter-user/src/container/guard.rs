// SPDX-License-Identifier: MIT OR Apache-2.0
//! A pin, for as long as it is held.

use std::fmt;
use std::sync::{Arc, Weak};

use dirty_core::host::Prot;
use dirty_core::Error;

use super::pinned::{OnMark, Pages};
use super::pins::DevicePins;

/// Pinned pages of a guest, which a device reads and writes.
///
/// The pages are dirty in every report of the container while this lives, and in the
/// first one after it is dropped, which unpins them. So a write needs no mark.
///
/// Any thread may read and write, at the same time and without a lock. The pages may go
/// before this does: by [`Device::unpin_range`](crate::Device::unpin_range), which a
/// dma_unmap callback calls, and when the device closes. Both wait for the reads and
/// writes that are under way; later ones fail with [`Error::Unmapped`]. So no write
/// goes to a page that is not pinned, whatever the callback forgets.
///
/// It does not keep its device open.
#[must_use = "the pages are unpinned when this is dropped"]
pub struct PinGuard {
    pages: Arc<Pages>,
    key: (u64, u64),
    /// Not an `Arc`: the device may own this, by what its callback holds.
    pins: Weak<DevicePins>,
    on_mark: Option<Arc<OnMark>>,
}

impl fmt::Debug for PinGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PinGuard")
            .field("iova", &self.iova())
            .field("size", &self.size())
            .field("prot", &self.prot())
            .finish_non_exhaustive()
    }
}

impl PinGuard {
    pub(super) fn new(
        pins: &Arc<DevicePins>,
        key: (u64, u64),
        pages: Arc<Pages>,
        on_mark: Option<Arc<OnMark>>,
    ) -> Self {
        PinGuard {
            pages,
            key,
            pins: Arc::downgrade(pins),
            on_mark,
        }
    }

    /// Returns the IOVA of the first byte.
    #[must_use]
    pub fn iova(&self) -> u64 {
        self.pages.iova
    }

    /// Returns how many bytes there are, at least one.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.pages.size
    }

    /// Returns what the device may do.
    #[must_use]
    pub fn prot(&self) -> Prot {
        self.pages.prot
    }

    /// Copies the bytes from byte `offset` on into `data`, as many as it has.
    ///
    /// # Errors
    ///
    /// In this order:
    ///
    /// - [`Error::Denied`] if the pin is not for READ.
    /// - [`Error::Unmapped`] if not all of the bytes are inside the pin, or its pages
    ///   were unpinned.
    /// - [`Error::OtherMm`] and [`Error::BadAddress`] for memory that was mapped by its
    ///   address: after a fork, and if the memory is gone. `data` may have some bytes
    ///   then.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        self.pages.read(offset, data)
    }

    /// Copies `data` to the bytes from byte `offset` on.
    ///
    /// # Errors
    ///
    /// In this order; the bytes before an error may be written:
    ///
    /// - [`Error::Denied`] if the pin is not for WRITE.
    /// - [`Error::Unmapped`], [`Error::OtherMm`], [`Error::BadAddress`] as
    ///   [`read`](PinGuard::read).
    /// - The error of the device's [`OnMark`], which gets all of the bytes.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.pages.write(offset, data, self.on_mark.as_deref())
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        if let Some(pins) = self.pins.upgrade() {
            pins.release(self.key);
        }
    }
}
