// SPDX-License-Identifier: MIT OR Apache-2.0
//! A file that says what happened, a line each: `VFIO_PRELOAD_TRACE` names it.

use std::fmt::Arguments;
use std::fs::File;
use std::io::Write;
use std::sync::OnceLock;
use std::time::Instant;

struct Trace {
    file: Option<File>,
    start: Instant,
}

static TRACE: OnceLock<Trace> = OnceLock::new();

/// Appends a line. It begins with the seconds since the first one.
pub(crate) fn line(what: Arguments<'_>) {
    let trace = TRACE.get_or_init(|| {
        let path = std::env::var_os("VFIO_PRELOAD_TRACE");
        Trace {
            file: path.and_then(|path| File::create(path).ok()),
            start: Instant::now(),
        }
    });
    if let Some(mut file) = trace.file.as_ref() {
        let seconds = trace.start.elapsed().as_secs_f64();
        // One write, so that lines of threads do not mix. A full disk loses the line.
        let _ = file.write_all(format!("{seconds:.4} {what}\n").as_bytes());
    }
}

macro_rules! trace {
    ($($arg:tt)*) => { crate::trace::line(format_args!($($arg)*)) };
}
pub(crate) use trace;
