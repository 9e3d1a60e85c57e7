// SPDX-License-Identifier: MIT OR Apache-2.0
//! A VFIO container with type1 semantics, in this process.
//!
//! [`Container`], [`Device`] and [`PinGuard`](guard::PinGuard) are what a VMM holds.
//! They share the core behind a lock (`shared`, `core_lock`) and call it with this process as its
//! host (`host`): memory that mappings keep alive (`memory`), pages that are made
//! resident (`resident`) and locked (`locked`), what that is charged with (`charge`),
//! and a simulated IOMMU (`iommu`). A device's pins are in its book (`pins`): those of
//! guards (`pinned`, `access`), and the others by how many each page has (`counts`).
//! `tracking` has the calls that report and mark dirty pages, `log` answers a tracker,
//! and `stats` is what an operator sees.

mod access;
pub(crate) mod charge;
mod core_lock;
mod counts;
pub(crate) mod device;
pub(crate) mod group;
pub(crate) mod guard;
mod heap;
mod host;
pub(crate) mod iommu;
mod locked;
mod log;
pub(crate) mod memory;
pub(crate) mod pinned;
mod pins;
mod place;
mod resident;
mod shared;
pub(crate) mod stats;
mod tracking;

use std::fmt;
use std::sync::{Arc, Weak};

use dirty_core::host::{GroupId, Prot};
use dirty_core::uapi;
use dirty_core::{Dest, Error, IommuType, Map, Options, PageSize, Target, Unmap};

use self::device::{Device, OnUnmap};
use self::group::Group;
use self::host::{Call, Caller};
use self::memory::GuestMemory;
use self::pinned::OnMark;
use self::shared::Shared;

/// A VFIO container with type1 semantics, in this process.
///
/// It maps guest memory for devices, which pin, read and write it. Between
/// [`start`](Container::start) and [`stop`](Container::stop) it knows which pages
/// they may have written.
///
/// A clone is another handle to the same container, and any thread may call it. The
/// container closes with its last handle and its last [`Device`]. Devices read,
/// write and mark at the same time; every other call waits for them and has the
/// container for itself. It uses membarrier(2) for that if the kernel has it when the
/// container is made, so a seccomp filter of a thread that makes such calls must not
/// kill for it. A refusal makes marks slower and nothing else.
///
/// Errors name the cause, and [`Error::errno`] gives what Linux answers. Before
/// [`set_iommu`](Container::set_iommu) most calls fail with [`Error::NoIommu`].
#[derive(Clone)]
pub struct Container {
    shared: Arc<Shared>,
}

impl fmt::Debug for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shared = &self.shared;
        let tracking = shared.read(|core| core.backend().ok()?.tracking());
        f.debug_struct("Container")
            .field("tracking", &tracking)
            .finish_non_exhaustive()
    }
}

impl Container {
    /// Creates a container without groups and without an IOMMU type. Its pages have the
    /// size that `options` say: see [`host_options`](crate::host_options).
    ///
    /// A pin makes its page resident: the page is in memory when the pin succeeds. It
    /// is not locked, so the system may swap it out or move it, and a later access may
    /// have to wait until it is back. What is read and written is right all the same.
    /// Pins take no VMA, and they never touch a lock that the owner of the memory has;
    /// who wants no waiting locks the memory, or see
    /// [`with_locked_pins`](Container::with_locked_pins).
    #[must_use]
    pub fn new(options: Options) -> Self {
        Container {
            shared: Arc::new(Shared::new(options, false)),
        }
    }

    /// As [`new`](Container::new), but a pin of a page of a [`GuestMemory`] locks it.
    ///
    /// It locks the whole block of memory that the page is in: 2 MiB, or 1/64 of the
    /// memory if that is more, so that pins split a memory's mapping into at most 64
    /// VMAs wherever they lie. Pages of the block become resident when they are pinned or
    /// touched, and then stay so until the block has no pin left. The kernel counts
    /// whole blocks against RLIMIT_MEMLOCK; a pin beyond it fails with [`Error::Pin`].
    /// Locking and unlocking take the kernel time for each page: an unmap of 1 GiB of
    /// pins takes about 90 ms of a processor's time, about 47 ms of it in munlock(2), and
    /// 4 ms without locks.
    ///
    /// The locks are those of a second mapping of the memory, so they drop no lock that
    /// its owner has. There is no such mapping of memory that was mapped by its address
    /// ([`map_process`](Container::map_process), or by an ioctl): its pins make
    /// resident and do not lock.
    #[must_use]
    pub fn with_locked_pins(options: Options) -> Self {
        Container {
            shared: Arc::new(Shared::new(options, true)),
        }
    }

    fn call(&self) -> Call<'_> {
        Call::new(&self.shared.state, Caller::Process)
    }

    /// Answers an ioctl of the container's file as Linux does. `nr` is the ioctl's
    /// number. `arg` is its argument: a value for VFIO_CHECK_EXTENSION and
    /// VFIO_SET_IOMMU, and the address of a structure in this process for the
    /// VFIO_IOMMU_ ioctls; [`uapi`] has the structures.
    ///
    /// A page of the structure or of a bitmap may have to come first, from a disk or from
    /// a handler of userfaultfd. The ioctl waits for it without the container's lock, so
    /// other calls go on.
    ///
    /// # Errors
    ///
    /// Each ioctl checks its argument in the order in which Linux does (rules A2 to
    /// A6 in docs/rules.md), and [`Error::errno`] gives Linux's errno. A bad address
    /// is [`Error::BadAddress`] and no signal. Nothing is cleared or unmapped then.
    /// VFIO_SET_IOMMU fails with [`Error::WrongPageSize`] as
    /// [`set_iommu`](Container::set_iommu).
    ///
    /// # Safety
    ///
    /// It reads and writes memory of this process as the system call would:
    ///
    /// - An ioctl that answers in its structure or in a bitmap writes to the addresses
    ///   that `arg` and the structure name. Nobody else may use those bytes during the
    ///   call. The structure need not keep its value, and the addresses may be bad.
    /// - VFIO_IOMMU_MAP_DMA lets devices use the memory at its vaddr from now on: see
    ///   [`map_process`](Container::map_process).
    pub unsafe fn ioctl(&self, nr: u32, arg: u64) -> Result<u32, Error> {
        self.shared.ioctl(nr, arg)
    }

    /// Adds a group. If an IOMMU type is set already, the group joins its mappings;
    /// else it does so in [`set_iommu`](Container::set_iommu).
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::DuplicateGroup`].
    /// - [`Error::VaddrInvalid`] while the vaddr of a mapping is invalid.
    /// - [`Error::NoMemory`].
    /// - For a group that joins from behind an IOMMU: [`Error::Aperture`] and
    ///   [`Error::ReservedRegion`] if its addresses do not fit the mappings;
    ///   [`Error::UnsafeInterrupts`]; [`Error::NoPageSize`] if the groups have none in
    ///   common; [`Error::Pin`], [`Error::Charge`] and [`Error::Iommu`] from pinning and
    ///   mapping what is mapped already; and [`Error::NoPageSize`] if a mapping is not
    ///   aligned to the smallest.
    pub fn add_group(&self, group: Group) -> Result<(), Error> {
        let mut core = self.shared.write();
        let emulated = group.iommu.is_none();
        if core.has_group(group.id) {
            return Err(Error::DuplicateGroup);
        }
        if let Some(spec) = group.iommu {
            self.shared.state.iommus().insert(group.id, spec);
        }
        let attached = core.attach_group(&mut self.call(), group.id, emulated);
        if attached.is_err() {
            self.shared.state.iommus().remove(group.id);
        }
        attached
    }

    /// Removes a group. The IOMMU type and all mappings go with the last group.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::UnknownGroup`].
    /// - [`Error::GroupBusy`] while a device of the group is open.
    pub fn remove_group(&self, id: GroupId) -> Result<(), Error> {
        self.shared.write().detach_group(&mut self.call(), id)?;
        self.shared.state.iommus().remove(id);
        Ok(())
    }

    /// Sets the IOMMU type. The container needs a group first.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::WrongPageSize`] unless [`Options::page_size`] is the page size of this
    ///   host, which [`host_options`](crate::host_options) has, or a larger one of at most
    ///   64 KiB.
    /// - [`Error::IommuAlreadySet`].
    /// - [`Error::NoGroup`].
    /// - The error of the first group that cannot join, as
    ///   [`add_group`](Container::add_group).
    pub fn set_iommu(&self, kind: IommuType) -> Result<(), Error> {
        let kind = match kind {
            IommuType::Type1 => uapi::VFIO_TYPE1_IOMMU,
            IommuType::Type1v2 => uapi::VFIO_TYPE1v2_IOMMU,
        };
        self.shared.check_page()?;
        self.shared.write().set_iommu(&mut self.call(), kind)
    }

    /// Maps the `size` bytes at byte `offset` of `memory` to the IOVAs from `iova` on.
    /// `prot` says what devices may do.
    ///
    /// The mapping keeps the memory alive, and devices access it without a system
    /// call. For memory that is not a [`GuestMemory`] there is
    /// [`map_process`](Container::map_process).
    ///
    /// # Errors
    ///
    /// [`Error::Wraps`] if not all of the bytes are in `memory`; then as
    /// [`map_process`](Container::map_process). Nothing is mapped then.
    pub fn map(
        &self,
        iova: u64,
        memory: &Arc<GuestMemory>,
        offset: u64,
        size: u64,
        prot: Prot,
    ) -> Result<(), Error> {
        let end = offset.checked_add(size).ok_or(Error::Wraps)?;
        if end > memory.len() {
            return Err(Error::Wraps);
        }
        let map = Map {
            iova,
            vaddr: memory.addr() + offset,
            size,
            prot: Some(prot),
        };
        let mut call = Call::with_backing(&self.shared.state, memory);
        self.shared.write().backend_mut()?.map(&mut call, &map)
    }

    /// Maps the `size` bytes at address `vaddr` of this process to the IOVAs from
    /// `iova` on. `prot` says what devices may do.
    ///
    /// This is the way to map memory that another crate owns, as the regions of
    /// vm-memory. Nothing keeps that memory alive: unmap it before it goes. An access
    /// to memory that is gone fails with [`Error::BadAddress`] and raises no signal.
    ///
    /// # Safety
    ///
    /// Until the bytes are unmapped, devices read them and, if `prot` has WRITE, write
    /// them, from any thread and at any time. So if they are memory of this process
    /// then, they are memory for that use: guest memory, which everybody else accesses
    /// by volatile or atomic accesses through raw pointers, and to which there is no
    /// Rust reference. Memory that has gone must not be used for anything else, as by
    /// an allocator, while its address is mapped here.
    ///
    /// # Errors
    ///
    /// In this order; nothing is mapped then:
    ///
    /// - [`Error::NoIommu`].
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs or the addresses wrap.
    /// - [`Error::FlagCombination`] if `prot` is empty, and [`Error::UnknownFlags`]
    ///   if it has other bits than READ and WRITE.
    /// - [`Error::Misaligned`] unless all three are multiples of the container's
    ///   smallest page: [`Options::page_size`], or the smallest one that its IOMMUs have
    ///   in common if that is larger.
    /// - [`Error::Overlap`] with another mapping.
    /// - [`Error::MappingLimit`] beyond [`Options::dma_entry_limit`].
    /// - [`Error::ForbiddenIova`] if an IOMMU's aperture or reserved regions exclude
    ///   an IOVA.
    /// - [`Error::NoMemory`].
    /// - Behind an IOMMU: [`Error::Pin`], [`Error::Charge`], [`Error::Iommu`].
    /// - While tracking is on: [`Error::TooManyPages`] for more than 2^31 - 1 pages,
    ///   [`Error::BitmapBudget`], [`Error::NoMemory`].
    pub unsafe fn map_process(
        &self,
        iova: u64,
        vaddr: u64,
        size: u64,
        prot: Prot,
    ) -> Result<(), Error> {
        let map = Map {
            iova,
            vaddr,
            size,
            prot: Some(prot),
        };
        let mut call = self.call();
        self.shared.write().backend_mut()?.map(&mut call, &map)
    }

    /// Removes the mappings in the `size` bytes of IOVAs from `iova` on, and returns
    /// how many bytes were mapped. Devices that have pins there are told to unpin
    /// first. What was dirty is forgotten: see [`unmap_dirty`](Container::unmap_dirty).
    ///
    /// # Errors
    ///
    /// In this order; nothing is unmapped then:
    ///
    /// - [`Error::NoIommu`].
    /// - [`Error::Misaligned`] unless `iova` is a multiple of the container's
    ///   smallest page, [`Error::ZeroSize`], [`Error::Misaligned`] unless `size` is a
    ///   multiple too, [`Error::Wraps`].
    /// - [`Error::Bisects`] if the range starts or ends inside a mapping. A container
    ///   of version 1 allows that; it unmaps nothing if the range starts inside one.
    /// - [`Error::StillPinned`] if a device does not unpin.
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64, Error> {
        let mut unmap = Unmap::new(Target::Range { iova, size });
        self.shared
            .unmap(|type1, call| type1.unmap(call, &mut unmap))
    }
    /// As [`unmap`](Container::unmap), and reports the dirty pages of the mappings
    /// that it removes, as [`dirty_bitmap`](Container::dirty_bitmap) does. Copy them
    /// after this call.
    ///
    /// # Errors
    ///
    /// In this order; nothing is unmapped or cleared then:
    ///
    /// - [`Error::WrongPageSize`] unless `pgsize` is a power of two.
    /// - [`Error::NoIommu`].
    /// - [`Error::Misaligned`], [`Error::ZeroSize`], [`Error::Wraps`] as `unmap`.
    /// - [`Error::NotTracking`] if tracking is off, or goes off while devices unpin.
    /// - [`Error::BitmapSize`] if `bitmap` is too short, or longer than 2^28 bytes, or
    ///   `size` is less than one page.
    /// - [`Error::Misaligned`] unless `iova` and `size` are multiples of `pgsize` and
    ///   of the page size that tracking has.
    /// - [`Error::Bisects`], [`Error::StillPinned`] as `unmap`.
    pub fn unmap_dirty(
        &self,
        iova: u64,
        size: u64,
        pgsize: u64,
        bitmap: &mut [u64],
    ) -> Result<u64, Error> {
        let pgsize = PageSize::new(pgsize).ok_or(Error::WrongPageSize)?;
        let mut unmap = Unmap::new(Target::Range { iova, size });
        self.shared
            .unmap(|type1, call| type1.unmap_dirty(call, &mut unmap, pgsize, Dest::Words(bitmap)))
    }

    /// Returns a handle that does not keep the container open: a callback that the
    /// container owns should hold this one.
    #[must_use]
    pub fn downgrade(&self) -> WeakContainer {
        WeakContainer {
            shared: Arc::downgrade(&self.shared),
        }
    }

    /// Opens a device of a group. It closes by [`Device::close`], or when its last
    /// handle is dropped.
    ///
    /// `on_unmap` is the device's dma_unmap callback. An unmap calls it for each
    /// mapping that has pins, with no lock held: it must end the device's writes to
    /// what the device pinned there, and then unpin it, as [`Device::unpin_range`] does.
    /// A device without a callback can read, write and mark, but not pin.
    ///
    /// # Errors
    ///
    /// In this order: [`Error::NoIommu`], [`Error::UnknownGroup`],
    /// [`Error::NoMemory`].
    pub fn open_device(
        &self,
        group: GroupId,
        on_unmap: Option<OnUnmap>,
    ) -> Result<Arc<Device>, Error> {
        Device::open(&self.shared, group, on_unmap, None)
    }

    /// As [`open_device`](Container::open_device), for a device that has a log of its
    /// own: `on_mark` gets what the device writes through [`Device::write`] or through
    /// a [`PinGuard`](crate::PinGuard), and what it marks.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use adapter_user::device_log::DeviceLog;
    /// use adapter_user::{host_options, Container, Error, Group, GroupId, IommuType, TrackError};
    ///
    /// # let container = Container::new(host_options());
    /// # container.add_group(Group::emulated(GroupId(1)))?;
    /// # container.set_iommu(IommuType::Type1v2)?;
    /// let log = Arc::new(DeviceLog::new(None));
    /// let own = Arc::clone(&log);
    /// let on_mark = move |iova, size| match own.mark(iova, size) {
    ///     Ok(()) | Err(TrackError::Cause(Error::NotTracking)) => Ok(()),
    ///     Err(TrackError::Cause(cause)) => Err(cause),
    ///     Err(_) => Err(Error::Unmapped),
    /// };
    /// let device = container.open_logged_device(GroupId(1), None, Box::new(on_mark))?;
    /// # Ok::<(), Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`open_device`](Container::open_device).
    pub fn open_logged_device(
        &self,
        group: GroupId,
        on_unmap: Option<OnUnmap>,
        on_mark: OnMark,
    ) -> Result<Arc<Device>, Error> {
        Device::open(&self.shared, group, on_unmap, Some(on_mark))
    }
}

/// A handle to a container that does not keep it open.
#[derive(Clone)]
pub struct WeakContainer {
    shared: Weak<Shared>,
}

impl WeakContainer {
    /// Returns the container if it is still open.
    #[must_use]
    pub fn upgrade(&self) -> Option<Container> {
        let shared = self.shared.upgrade()?;
        Some(Container { shared })
    }
}

impl fmt::Debug for WeakContainer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WeakContainer").finish_non_exhaustive()
    }
}

/// No safe call can write memory that it does not own.
///
/// ```compile_fail,E0133
/// # let container = adapter_user::Container::new(adapter_user::host_options());
/// container.map_process(0, 0x1000, 0x1000, adapter_user::Prot::READ_WRITE);
/// ```
///
/// ```compile_fail,E0133
/// # let container = adapter_user::Container::new(adapter_user::host_options());
/// container.ioctl(adapter_user::uapi::VFIO_IOMMU_GET_INFO, 0x1000);
/// ```
#[cfg(doctest)]
struct AddressesAreUnsafe;
