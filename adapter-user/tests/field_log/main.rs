// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bug reports of other projects and findings of a hostile review, about logs of
//! devices whose map changes. Each test says where it comes from.
//!
//! What changed in the calls since they were found:
//!
//! - Only what is mapped is logged, so a device without a map adds its ranges before
//!   it starts the log (f09, h02, l4, r05).
//! - A start over IOVAs that are not mapped costs nothing, so it fails no more for
//!   want of memory (h02, l4); it fails if so much is mapped.
//! - `ioctl` is `unsafe`, and answers EOVERFLOW for a range that ends at 2^64 (l4).

mod churn;
mod start;
mod taken_out;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Instant;

use adapter_user::device_log::{DeviceLog, Holes, LogOptions};
use adapter_user::guest::{Report, Tracker};
use adapter_user::{Error, Extent, PageSize, TrackError};

const PAGE: u64 = 4096;

/// The system's allocator. It counts what each thread has.
struct Counted;

thread_local! {
    static BYTES: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    BYTES.with(|all| all.set(all.get() + bytes));
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTED: Counted = Counted;

/// The bytes that this thread has allocated and not freed.
fn heap() -> i64 {
    BYTES.with(Cell::get)
}

/// The memory of this process, in MiB.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    (pages * PAGE) >> 20
}

fn on() -> DeviceLog {
    let log = DeviceLog::new(None);
    log.set_tracking(true).unwrap();
    log
}
