// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tracker: slots that are marked, and sources that are asked.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use dirty_core::Error;

use super::handles::{Source, SourceError, TakeError, WeakTracker};
use super::log::DirtyLog;
use super::report::Report;
use super::slots::{Slot, Slots};
use super::sources::{Kind, Sources};
use super::taken::LastTake;
use super::view::{IovaView, WeakView};
use super::whole::Why;
use crate::dirty_bits::DirtyBits;
use crate::error::TrackError;
use crate::trace;

/// Tracks everything that writes a guest's memory.
///
/// A clone is another handle to the same tracker, and any thread may call it. Marks
/// take no lock of the tracker. [`take`](Tracker::take), [`start`](Tracker::start),
/// [`stop`](Tracker::stop) and calls that add or remove sources wait for each other.
/// Slots come, move and go also while a take asks the sources.
///
/// A tracker is off until [`start`](Tracker::start): marks do nothing then, and
/// cost next to nothing.
///
/// ```
/// use adapter_user::guest::{Report, Tracker};
///
/// let tracker = Tracker::new(None);
/// let ram = tracker.add_slot(0, 0, None, 1 << 30)?; // slot 0: 1 GiB from 0 on
/// let iommu = tracker.iova_view();
/// let ring = iommu.map(0xf000_0000, 0x20_0000, 0x1000)?; // a mapping of a virtual IOMMU
///
/// tracker.start()?;
/// ram.mark(0x1000, 8)?; // the VMM wrote
/// ring.mark(0xf000_0010, 16)?; // a device wrote
/// iommu.unmap(0xf000_0000, 0x1000)?; // the mapping goes, and the page stays dirty
///
/// let mut report = Report::new();
/// tracker.take(&mut report)?;
/// let dirty: Vec<_> = report.ranges(4096)?.collect();
/// assert_eq!((dirty[0].gpa, dirty[0].size), (0x1000, 0x1000));
/// assert_eq!((dirty[1].gpa, dirty[1].size), (0x20_0000, 0x1000));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Tracker {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) slots: Arc<Slots>,
    sources: Mutex<Sources>,
    /// The views that may still be there. They own neither the tracker nor a
    /// source.
    views: Mutex<Vec<WeakView>>,
    /// What the last take found. Nothing else is locked while this is.
    last: Mutex<LastTake>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.slots.release();
    }
}

impl Inner {
    pub(super) fn sources(&self) -> MutexGuard<'_, Sources> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn views(&self) -> MutexGuard<'_, Vec<WeakView>> {
        self.views.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn last(&self) -> MutexGuard<'_, LastTake> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets every view know whether the tracker is on.
    pub(super) fn tell_views(views: &mut Vec<WeakView>, on: bool) {
        views.retain(|view| match view.upgrade() {
            Some(view) => {
                view.write().set_on(on);
                true
            }
            None => false,
        });
    }

    pub(super) fn remove_source(&self, id: u64) -> Result<(), TakeError> {
        let mut sources = self.sources();
        if !self.slots.read().on {
            return sources.remove(id, None, &self.slots.wholes);
        }
        let mut report = Report::new();
        report.follow(self.slots.id, &self.slots.read());
        let result = sources.remove(id, Some(&mut report), &self.slots.wholes);
        report.give_back();
        result
    }
}

impl Tracker {
    /// Creates a tracker without slots, which is off. Its bitmaps may take `budget`
    /// bytes in all, or any amount if there is none; 1 GiB of guest memory takes
    /// 32 KiB.
    #[must_use]
    pub fn new(budget: Option<u64>) -> Self {
        Tracker {
            inner: Arc::new(Inner {
                slots: Arc::new(Slots::new(budget)),
                sources: Mutex::default(),
                views: Mutex::default(),
                last: Mutex::default(),
            }),
        }
    }

    /// Returns a handle that does not keep the tracker alive, for a source that
    /// needs the tracker: a [`Tracker`] in one of its own sources is never freed.
    #[must_use]
    pub fn downgrade(&self) -> WeakTracker {
        WeakTracker {
            inner: Arc::downgrade(&self.inner),
        }
    }

    #[cfg(feature = "vm-memory")]
    pub(super) fn slots_(&self) -> &Slots {
        &self.inner.slots
    }

    /// Adds slot `id`: `size` bytes of guest memory at guest-physical address
    /// `gpa`, which this process has at address `host` (give `None` if no source
    /// reports host addresses). Returns its dirty bits, one per page of 4 KiB, for
    /// whoever writes the memory.
    ///
    /// If the tracker is on, all of the slot is dirty: its content was never copied.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::Misaligned`] unless `gpa` is a multiple of 4 KiB.
    /// - [`Error::ZeroSize`].
    /// - [`Error::Wraps`] if the guest addresses or the host addresses wrap.
    /// - [`TrackError::DuplicateSlot`].
    /// - [`Error::Overlap`] with the guest addresses of another slot.
    /// - [`TrackError::HostOverlap`].
    /// - [`TrackError::Budget`], [`TrackError::NoMemory`].
    pub fn add_slot(
        &self,
        id: u32,
        gpa: u64,
        host: Option<u64>,
        size: u64,
    ) -> Result<DirtyBits, TrackError> {
        self.inner.slots.add_new(id, gpa, host, size)
    }

    /// Adds guest memory that has dirty bits already: a region of vm-memory, or a
    /// slot that was removed and comes back. What is marked in the bits stays
    /// marked.
    ///
    /// If the tracker is on, all of the slot is dirty: what was written to it while
    /// it was no slot is not known.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::Misaligned`] unless `gpa` and `host` are multiples of the bits'
    ///   page size and `gpa` is one of 4 KiB.
    /// - [`TrackError::BitsLength`] unless the bits stand for `size` bytes.
    /// - As [`add_slot`](Tracker::add_slot) from `ZeroSize` to `HostOverlap`.
    /// - [`TrackError::BitsInUse`] if the bits belong to a slot, of this tracker or
    ///   of another.
    /// - [`TrackError::Budget`].
    /// - [`TrackError::Barrier`] if the bits are off, as those of a tracker are
    ///   that is gone, and cannot be switched on.
    pub fn add(&self, slot: Slot) -> Result<(), TrackError> {
        self.inner.slots.add(slot, false)
    }

    /// As [`add`](Tracker::add), for memory whose content the destination has or
    /// does not need: only what is marked in the bits is dirty.
    ///
    /// # Errors
    ///
    /// As [`add`](Tracker::add).
    pub fn add_known(&self, slot: Slot) -> Result<(), TrackError> {
        self.inner.slots.add(slot, true)
    }

    /// Moves slot `id` to guest address `gpa`, as when the guest moves a BAR.
    /// Everything that is dirty in it is told at the new address: marks, what a
    /// report has that was not delivered, and what a log reports later through
    /// mappings that were made before.
    ///
    /// Before you call it, read logs that go with the old place: KVM forgets a
    /// slot's log when the slot moves. [`DirtyBits::mark_bitmap`] takes it.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`TrackError::UnknownSlot`].
    /// - [`Error::Misaligned`] unless `gpa` is a multiple of 4 KiB and of the bits'
    ///   page size.
    /// - [`Error::Wraps`].
    /// - [`Error::Overlap`] with another slot.
    pub fn move_slot(&self, id: u32, gpa: u64) -> Result<(), TrackError> {
        self.inner.slots.move_to(id, gpa)
    }

    /// Lets slot `id` have `size` bytes, which are not fewer than before. The bits
    /// stay the same, and every handle to them has the new pages. If the tracker is
    /// on, the new memory is dirty.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`TrackError::UnknownSlot`].
    /// - [`TrackError::Shrinks`].
    /// - [`Error::Wraps`] if the guest addresses or the host addresses wrap.
    /// - [`Error::Overlap`], [`TrackError::HostOverlap`] with another slot.
    /// - [`TrackError::Budget`], [`TrackError::NoMemory`].
    pub fn grow_slot(&self, id: u32, size: u64) -> Result<(), TrackError> {
        self.inner.slots.grow(id, size)
    }

    /// Removes a slot and returns it. Later marks of it are refused, but its bits
    /// keep them, and the earlier ones: if the slot comes back with
    /// [`add`](Tracker::add) or [`add_known`](Tracker::add_known), they are told
    /// at its address then.
    ///
    /// A report that has pages of the slot which were not delivered hands them out
    /// with [`Report::removed`].
    ///
    /// Unmap its memory from every [`IovaView`] too. A mapping that stays leads to
    /// the removed memory, and to what has its guest addresses.
    ///
    /// # Errors
    ///
    /// [`TrackError::UnknownSlot`].
    pub fn remove_slot(&self, id: u32) -> Result<Slot, TrackError> {
        self.inner.slots.remove(id)
    }

    /// Returns the slots, sorted by address.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        self.inner.slots.read().list.clone()
    }

    /// Creates a clean report that has the tracker's slots.
    #[must_use]
    pub fn report(&self) -> Report {
        let mut report = Report::new();
        report.follow(self.inner.slots.id, &self.inner.slots.read());
        report
    }

    /// Creates an empty view of the memory, for the devices behind one virtual
    /// IOMMU domain.
    #[must_use]
    pub fn iova_view(&self) -> IovaView {
        let mut views = self.inner.views();
        views.retain(|view| view.upgrade().is_some());
        let on = self.inner.slots.read().on;
        let view = IovaView::new(Arc::clone(&self.inner.slots), on);
        views.push(view.downgrade());
        view
    }

    /// Adds a source that has a log of its own by guest address: KVM, the kernel's
    /// page tables, a vhost-user device. Each [`take`](Tracker::take) calls
    /// `source`, which ORs what it knows into the report. `name` is for
    /// [`TakeError`].
    ///
    /// Sources are called one after another, in the order in which they were added.
    /// A source must not call `take`, `start`, `stop`, or what adds or removes a
    /// source of this tracker: that would deadlock. It must not own the tracker:
    /// the report has the slots, and [`downgrade`](Tracker::downgrade) is for the
    /// rest.
    ///
    /// ```
    /// # use adapter_user::guest::{Report, Tracker};
    /// # let tracker = Tracker::new(None);
    /// # tracker.add_slot(0, 0, None, 1 << 20)?;
    /// # let get_dirty_log = |_slot, _size| Ok::<_, std::io::Error>(vec![1, 0, 0, 0]);
    /// // With kvm-ioctls: vm.get_dirty_log(slot.id, slot.size as usize)
    /// tracker.add_source("kvm", move |report| {
    ///     for slot in report.slots() {
    ///         report.or_slot(slot.id, &get_dirty_log(slot.id, slot.size)?)?;
    ///     }
    ///     Ok(())
    /// });
    /// tracker.start()?;
    /// let mut report = Report::new();
    /// tracker.take(&mut report)?;
    /// assert_eq!(report.slot(0), Some(&[1, 0, 0, 0][..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_source(
        &self,
        name: &str,
        source: impl FnMut(&mut Report) -> Result<(), SourceError> + Send + 'static,
    ) -> Source {
        self.add_kind(name, Kind::ByGuest(Box::new(source)))
    }

    /// Adds a log by IOVA, for the devices behind `view`. Each
    /// [`take`](Tracker::take) reads it and translates it, also what was written
    /// through mappings that are gone.
    ///
    /// The log is asked for the IOVAs that the view has mapped since the take
    /// before. Ranges that are at most `gap` bytes apart are asked for in one: 0
    /// asks for as little as possible, and more saves system calls.
    ///
    /// Add the log before its device can write.
    ///
    /// ```
    /// use adapter_user::guest::{DirtyIovas, IovaRange, Report, Tracker};
    /// use adapter_user::{Extent, PageSize};
    ///
    /// let tracker = Tracker::new(None);
    /// tracker.add_slot(0, 0, None, 1 << 20)?;
    /// let view = tracker.iova_view();
    /// # let report_ioctl = |_ask: &IovaRange, words: &mut [u64]| -> std::io::Result<()> {
    /// #     words[0] = 1;
    /// #     Ok(())
    /// # };
    /// let pgsize = PageSize::new(4096).ok_or("no page size")?;
    /// let read = move |ask: &[IovaRange], dirty: &mut DirtyIovas| {
    ///     for range in ask {
    ///         let npages = range.size / 4096;
    ///         let mut words = vec![0; npages.div_ceil(64) as usize];
    ///         report_ioctl(range, &mut words)?; // VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
    ///         dirty.or_bitmap(&words, Extent { bit: 0, iova: range.iova, npages, pgsize })?;
    ///     }
    ///     Ok(())
    /// };
    /// tracker.add_log("nvme0", &view, 0, read)?;
    /// tracker.start()?;
    ///
    /// view.map(0x8000, 0x1000, 0x1000)?;
    /// view.unmap(0x8000, 0x1000)?;
    /// view.map(0x8000, 0x2000, 0x1000)?;
    /// let mut report = Report::new();
    /// tracker.take(&mut report)?; // either mapping of 0x8000 may have been written
    /// assert_eq!(report.slot(0), Some(&[0b110, 0, 0, 0][..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`TrackError::OtherTracker`] if the view is not one of this tracker.
    pub fn add_log(
        &self,
        name: &str,
        view: &IovaView,
        gap: u64,
        log: impl DirtyLog + 'static,
    ) -> Result<Source, TrackError> {
        if view.tracker() != self.inner.slots.id {
            return Err(TrackError::OtherTracker);
        }
        Ok(self.add_kind(
            name,
            Kind::ByIova {
                view: view.clone(),
                gap,
                log: Box::new(log),
                new: true,
            },
        ))
    }

    fn add_kind(&self, name: &str, kind: Kind) -> Source {
        Source {
            id: self.inner.sources().add(name, kind),
            tracker: Arc::downgrade(&self.inner),
        }
    }

    /// Switches tracking on, and forgets what was marked and remembered so far.
    ///
    /// Start the logs of your sources before this call, which does not call the
    /// sources, and copy all memory after it. Writers need not stop: what a thread
    /// has written before it returns is in that copy, and every later write is in a
    /// report. A tracker that is on may be started again.
    ///
    /// # Errors
    ///
    /// [`TrackError::Barrier`]; the tracker is as it was then.
    pub fn start(&self) -> Result<(), TrackError> {
        let mut sources = self.inner.sources();
        // No view is created meanwhile.
        let mut views = self.inner.views();
        self.inner.slots.start()?;
        Inner::tell_views(&mut views, true);
        sources.start();
        Ok(())
    }

    /// Switches tracking off: marks do nothing, and unmaps remember nothing. What no
    /// report has taken is forgotten. Stop the logs of your sources after this call.
    pub fn stop(&self) {
        let _sources = self.inner.sources();
        let mut views = self.inner.views();
        self.inner.slots.stop();
        Inner::tell_views(&mut views, false);
    }

    /// Returns whether the tracker is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.inner.slots.read().on
    }

    /// ORs everything that was written since the last take into `report`: first
    /// asks each source, then takes the marks of all slots.
    ///
    /// Copy the pages *after* this call. Clear the report only when they have
    /// arrived: then the next round repeats a round that failed.
    ///
    /// The report follows the slots, as they are when the call returns: new ones are
    /// added to it, those that moved have their new addresses, and what it had of
    /// removed ones is in [`Report::removed`].
    ///
    /// # Errors
    ///
    /// A [`TakeError`] with the first source that failed. The other sources were
    /// asked all the same. If a log that was [added](Tracker::add_log) with a view
    /// failed, the report has all memory behind that view, mapped or remembered. If
    /// another source failed, or the tracker is off, it has **every page**.
    pub fn take(&self, report: &mut Report) -> Result<(), TakeError> {
        let (_span, began) = (trace::take(), Instant::now());
        let slots = &self.inner.slots;
        let mut sources = self.inner.sources();
        report.follow(slots.id, &slots.read());
        report.count_anew();
        let on = slots.read().on;
        let departed = slots.departed();
        let result = match on {
            true => sources
                .ask(report, &slots.wholes)
                .inspect(|()| slots.forget(departed)),
            false => Err(TakeError {
                source: "a tracker that is off".to_owned(),
                cause: Error::NotTracking.into(),
            }),
        };
        // A slot may have come or moved meanwhile. No slot can now, so the addresses
        // are those of the marks. Sources may have marked, so marks are taken last.
        let state = slots.read();
        report.follow(slots.id, &state);
        report.take_marks();
        if !on {
            sources.asked.clear();
            report.set_all();
            let what = "a take from a tracker that is off";
            slots.wholes.add(Why::Off, report.memory(), &what);
        }
        drop(state);
        let mut last = self.inner.last();
        last.takes += 1;
        last.sources.clone_from(&sources.asked);
        last.slots.clear();
        last.slots.extend(report.slot_stats());
        last.time = began.elapsed();
        result
    }
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("slots", &self.slots())
            .finish_non_exhaustive()
    }
}
