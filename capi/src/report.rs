// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reports: the dirty pages of a guest.

use adapter_user::guest;
use libc::{c_int, c_void};

use crate::border::border;
use crate::failure::Failure;
use crate::pointer::Pointers;
use crate::range::Range;

/// The dirty pages of a guest: a bitmap for each slot. Pages stay in it until
/// `vfio_dirty_report_clear`.
///
/// A report belongs to one thread at a time. Threads that only read it may do so at the
/// same time.
#[derive(Default)]
pub struct Report {
    pub(crate) inner: guest::Report,
}

/// Gets one dirty range. It returns 0 to go on, and any other value to stop.
///
/// It may read the report, and must not change or free it.
pub type RangeVisit = Option<unsafe extern "C" fn(context: *mut c_void, range: Range) -> c_int>;

/// Creates a report without slots; the first take gives it slots.
///
/// # Safety
///
/// There is room for a pointer at `report`.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_report_new(report: *mut *mut Report) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let out = c.out(report, "report")?;
            c.give(out, Report::default());
            Ok(0)
        })
    }
}

/// Frees a report. NULL is ignored.
///
/// # Safety
///
/// Nobody uses the report or its words any more.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_report_free(report: *mut Report) {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            drop(c.take_back(report, "report")?);
            Ok(0)
        })
    };
}

/// Stores the number of dirty pages of 4 KiB.
///
/// # Safety
///
/// No thread changes the report meanwhile.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_report_pages(report: *const Report, pages: *mut u64) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let report = c.read(report, "report")?;
            let out = c.out(pages, "pages")?;
            c.put(out, report.inner.pages());
            Ok(0)
        })
    }
}

/// Stores where the bitmap of slot `id` is, and how many words it has: bit k % 64 of
/// word k / 64 is page k of 4 KiB of the slot. No bit beyond its last page is set.
///
/// The words stay there until the report is cleared or freed, or taken into again.
///
/// -EINVAL if the report has no such slot.
///
/// # Safety
///
/// No thread changes the report meanwhile.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_report_slot(
    report: *const Report,
    id: u32,
    words: *mut *const u64,
    nwords: *mut usize,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let report = c.read(report, "report")?;
            let (out, count) = (c.out(words, "words")?, c.out(nwords, "nwords")?);
            let slot = report.inner.slot(id);
            let slot = slot.ok_or(adapter_user::TrackError::UnknownSlot { id })?;
            c.put(out, slot.as_ptr());
            c.put(count, slot.len());
            Ok(0)
        })
    }
}

/// ORs the dirty pages of slot `id` into `words`, in pages of `pgsize` bytes, which may
/// be any power of two. Bit 0 is the page that holds the slot's first byte, also where
/// the slot starts inside that page.
///
/// -EINVAL, in this order: `pgsize` is no power of two, the report has no such slot, or
/// `nwords` is too few. Nothing changes then.
///
/// # Safety
///
/// `words` has `nwords` words, which have values. No thread changes the report meanwhile.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_report_bitmap(
    report: *const Report,
    id: u32,
    pgsize: u64,
    words: *mut u64,
    nwords: usize,
) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            let report = c.read(report, "report")?;
            let words = c.slice_mut(words, nwords, "words")?;
            report.inner.bitmap(id, pgsize, words)?;
            Ok(0)
        })
    }
}

/// Calls `visit` for each dirty range of guest-physical addresses, in their order. A
/// range consists of whole pages of `pgsize` bytes, which may be any power of two, cut
/// at the ends of its slot. Two ranges of one slot never touch.
///
/// Returns 0, or what `visit` returned if that is not 0: no other range follows then.
/// -EINVAL if `pgsize` is no power of two or `visit` is NULL.
///
/// # Safety
///
/// `visit` may be called with `context`. No thread changes the report meanwhile.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_report_ranges(
    report: *const Report,
    pgsize: u64,
    visit: RangeVisit,
    context: *mut c_void,
) -> c_int {
    let each = |c: &Pointers| {
        let report = c.read(report, "report")?;
        let visit = visit.ok_or_else(|| Failure::argument("visit", "is NULL"))?;
        for guest::Range { gpa: addr, size } in report.inner.ranges(pgsize)? {
            // SAFETY: the caller promised that it may be called so.
            match unsafe { visit(context, Range { addr, size }) } {
                0 => {}
                stop => return Ok(stop),
            }
        }
        Ok(0)
    };
    // SAFETY: the caller keeps the contract.
    unsafe { border(each) }
}

/// Makes every page clean. Call it when the copies of the pages have arrived: if a round
/// fails, do not clear it, and the next take adds to it.
///
/// # Safety
///
/// No other thread uses the report.
#[no_mangle]
pub unsafe extern "C" fn vfio_dirty_report_clear(report: *mut Report) -> c_int {
    // SAFETY: the caller keeps the contract.
    unsafe {
        border(|c| {
            c.handle_mut(report, "report")?.inner.clear();
            Ok(0)
        })
    }
}
