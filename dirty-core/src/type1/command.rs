// SPDX-License-Identifier: MIT OR Apache-2.0
//! The first half of an ioctl: the bytes of the caller's argument become a
//! typed command. No lock is needed for it.

use crate::error::Error;
use crate::host::{Fault, Prot};
use crate::span::Span;
use crate::type1::map::Map;
use crate::type1::unmap::{Target, Unmap};
use crate::type1::IommuType;
use crate::uapi::*;

/// Flags that an argument may have: each of the three ioctls has three.
const KNOWN_FLAGS: u32 = 7;

/// An ioctl of a container's file whose argument was read.
///
/// An ioctl has two halves. [`Command::read`] copies the argument from the
/// caller's memory, and may wait for a page of it. Call it without the
/// container's lock. [`Container::run`](crate::Container::run) and
/// [`Type1::run`](crate::Type1::run) do what the command says. They need the
/// lock, and never read the caller's memory.
#[derive(Debug)]
pub struct Command {
    pub(crate) kind: Kind,
}

#[derive(Debug)]
pub(crate) enum Kind {
    ApiVersion,
    CheckExtension(u64),
    SetIommu(u64),
    GetInfo { addr: u64, argsz: u32 },
    Map(Map),
    Unmap(UserUnmap),
    Start,
    Stop,
    GetBitmap(vfio_iommu_type1_dirty_bitmap_get),
}

/// An UNMAP_DMA, as far as it is.
#[derive(Debug)]
pub(crate) struct UserUnmap {
    pub(super) unmap: Unmap,
    /// Where the argument is in the caller's memory.
    pub(super) addr: u64,
    pub(super) arg: vfio_iommu_type1_dma_unmap,
    pub(super) bitmap: Option<vfio_bitmap>,
}

impl Command {
    /// Reads the argument of ioctl `nr`: `arg` is a value, or an address in the
    /// caller's memory. `iommu` is the container's IOMMU type, or `None` before
    /// SET_IOMMU. `copy_from_user` copies as many bytes as its second argument
    /// has from an address of the caller.
    ///
    /// # Errors
    ///
    /// In this order:
    /// - `NoIommu` for an ioctl that needs an IOMMU type, if there is none;
    /// - `UnknownIoctl` for a number that type1 does not have;
    /// - `NotV2` for DIRTY_PAGES on a version 1 container;
    /// - `BadAddress` if the argument cannot be read, `ShortArgsz`,
    ///   `UnknownFlags`, `FlagCombination`. MAP_DMA has `ZeroSize` and `Wraps`
    ///   before `FlagCombination`.
    ///
    /// Rules A3 to A6 in docs/rules.md have the exact order for each ioctl.
    pub fn read(
        iommu: Option<IommuType>,
        nr: u32,
        arg: u64,
        mut copy_from_user: impl FnMut(u64, &mut [u8]) -> Result<(), Fault>,
    ) -> Result<Command, Error> {
        let user = &mut User(&mut copy_from_user);
        let iommu = iommu.ok_or(Error::NoIommu);
        let kind = match nr {
            VFIO_GET_API_VERSION => Kind::ApiVersion,
            VFIO_CHECK_EXTENSION => Kind::CheckExtension(arg),
            VFIO_SET_IOMMU => Kind::SetIommu(arg),
            VFIO_IOMMU_GET_INFO => iommu.and_then(|_| get_info(user, arg))?,
            VFIO_IOMMU_MAP_DMA => iommu.and_then(|_| map(user, arg))?,
            VFIO_IOMMU_UNMAP_DMA => iommu.and_then(|_| unmap(user, arg))?,
            VFIO_IOMMU_DIRTY_PAGES => match iommu? {
                IommuType::Type1 => return Err(Error::NotV2), // before the argument is read
                IommuType::Type1v2 => dirty_pages(user, arg)?,
            },
            _ => return Err(iommu.map_or_else(|e| e, |_| Error::UnknownIoctl)),
        };
        Ok(Command { kind })
    }

    /// The caller's bitmap that the command writes, if it writes one: its address
    /// and its bytes, as the caller has them. Nothing has checked them yet.
    ///
    /// A host whose copies may not wait faults in this memory before it runs the
    /// command, or before it runs it again.
    #[must_use]
    pub fn bitmap(&self) -> Option<(u64, u64)> {
        let bitmap = match &self.kind {
            Kind::GetBitmap(get) => Some(&get.bitmap),
            Kind::Unmap(unmap) => unmap.bitmap.as_ref(),
            _ => None,
        };
        bitmap.map(|bitmap| (bitmap.data, bitmap.size))
    }
}

/// Copies from an address of the caller.
type CopyFromUser<'a> = dyn FnMut(u64, &mut [u8]) -> Result<(), Fault> + 'a;

/// The caller's memory.
struct User<'a>(&'a mut CopyFromUser<'a>);

impl User<'_> {
    /// Reads `N` bytes, `offset` bytes after `addr`.
    fn read<const N: usize>(&mut self, addr: u64, offset: u64) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        let addr = addr.checked_add(offset).ok_or(Error::BadAddress)?;
        let copied = (self.0)(addr, &mut bytes);
        copied.map_err(|_| Error::BadAddress)?;
        Ok(bytes)
    }
}

/// GET_INFO (A3).
fn get_info(user: &mut User<'_>, addr: u64) -> Result<Kind, Error> {
    let head: [u8; 16] = user.read(addr, 0)?;
    let (argsz, _) = head.split_first_chunk().unwrap_or((&[0; 4], &[]));
    let argsz = u32::from_ne_bytes(*argsz);
    if argsz < 16 {
        return Err(Error::ShortArgsz);
    }
    Ok(Kind::GetInfo { addr, argsz })
}

/// MAP_DMA: steps 1, 2 and 6 of A4. Step 6 comes after the checks of the range
/// (steps 4 and 5), so they are made here too before it fails.
fn map(user: &mut User<'_>, addr: u64) -> Result<Kind, Error> {
    let arg = vfio_iommu_type1_dma_map::from_bytes(&user.read(addr, 0)?);
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
    Ok(Kind::Map(Map {
        iova: arg.iova,
        vaddr: arg.vaddr,
        size: arg.size,
        prot: (!vaddr).then_some(prot),
    }))
}

/// UNMAP_DMA: steps 1 to 3 of A5.
fn unmap(user: &mut User<'_>, addr: u64) -> Result<Kind, Error> {
    let arg = vfio_iommu_type1_dma_unmap::from_bytes(&user.read(addr, 0)?);
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
        bitmap = Some(vfio_bitmap::from_bytes(&user.read(addr, 24)?));
    }
    let (iova, size) = (arg.iova, arg.size);
    let target = match all {
        true => Target::All,
        false => Target::Range { iova, size },
    };
    let unmap = match vaddr {
        true => Unmap::vaddr(target),
        false => Unmap::new(target),
    };
    Ok(Kind::Unmap(UserUnmap {
        unmap,
        addr,
        arg,
        bitmap,
    }))
}

/// DIRTY_PAGES: steps 2 to 5 of A6.
fn dirty_pages(user: &mut User<'_>, addr: u64) -> Result<Kind, Error> {
    let arg = vfio_iommu_type1_dirty_bitmap::from_bytes(&user.read(addr, 0)?);
    if arg.argsz < 8 {
        return Err(Error::ShortArgsz);
    }
    if arg.flags & !KNOWN_FLAGS != 0 {
        return Err(Error::UnknownFlags);
    }
    match arg.flags {
        VFIO_IOMMU_DIRTY_PAGES_FLAG_START => Ok(Kind::Start),
        VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP => Ok(Kind::Stop),
        VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP => {
            if arg.argsz < 48 {
                return Err(Error::ShortArgsz);
            }
            let get = vfio_iommu_type1_dirty_bitmap_get::from_bytes(&user.read(addr, 8)?);
            Ok(Kind::GetBitmap(get))
        }
        _ => Err(Error::FlagCombination),
    }
}
