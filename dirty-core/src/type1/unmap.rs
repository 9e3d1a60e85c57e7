// SPDX-License-Identifier: MIT OR Apache-2.0
//! UNMAP_DMA.
//!
//! Devices drop their pins first, with the container's lock released; then
//! everything is checked again (D7), the bits are reported, and only then do
//! mappings go, all of them (D3, D8).

use crate::error::Error;
use crate::host::{Host, Memory};
use crate::pgsize::PageSize;
use crate::type1::dirty;
use crate::type1::map::last_of;
use crate::type1::report::{Dest, Range};
use crate::type1::Type1;
use crate::uapi::{vfio_bitmap, vfio_iommu_type1_dma_unmap};

/// How often devices are asked to unpin one mapping.
const MAX_TRIES: u32 = 11;

/// What to unmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The mappings inside `size` bytes from `iova` on.
    Range {
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
    },
    /// Every mapping.
    All,
}

/// An unmap under way; it may take several steps.
#[derive(Clone, Copy, Debug)]
pub struct Unmap {
    target: Target,
    vaddr: bool,
    /// The last mapping, in order, whose pins devices were asked to drop.
    asked: Option<u64>,
    /// How often they were asked again since.
    tries: u32,
}

impl Unmap {
    /// Removes mappings.
    #[must_use]
    pub fn new(target: Target) -> Self {
        Unmap {
            target,
            vaddr: false,
            asked: None,
            tries: 0,
        }
    }

    /// Invalidates the vaddr of mappings instead; MAP gives them a new one.
    #[must_use]
    pub fn vaddr(target: Target) -> Self {
        Unmap {
            vaddr: true,
            ..Unmap::new(target)
        }
    }
}

/// How far an unmap is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Done: so many bytes were unmapped or invalidated (modulo 2^64).
    Done(u64),
    /// Devices still pin pages of the mapping at `iova`. Call the dma_unmap
    /// callback of each device with this range, the container's lock released,
    /// and take the next step.
    Notify {
        /// First address of the mapping.
        iova: u64,
        /// Its bytes.
        size: u64,
    },
}

/// Where the harvested bits go.
pub(super) enum Harvest<'a> {
    None,
    /// The user's bitmap, and the argument to write back at an address.
    User {
        bitmap: Option<vfio_bitmap>,
        addr: u64,
        arg: vfio_iommu_type1_dma_unmap,
    },
    Dest {
        pgsize: PageSize,
        dest: Dest<'a>,
    },
}

impl Harvest<'_> {
    /// The page size of the bits, in bytes.
    fn pgsize(&self) -> Option<u64> {
        match self {
            Harvest::User {
                bitmap: Some(bitmap),
                ..
            } => Some(bitmap.pgsize),
            Harvest::Dest { pgsize, .. } => Some(pgsize.bytes()),
            _ => None,
        }
    }
}

impl<M: Memory> Type1<M> {
    /// One step of UNMAP_DMA: call it again after each [`Progress::Notify`].
    ///
    /// # Errors
    ///
    /// In this order: `EmulatedGroup` if vaddrs are to be invalidated and an
    /// emulated group is attached; `Misaligned`, `ZeroSize`, `Wraps` if the
    /// range is wrong; `Bisects` if it starts or ends inside a mapping (version
    /// 2 only); `VaddrMismatch` if a vaddr is invalid already; `StillPinned` if
    /// devices do not unpin when they are told to. Nothing is unmapped then.
    pub fn unmap(&mut self, host: &mut dyn Host, unmap: &mut Unmap) -> Result<Progress, Error> {
        self.unmap_step(host, unmap, Harvest::None)
    }

    /// As [`unmap`](Type1::unmap), and writes the dirty pages of what goes to
    /// `dest`, at any page size: bit k is the page at `iova + k * pgsize`. Pass
    /// the same `dest` at each step.
    ///
    /// # Errors
    ///
    /// `FlagCombination` for an unmap of vaddrs or of [`Target::All`]; then
    /// those of `unmap`, and before `Bisects`: `NotTracking`; `BitmapSize`;
    /// `Misaligned` if the range is no multiple of `pgsize` and of the bitmaps'
    /// own page size. Nothing is unmapped then.
    pub fn unmap_dirty(
        &mut self,
        host: &mut dyn Host,
        unmap: &mut Unmap,
        pgsize: PageSize,
        dest: Dest<'_>,
    ) -> Result<Progress, Error> {
        if unmap.vaddr || unmap.target == Target::All {
            return Err(Error::FlagCombination);
        }
        self.unmap_step(host, unmap, Harvest::Dest { pgsize, dest })
    }

    /// One step of an unmap, from step 5 of A5 on.
    pub(super) fn unmap_step(
        &mut self,
        host: &mut dyn Host,
        unmap: &mut Unmap,
        harvest: Harvest<'_>,
    ) -> Result<Progress, Error> {
        if unmap.vaddr && self.has_emulated_group() {
            return Err(Error::EmulatedGroup);
        }
        let (first, last) = self.unmap_range(unmap.target)?;
        let dirty = match harvest.pgsize() {
            Some(bytes) => Some(self.harvest_range(first, last, bytes, &harvest)?),
            None => None,
        };
        if unmap.target != Target::All {
            if self.v2 && self.dmas.bisected(first, last) {
                return Err(Error::Bisects);
            }
            // Version 1 stops at a mapping that starts before the range.
            if !self.v2 && self.dmas.find(first).is_some_and(|dma| dma.iova < first) {
                return self.finish(host, harvest, dirty, first, None);
            }
        }
        if unmap.vaddr {
            return self.invalidate(host, first, last, harvest);
        }
        let mut hits = self.dmas.range(first, last);
        let pinned = hits.find(|dma| !dma.pins.is_empty());
        if let Some((iova, size)) = pinned.map(|dma| (dma.iova, dma.size())) {
            // Each mapping has its tries; going back to an earlier one counts
            // as another try of the last.
            if unmap.asked.is_some_and(|asked| iova <= asked) {
                unmap.tries = unmap.tries.saturating_add(1);
            } else {
                unmap.tries = 0;
                unmap.asked = Some(iova);
            }
            if unmap.tries >= MAX_TRIES {
                return Err(Error::StillPinned);
            }
            return Ok(Progress::Notify { iova, size });
        }
        drop(hits);
        self.finish(host, harvest, dirty, first, Some(last))
    }

    /// First and last address of the target.
    fn unmap_range(&self, target: Target) -> Result<(u64, u64), Error> {
        match target {
            Target::All => Ok((0, u64::MAX)),
            Target::Range { iova, size } => {
                let page = self.min_page();
                if !page.aligns(iova) {
                    return Err(Error::Misaligned);
                }
                if size == 0 {
                    return Err(Error::ZeroSize);
                }
                if !page.aligns(size) {
                    return Err(Error::Misaligned);
                }
                Ok((iova, last_of(iova, size)?))
            }
        }
    }

    /// Step 9: whether bits can be harvested at `pgsize` bytes.
    fn harvest_range(
        &self,
        first: u64,
        last: u64,
        pgsize: u64,
        harvest: &Harvest<'_>,
    ) -> Result<Range, Error> {
        if self.tracking.is_none() {
            return Err(Error::NotTracking);
        }
        let latched = self.dirty_page();
        let size = last.wrapping_sub(first).wrapping_add(1);
        let pgsize = PageSize::new(pgsize).ok_or(Error::WrongPageSize)?;
        match harvest {
            Harvest::Dest { dest, .. } => dirty::check_report(size, pgsize, dest)?,
            _ if pgsize != latched => return Err(Error::WrongPageSize),
            _ => {}
        }
        if !pgsize.max(latched).aligns(first | size) {
            return Err(Error::Misaligned);
        }
        Ok(Range {
            first,
            last,
            pgsize,
        })
    }

    /// Reports, then removes the mappings from `first` to `last`, if any are
    /// to go.
    fn finish(
        &mut self,
        host: &mut dyn Host,
        harvest: Harvest<'_>,
        dirty: Option<Range>,
        first: u64,
        last: Option<u64>,
    ) -> Result<Progress, Error> {
        let hits = last
            .into_iter()
            .flat_map(|last| self.dmas.range(first, last));
        let size = hits.fold(0u64, |sum, dma| sum.wrapping_add(dma.size()));
        match harvest {
            Harvest::None => {}
            Harvest::User { bitmap, addr, arg } => {
                if let (Some(range), Some(bitmap)) = (dirty, bitmap) {
                    self.copy_out(host, range, bitmap.data)?;
                }
                write_back(host, addr, arg, size)?;
            }
            Harvest::Dest { dest, .. } => {
                if let Some(range) = dirty {
                    self.take(range, dest)?;
                }
            }
        }
        if let Some(last) = last {
            while let Some(iova) = self.dmas.first_in(first, last) {
                self.remove_dma(host, iova);
            }
        }
        Ok(Progress::Done(size))
    }

    /// Invalidates the vaddr of every mapping in the range, or of none.
    fn invalidate(
        &mut self,
        host: &mut dyn Host,
        first: u64,
        last: u64,
        harvest: Harvest<'_>,
    ) -> Result<Progress, Error> {
        if self.dmas.range(first, last).any(|dma| dma.vaddr_invalid) {
            return Err(Error::VaddrMismatch);
        }
        let hits = self.dmas.range(first, last);
        let size = hits.fold(0u64, |sum, dma| sum.wrapping_add(dma.size()));
        if let Harvest::User { addr, arg, .. } = harvest {
            write_back(host, addr, arg, size)?;
        }
        for dma in self.dmas.range_mut(first, last) {
            dma.vaddr_invalid = true;
            self.vaddr_invalid = self.vaddr_invalid.saturating_add(1);
        }
        Ok(Progress::Done(size))
    }
}

/// Tells the user what was unmapped, before it is: a fault loses nothing.
fn write_back(
    host: &mut dyn Host,
    addr: u64,
    arg: vfio_iommu_type1_dma_unmap,
    size: u64,
) -> Result<(), Error> {
    let arg = vfio_iommu_type1_dma_unmap { size, ..arg };
    host.copy_to_user(addr, &arg.to_bytes())
        .map_err(|_| Error::BadAddress)
}
