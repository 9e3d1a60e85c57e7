// SPDX-License-Identifier: MIT OR Apache-2.0
//! One IOMMU domain: what must know of its mappings, kept in step.
//!
//! The steps of a map and of an unmap have an order in which no write is lost,
//! whatever the tracker takes and devices mark meanwhile:
//!
//! - A map tells the log, the view, and then the container: a device can write when
//!   all of them know the mapping.
//! - An unmap goes the other way. The container says what is dirty, which is marked in
//!   the view before the view unmaps. The log keeps what is dirty, and the view
//!   remembers the mapping until the log was read.

#[cfg(feature = "container")]
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[cfg(feature = "container")]
use dirty_core::host::GroupId;
use dirty_core::host::Prot;
use dirty_core::Error;

#[cfg(feature = "container")]
use crate::container::{
    device::{Device, OnUnmap},
    Container,
};
use crate::device_log::DeviceLog;
use crate::error::TrackError;
#[cfg(feature = "container")]
use crate::guest::DirtyIovas;
use crate::guest::{IovaView, Mapping};

/// The mappings of one IOMMU domain, for all that must know of them: the view of a
/// tracker, and a device's log, a container, or both.
///
/// One [`map`](Domain::map) and one [`unmap`](Domain::unmap) reach all of them, or none
/// if it fails. One [`mark`](Domain::mark) reaches all of them too. Any thread may call
/// it. Change the mappings of the view, the log and the container by these calls only.
///
/// What the tracker must be told of besides depends on who writes:
///
/// | who writes | is in | add to the tracker |
/// |---|---|---|
/// | whoever calls [`Domain::mark`] or marks through the [`Mapping`] | the view | nothing |
/// | [`Device::write`], [`Device::mark`] and [`PinGuard::write`] of a device from [`open_device`](Domain::open_device) | the view | nothing |
/// | a device that pins pages and writes them by itself, or that is behind an IOMMU | the container | the container |
/// | a device that marks only in its log, as by a [`LogRange`] | the log | the log |
///
/// [`Tracker::add_log`](crate::guest::Tracker::add_log) with [`view`](Domain::view) adds
/// them. If a log or a container is added that is marked here as well, a page may be in
/// two reports, but none is lost.
///
/// ```
/// use adapter_user::device_log::DeviceLog;
/// use adapter_user::guest::{Report, Tracker};
/// use adapter_user::{Domain, Prot};
///
/// let tracker = Tracker::new(None);
/// tracker.add_slot(0, 0, None, 1 << 20)?;
/// let log = DeviceLog::new(None);
/// let domain = Domain::new(tracker.iova_view()).with_log(log.clone());
/// tracker.add_log("nvme0", domain.view(), 0, log.clone())?;
/// log.start_all(4096)?;
/// tracker.start()?; // now copy all memory
///
/// domain.map(0x8000, 0x1000, 0x1000, Prot::READ_WRITE)?;
/// log.mark(0x8000, 1)?; // the device wrote
/// domain.unmap(0x8000, 0x1000)?;
/// let mut report = Report::new();
/// tracker.take(&mut report)?;
/// assert_eq!(report.slot(0).unwrap()[0], 0b10);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// [`Device::write`]: crate::Device::write
/// [`Device::mark`]: crate::Device::mark
/// [`PinGuard::write`]: crate::PinGuard::write
/// [`LogRange`]: crate::device_log::LogRange
#[derive(Debug)]
pub struct Domain {
    view: IovaView,
    log: Option<DeviceLog>,
    #[cfg(feature = "container")]
    container: Option<Container>,
    /// Held by whoever maps or unmaps.
    changing: Mutex<()>,
}

impl Domain {
    /// Creates a domain whose mappings `view` has. The view must be empty.
    #[must_use]
    pub fn new(view: IovaView) -> Self {
        Domain {
            view,
            log: None,
            #[cfg(feature = "container")]
            container: None,
            changing: Mutex::default(),
        }
    }

    /// Gives the domain a log, which has no ranges yet.
    #[must_use]
    pub fn with_log(self, log: DeviceLog) -> Self {
        let log = Some(log);
        Domain { log, ..self }
    }

    /// Gives the domain a container, which has an IOMMU type and no mappings yet.
    ///
    /// # Safety
    ///
    /// [`map`](Domain::map) lets the container's devices use the memory of the
    /// tracker's slots at their host addresses, as
    /// [`Container::map_process`] does. So each slot that has a host address must be
    /// memory for that use until it is unmapped here.
    #[cfg(feature = "container")]
    #[cfg_attr(docsrs, doc(cfg(feature = "container")))]
    #[must_use]
    pub unsafe fn with_container(self, container: Container) -> Self {
        let container = Some(container);
        Domain { container, ..self }
    }

    /// Returns the view.
    #[must_use]
    pub fn view(&self) -> &IovaView {
        &self.view
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps `size` bytes of guest memory at guest address `gpa` to the IOVAs from `iova`
    /// on. `prot` is what the container allows its devices.
    ///
    /// The bytes may span slots, and some may be in no slot, as a device's BAR is. The
    /// container does not map these.
    ///
    /// # Errors
    ///
    /// In this order; nothing is mapped then:
    ///
    /// - Of the log: those of [`DeviceLog::add_range`].
    /// - Of the view: those of [`IovaView::map`].
    /// - Of the container: [`Error::BadAddress`] if a slot has no host address; those of
    ///   [`Container::map_process`] for the part of a slot.
    /// - [`Error::StillPinned`] if the container refused a part, and a device keeps pages
    ///   of a part before it pinned. What was mapped of the range **stays mapped** then,
    ///   until it is unmapped here.
    pub fn map(&self, iova: u64, gpa: u64, size: u64, prot: Prot) -> Result<Mapping, TrackError> {
        let _changing = self.changing();
        if let Some(log) = &self.log {
            log.add_range(iova, size)?;
        }
        let mapping = self.view.map(iova, gpa, size).inspect_err(|_| {
            self.remove_from_log(iova, size);
        })?;
        #[cfg(feature = "container")]
        if let Err(cause) = self.map_container(&mapping, prot) {
            if cause != Error::StillPinned {
                self.remove_from_log(iova, size);
                self.view.unmap(iova, size)?;
            }
            return Err(cause.into());
        }
        #[cfg(not(feature = "container"))]
        let _ = prot;
        Ok(mapping)
    }

    /// Unmaps every mapping in the `size` bytes of IOVAs from `iova` on, and returns how
    /// many bytes were mapped. What is dirty there is told all the same.
    ///
    /// The container's devices that have pins there are told to unpin first. Their
    /// callback must not map or unmap in this domain: that deadlocks. End the writes of
    /// other devices before this call.
    ///
    /// # Errors
    ///
    /// In this order; nothing is unmapped then:
    ///
    /// - [`Error::Misaligned`] unless both are multiples of 4 KiB.
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the IOVAs wrap.
    /// - [`Error::Bisects`] if the range starts or ends inside a mapping.
    /// - Of the container: those of [`Container::unmap`].
    pub fn unmap(&self, iova: u64, size: u64) -> Result<u64, TrackError> {
        let last = IovaView::last_of(iova, 0, size)?;
        let _changing = self.changing();
        let mappings = self.view.mappings(iova, last);
        if mappings.iter().any(|m| m.iova() < iova || m.last() > last) {
            return Err(Error::Bisects.into());
        }
        #[cfg(feature = "container")]
        self.unmap_container(iova, size)?;
        for mapping in &mappings {
            self.remove_from_log(mapping.iova(), mapping.size());
        }
        self.view.unmap(iova, size)
    }

    /// Marks as dirty every page that the `len` bytes at IOVA `iova` touch, in the view,
    /// the log and the container. Those that are off have no need of it. No bytes mark
    /// nothing.
    ///
    /// Call it *after* the write, and before you tell anybody that the write is
    /// done.
    ///
    /// # Errors
    ///
    /// As [`IovaView::mark`].
    pub fn mark(&self, iova: u64, len: u64) -> Result<(), TrackError> {
        #[cfg(feature = "container")]
        if let (Some(container), 1..) = (&self.container, len) {
            // What it does not map, nobody can ask it for. The view knows what is mapped.
            let _ = container.mark(iova, len);
        }
        mark(&self.view, self.log.as_ref(), iova, len)
    }

    fn remove_from_log(&self, iova: u64, size: u64) {
        if let Some(log) = &self.log {
            // It fails only if somebody else has removed the range.
            let _ = log.remove_range(iova, size);
        }
    }
}

fn mark(view: &IovaView, log: Option<&DeviceLog>, iova: u64, len: u64) -> Result<(), TrackError> {
    let marked = view.mark(iova, len);
    match log.map(|log| log.mark(iova, len)) {
        None | Some(Err(TrackError::Cause(Error::NotTracking))) => marked,
        Some(logged) => marked.and(logged),
    }
}

#[cfg(feature = "container")]
#[cfg_attr(docsrs, doc(cfg(feature = "container")))]
impl Domain {
    /// Opens a device of the container, as [`Container::open_device`], whose writes are
    /// marked in the view and the log too.
    ///
    /// # Errors
    ///
    /// As [`Container::open_device`], and [`Error::NoIommu`] if the domain has no
    /// container.
    pub fn open_device(
        &self,
        group: GroupId,
        on_unmap: Option<OnUnmap>,
    ) -> Result<Arc<Device>, Error> {
        let container = self.container.as_ref().ok_or(Error::NoIommu)?;
        let (view, log) = (self.view.clone(), self.log.clone());
        let on_mark = move |iova, size| match mark(&view, log.as_ref(), iova, size) {
            Ok(()) => Ok(()),
            Err(TrackError::Cause(cause)) => Err(cause),
            Err(_) => Err(Error::Unmapped),
        };
        container.open_logged_device(group, on_unmap, Box::new(on_mark))
    }

    /// Maps the parts of a mapping that lead to slots. If one fails, the others are
    /// unmapped; `StillPinned` if that fails.
    fn map_container(&self, mapping: &Mapping, prot: Prot) -> Result<(), Error> {
        let Some(container) = &self.container else {
            return Ok(());
        };
        let mut done = Vec::new();
        for (iova, host, size) in mapping.parts() {
            let mapped = host.ok_or(Error::BadAddress).and_then(|host| {
                // SAFETY: whoever gave the domain its container promised that the slots
                // are memory for this use.
                unsafe { container.map_process(iova, host, size, prot) }
            });
            if let Err(cause) = mapped {
                let mut undo = done.iter();
                undo.try_for_each(|(iova, size)| self.unmap_container(*iova, *size))
                    .map_err(|_| Error::StillPinned)?;
                return Err(cause);
            }
            done.push((iova, size));
        }
        Ok(())
    }

    /// Unmaps a range in the container, and marks what was dirty there in the view,
    /// which still has the mappings.
    fn unmap_container(&self, iova: u64, size: u64) -> Result<(), Error> {
        let Some(container) = &self.container else {
            return Ok(());
        };
        let mut dirty = DirtyIovas::default();
        let unmapped = container.unmap_taking(iova, size, &mut dirty);
        // Also if it failed: the container does not have these pages any more.
        self.view.mark_dirty(&dirty);
        unmapped.map(|_| ())
    }
}

/// Memory that is no guest memory is not for devices, so this needs `unsafe`.
///
/// ```compile_fail,E0133
/// # use adapter_user::{guest::Tracker, Container, Domain};
/// # let container = Container::new(adapter_user::host_options());
/// Domain::new(Tracker::new(None).iova_view()).with_container(container);
/// ```
#[cfg(doctest)]
struct ContainersAreUnsafe;
