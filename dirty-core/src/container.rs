// SPDX-License-Identifier: MIT OR Apache-2.0
//! A container: the groups in it, and the type1 backend once it is chosen.
//!
//! The container holds no lock and owns no host: whoever holds it calls it
//! with `&mut` and its own `&mut dyn Host`. Typed calls are here; the ioctl
//! interface is in [`ioctl`](crate::type1::ioctl).

use crate::error::Error;
use crate::host::{DeviceId, GroupId, Host, Memory, Prot};
use crate::mem::List;
use crate::pgsize::{Extent, PageSize};
use crate::type1::map::{last_of, Map};
use crate::type1::report::Dest;
use crate::type1::unmap::{Harvest, Progress, Unmap};
use crate::type1::{Options, Type1};
use crate::uapi;

/// A group in the container, whether or not a backend is set.
#[derive(Clone, Copy)]
struct Member {
    group: GroupId,
    emulated: bool,
}

/// An open device.
#[derive(Clone, Copy)]
struct Device {
    id: DeviceId,
    group: GroupId,
    /// Whether its driver can be told to unpin.
    dma_unmap: bool,
}

/// A VFIO container.
pub struct Container<M: Memory> {
    mem: M,
    options: Options,
    groups: List<Member, M>,
    devices: List<Device, M>,
    backend: Option<Type1<M>>,
}

impl<M: Memory> Container<M> {
    /// An empty container, as after open of `/dev/vfio/vfio`.
    #[must_use]
    pub fn new(mem: M, options: Options) -> Self {
        Container {
            groups: List::new(&mem),
            devices: List::new(&mem),
            backend: None,
            options,
            mem,
        }
    }

    pub(crate) fn backend(&self) -> Result<&Type1<M>, Error> {
        self.backend.as_ref().ok_or(Error::NoIommu)
    }

    pub(crate) fn backend_mut(&mut self) -> Result<&mut Type1<M>, Error> {
        self.backend.as_mut().ok_or(Error::NoIommu)
    }

    /// CHECK_EXTENSION (A2): whether an extension is there.
    #[must_use]
    pub fn check_extension(&self, extension: u64) -> bool {
        match extension {
            uapi::VFIO_TYPE1_IOMMU | uapi::VFIO_TYPE1v2_IOMMU | uapi::VFIO_UNMAP_ALL => true,
            uapi::VFIO_UPDATE_VADDR => self
                .backend
                .as_ref()
                .is_some_and(|b| !b.has_emulated_group()),
            uapi::VFIO_DMA_CC_IOMMU => self.backend.as_ref().is_some_and(Type1::is_coherent),
            _ => false,
        }
    }

    /// SET_IOMMU (A2): opens the backend and attaches every group, or none.
    ///
    /// # Errors
    ///
    /// `NoGroup`, `IommuAlreadySet`, `NoSuchIommu`, `ExtensionAsIommu`, and
    /// why a group does not fit.
    pub fn set_iommu(&mut self, host: &mut dyn Host, kind: u64) -> Result<(), Error> {
        if self.backend.is_some() {
            return Err(Error::IommuAlreadySet);
        }
        if self.groups.is_empty() {
            return Err(Error::NoGroup);
        }
        let v2 = match kind {
            uapi::VFIO_TYPE1_IOMMU => false,
            uapi::VFIO_TYPE1v2_IOMMU => true,
            uapi::VFIO_UNMAP_ALL => return Err(Error::ExtensionAsIommu),
            _ => return Err(Error::NoSuchIommu),
        };
        let mut backend = Type1::new(&self.mem, self.options, v2);
        for member in self.groups.iter() {
            if let Err(e) = backend.attach_group(host, member.group, member.emulated) {
                backend.close(host);
                return Err(e);
            }
        }
        self.backend = Some(backend);
        Ok(())
    }

    /// Adds a group: to the backend too, if one is set. `emulated` groups have
    /// no IOMMU; the others' is the host's.
    ///
    /// # Errors
    ///
    /// `DuplicateGroup`, `VaddrInvalid`, `NoMemory`, or why its IOMMU does not
    /// fit what is mapped (A9). Nothing changes then.
    pub fn attach_group(
        &mut self,
        host: &mut dyn Host,
        group: GroupId,
        emulated: bool,
    ) -> Result<(), Error> {
        if self.backend.as_ref().is_some_and(|b| b.vaddr_invalid != 0) {
            return Err(Error::VaddrInvalid);
        }
        if self.has_group(group) {
            return Err(Error::DuplicateGroup);
        }
        self.groups.reserve()?;
        if let Some(backend) = &mut self.backend {
            backend.attach_group(host, group, emulated)?;
        }
        self.groups.push(Member { group, emulated })?; // cannot fail: reserved
        Ok(())
    }

    /// Whether a group is in the container.
    #[must_use]
    pub fn has_group(&self, group: GroupId) -> bool {
        self.groups.iter().any(|m| m.group == group)
    }

    /// Removes a group. The backend goes with the last one, and all mappings
    /// with it.
    ///
    /// # Errors
    ///
    /// `UnknownGroup`; `GroupBusy` while a device of it is open.
    pub fn detach_group(&mut self, host: &mut dyn Host, group: GroupId) -> Result<(), Error> {
        let at = self.groups.iter().position(|m| m.group == group);
        let at = at.ok_or(Error::UnknownGroup)?;
        if self.devices.iter().any(|d| d.group == group) {
            return Err(Error::GroupBusy);
        }
        self.groups.remove(at);
        if let Some(backend) = &mut self.backend {
            backend.detach_group(host, group);
        }
        if self.groups.is_empty() {
            self.backend = None;
        }
        Ok(())
    }

    /// Opens a device of a group; `dma_unmap` says whether it can be told to
    /// unpin, without which it may not pin.
    ///
    /// # Errors
    ///
    /// `NoIommu` before SET_IOMMU, `UnknownGroup`, `DuplicateDevice`,
    /// `NoMemory`.
    pub fn open_device(
        &mut self,
        id: DeviceId,
        group: GroupId,
        dma_unmap: bool,
    ) -> Result<(), Error> {
        self.backend()?;
        if !self.has_group(group) {
            return Err(Error::UnknownGroup);
        }
        if self.devices.iter().any(|d| d.id == id) {
            return Err(Error::DuplicateDevice);
        }
        let device = Device {
            id,
            group,
            dma_unmap,
        };
        Ok(self.devices.push(device)?)
    }

    /// Closes a device. It must have unpinned what it pinned.
    pub fn close_device(&mut self, id: DeviceId) {
        if let Some(at) = self.devices.iter().position(|d| d.id == id) {
            self.devices.remove(at);
        }
    }

    fn device(&self, id: DeviceId) -> Result<Device, Error> {
        let device = self.devices.iter().find(|d| d.id == id);
        device.copied().ok_or(Error::UnknownDevice)
    }

    /// MAP_DMA.
    ///
    /// # Errors
    ///
    /// In the order of A4; nothing is mapped then.
    pub fn map(&mut self, host: &mut dyn Host, map: &Map) -> Result<(), Error> {
        self.backend_mut()?.map(host, map)
    }

    /// One step of UNMAP_DMA; call it again after each [`Progress::Notify`].
    ///
    /// # Errors
    ///
    /// In the order of A5; nothing is unmapped then.
    pub fn unmap(&mut self, host: &mut dyn Host, unmap: &mut Unmap) -> Result<Progress, Error> {
        self.backend_mut()?.unmap(host, unmap, Harvest::None)
    }

    /// Likewise, harvesting the dirty pages of what is unmapped at any page
    /// size. Not for vaddr, nor for [`Target::All`](crate::Target::All).
    ///
    /// # Errors
    ///
    /// In the order of A5; nothing is unmapped then.
    pub fn unmap_dirty(
        &mut self,
        host: &mut dyn Host,
        unmap: &mut Unmap,
        pgsize: PageSize,
        report: Dest<'_>,
    ) -> Result<Progress, Error> {
        if !unmap.may_harvest() {
            return Err(Error::FlagCombination);
        }
        let harvest = Harvest::Dest { pgsize, report };
        self.backend_mut()?.unmap(host, unmap, harvest)
    }

    /// DIRTY_PAGES START. Reports tell what is written from now on: copy
    /// everything after this call.
    ///
    /// # Errors
    ///
    /// `NoIommu`, `NotV2`, `TooManyPages`, `BitmapBudget`, `NoMemory`;
    /// tracking stays off then.
    pub fn start(&mut self) -> Result<(), Error> {
        self.tracker()?.start()
    }

    /// DIRTY_PAGES STOP: what was dirty is forgotten.
    ///
    /// # Errors
    ///
    /// `NoIommu`, `NotV2`.
    pub fn stop(&mut self) -> Result<(), Error> {
        self.tracker()?.stop();
        Ok(())
    }

    /// DIRTY_PAGES GET_BITMAP at any page size: bit k of the report is the
    /// page at `iova + k * pgsize`. What is reported is clean afterwards, but
    /// for pinned pages.
    ///
    /// # Errors
    ///
    /// `NoIommu`, `NotV2`, then in the order of A6; nothing is cleared then.
    pub fn get_bitmap(
        &mut self,
        iova: u64,
        size: u64,
        pgsize: PageSize,
        report: Dest<'_>,
    ) -> Result<(), Error> {
        self.tracker()?.get_bitmap(iova, size, pgsize, report)
    }

    /// The backend, if it is one that tracks.
    pub(crate) fn tracker(&mut self) -> Result<&mut Type1<M>, Error> {
        let backend = self.backend_mut()?;
        if backend.v2 {
            Ok(backend)
        } else {
            Err(Error::NotV2)
        }
    }

    /// Whether tracking is on, and at which page size.
    #[must_use]
    pub fn tracking(&self) -> Option<PageSize> {
        let tracking = self.backend.as_ref()?.tracking.as_ref();
        tracking.map(|t| t.pgsize)
    }

    /// pin_pages: pins the page at `iova` and those that follow, as many as
    /// `pfns` holds, and gives their pfns.
    ///
    /// # Errors
    ///
    /// In the order of A9; no page stays pinned then, though pages that were
    /// for a moment are dirty.
    pub fn pin_pages(
        &mut self,
        host: &mut dyn Host,
        device: DeviceId,
        iova: u64,
        prot: Prot,
        pfns: &mut [u64],
    ) -> Result<(), Error> {
        let device = self.device(device)?;
        if pfns.is_empty() {
            return Err(Error::NoPages);
        }
        if !device.dma_unmap {
            return Err(Error::NoDmaUnmap);
        }
        let page = self.options.page_size;
        if pfns.len() as u64 > page.bytes() / 8 {
            return Err(Error::TooManyPins);
        }
        let backend = self.tracker()?;
        last_of(iova, (pfns.len() as u64) << page.shift())?;
        backend.pin_pages(host, device.group, iova, prot, pfns)
    }

    /// unpin_pages: stops at the first page that is not mapped; a page that is
    /// not pinned is passed over. It marks what was written while pinned, so
    /// call it after the last write.
    ///
    /// # Errors
    ///
    /// `UnknownDevice`, `NoIommu`.
    pub fn unpin_pages(
        &mut self,
        host: &mut dyn Host,
        device: DeviceId,
        iova: u64,
        npages: u64,
    ) -> Result<(), Error> {
        self.device(device)?;
        self.backend_mut()?.unpin_pages(host, iova, npages);
        Ok(())
    }

    /// dma_rw: writes as the device would, and marks what may have been
    /// written. Callers may do so at the same time.
    ///
    /// # Errors
    ///
    /// In the order of A9; what was written before an error stays.
    pub fn write(
        &self,
        host: &mut dyn Host,
        device: DeviceId,
        iova: u64,
        data: &[u8],
    ) -> Result<(), Error> {
        self.device(device)?;
        self.backend()?.write(host, iova, data)
    }

    /// dma_rw: reads as the device would.
    ///
    /// # Errors
    ///
    /// In the order of A9.
    pub fn read(
        &self,
        host: &mut dyn Host,
        device: DeviceId,
        iova: u64,
        data: &mut [u8],
    ) -> Result<(), Error> {
        self.device(device)?;
        self.backend()?.read(host, iova, data)
    }

    /// Marks `size` bytes from `iova` on as written: for whoever writes to
    /// guest memory by itself. Callers may do so at the same time.
    ///
    /// Call it *after* the write, and before telling anybody that the write is
    /// done (a completion, an interrupt, a device that is stopped): on that,
    /// somebody makes the last report. The lock around the container orders
    /// this call (`&self`) with each report (`&mut self`): a copy made after
    /// the report that has the mark has the write too, and a mark that comes
    /// too late for one report is in the next.
    ///
    /// # Errors
    ///
    /// `ZeroSize`, `Wraps`; `Unmapped` if a part lies in no mapping (the rest
    /// is marked). No report has that part, nor had one of an unmap that came
    /// between the write and the mark: writers stop before a range goes.
    pub fn mark(&self, iova: u64, size: u64) -> Result<(), Error> {
        self.backend()?.mark(iova, size)
    }

    /// Marks what a bitmap says, at its own page size: takes in the report of
    /// another tracker. As with [`mark`](Container::mark), after the writes.
    ///
    /// # Errors
    ///
    /// `BitmapSize`, `Misaligned` and `Wraps` if `extent` does not describe
    /// `words`; `Unmapped` if a dirty page lies in no mapping (the rest is
    /// marked).
    pub fn mark_bitmap(&self, words: &[u64], extent: Extent) -> Result<(), Error> {
        let backend = self.backend()?;
        let mut result = Ok(());
        for (first, last) in extent.ranges(words)? {
            let size = last.wrapping_sub(first).wrapping_add(1);
            result = result.and(backend.mark(first, size));
        }
        result
    }

    /// Closes the container: every group leaves, every mapping goes. Dropping
    /// a container frees its memory but cannot give back pins.
    pub fn close(&mut self, host: &mut dyn Host) {
        self.devices.clear();
        if let Some(backend) = &mut self.backend {
            backend.close(host);
        }
        self.backend = None;
        self.groups.clear();
    }
}
