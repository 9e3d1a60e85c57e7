// SPDX-License-Identifier: GPL-2.0-only
//! The control file of the test IOMMU; `tiommu.h` declares its ioctls.

use std::fs::File;

use dirty_core::Errno;
use dirty_script::op::{DeviceIndex, BIG0, DEVICES, FOUR0, LOW0};
use dirty_script::Answer;

use crate::real::{address, open, raw_ioctl};

/// What the IOMMU offers to a device.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Config {
    pub(crate) device: u32,
    pub(crate) flags: u32,
    pub(crate) pgsizes: u64,
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// First and last of each range.
    pub(crate) reserved: [[u64; 2]; 4],
}

/// Domains can track dirty pages if that was asked for.
pub(crate) const TRACKS_IF_ASKED: u32 = 1;
/// Domains can track dirty pages, whether that was asked for or not.
pub(crate) const TRACKS: u32 = 1 | 8;
/// Domains can enforce cache coherency.
pub(crate) const COHERENT: u32 = 2;
/// The device's interrupts are not isolated.
pub(crate) const UNSAFE_MSI: u32 = 4;

#[repr(C)]
#[derive(Default)]
struct Dma {
    device: u32,
    flags: u32,
    iova: u64,
    len: u64,
    data: u64,
    done: u64,
}

#[repr(C)]
#[derive(Default)]
struct Dirty {
    device: u32,
    flags: u32,
    iova: u64,
    size: u64,
    first: u64,
    last: u64,
}

const NO_CLEAR: u32 = 1;

const WRITE: u32 = 1;
const DELAY: u32 = 2;
const LATE: u32 = 4;

/// What the IOMMU has counted since its last reset.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) maps: u64,
    pub(crate) mapped: u64,
    pub(crate) map_syncs: u64,
    pub(crate) unmaps: u64,
    pub(crate) unmapped: u64,
    pub(crate) syncs: u64,
    pub(crate) flushes: u64,
    /// Unmaps that ended inside a page of the table.
    pub(crate) split: u64,
    pub(crate) faults: u64,
    /// Delayed writes to memory that was no longer pinned.
    pub(crate) late: u64,
    /// Bytes that are mapped now.
    pub(crate) bytes: u64,
    /// Domains that exist now.
    pub(crate) domains: u64,
}

const CONFIGURE: u32 = 0x4060_54d0;
const DMA: u32 = 0xc028_54d1;
const COUNTERS: u32 = 0x8060_54d2;
const RESET: u32 = 0x54d3;
const REFUSE: u32 = 0x54d4;
const TRACK: u32 = 0x4028_54d5;
const READ_DIRTY: u32 = 0xc028_54d6;

/// The devices of the scripts that are behind the test IOMMU, by their numbers there.
const BEHIND: [DeviceIndex; 3] = [BIG0, LOW0, FOUR0];

/// The number of a device behind the test IOMMU.
pub(crate) fn number(device: DeviceIndex) -> Option<u32> {
    (0..)
        .zip(BEHIND)
        .find(|(_, d)| *d == device)
        .map(|(n, _)| n)
}

/// What scripts expect of a device's IOMMU.
pub(crate) fn config(index: DeviceIndex) -> Config {
    let spec = &DEVICES[index];
    let mut config = Config {
        device: number(index).unwrap_or_default(),
        pgsizes: spec.pgsizes.unwrap_or_default(),
        first: spec.aperture.0,
        last: spec.aperture.1,
        ..Config::default()
    };
    for (to, (first, last)) in config.reserved.iter_mut().zip(spec.reserved) {
        *to = [*first, *last];
    }
    config
}

/// The open control file.
pub(crate) struct Tiommu(File);

/// Whether this VM has the test IOMMU. On Linux 6.1 a bus has one IOMMU driver, and it is
/// Intel's.
pub(crate) fn exists() -> bool {
    std::path::Path::new("/dev/tiommu").exists()
}

impl Tiommu {
    pub(crate) fn open() -> Result<Self, Errno> {
        open("/dev/tiommu").map(Tiommu)
    }

    /// Gives each device of the scripts the IOMMU that scripts expect.
    pub(crate) fn configure_all(&self) -> Answer {
        for index in BEHIND {
            self.configure(config(index))?;
        }
        Ok(0)
    }

    /// Changes what a device's IOMMU offers. EBUSY while the device is in use.
    pub(crate) fn configure(&self, mut config: Config) -> Answer {
        raw_ioctl(&self.0, CONFIGURE, address(&mut config))
    }

    fn dma(&self, device: u32, flags: u32, iova: u64, data: u64, len: usize) -> Answer {
        let mut dma = Dma {
            device,
            flags,
            iova,
            len: len as u64,
            data,
            done: 0,
        };
        raw_ioctl(&self.0, DMA, address(&mut dma))
    }

    /// Has the device read memory; EFAULT if it cannot read all of it.
    pub(crate) fn read(&self, device: u32, iova: u64, buf: &mut [u8]) -> Answer {
        self.dma(device, 0, iova, buf.as_mut_ptr() as u64, buf.len())
    }

    /// Has the device write memory; EFAULT if it cannot write all of it.
    pub(crate) fn write(&self, device: u32, iova: u64, buf: &[u8]) -> Answer {
        self.dma(device, WRITE, iova, buf.as_ptr() as u64, buf.len())
    }

    /// As `write`, but the bytes reach memory at the next IOTLB sync.
    pub(crate) fn write_delayed(&self, device: u32, iova: u64, buf: &[u8]) -> Answer {
        self.dma(device, WRITE | DELAY, iova, buf.as_ptr() as u64, buf.len())
    }

    /// As `write`, but the device writes just before its page is unmapped.
    pub(crate) fn write_late(&self, device: u32, iova: u64, buf: &[u8]) -> Answer {
        self.dma(device, WRITE | LATE, iova, buf.as_ptr() as u64, buf.len())
    }

    pub(crate) fn counters(&self) -> Result<Counters, Errno> {
        let mut counters = Counters::default();
        raw_ioctl(&self.0, COUNTERS, address(&mut counters))?;
        Ok(counters)
    }

    /// Sets the counters to zero, but for what is mapped now.
    pub(crate) fn reset(&self) -> Answer {
        raw_ioctl(&self.0, RESET, 0)
    }

    /// Has the map of the `n`-th 4K from now on fail with EIO; 0 takes that back.
    /// Returns how many were still to come.
    pub(crate) fn refuse(&self, n: u64) -> Answer {
        raw_ioctl(&self.0, REFUSE, n)
    }

    /// Calls set_dirty_tracking of the device's domain.
    pub(crate) fn track(&self, device: u32, on: bool) -> Answer {
        let mut dirty = Dirty {
            device,
            flags: on.into(),
            ..Dirty::default()
        };
        raw_ioctl(&self.0, TRACK, address(&mut dirty))
    }

    /// Calls read_and_clear_dirty of the device's domain; whether a page in the range
    /// is dirty.
    pub(crate) fn is_dirty(
        &self,
        device: u32,
        iova: u64,
        size: u64,
        clear: bool,
    ) -> Result<bool, Errno> {
        let mut dirty = Dirty {
            device,
            flags: if clear { 0 } else { NO_CLEAR },
            iova,
            size,
            ..Dirty::default()
        };
        raw_ioctl(&self.0, READ_DIRTY, address(&mut dirty))?;
        Ok(dirty.last != 0)
    }
}
