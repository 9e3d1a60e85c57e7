// SPDX-License-Identifier: GPL-2.0-only
//! Memory for the arguments of ioctls: one page that can be written, one that can only
//! be read, and none after it.

use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use dirty_model::migration::Place;
use nix::sys::mman::{mmap_anonymous, mprotect, munmap, MapFlags, ProtFlags};

const PAGE: usize = 4096;

/// Three pages: can be written; can be read only while an ioctl runs; are not there.
pub(crate) struct Pages(NonNull<u8>);

impl Pages {
    pub(crate) fn new() -> io::Result<Pages> {
        let size = NonZeroUsize::new(4 * PAGE).expect("not zero");
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a mapping at an address that the kernel chooses replaces nothing.
        let pages = unsafe { mmap_anonymous(None, size, prot, MapFlags::MAP_PRIVATE) }?;
        let pages = Pages(pages.cast());
        // SAFETY: these are two pages of the mapping.
        unsafe { munmap(pages.at(PAGE).cast(), PAGE) }?;
        // SAFETY: as above.
        unsafe { munmap(pages.at(3 * PAGE).cast(), PAGE) }?;
        Ok(pages)
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        // SAFETY: `offset` is inside the four pages that were mapped as one.
        unsafe { self.0.add(offset) }
    }

    /// Puts an argument where `place` says, calls `act` with its address, and returns
    /// what `act` does and the argument as it is then, as far as it can be read.
    pub(crate) fn with<R>(
        &self,
        place: Place,
        argument: &[u8; 64],
        act: impl FnOnce(usize) -> R,
    ) -> io::Result<(R, [u8; 64])> {
        let offset = match place {
            Place::Mem => 0,
            Place::Half => PAGE - 8,
            Place::Hole => PAGE,
            Place::ReadOnly => 2 * PAGE,
        };
        let addr = self.at(offset);
        let there = place.readable().min(argument.len());
        // SAFETY: so many bytes are mapped there and can be written.
        unsafe {
            argument
                .as_ptr()
                .copy_to_nonoverlapping(addr.as_ptr(), there)
        };
        if place == Place::ReadOnly {
            self.protect(ProtFlags::PROT_READ)?;
        }
        let done = act(addr.as_ptr() as usize);
        let mut after = [0; 64];
        // SAFETY: so many bytes are mapped there and can be read.
        unsafe {
            after
                .as_mut_ptr()
                .copy_from_nonoverlapping(addr.as_ptr(), there)
        };
        self.protect(ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
        Ok((done, after))
    }

    fn protect(&self, prot: ProtFlags) -> io::Result<()> {
        // SAFETY: the page belongs to the mapping, and nothing refers to it.
        unsafe { mprotect(self.at(2 * PAGE).cast(), PAGE, prot) }?;
        Ok(())
    }
}
