// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an operator sees of trackers, containers and device logs.

use adapter_user::{guest, ContainerStats as InContainer};
use libc::{c_char, c_int, c_void};

use crate::border::border;
use crate::container::Container;
use crate::device_log::DeviceLog;
use crate::failure::Failure;
use crate::pointer::{text_of, Grows, Pointers};
use crate::range::nanoseconds;
use crate::tracker::Tracker;

/// How often some memory was told as dirty as a whole for one cause.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Whole {
    /// How often it happened.
    pub times: u64,
    /// The bytes of memory of all these times together. Memory that is mapped twice
    /// counts twice.
    pub bytes: u64,
}

/// What a tracker has, and what its last take found. Make it zero and set `argsz`.
///
/// `whole_off` to `whole_restore_failed` is what was told as dirty as a whole since the
/// tracker was created, because nobody knows which of its pages were written. All of it
/// but `whole_new_memory` is more than what was written, and costs a larger round.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct TrackerStats {
    /// `sizeof(struct vfio_dirty_tracker_stats)`. The call stores how many bytes it has
    /// filled, which are fewer if the library is older than the header.
    pub argsz: u32,
    /// 1 if the tracker is on, and 0 if it is off.
    pub on: u32,
    /// How many takes there were since the tracker was created.
    pub takes: u64,
    /// How long the last take was, in nanoseconds, sources included.
    pub take_ns: u64,
    /// How many slots there are.
    pub slots: u64,
    /// How many slots moved or went since the logs were read, and are remembered.
    pub remembered_slots: u64,
    /// How many views there are.
    pub views: u64,
    /// How many mappings all views have.
    pub mappings: u64,
    /// How many mappings that are gone all views remember, because a log may still
    /// report what was written through them.
    pub remembered_mappings: u64,
    /// The bytes that the slots' bitmaps take.
    pub bitmap_bytes: u64,
    /// The most bytes that they may take, or 0 if there is no limit.
    pub budget: u64,
    /// A take asked a tracker that is off: all memory.
    pub whole_off: Whole,
    /// A source by guest address failed: all memory.
    pub whole_source_failed: Whole,
    /// A log by IOVA failed: all memory behind its view.
    pub whole_log_failed: Whole,
    /// A bug interrupted the take before, so what sources had told is lost: all memory.
    pub whole_source_panicked: Whole,
    /// A guest had stacked so many mappings at the same IOVAs that it would have taken
    /// too long to mark them one by one: all memory behind the view.
    pub whole_stacked_mappings: Whole,
    /// A view remembered as many mappings as it can, and one more went: the memory
    /// behind that one.
    pub whole_forgotten_mappings: Whole,
    /// The tracker remembered as many moved and removed slots as it can, and one more
    /// moved or went: that slot.
    pub whole_forgotten_slots: Whole,
    /// A slot was added, or grew, while the tracker was on: the new memory.
    pub whole_new_memory: Whole,
    /// A saved tracker could not be restored: all memory.
    pub whole_restore_failed: Whole,
}

/// What one source told in the last take.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SourceStats {
    /// How many bytes this structure has in the library. A field beyond them is not there.
    pub argsz: u32,
    /// 1 if the source failed, and 0 if not.
    pub failed: u32,
    /// How long it was asked, in nanoseconds. For a log by IOVA that includes the
    /// translation.
    pub time_ns: u64,
    /// The bytes that it told, in whole pages of its own page size. What it told twice
    /// counts twice, and what two sources told counts for both. A source that failed has
    /// what it told before it failed.
    pub bytes: u64,
    /// The name that it was added with. The string exists until the callback returns.
    pub name: *const c_char,
}

/// What the last take found in one slot.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SlotStats {
    /// How many bytes this structure has in the library. A field beyond them is not there.
    pub argsz: u32,
    /// The slot's number.
    pub id: u32,
    /// The bytes that were marked since the take before, in whole pages: by the VMM, by
    /// devices through mappings, and by logs by IOVA, whose dirty pages are marks too.
    /// Each page counts once.
    pub marked: u64,
    /// The bytes that sources by guest address told. What was told twice counts twice.
    pub told: u64,
}

/// Gets what one source told. It returns 0 to go on, and any other value to stop.
/// `stats` exists until it returns.
pub type SourceStatsVisit =
    Option<unsafe extern "C" fn(context: *mut c_void, stats: *const SourceStats) -> c_int>;

/// Gets what the last take found in one slot. It returns 0 to go on, and any other value
/// to stop. `stats` exists until it returns.
pub type SlotStatsVisit =
    Option<unsafe extern "C" fn(context: *mut c_void, stats: *const SlotStats) -> c_int>;

/// What a container has. Make it zero and set `argsz`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ContainerStats {
    /// `sizeof(struct vfio_dirty_container_stats)`. The call stores how many bytes it has
    /// filled, which are fewer if the library is older than the header.
    pub argsz: u32,
    /// How many groups make all memory dirty in every report, because they are behind an
    /// IOMMU that does not track, and have not pinned what they write.
    pub wholly_dirty_groups: u32,
    /// The page size of the dirty bitmaps in bytes, or 0 while tracking is off.
    pub pgsize: u64,
    /// How many mappings there are.
    pub mappings: u64,
    /// The bytes of memory that they have together.
    pub mapped_bytes: u64,
    /// At how many IOVAs devices have pinned a page. Each of these pages is dirty in
    /// every report, because a device may write it at any time.
    pub pinned_pages: u64,
    /// The bytes that the dirty bitmaps take.
    pub bitmap_bytes: u64,
    /// The most bytes that they may take, or 0 if there is no limit.
    pub budget: u64,
}

/// What a device's log has. Make it zero and set `argsz`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DeviceLogStats {
    /// `sizeof(struct vfio_dirty_device_log_stats)`. The call stores how many bytes it has
    /// filled, which are fewer if the library is older than the header.
    pub argsz: u32,
    /// 0.
    pub reserved: u32,
    /// The page size of the log in bytes, or 0 while it is off. `logged`, `bitmap_bytes`,
    /// `removed_ranges`, `removed_bytes` and `coarser` are 0 then.
    pub pgsize: u64,
    /// How many ranges are mapped.
    pub ranges: u64,
    /// How many pieces of them are logged. A range that the start named in two parts is
    /// two pieces.
    pub logged: u64,
    /// The bytes that the bitmaps of what is logged take.
    pub bitmap_bytes: u64,
    /// The most bytes that they may take, or 0 if there is no limit.
    pub budget: u64,
    /// How many ranges of IOVAs were removed and are still to be reported. Ranges that
    /// touch are one.
    pub removed_ranges: u64,
    /// About how many bytes the log keeps for removed ranges.
    pub removed_bytes: u64,
    /// About how many bytes it may keep for them.
    pub removed_limit: u64,
    /// How often that limit was reached since the log was switched on. The log became
    /// coarser then: pages may count as dirty that are not.
    pub coarser: u64,
}

// SAFETY: it begins with a u32, and has no padding: two u32, 9 u64 and 9 pairs of u64.
unsafe impl Grows for TrackerStats {
    const FIRST: usize = 8 + 9 * 8 + 9 * 16;
}

// SAFETY: it begins with a u32, and has no padding: two u32 and 6 u64.
unsafe impl Grows for ContainerStats {
    const FIRST: usize = 8 + 6 * 8;
}

// SAFETY: it begins with a u32, and has no padding: two u32 and 9 u64.
unsafe impl Grows for DeviceLogStats {
    const FIRST: usize = 8 + 9 * 8;
}

impl From<guest::Whole> for Whole {
    fn from(whole: guest::Whole) -> Self {
        Whole {
            times: whole.times,
            bytes: whole.bytes,
        }
    }
}

impl From<guest::TrackerStats> for TrackerStats {
    fn from(stats: guest::TrackerStats) -> Self {
        let whole = stats.wholly_dirty;
        TrackerStats {
            argsz: 0,
            on: stats.on.into(),
            takes: stats.takes,
            take_ns: nanoseconds(stats.last_take.time),
            slots: stats.slots as u64,
            remembered_slots: stats.remembered_slots as u64,
            views: stats.views as u64,
            mappings: stats.mappings as u64,
            remembered_mappings: stats.remembered_mappings as u64,
            bitmap_bytes: stats.bitmap_bytes,
            budget: stats.budget.unwrap_or(0),
            whole_off: whole.off.into(),
            whole_source_failed: whole.source_failed.into(),
            whole_log_failed: whole.log_failed.into(),
            whole_source_panicked: whole.source_panicked.into(),
            whole_stacked_mappings: whole.stacked_mappings.into(),
            whole_forgotten_mappings: whole.forgotten_mappings.into(),
            whole_forgotten_slots: whole.forgotten_slots.into(),
            whole_new_memory: whole.new_memory.into(),
            whole_restore_failed: whole.restore_failed.into(),
        }
    }
}

impl From<InContainer> for ContainerStats {
    fn from(stats: InContainer) -> Self {
        ContainerStats {
            argsz: 0,
            wholly_dirty_groups: stats.wholly_dirty_groups,
            pgsize: stats.pgsize.unwrap_or(0),
            mappings: stats.mappings,
            mapped_bytes: stats.mapped_bytes,
            pinned_pages: stats.pinned_pages,
            bitmap_bytes: stats.bitmap_bytes,
            budget: stats.budget.unwrap_or(0),
        }
    }
}

impl From<adapter_user::device_log::DeviceLogStats> for DeviceLogStats {
    fn from(stats: adapter_user::device_log::DeviceLogStats) -> Self {
        DeviceLogStats {
            argsz: 0,
            reserved: 0,
            pgsize: stats.pgsize.unwrap_or(0),
            ranges: stats.ranges as u64,
            logged: stats.logged as u64,
            bitmap_bytes: stats.bitmap_bytes,
            budget: stats.budget.unwrap_or(0),
            removed_ranges: stats.removed_ranges as u64,
            removed_bytes: stats.removed_bytes,
            removed_limit: stats.removed_limit,
            coarser: stats.coarser,
        }
    }
}

/// Stores what the tracker has, and what its last take found. It does not wait for a take
/// that is going on, so a callback of a source may call it.
///
/// -EINVAL if `argsz` is too small.
///
/// # Safety
///
/// `stats` has `argsz` bytes.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_stats(
    tracker: *const Tracker,
    stats: *mut TrackerStats,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let tracker = c.handle(tracker, "tracker")?;
            let out = c.sized(stats, "stats")?;
            c.fill(out, tracker.inner.stats().into());
            Ok(0)
        })
    }
}

/// Calls `visit` for each source of the last take, in the order in which they were asked.
/// It is not called before the first take. `visit` may call anything but what frees the
/// tracker.
///
/// Returns 0, or what `visit` returned if that is not 0: no other source follows then.
/// -EINVAL if `visit` is NULL.
///
/// # Safety
///
/// `visit` may be called with `context`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_source_stats(
    tracker: *const Tracker,
    visit: SourceStatsVisit,
    context: *mut c_void,
) -> c_int {
    let each = |c: &Pointers| {
        let tracker = c.handle(tracker, "tracker")?;
        let visit = visit.ok_or_else(|| Failure::argument("visit", "is NULL"))?;
        for source in tracker.inner.stats().last_take.sources {
            let name = text_of(&source.name);
            let stats = SourceStats {
                argsz: size_of::<SourceStats>() as u32,
                failed: source.failed.into(),
                time_ns: nanoseconds(source.time),
                bytes: source.bytes,
                name: name.as_ptr(),
            };
            // SAFETY: the caller promised that it may be called so.
            match unsafe { visit(context, &stats) } {
                0 => {}
                stop => return Ok(stop),
            }
        }
        Ok(0)
    };
    // SAFETY: the caller keeps the contract.
    unsafe { border(each) }
}

/// Calls `visit` for each slot of the last take, sorted by address. It is not called
/// before the first take. `visit` may call anything but what frees the tracker.
///
/// Returns 0, or what `visit` returned if that is not 0: no other slot follows then.
/// -EINVAL if `visit` is NULL.
///
/// # Safety
///
/// `visit` may be called with `context`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_tracker_slot_stats(
    tracker: *const Tracker,
    visit: SlotStatsVisit,
    context: *mut c_void,
) -> c_int {
    let each = |c: &Pointers| {
        let tracker = c.handle(tracker, "tracker")?;
        let visit = visit.ok_or_else(|| Failure::argument("visit", "is NULL"))?;
        for slot in tracker.inner.stats().last_take.slots {
            let stats = SlotStats {
                argsz: size_of::<SlotStats>() as u32,
                id: slot.id,
                marked: slot.marked,
                told: slot.told,
            };
            // SAFETY: the caller promised that it may be called so.
            match unsafe { visit(context, &stats) } {
                0 => {}
                stop => return Ok(stop),
            }
        }
        Ok(0)
    };
    // SAFETY: the caller keeps the contract.
    unsafe { border(each) }
}

/// Stores what the container has. It walks over the mappings.
///
/// -EINVAL if `argsz` is too small, or if no IOMMU type is set.
///
/// # Safety
///
/// `stats` has `argsz` bytes.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_container_stats(
    container: *const Container,
    stats: *mut ContainerStats,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let container = c.handle(container, "container")?;
            let out = c.sized(stats, "stats")?;
            c.fill(out, container.inner.stats()?.into());
            Ok(0)
        })
    }
}

/// Stores what the log has.
///
/// -EINVAL if `argsz` is too small.
///
/// # Safety
///
/// `stats` has `argsz` bytes.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_device_log_stats(
    log: *const DeviceLog,
    stats: *mut DeviceLogStats,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let log = c.handle(log, "log")?;
            let out = c.sized(stats, "stats")?;
            c.fill(out, log.inner.stats().into());
            Ok(0)
        })
    }
}
