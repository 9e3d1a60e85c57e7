// SPDX-License-Identifier: GPL-2.0-only
//! Memory of certain kinds at chosen addresses: huge pages, scattered pages, the
//! registers of a device.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use dirty_core::uapi::VFIO_SET_IOMMU;
use dirty_script::op::PAGE;
use dirty_script::System;
use nix::sys::memfd::{memfd_create, MFdFlags};
use nix::sys::mman::{madvise, mmap, mmap_anonymous, MapFlags, MmapAdvise, ProtFlags};

use crate::ask::text;
use crate::real::{address, open, raw_ioctl, Real, GROUP_GET_DEVICE_FD, GROUP_SET_CONTAINER};

/// Bytes of a transparent huge page, and of a page of hugetlb.
pub(crate) const HUGE_PAGE: u64 = 2 << 20;

/// The PCI device with a large BAR, and where VFIO puts that in the device's file.
const BAR_DEVICE: &str = "0000:00:09.0";
const BAR: i64 = 2 << 40;

/// Whether fresh anonymous memory consists of huge pages.
pub(crate) fn huge_pages(on: bool) -> Result<(), String> {
    let when = if on { "always" } else { "never" };
    fs::write("/sys/kernel/mm/transparent_hugepage/enabled", when).map_err(text)
}

/// Has the kernel keep so many pages for hugetlb.
pub(crate) fn reserve_hugetlb(pages: u64) -> Result<(), String> {
    let file = "/proc/sys/vm/nr_hugepages";
    fs::write(file, pages.to_string()).map_err(text)?;
    match fs::read_to_string(file).map_err(text)?.trim() == pages.to_string() {
        true => Ok(()),
        false => Err(format!("the VM has no {pages} huge pages")),
    }
}

fn touch(real: &mut Real, addr: u64) -> Result<(), String> {
    match real.poke(addr, &[1]) {
        true => Ok(()),
        false => Err(format!("no memory at {addr:#x}")),
    }
}

/// Transparent huge pages at `addr`.
pub(crate) fn transparent(real: &mut Real, addr: u64, size: u64) -> Result<(), String> {
    huge_pages(true)?;
    real.map_memory(addr, size, true).map_err(text)?;
    for at in (addr..addr + size).step_by(HUGE_PAGE as usize) {
        touch(real, at)?;
    }
    huge_pages(false)
}

/// Pages at `addr` of which no two neighbours are next to each other in memory: every
/// other page that the kernel gives out.
pub(crate) fn scattered(real: &mut Real, addr: u64, size: u64) -> Result<(), String> {
    huge_pages(false)?;
    real.map_memory(addr, 2 * size, true).map_err(text)?;
    for at in (addr..addr + size).step_by(PAGE as usize) {
        touch(real, at)?;
        touch(real, at + size)?;
    }
    Ok(())
}

/// Pages of hugetlb in place of the memory at `addr`.
pub(crate) fn replace_by_hugetlb(addr: u64, size: u64) -> Result<(), String> {
    let (at, len) = place(addr, size)?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB | MapFlags::MAP_FIXED;
    // SAFETY: the memory is the scripts', of which this program keeps no reference.
    unsafe { mmap_anonymous(at, len, RW, flags) }
        .map(|_| ())
        .map_err(text)
}

fn place(addr: u64, size: u64) -> Result<(Option<NonZeroUsize>, NonZeroUsize), String> {
    let len = NonZeroUsize::new(size as usize).ok_or("no bytes to map")?;
    Ok((NonZeroUsize::new(addr as usize), len))
}

const RW: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// Pages of hugetlb at `addr`.
pub(crate) fn hugetlb(real: &mut Real, addr: u64, size: u64) -> Result<(), String> {
    let (at, len) = place(addr, size)?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB | MapFlags::MAP_FIXED_NOREPLACE;
    // SAFETY: new memory, and NOREPLACE leaves all other memory as it is.
    unsafe { mmap_anonymous(at, len, RW, flags) }.map_err(text)?;
    for page in (addr..addr + size).step_by(HUGE_PAGE as usize) {
        touch(real, page)?;
    }
    Ok(())
}

fn map_file(file: impl AsFd, offset: i64, addr: u64, size: u64) -> Result<(), String> {
    let (at, len) = place(addr, size)?;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_FIXED_NOREPLACE;
    // SAFETY: new memory, and NOREPLACE leaves all other memory as it is.
    unsafe { mmap(at, len, RW, flags, file, offset) }
        .map(|_| ())
        .map_err(text)
}

/// The same `file_size` bytes of hugetlb over and over, up to `size` bytes at `addr`.
pub(crate) fn repeated(
    real: &mut Real,
    addr: u64,
    size: u64,
    file_size: u64,
) -> Result<(), String> {
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = File::from(memfd_create("repeated", flags).map_err(text)?);
    file.set_len(file_size).map_err(text)?;
    for at in (addr..addr + size).step_by(file_size as usize) {
        map_file(&file, 0, at, file_size)?;
    }
    for page in (addr..addr + file_size).step_by(HUGE_PAGE as usize) {
        touch(real, page)?;
    }
    Ok(())
}

/// Shared memory at `addr`, which keeps its bytes when it is evicted.
pub(crate) fn shared(addr: u64, size: u64) -> Result<(), String> {
    let file = File::from(memfd_create("shared", MFdFlags::empty()).map_err(text)?);
    file.set_len(size).map_err(text)?;
    map_file(&file, 0, addr, size)
}

/// Takes the pages at `addr` away. Those of anonymous memory lose their bytes.
pub(crate) fn evict(addr: u64, size: u64) -> Result<(), String> {
    let start = NonNull::new(addr as *mut c_void).ok_or("no memory at 0")?;
    // SAFETY: the memory is the scripts', of which this program keeps no reference.
    unsafe { madvise(start, size as usize, MmapAdvise::MADV_DONTNEED) }.map_err(text)
}

/// The files that keep a device's registers mapped.
pub(crate) struct Registers {
    _files: [OwnedFd; 3],
}

/// Maps the BAR of a PCI device, which is in a container of its own.
pub(crate) fn registers(addr: u64, size: u64) -> Result<Registers, String> {
    let group = fs::read_link(format!("/sys/bus/pci/devices/{BAR_DEVICE}/iommu_group"));
    let group = group.map_err(|e| format!("{BAR_DEVICE}: {e}"))?;
    let number = group.file_name().unwrap_or_default().to_string_lossy();
    let group = open(&format!("/dev/vfio/{number}")).map_err(text)?;
    let container = open("/dev/vfio/vfio").map_err(text)?;
    let mut fd = container.as_raw_fd();
    raw_ioctl(&group, GROUP_SET_CONTAINER, address(&mut fd)).map_err(text)?;
    raw_ioctl(&container, VFIO_SET_IOMMU, 3).map_err(text)?;
    let mut name = *b"0000:00:09.0\0";
    let fd = raw_ioctl(&group, GROUP_GET_DEVICE_FD, address(&mut name)).map_err(text)?;
    // SAFETY: the kernel has just opened the file, and nobody else has it.
    let device = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    // The registers can be mapped while the device decodes memory.
    let device = File::from(device);
    std::os::unix::fs::FileExt::write_all_at(&device, &2u16.to_le_bytes(), (7 << 40) + 4)
        .map_err(text)?;
    map_file(&device, BAR, addr, size)?;
    Ok(Registers {
        _files: [device.into(), group.into(), container.into()],
    })
}
