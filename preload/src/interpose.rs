// SPDX-License-Identifier: MIT OR Apache-2.0
//! The functions of libc that a program reaches VFIO through.
//!
//! A call whose path or descriptor is not ours goes to the function that this library
//! stands before, with the same arguments. This is the only file with `unsafe` in it.
//!
//! `open`, `openat`, `fcntl` and `ioctl` are variadic in C. Here they take their last
//! argument always: in the calling conventions of 64-bit Linux it is in the same register,
//! and what is there if the caller gave none is only passed on.

use std::ffi::{c_char, c_int, c_uint, c_ulong, c_void, CStr};
use std::os::fd::{FromRawFd, OwnedFd};
use std::ptr;
use std::slice;
use std::sync::atomic::{AtomicPtr, Ordering};

use adapter_user::device_log::DeviceLog;
use adapter_user::Errno;

use crate::files::{self, DataTable, File, Program};
use crate::remote;
use crate::watch;

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("vfio-preload is for 64-bit Linux");

/// Finds the function `name` that this library stands before, and remembers it in `known`.
fn next(known: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    let found = known.load(Ordering::Relaxed);
    if !found.is_null() {
        return found;
    }
    // SAFETY: `name` is a string that ends with a zero.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    known.store(found, Ordering::Relaxed);
    found
}

/// Calls the function of this name and type that this library stands before. Fails with
/// ENOSYS if there is none.
macro_rules! pass {
    ($name:literal as $type:ty, $($arg:expr),*) => {{
        static NEXT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
        let next = next(&NEXT, $name);
        if next.is_null() {
            return fail(Errno(libc::ENOSYS)) as _;
        }
        // SAFETY: libc's function of this name has this type.
        let function = unsafe { std::mem::transmute::<*mut c_void, $type>(next) };
        // SAFETY: these are the caller's arguments, for the function that it called.
        unsafe { function($($arg),*) }
    }};
}

fn fail(errno: Errno) -> c_int {
    // SAFETY: the address is that of this thread's errno.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above; nobody else accesses it.
    unsafe { place.write(errno.0) };
    -1
}

fn answer(result: Result<i32, Errno>) -> c_int {
    result.unwrap_or_else(fail)
}

fn count(result: Result<usize, Errno>) -> isize {
    match result {
        Ok(n) => n as isize,
        Err(errno) => fail(errno) as isize,
    }
}

/// Opens `path` if it is ours.
fn opened(path: *const c_char, flags: c_int) -> Option<c_int> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller of open(2) gives a string that ends with a zero.
    let path = unsafe { CStr::from_ptr(path) };
    let file = files::open(path)?;
    Some(answer(file.and_then(|file| {
        files::install(file, flags & libc::O_CLOEXEC != 0)
    })))
}

macro_rules! open {
    ($($name:ident $string:literal)*) => {$(
        #[no_mangle]
        unsafe extern "C" fn $name(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
            if let Some(fd) = opened(path, flags) {
                return fd;
            }
            pass!($string as unsafe extern "C" fn(*const c_char, c_int, ...) -> c_int, path, flags, mode)
        }
    )*};
}
open! { open c"open" open64 c"open64" }

macro_rules! open_2 {
    ($($name:ident $string:literal)*) => {$(
        #[no_mangle]
        unsafe extern "C" fn $name(path: *const c_char, flags: c_int) -> c_int {
            if let Some(fd) = opened(path, flags) {
                return fd;
            }
            pass!($string as unsafe extern "C" fn(*const c_char, c_int) -> c_int, path, flags)
        }
    )*};
}
open_2! { __open_2 c"__open_2" __open64_2 c"__open64_2" }

macro_rules! openat {
    ($($name:ident $string:literal)*) => {$(
        #[no_mangle]
        unsafe extern "C" fn $name(dir: c_int, path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
            if let Some(fd) = opened(path, flags) {
                return fd;
            }
            pass!($string as unsafe extern "C" fn(c_int, *const c_char, c_int, ...) -> c_int, dir, path, flags, mode)
        }
    )*};
}
openat! { openat c"openat" openat64 c"openat64" }

macro_rules! openat_2 {
    ($($name:ident $string:literal)*) => {$(
        #[no_mangle]
        unsafe extern "C" fn $name(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
            if let Some(fd) = opened(path, flags) {
                return fd;
            }
            pass!($string as unsafe extern "C" fn(c_int, *const c_char, c_int) -> c_int, dir, path, flags)
        }
    )*};
}
openat_2! { __openat_2 c"__openat_2" __openat64_2 c"__openat64_2" }

#[no_mangle]
unsafe extern "C" fn close(fd: c_int) -> c_int {
    let file = files::forget(fd);
    let closed = pass!(c"close" as unsafe extern "C" fn(c_int) -> c_int, fd);
    drop(file); // perhaps the last handle to a device
    closed
}

#[no_mangle]
unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    if flags as c_uint & libc::CLOSE_RANGE_CLOEXEC == 0 {
        drop(files::forget_range(first, last));
    }
    pass!(
        c"close_range" as unsafe extern "C" fn(c_uint, c_uint, c_int) -> c_int,
        first,
        last,
        flags
    )
}

#[no_mangle]
unsafe extern "C" fn dup(fd: c_int) -> c_int {
    let new = pass!(c"dup" as unsafe extern "C" fn(c_int) -> c_int, fd);
    files::duplicate(fd, new);
    new
}

#[no_mangle]
unsafe extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    let new = pass!(
        c"dup2" as unsafe extern "C" fn(c_int, c_int) -> c_int,
        fd,
        to
    );
    files::duplicate(fd, new);
    new
}

#[no_mangle]
unsafe extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    let new = pass!(
        c"dup3" as unsafe extern "C" fn(c_int, c_int, c_int) -> c_int,
        fd,
        to,
        flags
    );
    files::duplicate(fd, new);
    new
}

macro_rules! fcntl {
    ($($name:ident $string:literal)*) => {$(
        #[no_mangle]
        unsafe extern "C" fn $name(fd: c_int, command: c_int, arg: c_ulong) -> c_int {
            let done = pass!($string as unsafe extern "C" fn(c_int, c_int, ...) -> c_int, fd, command, arg);
            if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
                files::duplicate(fd, done);
            }
            done
        }
    )*};
}
fcntl! { fcntl c"fcntl" fcntl64 c"fcntl64" }

#[no_mangle]
unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, arg: c_ulong) -> c_int {
    let Some(file) = files::get(fd) else {
        return pass!(
            c"ioctl" as unsafe extern "C" fn(c_int, c_ulong, ...) -> c_int,
            fd,
            request,
            arg
        );
    };
    let nr = request as u32; // the kernel looks at 32 bits too
                             // The program makes this ioctl, with the rights over its memory that the kernel would take
                             // it to give: nobody uses what the ioctl writes to, and what it maps is memory for devices
                             // until it is unmapped. So much for each of the proofs below.
    answer(match file {
        File::Container(held) => {
            // SAFETY: the program's ioctl.
            let call = || unsafe { held.container.ioctl(nr, arg) };
            watch::container(&held, nr, arg, call)
        }
        File::Group(group) => files::open_elsewhere(&group, nr, arg).unwrap_or_else(|| {
            let program = Program {
                group: group.number,
            };
            // SAFETY: the program's ioctl.
            unsafe { group.file.ioctl(nr, arg, &program) }
        }),
        File::Device(device) => {
            // SAFETY: the program's ioctl.
            let call = || unsafe { device.ioctl(nr, arg, &DataTable) };
            watch::device(nr, arg, call)
        }
        // SAFETY: the program's ioctl.
        File::Data(data) => unsafe { data.ioctl(nr, arg) },
        File::Remote(device) => {
            // SAFETY: the program's ioctl.
            let logging = |log: &DeviceLog| unsafe { log.ioctl(nr, arg) }.map_err(|e| e.errno());
            let program = remote::Program {
                install: &|state| files::install(File::State(state), true),
                duplicate: &duplicate,
                logging: &logging,
            };
            watch::device(nr, arg, || device.ioctl(nr, arg, &program))
        }
        File::State(state) => state.ioctl(nr, arg),
    })
}

/// Returns another descriptor of the program's file `fd`. EBADF if it is not open.
fn duplicate(fd: c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: with this command fcntl(2) accesses no memory.
    let new = unsafe { fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if new < 0 {
        return Err(Errno::EBADF);
    }
    // SAFETY: it is open, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// The bytes that a program wants read into.
///
/// # Safety
///
/// They are `len` bytes at `buf` that nobody else uses until the call returns, as for read(2).
unsafe fn destination<'a>(buf: *mut c_void, len: usize) -> &'a mut [u8] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: as the caller promises. They may be uninitialised, as read(2) allows, which is
    // harmless here: they are only written.
    unsafe { slice::from_raw_parts_mut(buf.cast(), len) }
}

/// The bytes that a program wants written.
///
/// # Safety
///
/// They are `len` bytes at `buf` that nobody changes until the call returns, as for write(2).
unsafe fn source<'a>(buf: *const c_void, len: usize) -> &'a [u8] {
    if len == 0 {
        return &[];
    }
    // SAFETY: as the caller promises.
    unsafe { slice::from_raw_parts(buf.cast(), len) }
}

macro_rules! pread {
    ($($name:ident $string:literal)*) => {$(
        #[no_mangle]
        unsafe extern "C" fn $name(fd: c_int, buf: *mut c_void, len: usize, offset: i64) -> isize {
            let Some(device) = files::device(fd) else {
                return pass!($string as unsafe extern "C" fn(c_int, *mut c_void, usize, i64) -> isize, fd, buf, len, offset);
            };
            // SAFETY: the caller's, for pread(2).
            let data = unsafe { destination(buf, len) };
            count(device.read(offset as u64, data))
        }
    )*};
}
pread! { pread c"pread" pread64 c"pread64" }

macro_rules! pread_chk {
    ($($name:ident $string:literal)*) => {$(
        #[no_mangle]
        unsafe extern "C" fn $name(fd: c_int, buf: *mut c_void, len: usize, offset: i64, room: usize) -> isize {
            match files::device(fd) {
                // SAFETY: the caller's arguments.
                Some(_) if len <= room => unsafe { pread64(fd, buf, len, offset) },
                // A buffer that is too small ends the program, as it should.
                _ => pass!($string as unsafe extern "C" fn(c_int, *mut c_void, usize, i64, usize) -> isize, fd, buf, len, offset, room),
            }
        }
    )*};
}
pread_chk! { __pread_chk c"__pread_chk" __pread64_chk c"__pread64_chk" }

macro_rules! pwrite {
    ($($name:ident $string:literal)*) => {$(
        #[no_mangle]
        unsafe extern "C" fn $name(fd: c_int, buf: *const c_void, len: usize, offset: i64) -> isize {
            let Some(device) = files::device(fd) else {
                return pass!($string as unsafe extern "C" fn(c_int, *const c_void, usize, i64) -> isize, fd, buf, len, offset);
            };
            // SAFETY: the caller's, for pwrite(2).
            let data = unsafe { source(buf, len) };
            count(device.write(offset as u64, data))
        }
    )*};
}
pwrite! { pwrite c"pwrite" pwrite64 c"pwrite64" }

#[no_mangle]
unsafe extern "C" fn read(fd: c_int, buf: *mut c_void, len: usize) -> isize {
    match files::get(fd) {
        None => pass!(
            c"read" as unsafe extern "C" fn(c_int, *mut c_void, usize) -> isize,
            fd,
            buf,
            len
        ),
        Some(File::Data(data)) => {
            // SAFETY: the caller's, for read(2).
            let to = unsafe { destination(buf, len) };
            count(watch::data("read", data.read(to)))
        }
        Some(File::State(state)) => {
            // SAFETY: the caller's, for read(2).
            let to = unsafe { destination(buf, len) };
            count(watch::data("read", state.read(to)))
        }
        Some(_) => fail(Errno::EINVAL) as isize,
    }
}

#[no_mangle]
unsafe extern "C" fn __read_chk(fd: c_int, buf: *mut c_void, len: usize, room: usize) -> isize {
    match files::get(fd) {
        // SAFETY: the caller's arguments.
        Some(_) if len <= room => unsafe { read(fd, buf, len) },
        _ => pass!(
            c"__read_chk" as unsafe extern "C" fn(c_int, *mut c_void, usize, usize) -> isize,
            fd,
            buf,
            len,
            room
        ),
    }
}

#[no_mangle]
unsafe extern "C" fn write(fd: c_int, buf: *const c_void, len: usize) -> isize {
    match files::get(fd) {
        None => pass!(
            c"write" as unsafe extern "C" fn(c_int, *const c_void, usize) -> isize,
            fd,
            buf,
            len
        ),
        Some(File::Data(data)) => {
            // SAFETY: the caller's, for write(2).
            let from = unsafe { source(buf, len) };
            count(watch::data("write", data.write(from)))
        }
        Some(File::State(state)) => {
            // SAFETY: the caller's, for write(2).
            let from = unsafe { source(buf, len) };
            count(watch::data("write", state.write(from)))
        }
        Some(_) => fail(Errno::EINVAL) as isize,
    }
}

/// Called when the program exits.
extern "C" fn at_exit() {
    files::close_all();
}

/// A function that the dynamic linker calls when the program exits.
#[used]
#[link_section = ".fini_array"]
static AT_EXIT: extern "C" fn() = at_exit;
