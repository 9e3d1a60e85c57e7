// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which pages the CPUs wrote: the kernel's asynchronous write protection.
//!
//! A write to a protected page takes the protection away and goes on at once. PAGEMAP_SCAN lists
//! the pages without protection and protects them again, in one step.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use adapter_user::GuestMemory;

use super::guest::PAGE;
use super::page_set::PageSet;

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
    /// Protection ends when it is closed.
    _userfaultfd: OwnedFd,
    regions: Vec<PageRegion>,
}

impl CpuTracker {
    /// Protects all of `memory`: from now on a write through this mapping leaves a trace.
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
        // SAFETY: the argument is what this request reads and writes.
        unsafe { ioctls::uffdio_api(fd, &mut api) }?;
        let mut register = UffdioRegister {
            start: memory.addr(),
            len: memory.len(),
            mode: UFFDIO_REGISTER_MODE_WP,
            ioctls: 0,
        };
        // SAFETY: as above; asynchronous protection changes neither contents nor what may be
        // accessed.
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
        tracker.collect(&mut PageSet::new(0))?; // fails now where the kernel has no PAGEMAP_SCAN
        Ok(tracker)
    }

    /// Adds the pages written since the last call to `dirty`.
    pub(super) fn collect(&mut self, dirty: &mut PageSet) -> io::Result<()> {
        let base = self.memory.addr();
        let end = base + self.memory.len();
        let mut start = base;
        while start < end {
            let mut scan = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                start,
                end,
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
            for region in self.regions.iter().take(found as usize) {
                dirty.insert((region.start - base) / PAGE..(region.end - base) / PAGE);
            }
            start = scan.walk_end;
        }
        Ok(())
    }
}

fn open_userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | UFFD_USER_MODE_ONLY;
    // SAFETY: the call takes no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    let fd = RawFd::try_from(fd)
        .ok()
        .filter(|fd| *fd >= 0)
        .ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also tells what the other mapping is good for: what is written there is not seen.
    #[test]
    fn writes_are_seen_once_and_only_through_this_mapping() {
        let memory = Arc::new(GuestMemory::new(64 * PAGE).unwrap());
        let dma = memory.second_view().unwrap();
        memory.write(3 * PAGE, &[1]).unwrap();
        let mut tracker = match CpuTracker::protect(&memory) {
            Ok(tracker) => tracker,
            Err(e) => {
                // Before Linux 6.7; `migrate` then offers --no-cpu.
                let missing = [libc::EINVAL, libc::ENOSYS, libc::ENOTTY, libc::EPERM];
                assert!(missing.map(Some).contains(&e.raw_os_error()), "{e}");
                return;
            }
        };
        let mut collect = || {
            let mut dirty = PageSet::new(64);
            tracker.collect(&mut dirty).unwrap();
            dirty.iter().collect::<Vec<_>>()
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
