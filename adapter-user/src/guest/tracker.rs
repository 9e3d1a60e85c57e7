// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tracker: its slots and its sources.

use std::error::Error as StdError;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use dirty_core::Error;

use super::report::Report;
use super::view::IovaView;
use crate::dirty_bits::{DirtyBits, BASE_PAGE};
use crate::error::TrackError;

/// A piece of guest memory.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Its number, as KVM's.
    pub id: u32,
    /// Its first guest-physical address.
    pub gpa: u64,
    /// Where this process has it, for sources that speak of host addresses.
    pub host: Option<u64>,
    /// Its dirty pages.
    pub bits: DirtyBits,
}

impl Slot {
    pub(super) fn last(&self) -> u64 {
        self.gpa + (self.bits.len() - 1)
    }
}

/// What a source answers when it cannot tell.
pub type SourceError = Box<dyn StdError + Send + Sync>;

type Source = Box<dyn FnMut(&mut Report) -> Result<(), SourceError> + Send>;

/// Everything that writes a guest's memory, in one place.
///
/// A clone is another handle to the same tracker.
///
/// ```
/// use adapter_user::guest::{Report, Tracker};
///
/// let tracker = Tracker::new(None);
/// let ram = tracker.add_slot(0, 0, None, 1 << 30)?; // slot 0: 1 GiB from 0 on
/// let iommu = tracker.iova_view();
/// let ring = iommu.map(0xf000_0000, 0x20_0000, 0x1000)?; // of a virtual IOMMU
///
/// tracker.start();
/// ram.mark(0x1000, 8)?; // the VMM wrote
/// ring.mark(0xf000_0010, 16)?; // a device wrote
/// iommu.unmap(0xf000_0000, 0x1000)?; // its mapping goes; its dirt does not
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
    shared: Arc<Shared>,
}

pub(super) struct Shared {
    budget: Option<u64>,
    slots: RwLock<Vec<Slot>>,
    sources: Mutex<Vec<(String, Source)>>,
}

impl Shared {
    /// Sorted by address; no two overlap, none is empty.
    pub(super) fn slots(&self) -> RwLockReadGuard<'_, Vec<Slot>> {
        self.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots_mut(&self) -> RwLockWriteGuard<'_, Vec<Slot>> {
        self.slots.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tracker {
    /// A tracker without memory, whose bitmaps may take `budget` bytes in all
    /// (or any amount): 32 KiB for each GiB of guest memory.
    #[must_use]
    pub fn new(budget: Option<u64>) -> Self {
        Tracker {
            shared: Arc::new(Shared {
                budget,
                slots: RwLock::default(),
                sources: Mutex::default(),
            }),
        }
    }

    /// Adds `size` bytes of guest memory at `gpa`, in pages of 4 KiB, which
    /// this process has at `host`. Returns its dirty bits, for whoever writes
    /// it.
    ///
    /// # Errors
    ///
    /// As [`add`](Tracker::add), and `NoMemory`.
    pub fn add_slot(
        &self,
        id: u32,
        gpa: u64,
        host: Option<u64>,
        size: u64,
    ) -> Result<DirtyBits, TrackError> {
        let mut slots = self.shared.slots_mut();
        let bytes = DirtyBits::bytes(size, BASE_PAGE);
        let at = self.shared.check(&slots, id, gpa, host, size, bytes)?;
        let bits = DirtyBits::new(size, BASE_PAGE)?;
        let slot = Slot {
            id,
            gpa,
            host,
            bits: bits.clone(),
        };
        slots.insert(at, slot);
        Ok(bits)
    }

    /// Adds guest memory whose dirty bits are there already, as those of
    /// vm-memory's regions are.
    ///
    /// # Errors
    ///
    /// `Misaligned` unless `gpa` and `host` are multiples of the bits' page
    /// size, `ZeroSize`, `Wraps`, `Overlap`, [`TrackError::DuplicateSlot`],
    /// [`TrackError::Budget`]. Nothing changes then.
    pub fn add(&self, slot: Slot) -> Result<(), TrackError> {
        let mut slots = self.shared.slots_mut();
        let (size, pgsize) = (slot.bits.len(), slot.bits.pgsize());
        if !pgsize.aligns(slot.gpa | slot.host.unwrap_or(0)) {
            return Err(Error::Misaligned.into());
        }
        let bytes = DirtyBits::bytes(size, pgsize);
        let at = self
            .shared
            .check(&slots, slot.id, slot.gpa, slot.host, size, bytes)?;
        slots.insert(at, slot);
        Ok(())
    }

    /// Removes a slot and gives it back. Marks of it are refused from now on;
    /// those made before are still in its bits. Unmap it from every
    /// [`IovaView`] too: a mapping that stays leads to the memory that is gone,
    /// also when a slot comes to the same address.
    ///
    /// # Errors
    ///
    /// [`TrackError::UnknownSlot`].
    pub fn remove_slot(&self, id: u32) -> Result<Slot, TrackError> {
        let mut slots = self.shared.slots_mut();
        let at = slots.iter().position(|slot| slot.id == id);
        let slot = slots.remove(at.ok_or(TrackError::UnknownSlot { id })?);
        slot.bits.close();
        Ok(slot)
    }

    /// The slots, by address.
    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        self.shared.slots().clone()
    }

    /// What the devices behind one virtual IOMMU domain see of the memory.
    #[must_use]
    pub fn iova_view(&self) -> IovaView {
        IovaView::new(Arc::clone(&self.shared))
    }

    /// Adds a source that has a log of its own: each [`take`](Tracker::take)
    /// calls it, and it ORs what it knows into the report. It must not call the
    /// tracker's `take` or `add_source` itself.
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
        let mut sources = self.shared.sources.lock();
        let sources = sources.as_mut().unwrap_or_else(|e| e.get_mut());
        sources.push((name.to_owned(), Box::new(source)));
    }

    /// Forgets what was marked so far. Copy all memory after this call: reports
    /// tell what is written from now on. Sources are not asked: start their
    /// logs before.
    pub fn start(&self) {
        for slot in self.shared.slots().iter() {
            slot.bits.reset();
        }
    }

    /// ORs everything that was written since the last take into `report`: asks
    /// each source, and takes the marks. Copy the pages after this call, and
    /// clear the report only when they have arrived: a round that fails is then
    /// simply part of the next.
    ///
    /// Slots that came are added to the report, those that went are dropped.
    ///
    /// # Errors
    ///
    /// The first source that failed. The others were asked all the same, and
    /// **every page is dirty** in the report.
    pub fn take(&self, report: &mut Report) -> Result<(), TakeError> {
        let mut sources = self.shared.sources.lock();
        let sources = sources.as_mut().unwrap_or_else(|e| e.get_mut());
        report.follow(&self.shared.slots());
        let mut failed = None;
        for (name, source) in sources.iter_mut() {
            if let Err(cause) = source(report) {
                let source = name.clone();
                failed.get_or_insert(TakeError { source, cause });
            }
        }
        // A source may have marked, so the marks come last.
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

impl Shared {
    /// Where among `slots` a new one goes.
    fn check(
        &self,
        slots: &[Slot],
        id: u32,
        gpa: u64,
        host: Option<u64>,
        size: u64,
        bytes: u64,
    ) -> Result<usize, TrackError> {
        if !BASE_PAGE.aligns(gpa) {
            return Err(Error::Misaligned.into());
        }
        let more = size.checked_sub(1).ok_or(Error::ZeroSize)?;
        let last = gpa.checked_add(more).ok_or(Error::Wraps)?;
        let host = host.unwrap_or(0);
        host.checked_add(more).ok_or(Error::Wraps)?;
        if slots.iter().any(|slot| slot.id == id) {
            return Err(TrackError::DuplicateSlot { id });
        }
        let at = slots.partition_point(|slot| slot.gpa <= gpa);
        let below = at.checked_sub(1).and_then(|before| slots.get(before));
        if below.is_some_and(|slot| slot.last() >= gpa)
            || slots.get(at).is_some_and(|slot| slot.gpa <= last)
        {
            return Err(Error::Overlap.into());
        }
        let used = slots.iter().map(|slot| slot.bits.words() as u64 * 8).sum();
        within(self.budget, used, bytes)?;
        Ok(at)
    }
}

/// Whether a budget of which `used` bytes are gone has room for `wanted` more.
pub(crate) fn within(budget: Option<u64>, used: u64, wanted: u64) -> Result<(), TrackError> {
    let left = budget.unwrap_or(u64::MAX).saturating_sub(used);
    if wanted > left {
        return Err(TrackError::Budget { wanted, left });
    }
    Ok(())
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("slots", &*self.shared.slots())
            .finish_non_exhaustive()
    }
}

/// A source of dirty pages failed: every page counts as dirty.
#[derive(Debug)]
pub struct TakeError {
    /// The source's name.
    pub source: String,
    /// What it answered.
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
