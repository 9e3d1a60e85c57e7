// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ioctls: their arguments in the process's memory, in the order of checks
//! of rules A2 to A6.

use dirty_core::Errno;
use dirty_script::Answer;

use super::abi::*;
use super::backend::Backend;
use super::check::{check, test_bitmap};
use super::process::{is_user_range, Process, Result};
use super::unmap::{Harvest, Unmap};
use super::Naive;

impl Naive {
    pub(super) fn any_ioctl(&mut self, nr: u32, arg: u64) -> Answer {
        if self.container.is_none() {
            return Err(Errno::EBADF);
        }
        match nr {
            GET_API_VERSION => return Ok(0),
            CHECK_EXTENSION => return Ok(self.extension(arg).into()),
            SET_IOMMU => return self.set_iommu(arg),
            _ => {}
        }
        self.backend()?;
        match nr {
            GET_INFO => self.info_ioctl(arg),
            MAP_DMA => self.map_ioctl(arg),
            UNMAP_DMA => self.unmap_ioctl(arg),
            DIRTY_PAGES => self.dirty_ioctl(arg),
            _ => return Err(Errno::ENOTTY),
        }
        .map(|()| 0)
    }

    /// CHECK_EXTENSION.
    fn extension(&self, number: u64) -> bool {
        let backend = self.backend().ok();
        match number {
            1 | 3 | 9 => true, // type1, type1v2, unmap of everything
            // Coherent DMA: no simulated IOMMU has it.
            4 => backend.is_some_and(|b| b.domains().is_empty()),
            // New vaddrs for mappings.
            10 => backend.is_some_and(|b| !b.has_emulated()),
            _ => false,
        }
    }

    fn info_ioctl(&mut self, arg: u64) -> Result<()> {
        let (backend, process) = self.parts()?;
        let argsz = Fields(process.copy_in::<16>(arg)?).u32(0);
        check(argsz >= 16)?;
        let mut chain: Vec<u8> = Vec::new();
        let half = |chain: &mut Vec<u8>, v: u16| chain.extend(v.to_ne_bytes());
        let word = |chain: &mut Vec<u8>, v: u32| chain.extend(v.to_ne_bytes());
        let long = |chain: &mut Vec<u8>, v: u64| chain.extend(v.to_ne_bytes());
        half(&mut chain, 2); // migration
        half(&mut chain, 1);
        word(&mut chain, 24 + 32);
        word(&mut chain, 0);
        word(&mut chain, 0);
        long(&mut chain, backend.granule.unwrap_or(backend.page()));
        long(&mut chain, MAX_BITMAP);
        let more = !backend.ranges.is_empty();
        half(&mut chain, 3); // mappings left
        half(&mut chain, 1);
        word(&mut chain, if more { 24 + 32 + 16 } else { 0 });
        word(&mut chain, backend.avail());
        word(&mut chain, 0);
        if more {
            half(&mut chain, 1); // valid iovas
            half(&mut chain, 1);
            word(&mut chain, 0);
            word(&mut chain, backend.ranges.len() as u32);
            word(&mut chain, 0);
            for (start, end) in &backend.ranges {
                long(&mut chain, *start);
                long(&mut chain, *end);
            }
        }
        let needed = 24 + chain.len() as u32;
        let fits = argsz >= needed;
        if fits {
            process.copy_out(arg.wrapping_add(24), &chain)?;
        }
        let mut info: Vec<u8> = Vec::new();
        word(&mut info, argsz.max(needed));
        word(&mut info, 1 | 2); // page sizes, capabilities
        long(&mut info, backend.pgsizes());
        word(&mut info, if fits { 24 } else { 0 });
        word(&mut info, 0);
        process.copy_out(arg, &info[..argsz.min(24) as usize])
    }

    fn map_ioctl(&mut self, arg: u64) -> Result<()> {
        let (backend, process) = self.parts()?;
        let map = Fields(process.copy_in::<32>(arg)?);
        let (argsz, flags) = (map.u32(0), map.u32(4));
        let (vaddr, iova, size) = (map.u64(8), map.u64(16), map.u64(24));
        check(argsz >= 32 && flags < 8)?;
        check(size != 0)?;
        for start in [iova, vaddr] {
            start.checked_add(size - 1).ok_or(Errno::EOVERFLOW)?;
        }
        let set_vaddr = flags & MAP_VADDR != 0;
        let set_prot = flags & MAP_READ_WRITE != 0;
        check(set_vaddr != set_prot)?;
        backend.map(process, iova, size, vaddr, flags)
    }

    fn unmap_ioctl(&mut self, arg: u64) -> Result<()> {
        let (_, process) = self.parts()?;
        let unmap = Fields(process.copy_in::<24>(arg)?);
        let (argsz, flags) = (unmap.u32(0), unmap.u32(4));
        let (iova, size) = (unmap.u64(8), unmap.u64(16));
        check(argsz >= 24 && flags < 8)?;
        let all = flags & UNMAP_ALL != 0;
        let vaddr = flags & UNMAP_VADDR != 0;
        let get = flags & UNMAP_GET_BITMAP != 0;
        check(!get || !all && !vaddr)?;
        let mut bitmap = None;
        if get {
            check(argsz >= 48)?;
            let b = Fields(process.copy_in::<24>(arg.wrapping_add(24))?);
            let b = Bitmap::new(&b, 0);
            check(is_user_range(b.data, b.size))?;
            test_bitmap(size, b.pgsize, b.size)?;
            bitmap = Some(b);
        }
        let request = Unmap {
            iova,
            size,
            all,
            vaddr,
            harvest: bitmap.map(|b| Harvest::Ioctl { pgsize: b.pgsize }),
        };
        let iovas = self.unpin_for_unmap(&request)?;
        let (backend, process) = self.parts()?;
        let report = |backend: &Backend, process: &mut Process| match bitmap {
            Some(b) => backend.words(iova, iova + (size - 1), b.pgsize, &mut |k, words| {
                process.copy_words(b.data.wrapping_add(8 * k), words)
            }),
            None => Ok(()),
        };
        report(backend, process)?;
        let mut back = unmap.0;
        back[16..].copy_from_slice(&backend.bytes(&iovas).to_ne_bytes());
        process.copy_out(arg, &back)?;
        // Only now the mappings leave their domains: a copy that fails keeps them.
        if bitmap.is_some() && backend.write_late(None, iova, iova + (size - 1)) {
            report(backend, process)?;
        }
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
        let head = Fields(process.copy_in::<8>(arg)?);
        let (argsz, flags) = (head.u32(0), head.u32(4));
        check(argsz >= 8)?;
        match flags {
            DIRTY_START => backend.start(),
            DIRTY_STOP => backend.stop(),
            DIRTY_GET_BITMAP => {
                check(argsz >= 48)?;
                let get = Fields(process.copy_in::<40>(arg.wrapping_add(8))?);
                self.get(get.u64(0), get.u64(8), Bitmap::new(&get, 16))
            }
            _ => Err(Errno::EINVAL),
        }
    }
}
