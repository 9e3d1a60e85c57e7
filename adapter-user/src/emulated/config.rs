// SPDX-License-Identifier: MIT OR Apache-2.0
//! PCI's configuration space.

/// Bytes of the space.
const SIZE: usize = 256;
/// Where the BARs are.
const BARS: usize = 0x10;

/// The configuration space of a PCI device: 256 bytes, of which some can be written.
///
/// It is what a [`DeviceModel`](super::DeviceModel) answers reads and writes of region 7
/// with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    /// The bits that a write changes.
    writable: [u8; SIZE],
}

impl ConfigSpace {
    /// Creates the space of a device with these PCI IDs. `class` has the base class, the
    /// subclass and the programming interface, as in `0x088000`. The command register, the
    /// cache line size, the latency timer and the interrupt line can be written.
    #[must_use]
    pub fn new(vendor: u16, device: u16, class: u32) -> Self {
        let mut space = ConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
        };
        space.bytes[0..2].copy_from_slice(&vendor.to_le_bytes());
        space.bytes[2..4].copy_from_slice(&device.to_le_bytes());
        space.bytes[9..12].copy_from_slice(&class.to_le_bytes()[..3]);
        for (at, bits) in [(4, 0x47), (5, 0x05), (0xc, 0xff), (0xd, 0xff), (0x3c, 0xff)] {
            space.writable[at] = bits;
        }
        space
    }

    /// Gives the device a 32-bit memory BAR of `size` bytes, which must be a power of two
    /// from 16 on. `bar` is 0 to 5.
    ///
    /// # Panics
    ///
    /// If one of the two is not so.
    #[must_use]
    pub fn with_memory_bar(mut self, bar: usize, size: u32) -> Self {
        assert!(bar < 6, "a device has BARs 0 to 5");
        assert!(
            size.is_power_of_two() && size >= 16,
            "a BAR has a power of two of bytes, at least 16"
        );
        let at = BARS + 4 * bar;
        self.writable[at..at + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
        self
    }

    /// Copies the bytes at `offset` into `data`. What is beyond the space reads as 0xff.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let known = usize::try_from(at).ok().and_then(|at| self.bytes.get(at));
            *byte = known.copied().unwrap_or(0xff);
        }
    }

    /// Changes the bits at `offset` that can be written, as a guest does. The others, and
    /// what is beyond the space, stay.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, new) in (offset..).zip(data) {
            let Ok(at) = usize::try_from(at) else { return };
            let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) else {
                return;
            };
            *byte = *byte & !mask | new & mask;
        }
    }

    /// Returns all bytes, to save them.
    #[must_use]
    pub fn bytes(&self) -> &[u8; SIZE] {
        &self.bytes
    }

    /// Takes the bits that can be written from `bytes`, which another one saved.
    pub fn restore(&mut self, bytes: &[u8; SIZE]) {
        self.write(0, bytes);
    }
}
