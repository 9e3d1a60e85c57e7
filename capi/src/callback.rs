// SPDX-License-Identifier: MIT OR Apache-2.0
//! Calls into C: the callbacks of sources and logs.

use adapter_user::guest::{DirtyIovas, DirtyLog, IovaRange, Report, SourceError};
use libc::{c_int, c_void};

use crate::failure::Failure;
use crate::range::Range;
use crate::sink::{GpaSink, IovaSink};

/// Reads and clears a log by guest-physical address, and puts what it has into `sink`.
/// It returns 0, or a negative errno if it cannot tell what is dirty: then every page is.
///
/// It may mark, map and unmap, ask for stats, and add, move, grow and remove slots. What
/// starts, stops, takes, saves, restores, or adds or removes sources of its tracker fails
/// with -EDEADLK in it.
pub type SourceRead =
    Option<unsafe extern "C" fn(context: *mut c_void, sink: *mut GpaSink<'_>) -> c_int>;

/// Reads and clears a log by IOVA for the `nranges` ranges of `ask`, and puts what it has
/// into `sink`. It returns 0, or a negative errno if it cannot tell what is dirty: then
/// all memory behind the view is.
///
/// `ask` has every IOVA that the view maps, or has mapped since the last take, in whole
/// pages of 4 KiB. The ranges are disjoint and sorted. They exist until the callback
/// returns, and there may be none. Pages that the log has besides may be put into
/// `sink` too if the view maps them.
///
/// It may call what a source's callback may.
pub type LogRead = Option<
    unsafe extern "C" fn(
        context: *mut c_void,
        ask: *const Range,
        nranges: usize,
        sink: *mut IovaSink<'_>,
    ) -> c_int,
>;

/// A callback of C with its context.
pub(crate) struct Callback<F> {
    read: F,
    context: *mut c_void,
}

// SAFETY: whoever adds a source or a log promises that its callback may be called on any
// thread, on one at a time. Nothing here uses what the context points to.
unsafe impl<F: Send> Send for Callback<F> {}

pub(crate) type SourceCallback =
    Callback<unsafe extern "C" fn(*mut c_void, *mut GpaSink<'_>) -> c_int>;
pub(crate) type LogCallback =
    Callback<unsafe extern "C" fn(*mut c_void, *const Range, usize, *mut IovaSink<'_>) -> c_int>;

impl<F> Callback<F> {
    /// # Safety
    ///
    /// `read` is a function of C that returns, and that may be called with `context` as
    /// its type says: on any thread, on one at a time, until this value is dropped.
    pub(crate) unsafe fn new(read: Option<F>, context: *mut c_void) -> Result<Self, Failure> {
        let read = read.ok_or_else(|| Failure::argument("read", "is NULL"))?;
        Ok(Callback { read, context })
    }
}

impl SourceCallback {
    pub(crate) fn ask(&mut self, report: &mut Report) -> Result<(), SourceError> {
        let mut sink = GpaSink::new(report);
        // SAFETY: as `new` was promised; the sink is there until the callback returns.
        let rc = unsafe { (self.read)(self.context, &mut sink) };
        Ok(sink.finish(rc)?)
    }
}

impl DirtyLog for LogCallback {
    fn read(&mut self, ask: &[IovaRange], dirty: &mut DirtyIovas) -> Result<(), SourceError> {
        let ask: Vec<Range> = ask
            .iter()
            .map(|range| Range {
                addr: range.iova,
                size: range.size,
            })
            .collect();
        let mut sink = IovaSink::new(dirty);
        // SAFETY: as `new` was promised; the ranges and the sink are there until the
        // callback returns.
        let rc = unsafe { (self.read)(self.context, ask.as_ptr(), ask.len(), &mut sink) };
        Ok(sink.finish(rc)?)
    }
}
