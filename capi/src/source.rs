// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sources of a tracker that have a log of their own.

use adapter_user::guest;
use libc::{c_char, c_int, c_void};

use crate::border::border;
use crate::callback::{Callback, SourceRead};
use crate::pointer::{Out, Pointers};
use crate::tracker::Tracker;
use crate::turn::Turn;

/// A source of a tracker. The handle is for `vfio_dirty_source_remove` alone, so whoever
/// never removes the source need not ask for it.
pub struct Source {
    inner: guest::Source,
    turn: Turn,
}

/// Stores the handle of a new source if C wants it.
pub(crate) fn give(
    c: &Pointers,
    out: Option<Out<*mut Source>>,
    inner: guest::Source,
    turn: Turn,
) -> c_int {
    if let Some(out) = out {
        c.give(out, Source { inner, turn });
    }
    0
}

/// Adds a source that has a log of its own by guest-physical address: KVM, the kernel's
/// page tables, a vhost-user device. Each take calls `read` with `context`. `name` is for
/// the text of an error, and is copied.
///
/// Sources are called one after another, in the order in which they were added, by the
/// thread that takes or that removes the source.
///
/// If `source` is not NULL, it gets a handle to the source.
///
/// -EINVAL if `name` or `read` is NULL. -EDEADLK in a callback of a source.
///
/// # Safety
///
/// `read` and what `context` points to stay valid until `vfio_dirty_source_remove` or
/// `vfio_dirty_tracker_free` has returned. `read` returns: it neither throws nor longjmps
/// out of the call.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_add_source(
    tracker: *const Tracker,
    name: *const c_char,
    read: SourceRead,
    context: *mut c_void,
    source: *mut *mut Source,
) -> c_int {
    let add = |c: &Pointers| {
        let tracker = c.handle(tracker, "tracker")?;
        let name = c.text(name, "name")?;
        let out = c.maybe(source, "source")?;
        // SAFETY: the caller keeps the contract, which is that of this call.
        let mut callback = unsafe { Callback::new(read, context) }?;
        let _inside = tracker.turn.begin()?;
        let ask = move |report: &mut guest::Report| callback.ask(report);
        let source = tracker.inner.add_source(&name, ask);
        Ok(give(c, out, source, tracker.turn))
    };
    // SAFETY: the caller keeps the contract.
    unsafe { border(add) }
}

/// Removes a source, as when its device is unplugged, and frees its handle. If the
/// tracker is on, the source is asked once more, and what it knows is in the next report.
/// Its callback is not called any more when this returns. NULL is ignored, and a tracker
/// that was freed is no error.
///
/// Call it when the device has stopped to write, and before its log is closed.
///
/// The errno of the source if it failed: it is removed all the same, and the next report
/// has what it would have after a take that failed so. -EDEADLK in a callback of a
/// source; nothing is removed or freed then.
///
/// # Safety
///
/// Nobody else uses the handle, and nobody uses it after this call if it returns anything
/// but -EDEADLK.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_source_remove(source: *mut Source) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            if source.is_null() {
                return Ok(0);
            }
            let _inside = c.handle(source, "source")?.turn.begin()?;
            if let Some(source) = c.take_back(source, "source")? {
                source.inner.remove()?;
            }
            Ok(0)
        })
    }
}
