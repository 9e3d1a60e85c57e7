// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tracker and its slots.

use std::sync::{PoisonError, RwLock};

use adapter_user::{guest, DirtyBits, Error, TrackError};
use libc::{c_int, c_void};

use crate::border::border;
use crate::failure::Failure;
use crate::report::Report;
use crate::turn::Turn;

/// Tracks everything that writes a guest's memory: slots that are marked, and sources
/// that are asked.
///
/// It is off until `vfio_dirty_tracker_start`. Any thread may call it. Marks take no
/// lock that a take has.
pub struct Tracker {
    pub(crate) inner: guest::Tracker,
    pub(crate) turn: Turn,
    /// The tracker's slots, sorted by address.
    slots: RwLock<Vec<guest::Slot>>,
}

/// A slot's dirty pages, for whoever writes its memory. Any number of threads may mark
/// through it at the same time, without a lock. It stays valid until
/// `vfio_dirty_slot_free`, whatever happens to the slot and the tracker.
pub struct Slot {
    bits: DirtyBits,
}

impl Tracker {
    fn new(budget: Option<u64>) -> Self {
        Tracker {
            inner: guest::Tracker::new(budget),
            turn: Turn::new(),
            slots: RwLock::default(),
        }
    }

    /// Changes the slots.
    fn change<T>(
        &self,
        change: impl FnOnce(&guest::Tracker) -> Result<T, TrackError>,
    ) -> Result<T, Failure> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let changed = change(&self.inner)?;
        *slots = self.inner.slots();
        Ok(changed)
    }

    fn mark(&self, gpa: u64, len: u64) -> Result<(), Failure> {
        let Some(more) = len.checked_sub(1) else {
            return Ok(());
        };
        let last = gpa.checked_add(more).ok_or(Error::Wraps)?;
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let end = |slot: &guest::Slot| slot.gpa + (slot.size - 1);
        let from = slots.partition_point(|slot| end(slot) < gpa);
        let (mut marked, mut missing) = (Ok(()), None);
        let mut next = Some(gpa); // the first byte that no slot had so far
        for slot in slots[from..].iter().take_while(|slot| slot.gpa <= last) {
            let (first, stop) = (gpa.max(slot.gpa), last.min(end(slot)));
            marked = marked.and(slot.bits.mark(first - slot.gpa, stop - first + 1));
            missing = missing.or(next.filter(|next| *next < first));
            next = stop.checked_add(1);
        }
        match missing.or(next.filter(|next| *next <= last)) {
            Some(addr) => Err(TrackError::Unmapped { addr }.into()),
            None => Ok(marked?),
        }
    }
}

/// Creates a tracker without slots, which is off. Its bitmaps may take `budget` bytes in
/// all, or any amount if that is 0; 1 GiB of guest memory takes 32 KiB.
///
/// # Safety
///
/// There is room for a pointer at `tracker`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_new(budget: u64, tracker: *mut *mut Tracker) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let out = c.out(tracker, "tracker")?;
            c.give(out, Tracker::new((budget != 0).then_some(budget)));
            Ok(0)
        })
    }
}

/// Frees a tracker. Its sources are not called any more when it returns. Slots, views
/// and sources are handles of their own, which stay valid: marks do nothing then, and
/// every other call on them fails or does nothing. NULL is ignored, and so is a call in
/// a callback of the tracker.
///
/// # Safety
///
/// Nobody uses the tracker any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_free(tracker: *mut Tracker) {
    // SAFETY: the caller keeps the contract. In a callback, where a call of the tracker
    // is under way, the tracker is not freed.
    unsafe {
        border(|c| {
            if tracker.is_null() {
                return Ok(0);
            }
            let _inside = c.handle(tracker, "tracker")?.turn.begin()?;
            drop(c.take_back(tracker, "tracker")?);
            Ok(0)
        })
    };
}

/// Adds slot `id`: `size` bytes of guest memory at guest-physical address `gpa`, which
/// this process has at `host`. Give NULL for `host` if no source reports host addresses
/// and no device of a container uses the memory.
///
/// If `slot` is not NULL, it gets a handle to mark the slot's pages through, which are
/// of 4 KiB. If the tracker is on, all of the slot is dirty: its content was never copied.
///
/// Errors, in this order; nothing changes then:
///
/// - -EINVAL unless `gpa` is a multiple of 4 KiB, or if `size` is 0.
/// - -EOVERFLOW if the guest addresses or the host addresses wrap.
/// - -EEXIST if there is a slot `id`, or if another slot has some of the guest addresses
///   or host addresses.
/// - -ENOMEM beyond the budget, or if there is no memory.
///
/// # Safety
///
/// There is room for a pointer at `slot`, or it is NULL. `host` is only an address, and
/// nothing is read or written there.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_add_slot(
    tracker: *const Tracker,
    id: u32,
    gpa: u64,
    host: *const c_void,
    size: u64,
    slot: *mut *mut Slot,
) -> c_int {
    let host = (!host.is_null()).then_some(host.addr() as u64);
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            let out = c.maybe(slot, "slot")?;
            let bits = tracker.change(|tracker| tracker.add_slot(id, gpa, host, size))?;
            if let Some(out) = out {
                c.give(out, Slot { bits });
            }
            Ok(0)
        })
    }
}

/// Removes slot `id`. Its pages are in no later report. Marks through its handle fail
/// with -ESTALE then. Unmap its memory from every view too.
///
/// -EINVAL if there is no such slot.
///
/// # Safety
///
/// `tracker` is a tracker.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_remove_slot(tracker: *const Tracker, id: u32) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            tracker.change(|tracker| tracker.remove_slot(id))?;
            Ok(0)
        })
    }
}

/// Moves slot `id` to guest-physical address `gpa`, as when the guest moves a BAR. All
/// that is dirty in it is told at the new address, also what a log reports later through
/// mappings that were made before.
///
/// Before you call it, read logs that go with the old place, and put them into
/// `vfio_dirty_slot_mark_bitmap`: KVM forgets a slot's log when the slot moves.
///
/// Errors, in this order; nothing changes then:
///
/// - -EINVAL if there is no such slot, or unless `gpa` is a multiple of 4 KiB.
/// - -EOVERFLOW if the addresses wrap.
/// - -EEXIST if another slot has some of the addresses.
///
/// # Safety
///
/// `tracker` is a tracker.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_move_slot(
    tracker: *const Tracker,
    id: u32,
    gpa: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            tracker.change(|tracker| tracker.move_slot(id, gpa))?;
            Ok(0)
        })
    }
}

/// Lets slot `id` have `size` bytes, which are not fewer than before. Its handles have
/// the new pages. If the tracker is on, the new memory is dirty.
///
/// Errors, in this order; nothing changes then:
///
/// - -EINVAL if there is no such slot, or if `size` is less than before.
/// - -EOVERFLOW if the guest addresses or the host addresses wrap.
/// - -EEXIST if another slot has some of the addresses.
/// - -ENOMEM beyond the budget, or if there is no memory.
///
/// # Safety
///
/// `tracker` is a tracker.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_grow_slot(
    tracker: *const Tracker,
    id: u32,
    size: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            tracker.change(|tracker| tracker.grow_slot(id, size))?;
            Ok(0)
        })
    }
}

/// Switches tracking on, and forgets what was marked so far. Start the logs of your
/// sources before this call, and copy all memory after it. Writers need not stop. A
/// tracker that is on may be started again.
///
/// -EPERM if the kernel refuses membarrier(2), which a seccomp filter must allow.
/// -EDEADLK in a callback of a source.
///
/// # Safety
///
/// `tracker` is a tracker.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_start(tracker: *const Tracker) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            let _inside = tracker.turn.begin()?;
            tracker.inner.start()?;
            Ok(0)
        })
    }
}

/// Switches tracking off: marks do nothing, and what no report has taken is forgotten.
/// Stop the logs of your sources after this call. A tracker that is off may be stopped.
///
/// -EDEADLK in a callback of a source.
///
/// # Safety
///
/// `tracker` is a tracker.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_stop(tracker: *const Tracker) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            let _inside = tracker.turn.begin()?;
            tracker.inner.stop();
            Ok(0)
        })
    }
}

/// ORs everything that was written since the last take into `report`: first asks each
/// source, then takes the marks of all slots. Copy the pages after this call. Use one
/// report for all rounds of a migration.
///
/// The report is complete also if this fails, so a failure makes a round larger and
/// loses nothing:
///
/// - The errno of the first source that failed, -EIO if its callback returned no errno, or
///   if it was saved and not added again; vfio_dirty_error() names it, and
///   vfio_dirty_tracker_source_stats() tells which failed. The other sources were asked all the same. The report
///   has all memory behind the view of a log that failed, and every page if another
///   source failed.
/// - -EINVAL if the tracker is off, and -ENOTRECOVERABLE: the report has every page.
///
/// Nothing is taken, and the report is unchanged, if a pointer is refused (-EINVAL) and in
/// a callback of a source (-EDEADLK).
///
/// # Safety
///
/// Neither another thread nor a callback of a source uses the report.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_take(
    tracker: *const Tracker,
    report: *mut Report,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    let taken = unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            // First, because in a callback the report of the take is in use.
            let _inside = tracker.turn.begin()?;
            let report = c.handle_mut(report, "report")?;
            tracker.inner.take(&mut report.inner)?;
            Ok(0)
        })
    };
    if taken == -libc::ENOTRECOVERABLE {
        // SAFETY: the caller keeps the contract.
        unsafe {
            border(|c| {
                c.handle_mut(report, "report")?.inner.set_all();
                Ok(0)
            })
        };
    }
    taken
}

/// Marks as dirty every page that the `len` bytes at guest-physical address `gpa` touch,
/// which may span slots. No bytes mark nothing. While the tracker is off, nothing is
/// marked. Call it after the write, and before you tell anybody that the write is done.
///
/// It waits while a thread changes the slots. Through a slot's handle, marks wait for
/// nobody.
///
/// -EOVERFLOW if the addresses wrap; nothing is marked then. -EINVAL if some of the
/// bytes are in no slot; the others are marked all the same.
///
/// # Safety
///
/// `tracker` is a tracker.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_mark(
    tracker: *const Tracker,
    gpa: u64,
    len: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            c.handle(tracker, "tracker")?.mark(gpa, len)?;
            Ok(0)
        })
    }
}

/// Marks as dirty every page that the `len` bytes at byte `offset` of the slot touch. No
/// bytes mark nothing. While the tracker is off, nothing is marked. Call it after the
/// write, and before you tell anybody that the write is done.
///
/// -ESTALE if the slot was removed. -EINVAL if some of the bytes are beyond the slot's end;
/// the others are marked all the same.
///
/// # Safety
///
/// `slot` is a slot.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_slot_mark(slot: *const Slot, offset: u64, len: u64) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let marked = c.handle(slot, "slot")?.bits.mark(offset, len);
            marked.map_err(Failure::of_mark)?;
            Ok(0)
        })
    }
}

/// Marks the pages whose bits are set: bit k % 64 of word k / 64 is page k of 4 KiB of
/// the slot. Bits beyond its last page are ignored. While the tracker is off, nothing is
/// marked.
///
/// It takes a log that ends between two takes, as KVM's of a slot that is about to move.
///
/// -EINVAL unless `nwords` is what the slot's pages need. -ESTALE if the slot was removed.
///
/// # Safety
///
/// `words` has `nwords` words.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_slot_mark_bitmap(
    slot: *const Slot,
    words: *const u64,
    nwords: usize,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let slot = c.handle(slot, "slot")?;
            let marked = slot.bits.mark_bitmap(c.slice(words, nwords, "words")?);
            marked.map_err(Failure::of_mark)?;
            Ok(0)
        })
    }
}

/// Frees a handle to a slot. The slot stays. NULL is ignored.
///
/// # Safety
///
/// Nobody uses the handle any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_slot_free(slot: *mut Slot) {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            drop(c.take_back(slot, "slot")?);
            Ok(0)
        })
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr;

    /// A bug behind the border, which C cannot cause: nothing is lost.
    #[test]
    fn a_take_that_panics_has_every_page() {
        let tracker = Tracker::new(None);
        tracker
            .change(|tracker| tracker.add_slot(0, 0, None, 4 << 12))
            .unwrap();
        tracker.inner.start().unwrap();
        let mut bug = true;
        tracker.inner.add_source("kvm", move |_| {
            assert!(!std::mem::take(&mut bug), "on purpose");
            Ok(())
        });
        let mut report = Report::default();
        // SAFETY: both are there, and this thread alone uses them.
        let taken = unsafe { vfio_dirty_tracker_take(&tracker, &mut report) };
        assert_eq!(taken, -libc::ENOTRECOVERABLE);
        assert_eq!(report.inner.pages(), 4);

        // The thread may call the tracker again. What the sources had that were asked
        // before the panic is not known, so the next take has every page too.
        report.inner.clear();
        // SAFETY: as before.
        let taken = unsafe { vfio_dirty_tracker_take(&tracker, &mut report) };
        assert_eq!((taken, report.inner.pages()), (0, 4));
        report.inner.clear();
        // SAFETY: as before.
        let taken = unsafe { vfio_dirty_tracker_take(&tracker, &mut report) };
        assert_eq!((taken, report.inner.pages()), (0, 0));
        // SAFETY: the tracker is there.
        assert_eq!(unsafe { vfio_dirty_tracker_stop(&tracker) }, 0);
    }

    #[test]
    fn a_new_handle_is_freed_once() {
        let mut tracker = ptr::null_mut();
        // SAFETY: there is room for the handle.
        assert_eq!(unsafe { vfio_dirty_tracker_new(0, &mut tracker) }, 0);
        // SAFETY: the handle was just created.
        let inner = unsafe { &*tracker }.inner.downgrade();
        assert!(inner.upgrade().is_some());
        // SAFETY: nobody uses the handle any more.
        unsafe { vfio_dirty_tracker_free(tracker) };
        assert!(inner.upgrade().is_none());
    }
}
