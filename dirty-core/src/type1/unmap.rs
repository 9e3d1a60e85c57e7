// SPDX-License-Identifier: MIT OR Apache-2.0
//! UNMAP_DMA.
//!
//! Devices drop their pins first, while the container's lock is released. Then
//! everything is checked again (D7) and the dirty pages are reported. Mappings
//! go last, and all of them, so that no failure loses a bit (D3, D8).

use crate::error::Error;
use crate::host::{Host, Memory};
use crate::pgsize::PageSize;
use crate::span::Span;
use crate::type1::dirty;
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

/// An unmap under way, which may take several steps.
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
    /// An unmap that removes mappings.
    #[must_use]
    pub fn new(target: Target) -> Self {
        Unmap {
            target,
            vaddr: false,
            asked: None,
            tries: 0,
        }
    }

    /// An unmap that invalidates the vaddr of mappings and keeps them: MAP_DMA
    /// gives them a new one.
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
    /// Devices still pin pages of the mapping at `iova`. Release the container's
    /// lock, call the dma_unmap callback of each device with this range, and
    /// take the next step.
    Notify {
        /// First address of the mapping.
        iova: u64,
        /// Its bytes.
        size: u64,
    },
}

/// The mappings in the range of an unmap.
enum Going {
    /// None may go.
    Nothing,
    /// Devices pin pages of this one.
    Pinned(Span),
    /// All may go; they have so many bytes (modulo 2^64).
    All(u64),
}

/// Where the dirty pages of what goes are reported to.
pub(super) enum Harvest<'a> {
    /// Nowhere.
    None,
    /// The user's bitmap if there is one; and the argument, to be written back
    /// at `addr` with the bytes that were unmapped.
    User {
        bitmap: Option<vfio_bitmap>,
        addr: u64,
        arg: vfio_iommu_type1_dma_unmap,
    },
    /// A caller of the core.
    Dest { pgsize: PageSize, dest: Dest<'a> },
}

impl<M: Memory> Type1<M> {
    /// One step of UNMAP_DMA (rule A5 in docs/rules.md). Call it again after
    /// each [`Progress::Notify`].
    ///
    /// # Errors
    ///
    /// In this order: `EmulatedGroup` if vaddrs are to be invalidated while an
    /// emulated group is attached; `Misaligned`, `ZeroSize` or `Wraps` for a bad
    /// range; `Bisects` if it starts or ends inside a mapping, in version 2;
    /// `VaddrMismatch` if a vaddr is invalid already; `StillPinned` if devices
    /// do not unpin when they are told to. Nothing changes then.
    pub fn unmap(&mut self, host: &mut dyn Host, unmap: &mut Unmap) -> Result<Progress, Error> {
        self.unmap_step(host, unmap, Harvest::None)
    }

    /// As [`unmap`](Type1::unmap), and reports the dirty pages of what goes, at
    /// any page size: bit k of `dest` is the page at `iova + k * pgsize`. Pass
    /// the same destination at each step; only the last one writes to it.
    ///
    /// # Errors
    ///
    /// `FlagCombination` for an unmap of vaddrs or of [`Target::All`]. Otherwise
    /// those of `unmap`, and before `Bisects`: `NotTracking`; `BitmapSize`;
    /// `Misaligned` if the range is no multiple of `pgsize` and of the bitmaps'
    /// own page size. Nothing changes then.
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
        let span = self.unmap_span(unmap.target)?;
        let dirty = self.harvest_range(span, &harvest)?;
        self.dmas.seek(span.first());
        match self.going(unmap, span)? {
            Going::Nothing => self.finish(host, harvest, dirty, None),
            Going::Pinned(mapping) => unmap.notify(mapping),
            Going::All(size) if unmap.vaddr => self.invalidate(host, span, size, harvest),
            Going::All(size) => self.finish(host, harvest, dirty, Some((span, size))),
        }
    }

    /// What the unmap may take.
    fn going(&self, unmap: &Unmap, span: Span) -> Result<Going, Error> {
        let mut hits = self.dmas.range(span).peekable();
        if let (Target::Range { .. }, Some(first)) = (unmap.target, hits.peek()) {
            if self.v2 && self.dmas.bisects(span) {
                return Err(Error::Bisects);
            }
            // Version 1 stops at a mapping that starts before the range.
            if !self.v2 && first.span.first() < span.first() {
                return Ok(Going::Nothing);
            }
        }
        let mut size: u64 = 0;
        for dma in hits {
            if !unmap.vaddr && !dma.pins.is_empty() {
                return Ok(Going::Pinned(dma.span));
            }
            size = size.wrapping_add(dma.span.size());
        }
        Ok(Going::All(size))
    }

    /// The addresses of the target.
    fn unmap_span(&self, target: Target) -> Result<Span, Error> {
        match target {
            Target::All => Ok(Span::ALL),
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
                Span::new(iova, size)
            }
        }
    }

    /// Step 9 of A5: the pages to report, if there is somewhere to report them.
    fn harvest_range(&self, span: Span, harvest: &Harvest<'_>) -> Result<Option<Range>, Error> {
        let pgsize = match harvest {
            Harvest::Dest { pgsize, .. } => Some(*pgsize),
            Harvest::User {
                bitmap: Some(bitmap),
                ..
            } => PageSize::new(bitmap.pgsize),
            _ => return Ok(None),
        };
        if self.tracking.is_none() {
            return Err(Error::NotTracking);
        }
        let latched = self.dirty_page();
        let pgsize = pgsize.ok_or(Error::WrongPageSize)?;
        match harvest {
            Harvest::Dest { dest, .. } => dirty::check_dest(span, pgsize, dest)?,
            _ if pgsize != latched => return Err(Error::WrongPageSize),
            _ => {}
        }
        if !pgsize.max(latched).aligns(span.first() | span.size()) {
            return Err(Error::Misaligned);
        }
        Ok(Some(Range { span, pgsize }))
    }

    /// Reports, then removes the mappings in a range, if any are to go; they have so
    /// many bytes.
    ///
    /// An IOMMU's last dirty pages are known when no device reaches the mappings
    /// any more. If there are some and the user's bitmap cannot be written a
    /// second time, the mappings stay with all their bits, and without the domains.
    fn finish(
        &mut self,
        host: &mut dyn Host,
        harvest: Harvest<'_>,
        dirty: Option<Range>,
        going: Option<(Span, u64)>,
    ) -> Result<Progress, Error> {
        let size = going.map_or(0, |(_, size)| size);
        match harvest {
            Harvest::None => {}
            Harvest::User { bitmap, addr, arg } => {
                let report = dirty.zip(bitmap.map(|bitmap| bitmap.data));
                if let Some((range, data)) = report {
                    self.harvest(host, range.span);
                    self.copy_out(host, range, data)?;
                }
                write_back(host, addr, arg, size)?;
                if let Some((range, data)) = report {
                    // What devices wrote meanwhile.
                    if self.unmap_and_harvest(host, range.span) {
                        self.copy_out(host, range, data)?;
                    }
                }
            }
            Harvest::Dest { dest, .. } => {
                if let Some(range) = dirty {
                    self.unmap_and_harvest(host, range.span);
                    self.take(range, dest)?;
                }
            }
        }
        if let Some((span, _)) = going {
            self.remove_all(host, span);
        }
        Ok(Progress::Done(size))
    }

    /// Removes every mapping that overlaps `span`.
    pub(super) fn remove_all(&mut self, host: &mut dyn Host, span: Span) {
        while let Some(removed) = self.remove_first(host, span) {
            if removed.last() >= span.last() {
                return; // nothing else overlaps
            }
        }
    }

    /// Invalidates the vaddr of every mapping in `span`, or of none. They have `size`
    /// bytes.
    fn invalidate(
        &mut self,
        host: &mut dyn Host,
        span: Span,
        size: u64,
        harvest: Harvest<'_>,
    ) -> Result<Progress, Error> {
        if self.dmas.range(span).any(|dma| dma.vaddr_invalid) {
            return Err(Error::VaddrMismatch);
        }
        if let Harvest::User { addr, arg, .. } = harvest {
            write_back(host, addr, arg, size)?;
        }
        for dma in self.dmas.range_mut(span) {
            dma.vaddr_invalid = true;
            self.vaddr_invalid = self.vaddr_invalid.saturating_add(1);
        }
        Ok(Progress::Done(size))
    }
}

impl Unmap {
    /// Asks for the devices to be told of a mapping that is still pinned. Each
    /// mapping has its tries; going back to an earlier mapping counts as another
    /// try of the last.
    fn notify(&mut self, mapping: Span) -> Result<Progress, Error> {
        if self.asked.is_some_and(|asked| mapping.first() <= asked) {
            self.tries = self.tries.saturating_add(1);
        } else {
            self.tries = 0;
            self.asked = Some(mapping.first());
        }
        if self.tries >= MAX_TRIES {
            return Err(Error::StillPinned);
        }
        Ok(Progress::Notify {
            iova: mapping.first(),
            size: mapping.size(),
        })
    }
}

/// Tells the user what is unmapped before it is: a fault loses nothing.
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
