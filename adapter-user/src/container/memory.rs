// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guest memory that CPUs and devices read and write at the same time.

use std::ffi::c_void;
use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::slice;
use std::sync::atomic::{AtomicU64, Ordering};

use dirty_core::PageSize;
use nix::fcntl::{fcntl, FcntlArg, SealFlag};
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::mman::{madvise, mmap, mmap_anonymous, munmap, MapFlags, MmapAdvise, ProtFlags};

use crate::host_page::host_page;

const WORD: usize = size_of::<AtomicU64>();

/// The largest page that a container may have on a host with smaller ones.
pub(super) const LARGEST_PAGE: PageSize = match PageSize::new(64 << 10) {
    Some(size) => size,
    None => panic!(), // it is a power of two
};

/// A shared mapping of a memory file: one view of a guest's memory.
///
/// Any number of threads may read and write it at once, without a lock. Accesses that race give a
/// mix of old and new bytes, as they do on hardware.
///
/// # Invariants
///
/// `start` is the start of a shared, readable and writable mapping of `len` bytes, rounded up to
/// whole pages. It is aligned to a page of the host and to 64 KiB, so that a page of a
/// container starts there. The mapping belongs to this value until it is dropped.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    start: NonNull<AtomicU64>,
    len: NonZeroUsize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and `GuestMemory` owns it.
unsafe impl Send for GuestMemory {}
// SAFETY: the bytes are only reached as atomic words.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Creates zeroed memory of `len` bytes in a memory file of its own.
    ///
    /// The file is sealed: nobody who gets hold of it can change its size under a mapping.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if `len` is 0, otherwise the kernel's error.
    pub fn new(len: u64) -> io::Result<Self> {
        let file = File::from(memfd_create(
            c"guest-memory",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )?);
        file.set_len(len)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        Self::of_file(file)
    }

    /// Maps the whole file behind `fd`, for example the memory of another process.
    ///
    /// The file must not shrink later: an access beyond its end ends the process with SIGBUS.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if the file is empty, otherwise the kernel's error.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Self::of_file(File::from(fd))
    }

    /// Maps the same memory once more, at another address.
    ///
    /// Who tracks writes to the first mapping by its page tables does not see writes through the
    /// second one, as with DMA.
    ///
    /// # Errors
    ///
    /// The kernel's error.
    pub fn second_view(&self) -> io::Result<Self> {
        Self::of_file(self.file.try_clone()?)
    }

    fn of_file(file: File) -> io::Result<Self> {
        let len = usize::try_from(file.metadata()?.len())
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(io::ErrorKind::InvalidInput)?;
        let start = map(&file, len)?;
        // INVARIANT: just mapped with exactly these properties, and given to nobody else.
        Ok(Self {
            file,
            start: start.cast(),
            len,
        })
    }

    /// Allocates and maps every page now. Otherwise that happens when a page is first used.
    ///
    /// # Errors
    ///
    /// The kernel's error, for example that there is not enough memory.
    pub fn populate(&self) -> io::Result<()> {
        let advice = MmapAdvise::MADV_POPULATE_WRITE;
        // SAFETY: by the invariant the range is ours; this advice changes no byte of it.
        unsafe { madvise(self.start.cast(), self.len.get(), advice) }?;
        Ok(())
    }

    /// Returns the memory file, to pass it to another process.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Returns the address of the first byte in this process.
    pub fn addr(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Returns the length in bytes, which is never 0.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> u64 {
        self.len.get() as u64
    }

    /// Copies the bytes at byte `offset` of the memory into `bytes`, as many as it has.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`] if not all of them are inside; nothing is copied then.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), OutOfBounds> {
        let (words, skip) = self.words(offset, bytes.len())?;
        let mut words = words.iter();
        let (head, rest) = bytes.split_at_mut(head_len(skip, bytes.len()));
        copy_out(&mut words, skip, head);
        let mut body = rest.chunks_exact_mut(WORD);
        for (bytes, word) in body.by_ref().zip(words.by_ref()) {
            bytes.copy_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
        }
        copy_out(&mut words, 0, body.into_remainder());
        Ok(())
    }

    /// Copies `bytes` into the memory, from byte `offset` on.
    ///
    /// # Errors
    ///
    /// [`OutOfBounds`] if not all of them fit inside; nothing is written then.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), OutOfBounds> {
        let (words, skip) = self.words(offset, bytes.len())?;
        let mut words = words.iter();
        let (head, rest) = bytes.split_at(head_len(skip, bytes.len()));
        copy_in(&mut words, skip, head);
        let mut body = rest.chunks_exact(WORD);
        for (bytes, word) in body.by_ref().zip(words.by_ref()) {
            let mut value = [0; WORD];
            value.copy_from_slice(bytes);
            word.store(u64::from_ne_bytes(value), Ordering::Relaxed);
        }
        copy_in(&mut words, 0, body.remainder());
        Ok(())
    }

    /// Returns the words that hold `len` bytes from `offset` on, and how many bytes to skip in the
    /// first one.
    fn words(&self, offset: u64, len: usize) -> Result<(&[AtomicU64], usize), OutOfBounds> {
        let out_of_bounds = OutOfBounds {
            offset,
            len,
            memory: self.len(),
        };
        let start = usize::try_from(offset).map_err(|_| out_of_bounds)?;
        let end = start
            .checked_add(len)
            .filter(|end| *end <= self.len.get())
            .ok_or(out_of_bounds)?;
        // SAFETY: by the invariant these words are mapped, writable and aligned as long as `self`
        // lives (the last one too, because the mapping ends with a whole page). Every access of
        // this process to them is an atomic one of this size. Any bytes are valid words.
        let all =
            unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len.get().div_ceil(WORD)) };
        let words = all.get(start / WORD..end.div_ceil(WORD));
        Ok((words.ok_or(out_of_bounds)?, start % WORD))
    }
}

impl AsFd for GuestMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        let start: NonNull<c_void> = self.start.cast();
        // SAFETY: by the invariant the mapping is ours. Every reference into it borrows `self`, so
        // none is left.
        let unmapped = unsafe { munmap(start, self.len.get()) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

/// Maps `len` bytes of a file, at an address that is free and aligned to a page of the host and
/// to 64 KiB.
fn map(file: &File, len: NonZeroUsize) -> io::Result<NonNull<c_void>> {
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses an address that is free, so no other object is replaced.
    let start = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, file, 0) }?;
    if LARGEST_PAGE.aligns(start.as_ptr() as u64) {
        return Ok(start);
    }
    // SAFETY: this is the mapping above, and nobody has its address.
    unsafe { munmap(start, len.get()) }?;
    map_in_room(file, len, prot)
}

/// As [`map`], in a range with so much room that an aligned address is in it.
fn map_in_room(file: &File, len: NonZeroUsize, prot: ProtFlags) -> io::Result<NonNull<c_void>> {
    let (page, align) = (host_page().bytes() as usize, LARGEST_PAGE.bytes() as usize);
    let room = len.checked_add(align).ok_or(io::ErrorKind::OutOfMemory)?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: the kernel chooses an address that is free, so no other object is replaced.
    let room_start = unsafe { mmap_anonymous(None, room, ProtFlags::PROT_NONE, flags) }?;
    let before = (room_start.as_ptr() as usize).wrapping_neg() % align;
    // SAFETY: it is inside the room.
    let start = unsafe { room_start.byte_add(before) };
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED;
    // SAFETY: these bytes are inside the room, and nobody has its address.
    let mapped = unsafe { mmap(Some(start.addr()), len, prot, flags, file, 0) };
    let used = mapped.map_or(0, |_| len.get().next_multiple_of(page));
    // What is not used goes again.
    let behind = before + used;
    for (at, bytes) in [(0, before), (behind, room.get() - behind)] {
        // SAFETY: it is inside the room.
        let unused = unsafe { room_start.byte_add(at) };
        if bytes != 0 {
            // SAFETY: nobody has the address of this part of the room.
            unsafe { munmap(unused, bytes) }?;
        }
    }
    Ok(mapped?)
}

/// Returns how many of `len` bytes come before the first whole word.
fn head_len(skip: usize, len: usize) -> usize {
    if skip == 0 {
        0
    } else {
        len.min(WORD - skip)
    }
}

/// Copies a part of a word out.
fn copy_out(words: &mut slice::Iter<'_, AtomicU64>, skip: usize, bytes: &mut [u8]) {
    if bytes.is_empty() {
        return;
    }
    if let Some(word) = words.next() {
        let value = word.load(Ordering::Relaxed).to_ne_bytes();
        bytes.copy_from_slice(&value[skip..skip + bytes.len()]);
    }
}

/// Changes a part of a word. Every access is to a whole word, because atomic accesses of different
/// sizes to the same bytes must not race.
fn copy_in(words: &mut slice::Iter<'_, AtomicU64>, skip: usize, bytes: &[u8]) {
    if bytes.is_empty() {
        return;
    }
    if let Some(word) = words.next() {
        let merged = |old: u64| {
            let mut value = old.to_ne_bytes();
            value[skip..skip + bytes.len()].copy_from_slice(bytes);
            u64::from_ne_bytes(value)
        };
        let mut old = word.load(Ordering::Relaxed);
        while let Err(now) =
            word.compare_exchange_weak(old, merged(old), Ordering::Relaxed, Ordering::Relaxed)
        {
            old = now;
        }
    }
}

/// An access that is not wholly inside the guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfBounds {
    /// The offset of the access, in bytes.
    pub offset: u64,
    /// The length of the access, in bytes.
    pub len: usize,
    /// The length of the memory, in bytes.
    pub memory: u64,
}

impl fmt::Display for OutOfBounds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes at offset {:#x} are not inside the guest memory of {:#x} bytes",
            self.len, self.offset, self.memory
        )
    }
}

impl std::error::Error for OutOfBounds {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offset_and_length_of_a_few_words() {
        for offset in 0..20 {
            for len in 0..20 {
                let memory = GuestMemory::new(4096).unwrap();
                let before: Vec<u8> = (0..64).map(|i| 100 + i).collect();
                memory.write(0, &before).unwrap();
                let bytes: Vec<u8> = (0..len).map(|i| 1 + i).collect();
                memory.write(offset as u64, &bytes).unwrap();

                let mut expected = before;
                expected[offset..offset + bytes.len()].copy_from_slice(&bytes);
                let mut all = [0; 64];
                memory.read(0, &mut all).unwrap();
                assert_eq!(all, expected[..]);

                let mut same = vec![0; bytes.len()];
                memory.read(offset as u64, &mut same).unwrap();
                assert_eq!(same, bytes);
            }
        }
    }

    #[test]
    fn a_second_view_and_a_passed_file_show_the_same_bytes() {
        let memory = GuestMemory::new(8192).unwrap();
        let view = memory.second_view().unwrap();
        let passed = GuestMemory::from_fd(memory.as_fd().try_clone_to_owned().unwrap()).unwrap();
        assert_ne!(view.addr(), memory.addr());
        assert_eq!(passed.len(), 8192);
        view.populate().unwrap();

        view.write(4095, &[1, 2, 3]).unwrap();
        drop(view);
        for view in [&memory, &passed] {
            let mut bytes = [0; 5];
            view.read(4094, &mut bytes).unwrap();
            assert_eq!(bytes, [0, 1, 2, 3, 0]);
        }
    }

    #[test]
    fn bounds_are_checked() {
        let memory = GuestMemory::new(4097).unwrap();
        assert_eq!(memory.write(4096, &[7]), Ok(()));
        assert_eq!(memory.write(4097, &[]), Ok(()));
        for (offset, len) in [(4097, 1), (4096, 2), (4098, 0), (u64::MAX, 1), (0, 4098)] {
            let error = OutOfBounds {
                offset,
                len,
                memory: 4097,
            };
            assert_eq!(memory.write(offset, &vec![1; len]), Err(error));
            assert_eq!(memory.read(offset, &mut vec![1; len]), Err(error));
        }
        assert!(GuestMemory::new(0).is_err());
        assert!(GuestMemory::new(u64::MAX).is_err());
    }

    #[test]
    fn the_file_of_a_memory_keeps_its_size() {
        let memory = GuestMemory::new(8192).unwrap();
        assert!(File::from(memory.as_fd().try_clone_to_owned().unwrap())
            .set_len(4096)
            .is_err());
    }

    #[test]
    fn neighbours_in_one_word_do_not_undo_each_other() {
        let memory = GuestMemory::new(4096).unwrap();
        std::thread::scope(|scope| {
            for byte in 0..8 {
                let memory = &memory;
                scope.spawn(move || {
                    for value in 0..10_000_u32 {
                        memory.write(byte, &[value as u8]).unwrap();
                        let mut now = [0];
                        memory.read(byte, &mut now).unwrap();
                        assert_eq!(now, [value as u8]);
                    }
                });
            }
        });
    }
}
