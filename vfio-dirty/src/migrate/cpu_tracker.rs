// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tracks the writes of CPUs by the kernel's asynchronous write protection.
//!
//! A write to a protected page removes the protection and goes on without a signal. PAGEMAP_SCAN
//! lists the pages without protection and protects them again, in one step.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use adapter_user::guest::SourceError;
use adapter_user::GuestMemory;

/// `struct uffdio_api`
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<UffdioApi>() == 24);

const UFFD_API: u64 = 0xaa;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

/// `struct uffdio_register`
#[repr(C)]
struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
const _: () = assert!(size_of::<UffdioRegister>() == 32);

const UFFDIO_REGISTER_MODE_WP: u64 = 1 << 1;

/// `struct uffdio_writeprotect`
#[repr(C)]
struct UffdioWriteprotect {
    start: u64,
    len: u64,
    mode: u64,
}
const _: () = assert!(size_of::<UffdioWriteprotect>() == 24);

const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// `struct pm_scan_arg`
#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<PmScanArg>() == 96);

/// `struct page_region`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}
const _: () = assert!(size_of::<PageRegion>() == 24);

const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;

mod ioctls {
    use super::{PmScanArg, UffdioApi, UffdioRegister, UffdioWriteprotect};

    nix::ioctl_readwrite!(
        #[allow(unreachable_pub)]
        uffdio_api,
        0xaa,
        0x3f,
        UffdioApi
    );
    nix::ioctl_readwrite!(
        #[allow(unreachable_pub)]
        uffdio_register,
        0xaa,
        0x00,
        UffdioRegister
    );
    nix::ioctl_readwrite!(
        #[allow(unreachable_pub)]
        uffdio_writeprotect,
        0xaa,
        0x06,
        UffdioWriteprotect
    );
    nix::ioctl_readwrite!(
        #[allow(unreachable_pub)]
        pagemap_scan,
        b'f',
        16,
        PmScanArg
    );
}

pub(super) struct CpuTracker {
    memory: Arc<GuestMemory>,
    pagemap: File,
    /// The protection ends when this is closed.
    _userfaultfd: OwnedFd,
    regions: Vec<PageRegion>,
}

impl CpuTracker {
    /// Protects all of `memory`. From now on, [`scan`](Self::scan) finds writes through this mapping.
    pub(super) fn protect(memory: &Arc<GuestMemory>) -> io::Result<Self> {
        let userfaultfd = open_userfaultfd()?;
        let fd = userfaultfd.as_raw_fd();
        let mut api = UffdioApi {
            api: UFFD_API,
            features: UFFD_FEATURE_WP_HUGETLBFS_SHMEM
                | UFFD_FEATURE_WP_UNPOPULATED
                | UFFD_FEATURE_WP_ASYNC,
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes only the argument.
        unsafe { ioctls::uffdio_api(fd, &mut api) }?;
        let mut register = UffdioRegister {
            start: memory.addr(),
            len: memory.len(),
            mode: UFFDIO_REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: as above. Asynchronous protection changes neither contents nor access rights.
        unsafe { ioctls::uffdio_register(fd, &mut register) }?;
        let mut protect = UffdioWriteprotect {
            start: memory.addr(),
            len: memory.len(),
            mode: UFFDIO_WRITEPROTECT_MODE_WP,
        };
        // SAFETY: as above.
        unsafe { ioctls::uffdio_writeprotect(fd, &mut protect) }?;
        let mut tracker = Self {
            memory: Arc::clone(memory),
            pagemap: File::open("/proc/self/pagemap")?,
            _userfaultfd: userfaultfd,
            regions: vec![PageRegion::default(); 4096],
        };
        tracker.next(memory.addr())?; // fails here if the kernel has no PAGEMAP_SCAN
        Ok(tracker)
    }

    /// Calls `written` with the address and bytes of each range written since the last call.
    pub(super) fn scan(
        &mut self,
        mut written: impl FnMut(u64, u64) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let mut start = self.memory.addr();
        while start < self.end() {
            let (found, next) = self.next(start)?;
            for region in self.regions.iter().take(found) {
                written(region.start, region.end - region.start)?;
            }
            start = next;
        }
        Ok(())
    }

    fn end(&self) -> u64 {
        self.memory.addr() + self.memory.len()
    }

    /// Fills `regions` from `start` on. Returns how many there are, and where to go on.
    fn next(&mut self, start: u64) -> io::Result<(usize, u64)> {
        let mut scan = PmScanArg {
            size: size_of::<PmScanArg>() as u64,
            flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            start,
            end: self.end(),
            walk_end: 0,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: PAGE_IS_WRITTEN,
            category_anyof_mask: 0,
            return_mask: PAGE_IS_WRITTEN,
        };
        // SAFETY: the kernel writes the argument and at most `vec_len` regions to `vec`.
        let found = unsafe { ioctls::pagemap_scan(self.pagemap.as_raw_fd(), &mut scan) }?;
        Ok((found as usize, scan.walk_end))
    }
}

fn open_userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY;
    // SAFETY: the system call takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = RawFd::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just opened this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::guest::PAGE;

    /// Also shows that writes through another mapping are not seen, as those of DMA are not.
    #[test]
    fn writes_are_seen_once_and_only_through_this_mapping() {
        let memory = Arc::new(GuestMemory::new(64 * PAGE).unwrap());
        let dma = memory.second_view().unwrap();
        memory.write(3 * PAGE, &[1]).unwrap();
        let mut tracker = match CpuTracker::protect(&memory) {
            Ok(tracker) => tracker,
            Err(e) => {
                // A kernel before Linux 6.7, for which `migrate` has --no-cpu.
                let missing = [libc::EINVAL, libc::ENOSYS, libc::ENOTTY, libc::EPERM];
                assert!(missing.map(Some).contains(&e.raw_os_error()), "{e}");
                return;
            }
        };
        let mut collect = || {
            let mut pages = Vec::new();
            let scanned = tracker.scan(|addr, size| {
                let first = (addr - memory.addr()) / PAGE;
                pages.extend(first..first + size / PAGE);
                Ok(())
            });
            scanned.unwrap();
            pages
        };
        assert_eq!(collect(), [0; 0]);

        memory.write(PAGE - 1, &[1, 2]).unwrap();
        memory.write(3 * PAGE, &[2]).unwrap();
        memory.write(63 * PAGE, &[2]).unwrap();
        dma.write(5 * PAGE, &[2]).unwrap();
        memory.read(7 * PAGE, &mut [0]).unwrap();
        assert_eq!(collect(), [0, 1, 3, 63]);
        assert_eq!(collect(), [0; 0]);

        memory.write(5 * PAGE, &[3]).unwrap();
        memory.write(63 * PAGE, &[3]).unwrap();
        assert_eq!(collect(), [5, 63]);
    }
}
