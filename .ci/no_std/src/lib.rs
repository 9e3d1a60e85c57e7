// SPDX-License-Identifier: MIT OR Apache-2.0
//! Links dirty-core and vfio-user-wire without std, alloc and a global allocator. The host's
//! answers come from outside, so that nothing of the core is left out as
//! unreachable.
#![no_std]

mod vfio_user;

use core::alloc::Layout;
use core::ptr::NonNull;

use dirty_core::host::*;
use dirty_core::migration::v1::{DataSection, Region};
use dirty_core::migration::{
    Device, DeviceFeature, Failure, Features, Migration, Offers, Precopy, PrecopyInfo, Transition,
};
use dirty_core::{
    normalise, Command, Container, Dest, Errno, Error, Extent, Options, Outcome, PageSize, Target,
    Unmap,
};

extern "C" {
    fn host_alloc(size: usize, align: usize) -> *mut u8;
    fn host_free(ptr: *mut u8, size: usize, align: usize);
    fn host_word() -> u64;
}

/// Any number: the host's answer to everything.
fn word() -> u64 {
    // SAFETY: no precondition.
    unsafe { host_word() }
}

fn answer<T>(value: T) -> Result<T, Errno> {
    match word() {
        0 => Ok(value),
        e => Err(Errno(e as i32)),
    }
}

fn copied() -> Result<(), Fault> {
    match word() {
        0 => Ok(()),
        done => Err(Fault {
            done: done as usize,
        }),
    }
}

/// Bytes from outside.
fn fill(buf: &mut [u8]) -> Result<(), Fault> {
    buf.iter_mut().for_each(|b| *b = word() as u8);
    copied()
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[derive(Clone)]
struct HostMemory;

// SAFETY: the linker's `host_alloc` gives zeroed memory of this size and alignment.
unsafe impl Memory for HostMemory {
    fn alloc_zeroed(&self, layout: Layout) -> Option<NonNull<u8>> {
        // SAFETY: no precondition.
        NonNull::new(unsafe { host_alloc(layout.size(), layout.align()) })
    }

    unsafe fn free(&self, ptr: NonNull<u8>, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { host_free(ptr.as_ptr(), layout.size(), layout.align()) }
    }
}

/// A host of which nothing is known.
struct Anybody;

impl Pinning for Anybody {
    fn pin(&mut self, _: Mm, _: u64, _: u64, _: Prot, runs: &mut [Run]) -> Result<usize, Errno> {
        for run in runs {
            *run = Run {
                pfn: word(),
                npages: word(),
                kind: self.page_kind(run.pfn),
            };
        }
        answer(word() as usize)
    }
    fn unpin(&mut self, _: u64, _: u64, _: Prot) -> u64 {
        word()
    }
    fn page_kind(&self, _: u64) -> PageKind {
        match word() {
            0 => PageKind::Normal,
            1 => PageKind::Reserved,
            _ => PageKind::NoPage,
        }
    }
}

impl Accounting for Anybody {
    fn grab(&mut self) -> Result<Mm, Errno> {
        answer(Mm(word()))
    }
    fn release(&mut self, _: Mm) {}
    fn reach(&self, _: Mm) -> Reach {
        match word() {
            0 => Reach::Own,
            1 => Reach::Other,
            _ => Reach::Gone,
        }
    }
    fn lock_cap(&self) -> bool {
        word() != 0
    }
    fn charge(&mut self, _: Mm, _: u64, _: bool) -> Result<(), Errno> {
        answer(())
    }
    fn uncharge(&mut self, _: Mm, _: u64) {}
}

impl UserMemory for Anybody {
    fn is_user_range(&self, _: u64, _: u64) -> bool {
        word() != 0
    }
    fn copy_to_user(&mut self, _: u64, _: &[u8]) -> Result<(), Fault> {
        copied()
    }
    fn read_mm(&mut self, _: Mm, _: u64, buf: &mut [u8]) -> Result<(), Fault> {
        fill(buf)
    }
    fn write_mm(&mut self, _: Mm, _: u64, _: &[u8]) -> Result<(), Fault> {
        copied()
    }
}

impl Iommu for Anybody {
    fn attach(&mut self, _: GroupId) -> Result<(DomainId, DomainInfo), Errno> {
        let info = DomainInfo {
            pgsize_bitmap: word(),
            aperture: (word(), word()),
            coherent: word() != 0,
            isolated_msi: word() != 0,
            kind: word(),
            dirty_tracking: word() != 0,
        };
        answer((DomainId(word()), info))
    }
    fn join(&mut self, _: GroupId, _: DomainId, _: DomainId) -> bool {
        word() != 0
    }
    fn detach(&mut self, _: GroupId, _: DomainId, _: bool) {}
    fn reserved(&self, _: GroupId, _: usize) -> Option<(u64, u64)> {
        answer((word(), word())).ok()
    }
    fn map(&mut self, _: DomainId, _: u64, _: u64, _: u64, _: Prot) -> Result<(), Errno> {
        answer(())
    }
    fn unmap(&mut self, _: DomainId, _: u64, _: u64) {}
    fn set_dirty_tracking(&mut self, _: DomainId, _: bool) -> Result<(), Errno> {
        answer(())
    }
    fn read_and_clear_dirty(
        &mut self,
        _: DomainId,
        _: u64,
        _: u64,
        mark: &mut dyn FnMut(u64, u64),
    ) {
        while word() != 0 {
            mark(word(), word());
        }
    }
    fn translate(&self, _: DomainId, _: u64) -> Option<u64> {
        answer(word()).ok()
    }
}

/// Calls of any kind with any arguments, until the host has had enough.
fn calls(container: &mut Container<HostMemory>, words: &mut [u64]) -> Result<(), Error> {
    let host = &mut Anybody;
    let pgsize = PageSize::new(word()).ok_or(Error::WrongPageSize)?;
    let (device, group) = (DeviceId(word()), GroupId(word()));
    let (iova, size) = (word(), word());
    let extent = Extent {
        bit: word(),
        iova: word(),
        npages: word(),
        pgsize,
    };
    while word() != 0 {
        match word() {
            0 => container.attach_group(host, group, word() != 0)?,
            1 => container.detach_group(host, group)?,
            2 => container.open_device(device, group, word() != 0)?,
            3 => container.close_device(device),
            4 => container.pin_pages(host, device, iova, Prot(word() as u32), words)?,
            5 => _ = container.unpin_pages(host, device, iova, size)?,
            6 => container.write(host, device, iova, &size.to_ne_bytes())?,
            7 => container.read(host, device, iova, &mut [0; 8])?,
            8 => container.backend()?.mark(iova, size)?,
            9 => container.backend()?.mark_bitmap(words, extent)?,
            10 => {
                container
                    .backend_mut()?
                    .get_bitmap(host, iova, size, pgsize, Dest::Words(words))?
            }
            11 => container.backend_mut()?.get_bitmap(
                host,
                iova,
                size,
                pgsize,
                Dest::Zeroed(words),
            )?,
            12 => {
                let mut unmap = Unmap::new(Target::Range { iova, size });
                container.backend_mut()?.unmap_dirty(
                    host,
                    &mut unmap,
                    pgsize,
                    Dest::Words(words),
                )?;
            }
            _ => {
                let (iommu, nr, arg) = (container.iommu_type(), word() as u32, word());
                let mut command = Command::read(iommu, nr, arg, |_, buf| fill(buf))?;
                while let Outcome::Notify { .. } = container.run(host, &mut command)? {}
            }
        }
    }
    let (half, rest) = words.split_at_mut_checked(8).unwrap_or_default();
    normalise(half, extent, rest, extent)
}

/// Everything a host can do with a container.
#[no_mangle]
pub extern "C" fn container_calls() -> i32 {
    let mut options = Options::default();
    options.bitmap_budget = Some(word());
    options.skip_read_only = word() != 0;
    options.iommu_dirty_tracking = word() != 0;
    let mut container = Container::new(HostMemory, options);
    let result = calls(&mut container, &mut [word(); 16]);
    container.close(&mut Anybody);
    result.map_or_else(|e| e.errno().0, |()| 0)
}

impl Device for Anybody {
    type File = u64;
    fn begin(&mut self, _: Transition) -> Result<u64, Failure> {
        self.step_or(word())
    }
    fn step(&mut self, _: Transition) -> Result<(), Failure> {
        self.step_or(())
    }
    fn stop_copy_length(&mut self) -> Result<u64, Errno> {
        answer(word())
    }
}

impl Anybody {
    fn step_or<T>(&self, value: T) -> Result<T, Failure> {
        let failure = match word() {
            0 => Failure::Unchanged,
            _ => Failure::Broken,
        };
        answer(value).map_err(failure)
    }
}

impl DataSection for Anybody {
    fn pending(&mut self) -> Result<u64, Errno> {
        answer(word())
    }
    fn stage(&mut self, _: u64) -> Result<u64, Errno> {
        answer(word())
    }
    fn load(&mut self, _: u64) -> Result<(), Errno> {
        answer(())
    }
    fn read(&mut self, _: u64, to: &mut [u8]) -> Result<(), Errno> {
        fill(to).map_err(|_| Errno::EIO)
    }
    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), Errno> {
        answer(())
    }
}

/// Calls of any kind on a device that migrates, until the host has had enough.
fn migrate() -> Result<(), Error> {
    let features = Features::from_bits(word()).ok_or(Error::UnknownState)?;
    let mut migration = Migration::new(features);
    let mut region = Region::new(word(), word()).ok_or(Error::RegionAccess)?;
    let offers = Offers {
        migration: Some(features),
        logging: word() != 0,
    };
    let device = &mut Anybody;
    while word() != 0 {
        match word() {
            0 => migration.reset(),
            1 => migration.close(),
            2 => region.reset(),
            3 => _ = migration.set_state(device, word() as u32)?,
            4 => {
                let bytes = &mut [word() as u8; 64];
                let len = word() as usize;
                let bytes = bytes.get_mut(..len).unwrap_or_default();
                region.read(device, word(), bytes)?;
            }
            5 => {
                let bytes = &[word() as u8; 64];
                let len = word() as usize;
                let bytes = bytes.get(..len).unwrap_or_default();
                region.write(device, word(), bytes)?;
            }
            6 => {
                let info = PrecopyInfo::read(word() as u32, word(), |_, buf| fill(buf))?;
                let precopy = Precopy {
                    initial_bytes: word(),
                    dirty_bytes: word(),
                    reinit: word() != 0,
                };
                migration.precopy_info(info, || answer(precopy), |_, _| copied())?;
            }
            _ => {
                let call = DeviceFeature::read(offers, word(), |_, buf| fill(buf))?;
                if let DeviceFeature::Migration(call) = call {
                    migration.run(device, call, |file| *file as i32, |_, _| copied())?;
                }
            }
        }
    }
    Ok(())
}

/// Everything a host can do with the migration of a device.
#[no_mangle]
pub extern "C" fn migration_calls() -> i32 {
    migrate().map_or_else(|e| e.errno().0, |()| 0)
}
