// SPDX-License-Identifier: MIT OR Apache-2.0
//! The type1 backend of a container: its state. What is done with it is in the
//! files beside this one.
//!
//! `command` turns the bytes of an ioctl into a command, and `ioctl` runs it. `groups` attaches and detaches; `map`,
//! `unmap` and `dirty` do what the user of the container asks for; `access`
//! does what devices ask for. `report` and `user_report` carry dirty pages out.
//! `dma` is a mapping, `domain` a mapping's pages in an IOMMU, `iommu_dirty` the
//! dirty pages that an IOMMU knows of, `iova` the valid iovas, `budget` the memory of
//! bitmaps.

pub(crate) mod access;
mod budget;
pub(crate) mod command;
mod dirty;
mod dma;
mod domain;
mod groups;
pub(crate) mod ioctl;
mod iommu_dirty;
mod iova;
pub(crate) mod map;
pub(crate) mod report;
pub(crate) mod unmap;
mod user_report;

use crate::error::Error;
use crate::host::{Host, Memory};
use crate::mem::{List, Words};
use crate::pgsize::PageSize;
use crate::span::Span;
use crate::type1::budget::Budget;
use crate::type1::dma::Dmas;
use crate::type1::domain::Domain;
use crate::type1::groups::Group;
use crate::type1::iova::Ranges;
use crate::uapi::{self, VFIO_DMA_CC_IOMMU, VFIO_TYPE1_IOMMU, VFIO_UNMAP_ALL, VFIO_UPDATE_VADDR};

/// What is chosen when a container is created. Start with the default and set fields: there
/// may be more of them in a later version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Options {
    /// The CPU's page size, which is what a pin covers. 4096 by default.
    pub page_size: PageSize,
    /// The most mappings at a time. 65535 by default, as the Linux module's
    /// parameter of this name.
    pub dma_entry_limit: u32,
    /// The most bytes for bitmaps. START, MAP_DMA and the first pin in a mapping
    /// fail with `BitmapBudget` beyond it (D5). A mapping has one bit for each
    /// page, and from its first pin on two. `None`, the default, sets no limit.
    pub bitmap_budget: Option<u64>,
    /// Devices behind an IOMMU do not make a mapping without WRITE dirty (D10).
    /// False by default, as in Linux: they make every mapping dirty.
    pub skip_read_only: bool,
    /// Ask IOMMUs that track dirty pages which pages devices have written (D12).
    /// False by default, as in Linux: everything that they can write is dirty.
    pub iommu_dirty_tracking: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            page_size: const {
                match PageSize::new(4096) {
                    Some(size) => size,
                    None => panic!(), // 4096 is a power of two
                }
            },
            dma_entry_limit: 65535,
            bitmap_budget: None,
            skip_read_only: false,
            iommu_dirty_tracking: false,
        }
    }
}

/// The types of IOMMU that a container can be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IommuType {
    /// Version 1 of type1. It tracks no dirty pages and has no pins, and an unmap
    /// may start or end inside a mapping.
    Type1,
    /// Version 2 of type1.
    Type1v2,
}

/// Words of staging memory.
const STAGING_WORDS: usize = 2048;

/// Dirty-page tracking, while it is on.
struct Tracking<M: Memory> {
    /// Granularity, latched by START (D6).
    pgsize: PageSize,
    /// Where words of a report wait for a copy to the user, or for another page
    /// size. INVARIANT: zero between reports.
    staging: Words<M>,
}

/// The type1 backend of a container: mappings, pinned pages and dirty bitmaps.
///
/// [`Container`](crate::Container) opens one at SET_IOMMU. A host that has
/// VFIO's generic layer already, as the Linux kernel has, holds a `Type1` by
/// itself.
///
/// There are three kinds of calls. Groups come and go
/// ([`attach_group`](Type1::attach_group), [`detach_group`](Type1::detach_group)).
/// The user of the container maps and asks what is dirty, by
/// [`run`](Type1::run) or by typed calls ([`map`](Type1::map),
/// [`unmap`](Type1::unmap), [`start`](Type1::start),
/// [`get_bitmap`](Type1::get_bitmap), ...). Devices pin, read, write and mark
/// ([`pin_pages`](Type1::pin_pages), [`write`](Type1::write),
/// [`mark`](Type1::mark), ...). Calls that take `&self` may run at the same
/// time; the lock that hands out `&self` and `&mut self` orders them with all
/// others.
pub struct Type1<M: Memory> {
    mem: M,
    options: Options,
    v2: bool,
    dmas: Dmas<M>,
    /// How many more mappings may be made. INVARIANT: with the number of mappings
    /// it is `options.dma_entry_limit`.
    dma_avail: u32,
    /// The number of mappings whose vaddr is invalid.
    vaddr_invalid: u32,
    groups: List<Group, M>,
    domains: List<Domain, M>,
    iova_ranges: Ranges<M>,
    /// The page sizes that every domain has. INVARIANT: not 0.
    pgsize_bitmap: u64,
    /// The number of groups whose dirty scope is everything.
    num_non_pinned_groups: u32,
    tracking: Option<Tracking<M>>,
    budget: Budget<M>,
}

impl<M: Memory> Type1<M> {
    /// A backend without groups and mappings, of IOMMU type `kind`:
    /// `VFIO_TYPE1_IOMMU` or `VFIO_TYPE1v2_IOMMU`. Version 1 neither tracks
    /// dirty pages nor pins.
    ///
    /// # Errors
    ///
    /// `ExtensionAsIommu` for `VFIO_UNMAP_ALL`, which Linux takes for an IOMMU
    /// type at first; `NoSuchIommu` for any other number.
    pub fn open(mem: M, options: Options, kind: u64) -> Result<Self, Error> {
        let v2 = match kind {
            VFIO_TYPE1_IOMMU => false,
            uapi::VFIO_TYPE1v2_IOMMU => true,
            VFIO_UNMAP_ALL => return Err(Error::ExtensionAsIommu),
            _ => return Err(Error::NoSuchIommu),
        };
        Ok(Type1 {
            options,
            v2,
            dmas: Dmas::new(&mem),
            dma_avail: options.dma_entry_limit,
            vaddr_invalid: 0,
            groups: List::new(&mem),
            domains: List::new(&mem),
            iova_ranges: List::new(&mem),
            pgsize_bitmap: groups::common_pgsizes(&[], options.page_size),
            num_non_pinned_groups: 0,
            tracking: None,
            budget: Budget::new(&mem, options.bitmap_budget),
            mem,
        })
    }

    /// The IOMMU type that the backend was opened as.
    #[must_use]
    pub fn iommu_type(&self) -> IommuType {
        match self.v2 {
            true => IommuType::Type1v2,
            false => IommuType::Type1,
        }
    }

    /// CHECK_EXTENSION before a backend is open: the IOMMU types, and what
    /// every backend has.
    #[must_use]
    pub fn offers(extension: u64) -> bool {
        matches!(
            extension,
            VFIO_TYPE1_IOMMU | uapi::VFIO_TYPE1v2_IOMMU | VFIO_UNMAP_ALL
        )
    }

    /// CHECK_EXTENSION: what [`offers`](Type1::offers) says, and besides
    /// `VFIO_UPDATE_VADDR` while no emulated group is attached, and
    /// `VFIO_DMA_CC_IOMMU` while every domain is coherent.
    #[must_use]
    pub fn check_extension(&self, extension: u64) -> bool {
        match extension {
            VFIO_UPDATE_VADDR => !self.has_emulated_group(),
            VFIO_DMA_CC_IOMMU => self.domains.iter().all(|d| d.info.coherent),
            _ => Self::offers(extension),
        }
    }

    /// The page size of the dirty bitmaps while tracking is on.
    #[must_use]
    pub fn tracking(&self) -> Option<PageSize> {
        self.tracking.as_ref().map(|t| t.pgsize)
    }

    /// The mappings that overlap the addresses from `first` to `last`, in order:
    /// the first address and the bytes of each.
    pub fn mappings(&self, first: u64, last: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let span = Span::between(first, last).into_iter();
        let hits = span.flat_map(|span| self.dmas.range(span));
        hits.map(|dma| (dma.span.first(), dma.span.size()))
    }

    /// The bytes that all dirty bitmaps take, which `Options::bitmap_budget` limits.
    #[must_use]
    pub fn bitmap_bytes(&self) -> u64 {
        self.budget.used()
    }

    /// The number of addresses at which devices have pinned a page. A page that is
    /// pinned twice at one address counts once.
    #[must_use]
    pub fn pinned_pages(&self) -> u64 {
        let pins = self.dmas.range(Span::ALL).map(|dma| dma.pins.count());
        pins.fold(0, u64::saturating_add)
    }

    /// The number of groups that make every mapping dirty in every report, because they
    /// are behind an IOMMU and nobody knows what they write (rule A8).
    #[must_use]
    pub fn wholly_dirty_groups(&self) -> u32 {
        self.num_non_pinned_groups
    }

    /// Refuses what version 1 does not have.
    fn check_v2(&self) -> Result<(), Error> {
        if self.v2 {
            Ok(())
        } else {
            Err(Error::NotV2)
        }
    }

    /// The smallest page size that every domain has. Mappings are aligned to it,
    /// and it is the granularity of tracking that starts now.
    fn min_page(&self) -> PageSize {
        PageSize::smallest(self.pgsize_bitmap).unwrap_or(self.options.page_size)
    }

    /// The page size of the dirty bitmaps, or of those that START would make.
    fn dirty_page(&self) -> PageSize {
        self.tracking().unwrap_or_else(|| self.min_page())
    }

    fn has_emulated_group(&self) -> bool {
        self.groups.iter().any(|g| g.domain.is_none())
    }

    /// Empties the backend: every group is detached, every mapping goes. Call
    /// it before dropping a backend: dropping one frees its memory, but cannot
    /// give pins back to the host.
    pub fn close(&mut self, host: &mut dyn Host) {
        while let Some(id) = self.groups.last().map(|g| g.id) {
            self.detach_group(host, id);
        }
        self.remove_all(host, Span::ALL);
    }
}
