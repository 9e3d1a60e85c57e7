// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tracker: slots that are marked, and sources that are asked.

use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::report::Report;
use super::slots::{Slot, Slots};
use super::view::IovaView;
use crate::dirty_bits::DirtyBits;
use crate::error::TrackError;

/// Why a source cannot say what is dirty.
pub type SourceError = Box<dyn StdError + Send + Sync>;

type Source = Box<dyn FnMut(&mut Report) -> Result<(), SourceError> + Send>;

/// Tracks everything that writes a guest's memory.
///
/// A clone is another handle to the same tracker, and any thread may call it. Marks
/// take no lock of the tracker. [`take`](Tracker::take) and
/// [`add_source`](Tracker::add_source) wait for each other, and so do calls that
/// change the slots and calls that read them.
///
/// ```
/// use adapter_user::guest::{Report, Tracker};
///
/// let tracker = Tracker::new(None);
/// let ram = tracker.add_slot(0, 0, None, 1 << 30)?; // slot 0: 1 GiB from 0 on
/// let iommu = tracker.iova_view();
/// let ring = iommu.map(0xf000_0000, 0x20_0000, 0x1000)?; // a mapping of a virtual IOMMU
///
/// tracker.start();
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
    slots: Arc<Slots>,
    sources: Arc<Mutex<Vec<(String, Source)>>>,
}

impl Tracker {
    /// Creates a tracker without slots. Its bitmaps may take `budget` bytes in all,
    /// or any amount if there is none; 1 GiB of guest memory takes 32 KiB.
    #[must_use]
    pub fn new(budget: Option<u64>) -> Self {
        Tracker {
            slots: Arc::new(Slots::new(budget)),
            sources: Arc::default(),
        }
    }

    fn sources(&self) -> MutexGuard<'_, Vec<(String, Source)>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds slot `id`: `size` bytes of guest memory at guest-physical address
    /// `gpa`, which this process has at address `host` (give `None` if no source
    /// reports host addresses). Returns its dirty bits, one per page of 4 KiB, for
    /// whoever writes the memory.
    ///
    /// # Errors
    ///
    /// In this order; nothing changes then:
    ///
    /// - [`Error::Misaligned`](crate::Error::Misaligned) unless `gpa` is a multiple
    ///   of 4 KiB.
    /// - [`Error::ZeroSize`](crate::Error::ZeroSize).
    /// - [`Error::Wraps`](crate::Error::Wraps) if the guest addresses or the host
    ///   addresses wrap.
    /// - [`TrackError::DuplicateSlot`].
    /// - [`Error::Overlap`](crate::Error::Overlap) with the guest addresses of
    ///   another slot.
    /// - [`TrackError::Budget`], [`TrackError::NoMemory`].
    pub fn add_slot(
        &self,
        id: u32,
        gpa: u64,
        host: Option<u64>,
        size: u64,
    ) -> Result<DirtyBits, TrackError> {
        self.slots.add_new(id, gpa, host, size)
    }

    /// Adds guest memory that has dirty bits already, as vm-memory's regions do.
    ///
    /// # Errors
    ///
    /// [`Error::Misaligned`](crate::Error::Misaligned) unless `gpa` and `host` are
    /// multiples of the bits' page size and `gpa` is one of 4 KiB; then as
    /// [`add_slot`](Tracker::add_slot). Nothing changes then.
    pub fn add(&self, slot: Slot) -> Result<(), TrackError> {
        self.slots.add(slot)
    }

    /// Removes a slot and returns it. Later marks of it are refused; the earlier
    /// ones are still in its bits.
    ///
    /// Unmap its memory from every [`IovaView`] too. A mapping that stays leads to
    /// the removed slot, even after another slot comes to the same address.
    ///
    /// # Errors
    ///
    /// [`TrackError::UnknownSlot`].
    pub fn remove_slot(&self, id: u32) -> Result<Slot, TrackError> {
        self.slots.remove(id)
    }

    /// Returns the slots, sorted by address.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        self.slots.read().clone()
    }

    /// Creates an empty view of the memory, for the devices behind one virtual
    /// IOMMU domain.
    #[must_use]
    pub fn iova_view(&self) -> IovaView {
        IovaView::new(Arc::clone(&self.slots))
    }

    /// Adds a source that has a log of its own: KVM, the kernel's page tables, a
    /// device. Each [`take`](Tracker::take) calls `source`, which ORs what it knows
    /// into the report. `name` is for [`TakeError`].
    ///
    /// Sources are called one after another, in the order in which they were added.
    /// A source must not call `take` or `add_source` of this tracker: that would
    /// deadlock.
    ///
    /// ```
    /// # use adapter_user::guest::{Report, Tracker};
    /// # let tracker = Tracker::new(None);
    /// # tracker.add_slot(0, 0, None, 1 << 20)?;
    /// # let get_dirty_log = |_slot| Ok::<_, std::io::Error>(vec![1, 0, 0, 0]);
    /// // With kvm-ioctls: vm.get_dirty_log(0, size)
    /// tracker.add_source("kvm", move |report| {
    ///     report.or_slot(0, &get_dirty_log(0)?)?;
    ///     Ok(())
    /// });
    /// let mut report = Report::new();
    /// tracker.take(&mut report)?;
    /// assert_eq!(report.slot(0), Some(&[1, 0, 0, 0][..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn add_source(
        &self,
        name: &str,
        source: impl FnMut(&mut Report) -> Result<(), SourceError> + Send + 'static,
    ) {
        self.sources().push((name.to_owned(), Box::new(source)));
    }

    /// Forgets what was marked so far. Start the logs of your sources before this
    /// call, which does not call the sources, and copy all memory after it: reports
    /// have what is written from now on.
    pub fn start(&self) {
        for slot in self.slots.read().iter() {
            slot.bits.reset();
        }
    }

    /// ORs everything that was written since the last take into `report`: first
    /// calls each source, then takes the marks of all slots.
    ///
    /// Copy the pages *after* this call. Clear the report only when they have
    /// arrived: then the next round repeats a round that failed.
    ///
    /// The report follows the slots: new ones are added to it, and removed ones are
    /// dropped from it.
    ///
    /// # Errors
    ///
    /// A [`TakeError`] with the first source that failed. The other sources were
    /// called all the same, and the report has **every page dirty**.
    pub fn take(&self, report: &mut Report) -> Result<(), TakeError> {
        let mut sources = self.sources();
        report.follow(&self.slots.read());
        let mut failed = None;
        for (name, source) in sources.iter_mut() {
            if let Err(cause) = source(report) {
                let source = name.clone();
                failed.get_or_insert(TakeError { source, cause });
            }
        }
        // A source may mark, so the marks are taken last.
        report.take_marks();
        match failed {
            None => Ok(()),
            Some(failed) => {
                report.set_all();
                Err(failed)
            }
        }
    }
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("slots", &*self.slots.read())
            .finish_non_exhaustive()
    }
}

/// A source failed to say what is dirty, so every page counts as dirty.
#[derive(Debug)]
pub struct TakeError {
    /// The source's name.
    pub source: String,
    /// Why it failed.
    pub cause: SourceError,
}

impl fmt::Display for TakeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} cannot tell what is dirty: {}",
            self.source, self.cause
        )
    }
}

impl StdError for TakeError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.cause)
    }
}
