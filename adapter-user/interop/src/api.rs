// SPDX-License-Identifier: MIT OR Apache-2.0
//! The functions of libvfio-user.h that the tests call.
//!
//! This is the only file with `unsafe` in it, but for the descriptors in `relay.rs`. A test
//! calls from one thread, and gives contexts, callbacks and structures as it would give them
//! to libvfio-user.

use std::ffi::{c_char, c_int, c_ulong, c_void, CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::ptr;
use std::slice;

use crate::context::Context;
use crate::model::{Data, MigrationCallbacks, Transition};

/// `vfu_migration_callbacks_t`.
#[repr(C)]
struct Callbacks {
    version: c_int,
    transition: Transition,
    read: Data,
    write: Data,
}

/// `dma_sg_t`, whose fields only the tests look at.
#[repr(C)]
struct Segment {
    iova: u64,
    region: c_int,
    length: u64,
    offset: u64,
    writable: bool,
}

fn fail(errno: c_int) -> c_int {
    // SAFETY: the address is that of this thread's errno.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above; nobody else accesses it.
    unsafe { place.write(errno) };
    -1
}

fn answer(result: Result<(), c_int>) -> c_int {
    result.map_or_else(fail, |()| 0)
}

/// The context that a test means.
///
/// # Safety
///
/// It is one of `vfu_create_ctx` that was not destroyed.
unsafe fn context<'a>(context: *mut Context) -> &'a mut Context {
    // SAFETY: as the caller promises; the tests call from one thread.
    unsafe { &mut *context }
}

#[no_mangle]
unsafe extern "C" fn vfu_create_ctx(
    transport: c_int,
    path: *const c_char,
    flags: c_int,
    _private: *mut c_void,
    kind: c_int,
) -> *mut Context {
    if transport != 0 || flags & !1 != 0 || kind != 0 {
        fail(libc::EINVAL);
        return ptr::null_mut();
    }
    // SAFETY: the caller gives a string that ends with a zero.
    let path = unsafe { CStr::from_ptr(path) };
    let path = PathBuf::from(OsStr::from_bytes(path.to_bytes()));
    let context = Box::into_raw(Box::new(Context::new(path)));
    // SAFETY: it was made just now.
    unsafe { (*context).setup.lock().context = context as usize };
    context
}

#[no_mangle]
unsafe extern "C" fn vfu_destroy_ctx(context: *mut Context) {
    if !context.is_null() {
        // SAFETY: `vfu_create_ctx` made it, and the caller gives it back.
        drop(unsafe { Box::from_raw(context) });
    }
}

#[no_mangle]
unsafe extern "C" fn vfu_realize_ctx(ctx: *mut Context) -> c_int {
    // SAFETY: the caller's context.
    answer(unsafe { context(ctx) }.realize())
}

#[no_mangle]
unsafe extern "C" fn vfu_attach_ctx(ctx: *mut Context) -> c_int {
    // SAFETY: the caller's context.
    answer(unsafe { context(ctx) }.attach())
}

#[no_mangle]
unsafe extern "C" fn vfu_run_ctx(ctx: *mut Context) -> c_int {
    // SAFETY: the caller's context.
    answer(unsafe { context(ctx) }.run())
}

#[no_mangle]
unsafe extern "C" fn vfu_pci_init(ctx: *mut Context, kind: c_int, _: c_int, _: c_int) -> c_int {
    let size = if kind == 3 { 4096 } else { 256 };
    // SAFETY: the caller's context.
    unsafe { context(ctx) }.setup.lock().regions[7] = size;
    0
}

#[no_mangle]
unsafe extern "C" fn vfu_setup_region(
    ctx: *mut Context,
    index: c_int,
    size: c_ulong,
    _access: *mut c_void,
    _flags: c_int,
    _areas: *mut c_void,
    _count: u32,
    _fd: c_int,
    _offset: u64,
) -> c_int {
    // SAFETY: the caller's context.
    let mut setup = unsafe { context(ctx) }.setup.lock();
    match usize::try_from(index)
        .ok()
        .and_then(|i| setup.regions.get_mut(i))
    {
        Some(region) => {
            *region = size;
            0
        }
        None => fail(libc::EINVAL),
    }
}

#[no_mangle]
unsafe extern "C" fn vfu_setup_device_nr_irqs(ctx: *mut Context, index: c_int, n: u32) -> c_int {
    // SAFETY: the caller's context.
    let mut setup = unsafe { context(ctx) }.setup.lock();
    match usize::try_from(index)
        .ok()
        .and_then(|i| setup.irqs.get_mut(i))
    {
        Some(irqs) => {
            *irqs = n;
            0
        }
        None => fail(libc::EINVAL),
    }
}

#[no_mangle]
unsafe extern "C" fn vfu_setup_device_migration_callbacks(
    ctx: *mut Context,
    callbacks: *const Callbacks,
) -> c_int {
    // SAFETY: the caller gives its structure.
    let callbacks = unsafe { &*callbacks };
    if callbacks.version != 2 {
        return fail(libc::EINVAL);
    }
    // SAFETY: the caller's context.
    unsafe { context(ctx) }.setup.lock().migration = Some(MigrationCallbacks {
        transition: callbacks.transition,
        read: callbacks.read,
        write: callbacks.write,
    });
    0
}

#[no_mangle]
extern "C" fn dma_sg_size() -> usize {
    size_of::<Segment>()
}

#[no_mangle]
unsafe extern "C" fn vfu_addr_to_sgl(
    ctx: *mut Context,
    iova: u64,
    length: usize,
    segments: *mut Segment,
    _max: usize,
    prot: c_int,
) -> c_int {
    // SAFETY: the caller's context.
    if !unsafe { context(ctx) }.is_mapped(iova, length as u64) {
        return fail(libc::ENOENT);
    }
    let segment = Segment {
        iova,
        region: 0,
        length: length as u64,
        offset: 0,
        writable: prot & libc::PROT_WRITE != 0,
    };
    // SAFETY: the caller has room for one, which a test always needs.
    unsafe { segments.write(segment) };
    1
}

#[no_mangle]
unsafe extern "C" fn vfu_sgl_put(
    ctx: *mut Context,
    segments: *const Segment,
    _vectors: *mut c_void,
    count: usize,
) {
    // SAFETY: the caller's context.
    let dma = unsafe { context(ctx) }.setup.lock().dma.clone();
    // SAFETY: the caller gives so many.
    let segments = unsafe { slice::from_raw_parts(segments, count) };
    for segment in segments {
        if let (Some(dma), true) = (&dma, segment.writable) {
            let _ = dma.mark(segment.iova, segment.length); // the report shows whether it worked
        }
    }
}

/// Functions that do nothing here, and say that they worked.
macro_rules! accept {
    ($($name:ident)*) => {$(
        #[no_mangle]
        extern "C" fn $name() -> c_int {
            0
        }
    )*};
}
accept! {
    vfu_setup_log vfu_setup_device_reset_cb vfu_setup_device_quiesce_cb vfu_setup_device_dma
    vfu_setup_irq_state_callback vfu_sgl_get
}

/// Functions of what the server does not have.
macro_rules! refuse {
    ($($name:ident)*) => {$(
        #[no_mangle]
        extern "C" fn $name() -> c_int {
            fail(libc::ENOTSUP)
        }
    )*};
}
refuse! {
    vfu_pci_add_capability vfu_irq_trigger vfu_sgl_read vfu_sgl_write vfu_create_ioeventfd
    vfu_device_quiesced
}

/// Functions of what the server does not have, which answer a pointer or an offset.
macro_rules! none {
    ($($name:ident)*) => {$(
        #[no_mangle]
        extern "C" fn $name() -> c_ulong {
            0
        }
    )*};
}
none! { vfu_pci_get_config_space vfu_pci_find_capability vfu_pci_find_next_capability }
