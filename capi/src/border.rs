// SPDX-License-Identifier: MIT OR Apache-2.0
//! The border to C: results become `0` or `-errno`, and no panic crosses it.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::CString;
use std::panic::{catch_unwind, AssertUnwindSafe};

use libc::{c_char, c_int};

use crate::failure::Failure;
use crate::pointer::{text_of, Pointers};

thread_local! {
    /// Why the last call failed that failed on this thread.
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs a call from C, and returns what C gets: what `call` returns, which is not
/// negative, or the negative errno of its failure. A panic is -ENOTRECOVERABLE.
///
/// # Safety
///
/// Every pointer that `call` hands to [`Pointers`] keeps what `Pointers` wants, until
/// this function returns.
pub(crate) unsafe fn border(
    call: impl for<'a> FnOnce(&'a Pointers) -> Result<c_int, Failure>,
) -> c_int {
    // After a panic nothing is used that it may have left half done: the tracker, the
    // log and the container have no such states, and `vfio_dirty_tracker_take` makes
    // its report dirty.
    let caught = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the caller promises what `Pointers` wants.
        let pointers = unsafe { Pointers::new() };
        call(&pointers)
    }));
    let failure = match caught {
        Ok(Ok(value)) => return value,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure::new(libc::ENOTRECOVERABLE, panicked(&*panic)),
    };
    remember(&failure.text);
    -failure.errno
}

fn panicked(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("a bug in vfio_dirty: {}", text.unwrap_or("a panic"))
}

fn remember(text: &str) {
    let text = text_of(text);
    // It fails only on a thread that is about to end.
    let _ = LAST.try_with(|last| last.replace(text));
}

/// Returns why the last call failed that returned an error on this thread, as a
/// sentence in English. It is "" if none did.
///
/// The text stays until the next call on this thread that fails, or until the thread
/// ends. Calls that succeed leave it as it is, so ask only after an error.
#[no_mangle]
pub extern "C" fn vfio_dirty_error() -> *const c_char {
    let last = LAST.try_with(|last| last.borrow().as_ptr());
    last.unwrap_or(c"".as_ptr())
}

/// Returns the version of the library, such as "0.1.0".
#[no_mangle]
pub extern "C" fn vfio_dirty_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn text() -> String {
        // SAFETY: the text is this thread's, which has no other call meanwhile.
        let text = unsafe { CStr::from_ptr(vfio_dirty_error()) };
        text.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_is_an_errno() {
        // SAFETY: no pointer is used.
        let rc = unsafe { border(|_| panic!("slot {}", 7)) };
        assert_eq!(rc, -libc::ENOTRECOVERABLE);
        assert_eq!(text(), "a bug in vfio_dirty: slot 7");
        // SAFETY: no pointer is used.
        let rc = unsafe { border(|_| panic!("plain")) };
        assert_eq!(rc, -libc::ENOTRECOVERABLE);
        assert_eq!(text(), "a bug in vfio_dirty: plain");
        // SAFETY: no pointer is used.
        let rc = unsafe { border(|_| std::panic::panic_any(3)) };
        assert_eq!(rc, -libc::ENOTRECOVERABLE);
        assert_eq!(text(), "a bug in vfio_dirty: a panic");
    }

    #[test]
    fn each_thread_has_its_own_text() {
        // SAFETY: no pointer is used.
        let rc = unsafe { border(|_| Err(Failure::new(5, "a\0b"))) };
        assert_eq!((rc, text().as_str()), (-5, "a b"));
        std::thread::spawn(|| assert_eq!(text(), ""))
            .join()
            .unwrap();
        // SAFETY: no pointer is used.
        assert_eq!(unsafe { border(|_| Ok(3)) }, 3);
        assert_eq!(text(), "a b");
    }

    /// A destructor of another thread-local may call the library when its text has gone.
    #[test]
    fn a_thread_that_ends_may_fail() {
        struct Late;
        impl Drop for Late {
            fn drop(&mut self) {
                // SAFETY: no pointer is used.
                let rc = unsafe { border(|_| Err(Failure::new(5, "late"))) };
                assert_eq!(rc, -5);
                assert!(!vfio_dirty_error().is_null());
            }
        }
        thread_local!(static LATE: Late = const { Late });
        let thread = std::thread::spawn(|| {
            LATE.with(|_| ());
            remember("early");
        });
        thread.join().unwrap();
    }
}
