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
use linux_raw_sys::general as linux;
use linux_raw_sys::general::{page_region, pm_scan_arg};
use linux_raw_sys::general::{uffdio_api, uffdio_range, uffdio_register, uffdio_writeprotect};

mod ioctls {
    use linux_raw_sys::general as linux;

    nix::ioctl_readwrite!(
        #[allow(unreachable_pub)]
        api,
        linux::UFFDIO,
        linux::_UFFDIO_API,
        linux::uffdio_api
    );
    nix::ioctl_readwrite!(
        #[allow(unreachable_pub)]
        register,
        linux::UFFDIO,
        linux::_UFFDIO_REGISTER,
        linux::uffdio_register
    );
    nix::ioctl_readwrite!(
        #[allow(unreachable_pub)]
        writeprotect,
        linux::UFFDIO,
        linux::_UFFDIO_WRITEPROTECT,
        linux::uffdio_writeprotect
    );
    nix::ioctl_readwrite!(
        #[allow(unreachable_pub)]
        pagemap_scan,
        b'f',
        16,
        linux::pm_scan_arg
    );
}

/// linux-raw-sys does not have it.
const UFFDIO_WRITEPROTECT_MODE_WP: u64 = 1 << 0;

pub(super) struct CpuTracker {
    memory: Arc<GuestMemory>,
    pagemap: File,
    /// The protection ends when this is closed.
    _userfaultfd: OwnedFd,
    regions: Vec<page_region>,
}

const NONE: page_region = page_region {
    start: 0,
    end: 0,
    categories: 0,
};

impl CpuTracker {
    /// Protects all of `memory`. From now on, [`scan`](Self::scan) finds writes through this mapping.
    pub(super) fn protect(memory: &Arc<GuestMemory>) -> io::Result<Self> {
        let userfaultfd = open_userfaultfd()?;
        let fd = userfaultfd.as_raw_fd();
        let mut api = uffdio_api {
            api: linux::UFFD_API.into(),
            features: u64::from(
                linux::UFFD_FEATURE_WP_HUGETLBFS_SHMEM
                    | linux::UFFD_FEATURE_WP_UNPOPULATED
                    | linux::UFFD_FEATURE_WP_ASYNC,
            ),
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes only the argument.
        unsafe { ioctls::api(fd, &mut api) }?;
        let range = uffdio_range {
            start: memory.addr(),
            len: memory.len(),
        };
        let mut register = uffdio_register {
            range,
            mode: linux::UFFDIO_REGISTER_MODE_WP.into(),
            ioctls: 0,
        };
        // SAFETY: as above. Asynchronous protection changes neither contents nor access rights.
        unsafe { ioctls::register(fd, &mut register) }?;
        let mut protect = uffdio_writeprotect {
            range,
            mode: UFFDIO_WRITEPROTECT_MODE_WP,
        };
        // SAFETY: as above.
        unsafe { ioctls::writeprotect(fd, &mut protect) }?;
        let mut tracker = Self {
            memory: Arc::clone(memory),
            pagemap: File::open("/proc/self/pagemap")?,
            _userfaultfd: userfaultfd,
            regions: vec![NONE; 4096],
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
        let mut scan = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: u64::from(linux::PM_SCAN_WP_MATCHING | linux::PM_SCAN_CHECK_WPASYNC),
            start,
            end: self.end(),
            walk_end: 0,
            vec: self.regions.as_mut_ptr() as u64,
            vec_len: self.regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: linux::PAGE_IS_WRITTEN.into(),
            category_anyof_mask: 0,
            return_mask: linux::PAGE_IS_WRITTEN.into(),
        };
        // SAFETY: the kernel writes the argument and at most `vec_len` regions to `vec`.
        let found = unsafe { ioctls::pagemap_scan(self.pagemap.as_raw_fd(), &mut scan) }?;
        Ok((found as usize, scan.walk_end))
    }
}

fn open_userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | linux::UFFD_USER_MODE_ONLY as libc::c_int;
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
