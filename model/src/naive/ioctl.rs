// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ioctls' arguments.

use dirty_core::uapi::*;
use dirty_core::Errno;
use dirty_script::Answer;

use super::mapping::smallest;
use super::process::{is_user_range, Result};
use super::unmap::{Harvest, Unmap};
use super::Naive;

/// Test T: whether a bitmap of `bytes` is right for `size` bytes of pages.
pub(super) fn test_bitmap(size: u64, pgsize: u64, bytes: u64) -> Result<()> {
    if pgsize == 0 {
        return Err(Errno::EINVAL);
    }
    let pages = size / smallest(pgsize);
    let enough = bytes >= dirty_bitmap_bytes(pages);
    match pages != 0 && bytes != 0 && bytes <= DIRTY_BITMAP_SIZE_MAX && enough {
        true => Ok(()),
        false => Err(Errno::EINVAL),
    }
}

/// Fails with EINVAL.
pub(super) fn check(holds: bool) -> Result<()> {
    match holds {
        true => Ok(()),
        false => Err(Errno::EINVAL),
    }
}

impl Naive {
    pub(super) fn any_ioctl(&mut self, nr: u32, arg: u64) -> Answer {
        if self.container.is_none() {
            return Err(Errno::EBADF);
        }
        match nr {
            VFIO_GET_API_VERSION => return Ok(0),
            VFIO_CHECK_EXTENSION => return Ok(self.extension(arg).into()),
            VFIO_SET_IOMMU => return self.set_iommu(arg),
            _ => {}
        }
        self.backend()?;
        match nr {
            VFIO_IOMMU_GET_INFO => self.info_ioctl(arg),
            VFIO_IOMMU_MAP_DMA => self.map_ioctl(arg),
            VFIO_IOMMU_UNMAP_DMA => self.unmap_ioctl(arg),
            VFIO_IOMMU_DIRTY_PAGES => self.dirty_ioctl(arg),
            _ => return Err(Errno::ENOTTY),
        }
        .map(|()| 0)
    }

    fn extension(&self, number: u64) -> bool {
        let backend = self.backend().ok();
        match number {
            1 | 3 | VFIO_UNMAP_ALL => true, // type1, type1v2
            VFIO_DMA_CC_IOMMU => backend.is_some_and(|b| b.domains().is_empty()),
            VFIO_UPDATE_VADDR => backend.is_some_and(|b| !b.has_emulated()),
            _ => false,
        }
    }

    fn info_ioctl(&mut self, arg: u64) -> Result<()> {
        let (backend, process) = self.parts()?;
        let head = process.copy_in::<16>(arg)?;
        let argsz = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
        check(argsz >= 16)?;
        let mut chain: Vec<u8> = Vec::new();
        let half = |chain: &mut Vec<u8>, v: u16| chain.extend(v.to_ne_bytes());
        let word = |chain: &mut Vec<u8>, v: u32| chain.extend(v.to_ne_bytes());
        let long = |chain: &mut Vec<u8>, v: u64| chain.extend(v.to_ne_bytes());
        half(&mut chain, VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION);
        half(&mut chain, 1);
        word(&mut chain, 24 + 32);
        word(&mut chain, 0);
        word(&mut chain, 0);
        long(&mut chain, backend.granule.unwrap_or(backend.page()));
        long(&mut chain, DIRTY_BITMAP_SIZE_MAX);
        let more = !backend.ranges.is_empty();
        half(&mut chain, VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL);
        half(&mut chain, 1);
        word(&mut chain, if more { 24 + 32 + 16 } else { 0 });
        word(&mut chain, backend.avail());
        word(&mut chain, 0);
        if more {
            half(&mut chain, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE);
            half(&mut chain, 1);
            word(&mut chain, 0);
            word(&mut chain, backend.ranges.len() as u32);
            word(&mut chain, 0);
            for (start, end) in &backend.ranges {
                long(&mut chain, *start);
                long(&mut chain, *end);
            }
        }
        let mut info = vfio_iommu_type1_info {
            argsz,
            flags: VFIO_IOMMU_INFO_PGSIZES | VFIO_IOMMU_INFO_CAPS,
            iova_pgsizes: backend.pgsizes(),
            cap_offset: 0,
            pad: 0,
        };
        let needed = 24 + chain.len() as u32;
        if argsz < needed {
            info.argsz = needed;
        } else {
            process.copy_out(arg.wrapping_add(24), &chain)?;
            info.cap_offset = 24;
        }
        let len = argsz.min(24) as usize;
        process.copy_out(arg, &info.to_bytes()[..len])
    }

    fn map_ioctl(&mut self, arg: u64) -> Result<()> {
        let (backend, process) = self.parts()?;
        let map = vfio_iommu_type1_dma_map::from_bytes(&process.copy_in(arg)?);
        check(map.argsz >= 32 && map.flags < 8)?;
        check(map.size != 0)?;
        for start in [map.iova, map.vaddr] {
            start.checked_add(map.size - 1).ok_or(Errno::EOVERFLOW)?;
        }
        let set_vaddr = map.flags & VFIO_DMA_MAP_FLAG_VADDR != 0;
        let set_prot = map.flags & (VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE) != 0;
        check(set_vaddr != set_prot)?;
        backend.map(process, &map)
    }

    fn unmap_ioctl(&mut self, arg: u64) -> Result<()> {
        let (_, process) = self.parts()?;
        let mut unmap = vfio_iommu_type1_dma_unmap::from_bytes(&process.copy_in(arg)?);
        check(unmap.argsz >= 24 && unmap.flags < 8)?;
        let all = unmap.flags & VFIO_DMA_UNMAP_FLAG_ALL != 0;
        let vaddr = unmap.flags & VFIO_DMA_UNMAP_FLAG_VADDR != 0;
        let get = unmap.flags & VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP != 0;
        check(!get || !all && !vaddr)?;
        let mut bitmap = None;
        if get {
            check(unmap.argsz >= 48)?;
            let b = vfio_bitmap::from_bytes(&process.copy_in(arg.wrapping_add(24))?);
            check(is_user_range(b.data, b.size))?;
            test_bitmap(unmap.size, b.pgsize, b.size)?;
            bitmap = Some(b);
        }
        let request = Unmap {
            iova: unmap.iova,
            size: unmap.size,
            all,
            vaddr,
            harvest: bitmap.map(|b| Harvest::Ioctl { pgsize: b.pgsize }),
        };
        let iovas = self.unmap_look(&request)?;
        let (backend, process) = self.parts()?;
        if let Some(b) = bitmap {
            let last = unmap.iova + (unmap.size - 1);
            backend.words(unmap.iova, last, b.pgsize, &mut |k, words| {
                process.copy_words(b.data.wrapping_add(8 * k), words)
            })?;
        }
        unmap.size = backend.bytes(&iovas);
        process.copy_out(arg, &unmap.to_bytes())?;
        if vaddr {
            backend.invalidate(&iovas);
        } else {
            backend.remove(process, &iovas);
        }
        Ok(())
    }

    fn dirty_ioctl(&mut self, arg: u64) -> Result<()> {
        let (backend, process) = self.parts()?;
        if !backend.v2 {
            return Err(Errno::EACCES);
        }
        let head = vfio_iommu_type1_dirty_bitmap::from_bytes(&process.copy_in(arg)?);
        check(head.argsz >= 8)?;
        match head.flags {
            VFIO_IOMMU_DIRTY_PAGES_FLAG_START => backend.start(),
            VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP => backend.stop(),
            VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP => {
                check(head.argsz >= 48)?;
                let get = process.copy_in(arg.wrapping_add(8))?;
                self.get(&vfio_iommu_type1_dirty_bitmap_get::from_bytes(&get))
            }
            _ => Err(Errno::EINVAL),
        }
    }
}
