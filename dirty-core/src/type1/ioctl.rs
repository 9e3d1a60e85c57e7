// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ioctls of a backend: the bytes of the caller's argument become a typed
//! call, in the order of checks of rules A3 to A6.

use crate::error::Error;
use crate::host::{Host, Memory, Prot};
use crate::span::Span;
use crate::type1::dirty::check_user_bitmap;
use crate::type1::map::Map;
use crate::type1::unmap::{Harvest, Progress, Target, Unmap};
use crate::type1::Type1;
use crate::uapi::{self, *};

/// Flags that an argument may have: each of the three ioctls has three.
const KNOWN_FLAGS: u32 = 7;

/// The result of an ioctl.
#[derive(Debug)]
pub enum Outcome {
    /// The ioctl is done; this is its return value.
    Done(u32),
    /// An UNMAP_DMA waits for devices; see [`Type1::resume`].
    Notify(Pending),
}

/// An UNMAP_DMA that waits until devices have dropped their pins.
#[derive(Debug)]
pub struct Pending {
    call: UnmapCall,
    /// First address of the mapping that is still pinned.
    pub iova: u64,
    /// Its bytes.
    pub size: u64,
}

/// An UNMAP_DMA whose argument was read.
#[derive(Debug)]
struct UnmapCall {
    unmap: Unmap,
    /// Where the argument is in the caller's memory.
    addr: u64,
    arg: vfio_iommu_type1_dma_unmap,
    bitmap: Option<vfio_bitmap>,
}

impl<M: Memory> Type1<M> {
    /// An ioctl that VFIO's generic layer hands to its backend: the number, and
    /// the argument as a value or as an address in the caller's memory.
    ///
    /// # Errors
    ///
    /// `UnknownIoctl` for a number that type1 does not have. Otherwise, in this
    /// order:
    /// - `NotV2` for DIRTY_PAGES on a version 1 container;
    /// - `BadAddress` if the argument cannot be read, `ShortArgsz`,
    ///   `UnknownFlags`, `FlagCombination`;
    /// - for a bitmap `NotUserRange`, `WrongPageSize`, `BitmapSize`;
    /// - those of the typed call: [`map`](Type1::map), [`unmap`](Type1::unmap),
    ///   [`start`](Type1::start), [`stop`](Type1::stop) or
    ///   [`get_bitmap`](Type1::get_bitmap);
    /// - `BadAddress` if the answer cannot be written.
    ///
    /// Rules A3 to A6 in docs/rules.md have the exact order for each ioctl.
    /// Nothing changes then.
    pub fn ioctl(&mut self, host: &mut dyn Host, nr: u32, arg: u64) -> Result<Outcome, Error> {
        let done = |()| Outcome::Done(0);
        match nr {
            VFIO_CHECK_EXTENSION => Ok(Outcome::Done(u32::from(self.check_extension(arg)))),
            VFIO_IOMMU_GET_INFO => self.get_info(host, arg).map(done),
            VFIO_IOMMU_MAP_DMA => {
                let map = read_map(host, arg)?;
                self.map(host, &map).map(done)
            }
            VFIO_IOMMU_UNMAP_DMA => {
                let call = read_unmap(host, arg)?;
                self.check_all(&call.arg)?;
                self.unmap_call(host, call)
            }
            VFIO_IOMMU_DIRTY_PAGES => self.dirty_pages(host, arg).map(done),
            _ => Err(Error::UnknownIoctl),
        }
    }

    /// Goes on with an UNMAP_DMA after an [`Outcome::Notify`]. Before, release
    /// the container's lock, and call the dma_unmap callback of each device with
    /// `iova` and `size` of `pending`.
    ///
    /// # Errors
    ///
    /// Those of UNMAP_DMA from [`unmap`](Type1::unmap) on, since everything is
    /// checked again. Nothing changes then.
    pub fn resume(&mut self, host: &mut dyn Host, pending: Pending) -> Result<Outcome, Error> {
        self.unmap_call(host, pending.call)
    }

    fn unmap_call(&mut self, host: &mut dyn Host, mut call: UnmapCall) -> Result<Outcome, Error> {
        let harvest = Harvest::User {
            bitmap: call.bitmap,
            addr: call.addr,
            arg: call.arg,
        };
        Ok(match self.unmap_step(host, &mut call.unmap, harvest)? {
            Progress::Done(_) => Outcome::Done(0),
            Progress::Notify { iova, size } => Outcome::Notify(Pending { call, iova, size }),
        })
    }
}

/// Reads a structure from the caller's memory.
fn read<const N: usize>(host: &mut dyn Host, addr: u64) -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    host.copy_from_user(addr, &mut bytes)
        .map_err(|_| Error::BadAddress)?;
    Ok(bytes)
}

fn write(host: &mut dyn Host, addr: u64, bytes: &[u8]) -> Result<(), Error> {
    host.copy_to_user(addr, bytes)
        .map_err(|_| Error::BadAddress)
}

fn offset(addr: u64, by: u64) -> Result<u64, Error> {
    addr.checked_add(by).ok_or(Error::BadAddress)
}

/// The argument of MAP_DMA: steps 1, 2 and 6 of A4. Step 6 comes after the
/// checks of the range (steps 4 and 5), so they are made here too before it
/// fails.
fn read_map(host: &mut dyn Host, addr: u64) -> Result<Map, Error> {
    let arg = vfio_iommu_type1_dma_map::from_bytes(&read(host, addr)?);
    if arg.argsz < 32 {
        return Err(Error::ShortArgsz);
    }
    if arg.flags & !KNOWN_FLAGS != 0 {
        return Err(Error::UnknownFlags);
    }
    let prot = Prot(arg.flags & Prot::READ_WRITE.0);
    let vaddr = arg.flags & VFIO_DMA_MAP_FLAG_VADDR != 0;
    if vaddr && prot != Prot(0) {
        Span::new(arg.iova, arg.size)?;
        Span::new(arg.vaddr, arg.size)?;
        return Err(Error::FlagCombination);
    }
    Ok(Map {
        iova: arg.iova,
        vaddr: arg.vaddr,
        size: arg.size,
        prot: (!vaddr).then_some(prot),
    })
}

/// The argument of UNMAP_DMA: steps 1 to 4 of A5.
fn read_unmap(host: &mut dyn Host, addr: u64) -> Result<UnmapCall, Error> {
    let arg = vfio_iommu_type1_dma_unmap::from_bytes(&read(host, addr)?);
    if arg.argsz < 24 {
        return Err(Error::ShortArgsz);
    }
    if arg.flags & !KNOWN_FLAGS != 0 {
        return Err(Error::UnknownFlags);
    }
    let get = arg.flags & VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0;
    let all = arg.flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
    let vaddr = arg.flags & VFIO_DMA_UNMAP_FLAG_VADDR != 0;
    if get && (all || vaddr) {
        return Err(Error::FlagCombination);
    }
    let mut bitmap = None;
    if get {
        if arg.argsz < 48 {
            return Err(Error::ShortArgsz);
        }
        let b = vfio_bitmap::from_bytes(&read(host, offset(addr, 24)?)?);
        check_user_bitmap(host, arg.size, &b)?;
        bitmap = Some(b);
    }
    let target = if all {
        Target::All
    } else {
        Target::Range {
            iova: arg.iova,
            size: arg.size,
        }
    };
    let unmap = if vaddr {
        Unmap::vaddr(target)
    } else {
        Unmap::new(target)
    };
    Ok(UnmapCall {
        unmap,
        addr,
        arg,
        bitmap,
    })
}

impl<M: Memory> Type1<M> {
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

    /// DIRTY_PAGES, steps 1 to 5 of A6.
    fn dirty_pages(&mut self, host: &mut dyn Host, addr: u64) -> Result<(), Error> {
        self.check_v2()?; // before the argument is read
        let arg = vfio_iommu_type1_dirty_bitmap::from_bytes(&read(host, addr)?);
        if arg.argsz < 8 {
            return Err(Error::ShortArgsz);
        }
        if arg.flags & !KNOWN_FLAGS != 0 {
            return Err(Error::UnknownFlags);
        }
        match arg.flags {
            VFIO_IOMMU_DIRTY_PAGES_FLAG_START => self.start(),
            VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP => self.stop(),
            VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP => {
                if arg.argsz < 48 {
                    return Err(Error::ShortArgsz);
                }
                let get = read(host, offset(addr, 8)?)?;
                let get = vfio_iommu_type1_dirty_bitmap_get::from_bytes(&get);
                self.get_user_bitmap(host, get.iova, get.size, &get.bitmap)
            }
            _ => Err(Error::FlagCombination),
        }
    }

    /// GET_INFO (A3).
    fn get_info(&self, host: &mut dyn Host, addr: u64) -> Result<(), Error> {
        let head: [u8; 16] = read(host, addr)?;
        let argsz = u32_at_start(&head);
        if argsz < 16 {
            return Err(Error::ShortArgsz);
        }
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

fn u32_at_start(bytes: &[u8; 16]) -> u32 {
    let (head, _) = bytes.split_first_chunk().unwrap_or((&[0; 4], &[]));
    u32::from_ne_bytes(*head)
}
