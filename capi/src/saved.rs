// SPDX-License-Identifier: MIT OR Apache-2.0
//! A tracker becomes bytes, and another one goes on with them: live upgrade.

use std::ffi::CString;

use adapter_user::guest::{self, WeakTracker};
use libc::{c_char, c_int, c_void};

use crate::border::border;
use crate::failure::Failure;
use crate::pointer::{text_of, Pointers};
use crate::report::Report;
use crate::source::{give, Source};
use crate::tracker::Tracker;
use crate::turn::Turn;
use crate::view::View;

/// The bytes of a saved tracker.
pub struct Saved {
    bytes: Vec<u8>,
}

/// The sources that a saved tracker had, which must be added again.
pub struct Restored {
    inner: guest::Restored,
    names: Vec<CString>,
    tracker: WeakTracker,
    turn: Turn,
}

/// Saves the tracker as bytes, from which vfio_dirty_tracker_restore() goes on in another
/// process: a live upgrade of the VMM in the middle of a migration. docs/live-upgrade.md of
/// the project has the whole order of steps.
///
/// Before the call, stop everything that marks or maps in this process: CPUs, devices, the
/// VMM's own threads. What they mark after it is not in the bytes. A device that has its
/// log elsewhere may go on writing, as long as its mappings stay.
///
/// The call asks every source once more, as a take does. If one fails, what would count as
/// dirty in a take is dirty in the bytes, and the save does not fail. `undelivered` is the
/// report of the migration, whose pages have not arrived and are in the bytes; it stays as
/// it is. Give NULL if there is none. What it has of removed slots is not in the bytes.
///
/// The tracker stays as it is and keeps all that is dirty, so the migration can go on here
/// if the new process does not start.
///
/// Errors, in this order; the tracker keeps what the sources told:
///
/// - -EDEADLK in a callback of a source.
/// - -EINVAL if the report is one of another tracker.
/// - -ENOMEM if there is no memory for the bytes.
///
/// # Safety
///
/// No thread changes the report meanwhile. There is room for a pointer at `saved`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_save(
    tracker: *const Tracker,
    undelivered: *const Report,
    saved: *mut *mut Saved,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            let out = c.out(saved, "saved")?;
            // First, because in a callback the report of the take is in use.
            let _inside = tracker.turn.begin()?;
            let bytes = match undelivered.is_null() {
                true => tracker.inner.save(&guest::Report::new()),
                false => {
                    let report = c.read(undelivered, "undelivered")?;
                    tracker.inner.save(&report.inner)
                }
            };
            c.give(out, Saved { bytes: bytes? });
            Ok(0)
        })
    }
}

/// Stores where the bytes of a saved tracker are, and how many. They stay there until
/// `vfio_dirty_saved_free`. Put them where the new process finds them, as in a memfd.
///
/// # Safety
///
/// `saved` is a saved tracker. There is room for the answers.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_saved_bytes(
    saved: *const Saved,
    bytes: *mut *const c_void,
    nbytes: *mut usize,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let saved = c.handle(saved, "saved")?;
            let (out, count) = (c.out(bytes, "bytes")?, c.out(nbytes, "nbytes")?);
            c.put(out, saved.bytes.as_ptr().cast());
            c.put(count, saved.bytes.len());
            Ok(0)
        })
    }
}

/// Frees the bytes of a saved tracker. NULL is ignored.
///
/// # Safety
///
/// Nobody uses the bytes any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_saved_free(saved: *mut Saved) {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            drop(c.take_back(saved, "saved")?);
            Ok(0)
        })
    };
}

/// Goes on where the tracker was that vfio_dirty_tracker_save() made the `nbytes` bytes at
/// `bytes` of, in another process.
///
/// Before the call, add the same slots to a new tracker, with their numbers, guest
/// addresses and sizes; host addresses may differ. Nothing may have written guest memory in
/// this process yet. The call switches the tracker on, if the saved one was on. A slot that
/// was not saved is dirty as a whole.
///
/// After the call and before the first take, add each source of `restored` again, under its
/// name, and logs by IOVA with the view that `restored` has for them. A source that does not
/// come back is removed by its handle. Until then each take fails with -EIO, and has every
/// page, or all memory behind the view of a log. Map in the views what the devices have
/// mapped, before they write.
///
/// Errors, in this order:
///
/// - -EINVAL for a pointer, and -EDEADLK in a callback of a source. Nothing is restored
///   then: a tracker that is off has every page in each take.
/// - -EINVAL if the bytes are damaged or incomplete, and -EOPNOTSUPP if they have another
///   version of the format. **Every page is dirty then**, and the tracker is on. It has
///   none of the saved sources or views. So the caller may go on with a round that sends
///   all memory.
/// - -EINVAL if a saved slot is not in the tracker as it was. Every page is dirty then too.
/// - -EPERM if the kernel refuses membarrier(2), and -ENOTRECOVERABLE. The tracker is off
///   then.
///
/// # Safety
///
/// There are `nbytes` bytes. There is room for a pointer at `restored`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_restore(
    tracker: *const Tracker,
    bytes: *const c_void,
    nbytes: usize,
    restored: *mut *mut Restored,
) -> c_int {
    let restore = |c: &Pointers| {
        let tracker = c.handle(tracker, "tracker")?;
        let out = c.out(restored, "restored")?;
        let bytes = c.slice(bytes.cast::<u8>(), nbytes, "bytes")?;
        let _inside = tracker.turn.begin()?;
        let inner = tracker.inner.restore(bytes)?;
        let names = inner.sources.iter().map(|source| text_of(&source.name));
        let restored = Restored {
            names: names.collect(),
            inner,
            tracker: tracker.inner.downgrade(),
            turn: tracker.turn,
        };
        c.give(out, restored);
        Ok(0)
    };
    // SAFETY: the caller keeps the contract.
    let done = unsafe { border(restore) };
    if done == -libc::ENOTRECOVERABLE {
        // Some of the bits may be missing. A tracker that is off has every page.
        // SAFETY: the caller keeps the contract.
        unsafe {
            border(|c| {
                c.handle(tracker, "tracker")?.inner.stop();
                Ok(0)
            })
        };
    }
    done
}

/// Stores what is known of source number `at` of the saved tracker, from 0 on, in the order
/// in which they were added. Each answer may be left out by NULL:
///
/// - `name`: its name. The string stays there until `vfio_dirty_restored_free`.
/// - `view`: for a log by IOVA, a new handle to the view to add it with, and NULL for
///   another source. Free it. The view has no mappings: make those that the devices have.
///   It remembers the mappings of the old view until its logs were read.
/// - `source`: a new handle to remove it, if it does not come back.
///
/// -ENOENT if there are not so many sources. A saved tracker that was off has none.
///
/// # Safety
///
/// `restored` is a restored tracker. There is room for each answer, or it is NULL.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_restored_source(
    restored: *const Restored,
    at: usize,
    name: *mut *const c_char,
    view: *mut *mut View,
    source: *mut *mut Source,
) -> c_int {
    let answer = |c: &Pointers| {
        let restored = c.handle(restored, "restored")?;
        let name = c.maybe(name, "name")?;
        let view = c.maybe(view, "view")?;
        let out = c.maybe(source, "source")?;
        let source = restored.inner.sources.get(at).zip(restored.names.get(at));
        let none = || Failure::new(libc::ENOENT, "there are not so many saved sources");
        let (source, text) = source.ok_or_else(none)?;
        if let Some(name) = name {
            c.put(name, text.as_ptr());
        }
        match (view, &source.view) {
            (Some(out), Some(view)) => {
                let (tracker, turn) = (restored.tracker.clone(), restored.turn);
                c.give(out, View::new(view.clone(), tracker, turn));
            }
            (Some(out), None) => c.put(out, std::ptr::null_mut()),
            (None, _) => {}
        }
        Ok(give(c, out, source.source.clone(), restored.turn))
    };
    // SAFETY: the caller keeps the contract.
    unsafe { border(answer) }
}

/// Frees what a restore returned. The handles that were taken out of it stay. NULL is
/// ignored.
///
/// # Safety
///
/// Nobody uses it or its names any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_restored_free(restored: *mut Restored) {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            drop(c.take_back(restored, "restored")?);
            Ok(0)
        })
    };
}
