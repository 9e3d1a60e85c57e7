// SPDX-License-Identifier: MIT OR Apache-2.0
//! UNMAP_DMA: the checks, the devices' callbacks, and the typed call.

use dirty_core::Errno;
use dirty_script::op::{Action, ReportArg, DEVICES};
use dirty_script::System;

use super::backend::Backend;
use super::check::{check, test_bitmap};
use super::process::Result;
use super::Naive;

/// How an unmap asks for the dirty bits of what goes.
pub(super) enum Harvest {
    /// By the ioctl, which takes only the page size that is tracked.
    Ioctl { pgsize: u64 },
    /// By the typed call, at any page size, into so many bytes.
    Typed { pgsize: u64, bytes: u64 },
}

/// The arguments of an unmap.
pub(super) struct Unmap {
    pub(super) iova: u64,
    pub(super) size: u64,
    /// Unmap everything; iova and size must be 0.
    pub(super) all: bool,
    /// Only invalidate the vaddr of the mappings.
    pub(super) vaddr: bool,
    pub(super) harvest: Option<Harvest>,
}

impl Backend {
    /// The iovas of the mappings to unmap: steps 5 to 11 of A5 without the
    /// callbacks.
    fn unmap_check(&self, u: &Unmap) -> Result<Vec<u64>> {
        if u.vaddr && self.has_emulated() {
            return Err(Errno::EBUSY);
        }
        let page = self.page();
        check(u.iova % page == 0)?;
        let last = if u.all {
            check(u.iova == 0 && u.size == 0)?;
            u64::MAX
        } else {
            check(u.size != 0 && u.size % page == 0)?;
            u.iova.checked_add(u.size - 1).ok_or(Errno::EOVERFLOW)?
        };
        if let Some(harvest) = &u.harvest {
            let granule = self.granule.ok_or(Errno::EINVAL)?;
            let page = match harvest {
                Harvest::Ioctl { pgsize } => {
                    check(*pgsize == granule)?;
                    granule
                }
                Harvest::Typed { pgsize, bytes } => {
                    test_bitmap(u.size, *pgsize, *bytes)?;
                    granule.max(*pgsize)
                }
            };
            check(u.iova % page == 0 && u.size % page == 0)?;
        }
        if self.v2 && !u.all {
            check(!self.mappings.bisected(u.iova, last))?;
        }
        let iovas = self.mappings.overlapping(u.iova, last);
        if !self.v2 && iovas.first().is_some_and(|first| *first < u.iova) {
            return Ok(Vec::new());
        }
        if u.vaddr {
            check(
                iovas
                    .iter()
                    .all(|iova| !self.mappings.0[iova].vaddr_invalid),
            )?;
        }
        Ok(iovas)
    }

    /// The sum of the sizes of some mappings.
    pub(super) fn bytes(&self, iovas: &[u64]) -> u64 {
        let sizes = iovas.iter().map(|iova| self.mappings.0[iova].size);
        sizes.fold(0, u64::wrapping_add)
    }

    /// Invalidates the vaddr of some mappings.
    pub(super) fn invalidate(&mut self, iovas: &[u64]) {
        for iova in iovas {
            if let Some(m) = self.mappings.0.get_mut(iova) {
                m.vaddr_invalid = true;
            }
        }
    }
}

impl Naive {
    /// Calls the devices' callbacks until nothing that is to be unmapped is
    /// pinned. Returns the iovas of the mappings to unmap, which may have
    /// changed meanwhile.
    pub(super) fn unpin_for_unmap(&mut self, u: &Unmap) -> Result<Vec<u64>> {
        let mut asked = None;
        let mut tries = 0;
        loop {
            let backend = self.backend()?;
            let iovas = backend.unmap_check(u)?;
            let mappings = iovas.iter().map(|iova| &backend.mappings.0[iova]);
            let pinned = mappings.into_iter().find(|m| !m.pins.is_empty());
            let Some((iova, size)) = pinned.filter(|_| !u.vaddr).map(|m| (m.iova, m.size)) else {
                return match self.unmap_fails {
                    true => Err(Errno::EFAULT),
                    false => Ok(iovas),
                };
            };
            if asked.is_some_and(|asked| iova <= asked) {
                tries += 1;
                if tries == 11 {
                    return Err(Errno::EBUSY);
                }
            } else {
                asked = Some(iova); // each mapping has its own tries
                tries = 0;
            }
            self.ask_devices(iova, size);
        }
    }

    /// Calls the dma_unmap callback of every open device.
    fn ask_devices(&mut self, iova: u64, size: u64) {
        for device in self.open.clone() {
            if !DEVICES[device].dma_unmap {
                continue;
            }
            for action in self.drivers[device].dma_unmap(iova, size) {
                match action {
                    Action::Unpin => self.unpin_range(device, iova, size),
                    // Callbacks return nothing, so their errors are dropped.
                    Action::Start => drop(self.parts().and_then(|(b, _)| b.start())),
                    Action::Stop => drop(self.parts().and_then(|(b, _)| b.stop())),
                    Action::Pin => drop(self.pin(device, iova, 1, 1)),
                }
            }
        }
    }

    /// UNMAP_DMA with a bitmap as a typed call; returns the bytes unmapped.
    pub(super) fn typed_harvest(&mut self, arg: &ReportArg, words: &mut [u64]) -> Result<u64> {
        self.backend()?;
        check(arg.pgsize.is_power_of_two())?;
        let iovas = self.unpin_for_unmap(&Unmap {
            iova: arg.iova,
            size: arg.size,
            all: false,
            vaddr: false,
            harvest: Some(Harvest::Typed {
                pgsize: arg.pgsize,
                bytes: words.len() as u64 * 8,
            }),
        })?;
        let (backend, process) = self.parts()?;
        let last = arg.iova + (arg.size - 1);
        backend.write_late(None, arg.iova, last);
        backend.words(arg.iova, last, arg.pgsize, &mut |k, row| {
            words[k as usize..][..row.len()].copy_from_slice(row);
            Ok(())
        })?;
        let bytes = backend.bytes(&iovas);
        backend.remove(process, &iovas);
        Ok(bytes)
    }
}
