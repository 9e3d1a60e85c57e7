// SPDX-License-Identifier: MIT OR Apache-2.0
//! The second half of an ioctl: a command that was read is run.

use crate::error::Error;
use crate::host::{Host, Memory};
use crate::type1::command::{Command, Kind, UserUnmap};
use crate::type1::dirty::check_user_bitmap;
use crate::type1::unmap::{Harvest, Progress};
use crate::type1::Type1;
use crate::uapi::{self, *};

/// The result of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The ioctl is done; this is its return value.
    Done(u32),
    /// UNMAP_DMA: devices still pin pages of the mapping at `iova`. Release the
    /// container's lock, call the dma_unmap callback of each device with this
    /// range, and run the command again.
    Notify {
        /// First address of the mapping.
        iova: u64,
        /// Its bytes.
        size: u64,
    },
}

impl<M: Memory> Type1<M> {
    /// Runs a command that VFIO's generic layer hands to its backend.
    ///
    /// A command may be run again, after [`Outcome::Notify`] and after
    /// `BadAddress`. Everything is checked again then. So a host whose copies to
    /// user memory may not wait can let them fail, wait for the page without the
    /// lock, and run the command again.
    ///
    /// # Errors
    ///
    /// `UnknownIoctl` for GET_API_VERSION and SET_IOMMU, which the generic layer
    /// answers. Otherwise, in this order:
    /// - `NotV2`, `ZeroSize` and `Wraps` for GET_BITMAP;
    /// - for a bitmap `NotUserRange`, `WrongPageSize`, `BitmapSize`;
    /// - those of the typed call: [`map`](Type1::map), [`unmap`](Type1::unmap),
    ///   [`start`](Type1::start), [`stop`](Type1::stop) or
    ///   [`get_bitmap`](Type1::get_bitmap);
    /// - `BadAddress` if the answer cannot be written.
    ///
    /// Rules A3 to A6 in docs/rules.md have the exact order for each ioctl.
    /// Nothing changes then.
    pub fn run(&mut self, host: &mut dyn Host, command: &mut Command) -> Result<Outcome, Error> {
        let done = |()| Outcome::Done(0);
        match &mut command.kind {
            Kind::ApiVersion | Kind::SetIommu(_) => Err(Error::UnknownIoctl),
            Kind::CheckExtension(extension) => {
                Ok(Outcome::Done(u32::from(self.check_extension(*extension))))
            }
            Kind::GetInfo { addr, argsz } => self.get_info(host, *addr, *argsz).map(done),
            Kind::Map(map) => self.map(host, map).map(done),
            Kind::Unmap(unmap) => self.unmap_user(host, unmap),
            Kind::Start => self.start(host).map(done),
            Kind::Stop => self.stop(host).map(done),
            Kind::GetBitmap(get) => {
                let got = self.get_user_bitmap(host, get.iova, get.size, &get.bitmap);
                got.map(done)
            }
        }
    }

    /// UNMAP_DMA, from step 4 of A5 on.
    fn unmap_user(&mut self, host: &mut dyn Host, call: &mut UserUnmap) -> Result<Outcome, Error> {
        if let Some(bitmap) = &call.bitmap {
            check_user_bitmap(host, call.arg.size, bitmap)?;
        }
        self.check_all(&call.arg)?;
        let harvest = Harvest::User {
            bitmap: call.bitmap,
            addr: call.addr,
            arg: call.arg,
        };
        Ok(match self.unmap_step(host, &mut call.unmap, harvest)? {
            Progress::Done(_) => Outcome::Done(0),
            Progress::Notify { iova, size } => Outcome::Notify { iova, size },
        })
    }

    /// Step 8 of A5 for ALL, which takes no range; step 5 comes first.
    fn check_all(&self, arg: &vfio_iommu_type1_dma_unmap) -> Result<(), Error> {
        let all = arg.flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
        let vaddr = arg.flags & VFIO_DMA_UNMAP_FLAG_VADDR != 0;
        if vaddr && self.has_emulated_group() {
            return Err(Error::EmulatedGroup);
        }
        if all && (arg.iova | arg.size) != 0 {
            return Err(Error::AllTakesNoRange);
        }
        Ok(())
    }

    /// GET_INFO (A3).
    fn get_info(&self, host: &mut dyn Host, addr: u64, argsz: u32) -> Result<(), Error> {
        let ranges = &*self.iova_ranges;
        let iova_cap = if ranges.is_empty() {
            0
        } else {
            16u32.saturating_add(16u32.saturating_mul(ranges.len() as u32))
        };
        let size = 24u32.saturating_add(32 + 16).saturating_add(iova_cap);
        let fits = argsz >= size;
        if fits {
            let next = if iova_cap == 0 { 0 } else { 72 };
            let migration = uapi::Bytes::<32>::new()
                .u16(VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION)
                .u16(1)
                .u32(56)
                .u32(0)
                .u32(0)
                .u64(self.dirty_page().bytes()) // D6: what GET_BITMAP takes
                .u64(DIRTY_BITMAP_SIZE_MAX);
            write(host, offset(addr, 24)?, &migration.done())?;
            let avail = uapi::Bytes::<16>::new()
                .u16(VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL)
                .u16(1)
                .u32(next)
                .u32(self.dma_avail);
            write(host, offset(addr, 56)?, &avail.done())?;
        }
        if fits && iova_cap != 0 {
            let head = uapi::Bytes::<16>::new()
                .u16(VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE)
                .u16(1)
                .u32(0)
                .u32(ranges.len() as u32)
                .u32(0);
            write(host, offset(addr, 72)?, &head.done())?;
            for (span, at) in ranges.iter().zip((88..).step_by(16)) {
                let range = uapi::Bytes::<16>::new().u64(span.first()).u64(span.last());
                write(host, offset(addr, at)?, &range.done())?;
            }
        }
        let info = vfio_iommu_type1_info {
            argsz: if fits { argsz } else { size },
            flags: VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS,
            iova_pgsizes: self.pgsize_bitmap,
            cap_offset: if fits { 24 } else { 0 },
            pad: 0,
        };
        let len = usize::try_from(argsz.min(24)).unwrap_or(24);
        write(host, addr, info.to_bytes().get(..len).unwrap_or_default())
    }
}

fn write(host: &mut dyn Host, addr: u64, bytes: &[u8]) -> Result<(), Error> {
    host.copy_to_user(addr, bytes)
        .map_err(|_| Error::BadAddress)
}

fn offset(addr: u64, by: u64) -> Result<u64, Error> {
    addr.checked_add(by).ok_or(Error::BadAddress)
}
