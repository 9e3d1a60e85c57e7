// SPDX-License-Identifier: MIT OR Apache-2.0
//! The generic layer of VFIO above its backends: which groups and open devices
//! a container has, and which backend it uses.
//!
//! A container holds no lock and owns no host: each call gets the caller's
//! `&mut dyn Host`, and the caller decides who may call when.

use crate::error::Error;
use crate::host::{DeviceId, GroupId, Host, Memory, Prot};
use crate::mem::List;
use crate::type1::access::Partial;
use crate::type1::command::{Command, Kind};
use crate::type1::ioctl::Outcome;
use crate::type1::{IommuType, Options, Type1};

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

/// A VFIO container: what a file of `/dev/vfio/vfio` stands for.
///
/// Its backend exists from [`set_iommu`](Container::set_iommu) until the last
/// group leaves. Mappings and dirty pages belong to the backend:
/// [`backend`](Container::backend) hands it out. Calls that name a device are
/// here, because the container knows which devices are open.
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

    /// The backend: to read its state, or to mark pages beside other threads
    /// that do.
    ///
    /// # Errors
    ///
    /// `NoIommu` before SET_IOMMU.
    pub fn backend(&self) -> Result<&Type1<M>, Error> {
        self.backend.as_ref().ok_or(Error::NoIommu)
    }

    /// The backend, for every other call. Groups come and go by the container,
    /// not here: the container would not know.
    ///
    /// # Errors
    ///
    /// `NoIommu` before SET_IOMMU.
    pub fn backend_mut(&mut self) -> Result<&mut Type1<M>, Error> {
        self.backend.as_mut().ok_or(Error::NoIommu)
    }

    /// The IOMMU type, which [`Command::read`] needs; `None` before SET_IOMMU.
    #[must_use]
    pub fn iommu_type(&self) -> Option<IommuType> {
        self.backend.as_ref().map(Type1::iommu_type)
    }

    /// Runs an ioctl of the container's file whose argument was read. The
    /// container answers GET_API_VERSION, SET_IOMMU and, without a backend,
    /// CHECK_EXTENSION; the backend answers the rest.
    ///
    /// # Errors
    ///
    /// `NoIommu` for an ioctl that needs a backend before SET_IOMMU; otherwise
    /// see [`set_iommu`](Container::set_iommu) and [`Type1::run`]. The caller
    /// returns the negative of [`Error::errno`] to its user.
    pub fn run(&mut self, host: &mut dyn Host, command: &mut Command) -> Result<Outcome, Error> {
        match command.kind {
            Kind::ApiVersion => Ok(Outcome::Done(0)),
            Kind::CheckExtension(extension) => {
                Ok(Outcome::Done(u32::from(self.check_extension(extension))))
            }
            Kind::SetIommu(kind) => self.set_iommu(host, kind).map(|()| Outcome::Done(0)),
            _ => self.backend_mut()?.run(host, command),
        }
    }

    /// CHECK_EXTENSION: whether the backend has an extension, or would have it
    /// once it is set (rule A2 in docs/rules.md).
    #[must_use]
    pub fn check_extension(&self, extension: u64) -> bool {
        match &self.backend {
            Some(backend) => backend.check_extension(extension),
            None => Type1::<M>::offers(extension),
        }
    }

    /// SET_IOMMU: opens the backend for IOMMU type `kind` and attaches every
    /// group to it. On an error no group stays attached and no backend is set.
    ///
    /// # Errors
    ///
    /// In this order: `IommuAlreadySet`; `NoGroup`; `NoSuchIommu` or
    /// `ExtensionAsIommu` if `kind` is no IOMMU type; then those of
    /// [`Type1::attach_group`] for the first group that does not fit.
    pub fn set_iommu(&mut self, host: &mut dyn Host, kind: u64) -> Result<(), Error> {
        if self.backend.is_some() {
            return Err(Error::IommuAlreadySet);
        }
        if self.groups.is_empty() {
            return Err(Error::NoGroup);
        }
        let mut backend = Type1::open(self.mem.clone(), self.options, kind)?;
        for member in self.groups.iter() {
            if let Err(e) = backend.attach_group(host, member.group, member.emulated) {
                backend.close(host);
                return Err(e);
            }
        }
        self.backend = Some(backend);
        Ok(())
    }

    /// Adds a group, and attaches it to the backend if one is set. `emulated`
    /// groups have no IOMMU; the IOMMU of others is the host's.
    ///
    /// # Errors
    ///
    /// `DuplicateGroup` and `NoMemory`, and with a backend those of
    /// [`Type1::attach_group`]. Nothing changes then.
    pub fn attach_group(
        &mut self,
        host: &mut dyn Host,
        group: GroupId,
        emulated: bool,
    ) -> Result<(), Error> {
        match &self.backend {
            Some(backend) => backend.check_new_group(group)?,
            None if self.has_group(group) => return Err(Error::DuplicateGroup),
            None => {}
        }
        self.groups.reserve()?;
        if let Some(backend) = &mut self.backend {
            backend.attach_group(host, group, emulated)?;
        }
        self.groups.push(Member { group, emulated })?; // cannot fail: reserved above
        Ok(())
    }

    /// Whether a group is in the container.
    #[must_use]
    pub fn has_group(&self, group: GroupId) -> bool {
        self.groups.iter().any(|m| m.group == group)
    }

    /// Removes a group. With the last group the backend goes, and with it every
    /// mapping.
    ///
    /// # Errors
    ///
    /// `UnknownGroup`; `GroupBusy` while a device of the group is open.
    pub fn detach_group(&mut self, host: &mut dyn Host, group: GroupId) -> Result<(), Error> {
        let at = self.groups.iter().position(|m| m.group == group);
        let at = at.ok_or(Error::UnknownGroup)?;
        if self.devices.iter().any(|d| d.group == group) {
            return Err(Error::GroupBusy);
        }
        self.groups.remove(at);
        if let Some(backend) = &mut self.backend {
            backend.detach_group(host, group);
            if self.groups.is_empty() {
                backend.close(host);
                self.backend = None;
            }
        }
        Ok(())
    }

    /// Opens a device of a group. `dma_unmap` says whether its driver has a
    /// dma_unmap callback, without which it may not pin.
    ///
    /// # Errors
    ///
    /// In this order: `NoIommu` before SET_IOMMU, `UnknownGroup`,
    /// `DuplicateDevice`, `NoMemory`.
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

    /// Closes a device. The device must have unpinned what it pinned; pins that
    /// it leaves behind stay until their mapping goes.
    pub fn close_device(&mut self, id: DeviceId) {
        if let Some(at) = self.devices.iter().position(|d| d.id == id) {
            self.devices.remove(at);
        }
    }

    fn device(&self, id: DeviceId) -> Result<Device, Error> {
        let device = self.devices.iter().find(|d| d.id == id);
        device.copied().ok_or(Error::UnknownDevice)
    }

    /// pin_pages: pins the page at `iova` and the pages that follow, one for
    /// each entry of `pfns`, and stores their pfns there.
    ///
    /// # Errors
    ///
    /// In this order: `UnknownDevice`; `NoPages` if `pfns` is empty;
    /// `NoDmaUnmap` if the device was opened without a callback; `TooManyPins`
    /// for more than `page_size / 8` pages; then those of
    /// [`Type1::pin_pages`].
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
        if pfns.len() as u64 > self.options.page_size.bytes() / 8 {
            return Err(Error::TooManyPins);
        }
        let backend = self.backend_mut()?;
        backend.pin_pages(host, device.group, iova, prot, pfns)
    }

    /// unpin_pages: drops one pin of the page at `iova` and of each of the
    /// `npages - 1` pages that follow, and returns how many pages it went over. See
    /// [`Type1::unpin_pages`].
    ///
    /// # Errors
    ///
    /// `UnknownDevice`.
    pub fn unpin_pages(
        &mut self,
        host: &mut dyn Host,
        device: DeviceId,
        iova: u64,
        npages: u64,
    ) -> Result<u64, Error> {
        self.device(device)?;
        Ok(self.backend_mut()?.unpin_pages(host, iova, npages))
    }

    /// dma_rw: writes `data` to guest memory at `iova`, as the device would.
    /// Threads may write at the same time.
    ///
    /// # Errors
    ///
    /// `UnknownDevice`, then those of [`Type1::write`].
    pub fn write(
        &self,
        host: &mut dyn Host,
        device: DeviceId,
        iova: u64,
        data: &[u8],
    ) -> Result<(), Partial> {
        self.device(device)?;
        self.backend()?.write(host, iova, data)
    }

    /// dma_rw: fills `data` from guest memory at `iova`, as the device would.
    ///
    /// # Errors
    ///
    /// `UnknownDevice`, then those of [`Type1::read`].
    pub fn read(
        &self,
        host: &mut dyn Host,
        device: DeviceId,
        iova: u64,
        data: &mut [u8],
    ) -> Result<(), Partial> {
        self.device(device)?;
        self.backend()?.read(host, iova, data)
    }

    /// Closes the container: every device closes, every group leaves, every
    /// mapping goes. Call it before dropping a container: dropping one frees
    /// its memory, but cannot give pins back to the host.
    pub fn close(&mut self, host: &mut dyn Host) {
        self.devices.clear();
        if let Some(backend) = &mut self.backend {
            backend.close(host);
        }
        self.backend = None;
        self.groups.clear();
    }
}
