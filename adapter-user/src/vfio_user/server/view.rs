// SPDX-License-Identifier: MIT OR Apache-2.0
//! A client's files in this process, and their mappings in the container. All unsafe code of
//! vfio-user is here.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use dirty_core::host::Prot;
use dirty_core::{Errno, Error};
use nix::libc::off_t;
use nix::sys::mman::{mmap, munmap, MapFlags, ProtFlags};

use crate::container::memory::GuestMemory;
use crate::container::Container;

/// A part of a file, mapped into this process. Only the kernel copies from and to it
/// (process_vm_readv(2)), so that a page which the file has lost is an error and no signal.
///
/// # Invariants
///
/// `start` is the start of a shared mapping of `len` bytes, which belongs to this value until it
/// is dropped. There is no reference into it.
pub(super) struct View {
    start: NonNull<c_void>,
    len: NonZeroUsize,
    /// Where the first byte is in the file.
    offset: u64,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `View` owns it.
unsafe impl Send for View {}
// SAFETY: no method reaches the bytes.
unsafe impl Sync for View {}

impl View {
    /// Maps `len` bytes of a file from `offset` on, to write them too if `writable`.
    ///
    /// # Errors
    ///
    /// EINVAL for no bytes; those of mmap(2).
    pub(super) fn new(
        file: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        writable: bool,
    ) -> Result<View, Errno> {
        let size = usize::try_from(len).ok().and_then(NonZeroUsize::new);
        let size = size.ok_or(Errno::EINVAL)?;
        let at = off_t::try_from(offset).map_err(|_| Errno::EINVAL)?;
        let prot = match writable {
            true => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            false => ProtFlags::PROT_READ,
        };
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses an address that is free, so no other object is replaced.
        let start = unsafe { mmap(None, size, prot, flags, file, at) };
        // INVARIANT: just mapped with exactly these properties, and given to nobody else.
        Ok(View {
            start: start.map_err(|errno| Errno(errno as i32))?,
            len: size,
            offset,
        })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: by the invariant the mapping is ours, and there is no reference into it. Each
        // mapping of it in a container has gone: see `Mapped`.
        let unmapped = unsafe { munmap(self.start, self.len.get()) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

/// What a mapping in the container reaches.
#[derive(Clone)]
pub(super) enum Backing {
    /// A file that cannot shrink.
    Direct(Arc<GuestMemory>),
    /// Any other file.
    Checked(Arc<View>),
}

/// A mapping in a container, and the memory behind it.
pub(super) struct Mapped {
    container: Container,
    iova: u64,
    size: u64,
    /// `None` only while this is dropped.
    backing: Option<Backing>,
    gone: AtomicBool,
}

impl Mapped {
    /// Maps `size` bytes of a file, from byte `offset` on, at `iova` of a container. The backing
    /// must have them.
    ///
    /// # Errors
    ///
    /// As [`Container::map`].
    pub(super) fn new(
        container: &Container,
        backing: Backing,
        (iova, size): (u64, u64),
        offset: u64,
        prot: Prot,
    ) -> Result<Mapped, Error> {
        match &backing {
            Backing::Direct(memory) => container.map(iova, memory, offset, size, prot)?,
            Backing::Checked(view) => {
                let skip = offset.checked_sub(view.offset).ok_or(Error::Wraps)?;
                let end = skip.checked_add(size).ok_or(Error::Wraps)?;
                if end > view.len.get() as u64 {
                    return Err(Error::Wraps);
                }
                let vaddr = view.start.as_ptr() as u64 + skip;
                // SAFETY: the bytes are in the view, by the check above. Nobody has a reference
                // into the view, and it stays mapped until they are unmapped here: `Mapped` owns
                // a handle to it, and drops that after it has unmapped, or not at all.
                unsafe { container.map_process(iova, vaddr, size, prot) }?;
            }
        }
        Ok(Mapped {
            container: container.clone(),
            iova,
            size,
            backing: Some(backing),
            gone: AtomicBool::new(false),
        })
    }

    /// Unmaps it from the container. The device is told first, and accesses have ended when this
    /// returns. A second call does nothing.
    ///
    /// # Errors
    ///
    /// As [`Container::unmap`].
    pub(super) fn unmap(&self) -> Result<(), Error> {
        if self.gone.load(Ordering::Acquire) {
            return Ok(());
        }
        self.container.unmap(self.iova, self.size)?;
        self.gone.store(true, Ordering::Release);
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if self.unmap().is_err() {
            // A device keeps it pinned, so the memory must stay for as long as the process.
            std::mem::forget(self.backing.take());
        }
    }
}
