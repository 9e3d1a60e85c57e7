// SPDX-License-Identifier: MIT OR Apache-2.0
//! Views: what the devices behind one IOMMU domain see of a guest's memory.

use adapter_user::guest::{self, DirtyLog, IovaView, WeakTracker};
use libc::{c_char, c_int, c_void};

use crate::border::border;
use crate::callback::{Callback, LogRead};
use crate::container::Container;
use crate::device_log::DeviceLog;
use crate::failure::Failure;
use crate::pointer::Pointers;
use crate::range::bitmap;
use crate::source::{give, Source};
use crate::tracker::Tracker;
use crate::turn::Turn;

/// What the devices behind one IOMMU domain see of a guest's memory: which IOVA leads to
/// which guest-physical address. Any thread may call it.
///
/// Keep it in step with the IOMMU: map before the mapping there, and unmap after the
/// unmapping there, when the device can no longer write.
pub struct View {
    inner: IovaView,
    tracker: WeakTracker,
    turn: Turn,
}

impl View {
    pub(crate) fn new(inner: IovaView, tracker: WeakTracker, turn: Turn) -> Self {
        View {
            inner,
            tracker,
            turn,
        }
    }

    fn add_log(
        &self,
        name: &str,
        gap: u64,
        log: impl DirtyLog + 'static,
    ) -> Result<guest::Source, Failure> {
        let tracker = self.tracker.upgrade();
        let tracker = tracker.ok_or_else(|| Failure::argument("view", "has lost its tracker"))?;
        let _inside = self.turn.begin()?;
        Ok(tracker.add_log(name, &self.inner, gap, log)?)
    }
}

/// Creates an empty view of the tracker's memory, for the devices behind one virtual
/// IOMMU domain. Without a virtual IOMMU, map each slot to its own address.
///
/// # Safety
///
/// There is room for a pointer at `view`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_view_new(
    tracker: *const Tracker,
    view: *mut *mut View,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            let out = c.out(view, "view")?;
            let (view, weak) = (tracker.inner.iova_view(), tracker.inner.downgrade());
            c.give(out, View::new(view, weak, tracker.turn));
            Ok(0)
        })
    }
}

/// Frees the handle to a view. Logs that were added with it keep the view's mappings.
/// NULL is ignored.
///
/// # Safety
///
/// Nobody uses the handle any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_view_free(view: *mut View) {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            drop(c.take_back(view, "view")?);
            Ok(0)
        })
    };
}

/// Maps `size` bytes of guest memory at guest-physical address `gpa` to the IOVAs from
/// `iova` on. The bytes may span slots, and some may be in no slot, as another device's
/// BAR is: what is written there is ignored.
///
/// The mapping leads to the memory that is at `gpa` now, and stays with it when its slot
/// moves.
///
/// Errors, in this order; nothing is mapped then:
///
/// - -EINVAL unless all three are multiples of 4 KiB, or if `size` is 0.
/// - -EOVERFLOW if the IOVAs or the guest addresses wrap.
/// - -EEXIST if an IOVA is mapped already.
///
/// # Safety
///
/// `view` is a view.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_view_map(
    view: *const View,
    iova: u64,
    gpa: u64,
    size: u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            c.handle(view, "view")?.inner.map(iova, gpa, size)?;
            Ok(0)
        })
    }
}

/// Unmaps the `size` bytes of IOVAs from `iova` on, and stores how many of them were
/// mapped in `unmapped`, unless that is NULL. A mapping that reaches beyond the range
/// keeps the part outside. Pages that were marked through the mappings stay dirty. The
/// view remembers what is gone until every log was read.
///
/// -EINVAL unless both are multiples of 4 KiB, or if `size` is 0. -EOVERFLOW if the IOVAs
/// wrap. Nothing is unmapped then.
///
/// # Safety
///
/// There is room for the answer at `unmapped`, or it is NULL.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_view_unmap(
    view: *const View,
    iova: u64,
    size: u64,
    unmapped: *mut u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let view = c.handle(view, "view")?;
            let out = c.maybe(unmapped, "unmapped")?;
            let bytes = view.inner.unmap(iova, size)?;
            if let Some(out) = out {
                c.put(out, bytes);
            }
            Ok(0)
        })
    }
}

/// As `vfio_dirty_view_unmap`, with the dirty pages of the range, which are marked first:
/// those that VFIO_IOMMU_UNMAP_DMA returned, or that a log had which was read between two
/// takes. Bit k % 64 of word k / 64 is the page of `pgsize` bytes at `iova + k * pgsize`.
///
/// Errors, in this order; nothing is marked or unmapped then:
///
/// - -EINVAL unless `pgsize` is a power of two and `size` a multiple of it.
/// - As `vfio_dirty_view_unmap`.
/// - -EINVAL unless `iova` is a multiple of `pgsize`.
///
/// # Safety
///
/// `words` has a bit for each of the `size / pgsize` pages, in whole words.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_view_unmap_dirty(
    view: *const View,
    iova: u64,
    size: u64,
    words: *const u64,
    pgsize: u64,
    unmapped: *mut u64,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let view = c.handle(view, "view")?;
            let out = c.maybe(unmapped, "unmapped")?;
            if pgsize.is_power_of_two() && size % pgsize != 0 {
                return Err(adapter_user::Error::Misaligned.into());
            }
            let npages = size.checked_div(pgsize).unwrap_or(0);
            let (words, extent) = bitmap(c, words, iova, npages, pgsize)?;
            let bytes = view.inner.unmap_dirty(iova, size, words, extent)?;
            if let Some(out) = out {
                c.put(out, bytes);
            }
            Ok(0)
        })
    }
}

/// Marks as dirty every page that the `len` bytes at IOVA `iova` touch, which may span
/// mappings. No bytes mark nothing. While the tracker is off, nothing is marked. Call it
/// after the write, and before you tell anybody that the write is done.
///
/// -EOVERFLOW if the IOVAs wrap; nothing is marked then. -EINVAL if some of the bytes are
/// in no mapping, and -ESTALE if the slot behind some was removed and no other slot came to
/// its address; the others are marked all the same.
///
/// # Safety
///
/// `view` is a view.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_view_mark(view: *const View, iova: u64, len: u64) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let marked = c.handle(view, "view")?.inner.mark(iova, len);
            marked.map_err(Failure::of_mark)?;
            Ok(0)
        })
    }
}

/// Adds a log by IOVA that somebody else keeps, for the devices behind the view: VFIO's
/// DMA logging, iommufd's dirty tracking, the kernel's type1 container, a vfio-user
/// device. Each take calls `read` with `context`, and translates what it has, also what
/// was written through mappings that are gone. `name` is for the text of an error, and is
/// copied.
///
/// Ranges that are at most `gap` bytes apart are asked for in one: 0 asks for as little
/// as possible, and more saves system calls.
///
/// Add the log before its device can write. If `source` is not NULL, it gets a handle.
///
/// -EINVAL if `name` or `read` is NULL, or if the tracker was freed. -EDEADLK in a
/// callback of a source.
///
/// # Safety
///
/// As `vfio_dirty_tracker_add_source`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_view_add_log(
    view: *const View,
    name: *const c_char,
    gap: u64,
    read: LogRead,
    context: *mut c_void,
    source: *mut *mut Source,
) -> c_int {
    let add = |c: &Pointers| {
        let view = c.handle(view, "view")?;
        let name = c.text(name, "name")?;
        let out = c.maybe(source, "source")?;
        // SAFETY: the caller keeps the contract, which is that of this call.
        let callback = unsafe { Callback::new(read, context) }?;
        let source = view.add_log(&name, gap, callback)?;
        Ok(give(c, out, source, view.turn))
    };
    // SAFETY: the caller keeps the contract.
    unsafe { border(add) }
}

/// Adds a device's log of this library as a source, for a device that marks in its log
/// alone. Nobody else should read the log meanwhile, because a report clears what it has.
/// Start the log before the tracker, for all that the view maps, and stop it after the
/// tracker: otherwise takes fail with -EINVAL, and all memory behind the view is dirty.
///
/// The source keeps the log alive, also after `vfio_dirty_device_log_free`.
///
/// -EINVAL if `name` is NULL, or if the tracker was freed. -EDEADLK in a callback of a
/// source.
///
/// # Safety
///
/// `name` is a string of C. There is room for a pointer at `source`, or it is NULL.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_view_add_device_log(
    view: *const View,
    name: *const c_char,
    log: *const DeviceLog,
    source: *mut *mut Source,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let view = c.handle(view, "view")?;
            let name = c.text(name, "name")?;
            let log = c.handle(log, "log")?;
            let out = c.maybe(source, "source")?;
            let source = view.add_log(&name, 0, log.inner.clone())?;
            Ok(give(c, out, source, view.turn))
        })
    }
}

/// Adds a container of this library as a source, for devices that write through it.
/// Nobody else should read the container's bitmaps meanwhile, because a report clears
/// what it has. Start its dirty tracking before the tracker, and stop it after the
/// tracker: otherwise takes fail with -EINVAL, and all memory behind the view is dirty.
///
/// What VFIO_IOMMU_UNMAP_DMA forgets is lost: unmap with
/// VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP, and give its bitmap to
/// `vfio_dirty_view_unmap_dirty`.
///
/// The source keeps the container alive, also after `vfio_dirty_container_free`.
///
/// -EINVAL if `name` is NULL, or if the tracker was freed. -EDEADLK in a callback of a
/// source.
///
/// # Safety
///
/// `name` is a string of C. There is room for a pointer at `source`, or it is NULL.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_view_add_container(
    view: *const View,
    name: *const c_char,
    container: *const Container,
    source: *mut *mut Source,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let view = c.handle(view, "view")?;
            let name = c.text(name, "name")?;
            let container = c.handle(container, "container")?;
            let out = c.maybe(source, "source")?;
            let source = view.add_log(&name, 0, container.inner.clone())?;
            Ok(give(c, out, source, view.turn))
        })
    }
}
