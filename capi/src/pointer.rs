// SPDX-License-Identifier: MIT OR Apache-2.0
//! What C points to. NULL and misaligned pointers are refused; that the others are
//! valid is the contract of C's callers.

use std::ffi::{CStr, CString};
use std::marker::PhantomData;
use std::{ptr, slice};

use libc::c_char;

use crate::failure::Failure;

/// The right to use the pointers of one call from C.
///
/// INVARIANT: whoever made it has promised that every pointer which is given to its
/// methods is NULL, misaligned, or valid for what the method says, as long as this
/// value lives, and that nobody else writes to what it points to meanwhile (for
/// `_mut` and `put`: nobody else uses it). Handles may be used by many threads at
/// once, since they are `Sync`.
pub(crate) struct Pointers {
    /// A value belongs to the thread of its call.
    _call: PhantomData<*const ()>,
}

impl Pointers {
    /// # Safety
    ///
    /// The invariant of the type.
    pub(crate) unsafe fn new() -> Self {
        Pointers { _call: PhantomData }
    }

    /// A handle that this library has created and not freed.
    pub(crate) fn handle<T: Sync>(&self, handle: *const T, name: &str) -> Result<&T, Failure> {
        check(handle, 1, name)?;
        // SAFETY: by the invariant it points to a live T, which nobody has alone.
        Ok(unsafe { &*handle })
    }

    /// As `handle`, for what belongs to one thread at a time.
    #[allow(clippy::mut_from_ref)] // what it points to is no part of `self`
    pub(crate) fn handle_mut<T>(&self, handle: *mut T, name: &str) -> Result<&mut T, Failure> {
        check(handle, 1, name)?;
        // SAFETY: by the invariant it points to a live T, which nobody else uses.
        Ok(unsafe { &mut *handle })
    }

    /// As `handle`, for what may be read by many threads while none changes it.
    pub(crate) fn read<T>(&self, value: *const T, name: &str) -> Result<&T, Failure> {
        check(value, 1, name)?;
        // SAFETY: by the invariant it points to a live T, which nobody changes.
        Ok(unsafe { &*value })
    }

    /// `len` values. They may be at NULL if there are none.
    pub(crate) fn slice<T>(&self, at: *const T, len: usize, name: &str) -> Result<&[T], Failure> {
        if len == 0 {
            return Ok(&[]);
        }
        check(at, len, name)?;
        // SAFETY: by the invariant there are `len` values, which nobody changes.
        // `check` has looked that their size fits an isize.
        Ok(unsafe { slice::from_raw_parts(at, len) })
    }

    /// As `slice`, for values that the call changes.
    #[allow(clippy::mut_from_ref)] // what it points to is no part of `self`
    pub(crate) fn slice_mut<T>(
        &self,
        at: *mut T,
        len: usize,
        name: &str,
    ) -> Result<&mut [T], Failure> {
        if len == 0 {
            return Ok(&mut []);
        }
        check(at, len, name)?;
        // SAFETY: by the invariant there are `len` values, which nobody else uses.
        // `check` has looked that their size fits an isize.
        Ok(unsafe { slice::from_raw_parts_mut(at, len) })
    }

    /// A string of C, in UTF-8 or nearly so.
    pub(crate) fn text(&self, text: *const c_char, name: &str) -> Result<String, Failure> {
        check(text, 1, name)?;
        // SAFETY: by the invariant the string ends in NUL, and nobody changes it.
        let text = unsafe { CStr::from_ptr(text) };
        Ok(text.to_string_lossy().into_owned())
    }

    /// Checks that an answer can be stored at `out`, before the call does anything.
    pub(crate) fn out<T>(&self, out: *mut T, name: &str) -> Result<Out<T>, Failure> {
        check(out, 1, name)?;
        Ok(Out(out))
    }

    /// As `out`, for an answer that the caller may do without: NULL.
    pub(crate) fn maybe<T>(&self, out: *mut T, name: &str) -> Result<Option<Out<T>>, Failure> {
        match out.is_null() {
            true => Ok(None),
            false => self.out(out, name).map(Some),
        }
    }

    /// Stores an answer.
    pub(crate) fn put<T>(&self, out: Out<T>, value: T) {
        // SAFETY: by the invariant there is room for a T, which nobody else uses.
        // There may be no value yet that would have to be dropped.
        unsafe { out.0.write(value) };
    }

    /// Checks that a structure can be filled as far as its `argsz` says, before the call
    /// does anything.
    pub(crate) fn sized<T: Grows>(&self, out: *mut T, name: &str) -> Result<ToFill<T>, Failure> {
        check(out, 1, name)?;
        // SAFETY: by the invariant `argsz` has a value, with which a T begins.
        let argsz = unsafe { out.cast::<u32>().read() } as usize;
        match argsz >= T::FIRST {
            true => Ok(ToFill {
                out,
                bytes: argsz.min(size_of::<T>()),
            }),
            false => Err(Failure::argument(name, "has an argsz that is too small")),
        }
    }

    /// Fills a structure, and stores in `argsz` how far.
    pub(crate) fn fill<T: Grows>(&self, to: ToFill<T>, value: T) {
        let ToFill { out, bytes } = to;
        let from = (&raw const value).cast::<u8>();
        // SAFETY: by the invariant there is room for `argsz` bytes, which nobody else uses
        // and which are no fewer than `bytes`. A T has no fewer either, all of which have
        // values.
        unsafe { ptr::copy_nonoverlapping(from, out.cast::<u8>(), bytes) };
        // SAFETY: a T begins with `argsz`, and there is room for it as before.
        unsafe { out.cast::<u32>().write(bytes as u32) };
    }

    /// Stores a new handle.
    pub(crate) fn give<T>(&self, out: Out<*mut T>, value: T) {
        self.put(out, Box::into_raw(Box::new(value)));
    }

    /// Takes a handle back, which then is gone for C; `None` for NULL.
    pub(crate) fn take_back<T>(
        &self,
        handle: *mut T,
        name: &str,
    ) -> Result<Option<Box<T>>, Failure> {
        if handle.is_null() {
            return Ok(None);
        }
        check(handle, 1, name)?;
        // SAFETY: by the invariant the handle is one of `give`, which nobody else uses
        // or frees.
        Ok(Some(unsafe { Box::from_raw(handle) }))
    }
}

/// Where an answer goes: neither NULL nor misaligned.
pub(crate) struct Out<T>(*mut T);

/// A structure that C gets and that may have more fields in later versions.
///
/// # Safety
///
/// It is `repr(C)`, begins with a u32, and has no padding.
pub(crate) unsafe trait Grows: Copy {
    /// The bytes that it had in the first version that had it.
    const FIRST: usize;
}

/// A structure to fill: neither NULL nor misaligned.
pub(crate) struct ToFill<T> {
    out: *mut T,
    /// How much of it both sides know.
    bytes: usize,
}

/// A text as a string of C. A NUL inside becomes a space.
pub(crate) fn text_of(text: &str) -> CString {
    CString::new(text.replace('\0', " ")).unwrap_or_default()
}

fn check<T>(at: *const T, len: usize, name: &str) -> Result<(), Failure> {
    if at.is_null() {
        return Err(Failure::argument(name, "is NULL"));
    }
    if !at.is_aligned() {
        return Err(Failure::argument(name, "is misaligned"));
    }
    let bytes = len.checked_mul(size_of::<T>());
    let bytes = bytes.and_then(|bytes| isize::try_from(bytes).ok());
    let end = bytes.and_then(|bytes| at.addr().checked_add(bytes.unsigned_abs()));
    match end {
        Some(_) => Ok(()),
        None => Err(Failure::argument(name, "is longer than memory can be")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_memory_is_refused() {
        // SAFETY: every pointer below is NULL, misaligned or valid, or of an impossible
        // length.
        let c = unsafe { Pointers::new() };
        let words = [1u64, 2];
        let odd = words.as_ptr().wrapping_byte_add(4);
        let refused = |result: Result<&[u64], Failure>| result.unwrap_err().text;

        assert_eq!(c.slice(words.as_ptr(), 2, "words").unwrap(), words);
        let none: &[u64] = &[];
        assert_eq!(c.slice(std::ptr::null::<u64>(), 0, "words").unwrap(), none);
        let text = refused(c.slice(std::ptr::null(), 1, "words"));
        assert_eq!(text, "the argument words is NULL");
        let text = refused(c.slice(odd, 1, "words"));
        assert_eq!(text, "the argument words is misaligned");
        for len in [usize::MAX, usize::MAX / 8, isize::MAX as usize / 8 + 1] {
            let text = refused(c.slice(words.as_ptr(), len, "words"));
            assert_eq!(text, "the argument words is longer than memory can be");
        }
        assert!(c.read(odd, "x").is_err());
        assert!(c.handle(odd, "x").is_err());
        assert!(c.out(odd.cast_mut(), "x").is_err());
        assert!(c.maybe(odd.cast_mut(), "x").is_err());
        assert!(c.take_back(odd.cast_mut(), "x").is_err());
    }
}
