// SPDX-License-Identifier: MIT OR Apache-2.0
//! The naive model of a container: sets of pages, and the rules of
//! `docs/rules.md` one by one.

mod abi;
mod access;
mod backend;
mod check;
mod ioctl;
mod mapping;
mod process;
mod report;
mod unmap;

use dirty_core::Errno;
use dirty_script::op::*;
use dirty_script::sim::User;
use dirty_script::{returned, Answer, AttachError, Driver, Stat, System};

use backend::{Backend, Options};
use process::Process;

/// The naive model: a container with its groups and devices, and the process
/// that uses it.
#[derive(Clone, Debug)]
pub struct Naive {
    process: Process,
    entry_limit: u32,
    container: Option<Container>,
    drivers: [Driver; DEVICES.len()],
    /// Open devices, in the order in which they were opened.
    open: Vec<DeviceIndex>,
    /// Whether UNMAP_DMA fails with EFAULT where it would copy its result.
    unmap_fails: bool,
}

#[derive(Clone, Debug)]
struct Container {
    options: Options,
    /// Its groups, in the order in which they were attached. A group is named
    /// by its device.
    groups: Vec<DeviceIndex>,
    backend: Option<Backend>,
}

impl Default for Naive {
    fn default() -> Self {
        Naive {
            process: Process {
                user: User::default(),
                limit: u64::MAX >> 12,
                lock_cap: true,
                locked: 0,
            },
            entry_limit: 65535,
            container: None,
            drivers: Default::default(),
            open: Vec::new(),
            unmap_fails: false,
        }
    }
}

impl Naive {
    /// The pages that are pinned, each counted as often as it is pinned.
    #[must_use]
    pub fn pinned_pages(&self) -> u64 {
        let Ok(backend) = self.backend() else {
            return 0;
        };
        let count = |m: &mapping::Mapping| match m.iommu_mapped {
            true => m.size / PAGE + m.pins.len() as u64,
            false => m.pins.len() as u64,
        };
        backend.mappings.0.values().map(count).sum()
    }

    /// The bytes that a dirty bit stands for, if tracking is on.
    #[must_use]
    pub fn tracking(&self) -> Option<u64> {
        self.backend().ok()?.granule
    }

    /// First address and bytes of each mapping.
    #[must_use]
    pub fn mappings(&self) -> Vec<(u64, u64)> {
        let backend = self.backend().ok();
        let mappings = backend.into_iter().flat_map(|b| b.mappings.0.values());
        mappings.map(|m| (m.iova, m.size)).collect()
    }

    /// The memory of the script's process. After a copy that failed, it is set
    /// to what the copy has left.
    pub fn memory(&mut self) -> &mut User {
        &mut self.process.user
    }

    /// Does what [`rw`](System::rw) does if it fails after `bytes_done` bytes.
    pub fn rw_partial(&mut self, iova: u64, bytes_done: u64) {
        let process = &mut self.process;
        let backend = self.container.as_mut().and_then(|c| c.backend.as_mut());
        let Some(backend) = backend else { return };
        let mut done = 0;
        while done < bytes_done {
            match backend.write_chunk(process, iova.wrapping_add(done), bytes_done - done) {
                0 => break,
                n => done += n,
            }
        }
    }

    /// Does what an unmap does if it fails when it copies its result: the
    /// devices' callbacks are called, nothing is copied and nothing is
    /// unmapped.
    pub fn unmap_callbacks_only(&mut self, op: &Op) {
        self.unmap_fails = true;
        dirty_script::run(self, op);
        self.unmap_fails = false;
    }

    /// Does what a pin of `n` pages does to pinned bits if it fails.
    pub fn pin_fails(&mut self, iova: u64, n: u64) {
        let backend = self.container.as_mut().and_then(|c| c.backend.as_mut());
        if let Some(backend) = backend {
            backend.drop_pinned_bits(iova, n);
        }
    }

    /// The container's backend.
    fn backend(&self) -> Result<&Backend, Errno> {
        let container = self.container.as_ref().ok_or(Errno::EBADF)?;
        container.backend.as_ref().ok_or(Errno::EINVAL)
    }

    /// The container's backend, and the process that uses it.
    fn parts(&mut self) -> Result<(&mut Backend, &mut Process), Errno> {
        let container = self.container.as_mut().ok_or(Errno::EBADF)?;
        let backend = container.backend.as_mut().ok_or(Errno::EINVAL)?;
        Ok((backend, &mut self.process))
    }

    /// Fails unless the device is open and can be told what to do.
    fn check_device(&self, device: DeviceIndex) -> Result<(), Errno> {
        if !self.open.contains(&device) {
            return Err(Errno::EBADF);
        }
        if !DEVICES[device].pins {
            return Err(Errno::ENOTTY);
        }
        Ok(())
    }

    /// Unpins what a device's driver has pinned in a range.
    fn unpin_range(&mut self, device: DeviceIndex, iova: u64, size: u64) {
        for pin in self.drivers[device].take(iova, size) {
            if let Ok((backend, process)) = self.parts() {
                backend.unpin(process, pin, 1);
            }
        }
    }

    fn attached(&self, device: DeviceIndex) -> bool {
        let groups = self.container.as_ref().map(|c| &c.groups);
        groups.is_some_and(|groups| groups.contains(&device))
    }

    /// SET_IOMMU (rule A2).
    fn set_iommu(&mut self, kind: u64) -> Answer {
        let container = self.container.as_mut().ok_or(Errno::EBADF)?;
        if container.groups.is_empty() || container.backend.is_some() {
            return Err(Errno::EINVAL);
        }
        let mut backend = match kind {
            1 => Backend::new(false, container.options),
            3 => Backend::new(true, container.options),
            9 => return Err(Errno::EINVAL), // an extension, not a type
            _ => return Err(Errno::ENODEV),
        };
        for device in &container.groups {
            backend.attach(&mut self.process, *device)?;
        }
        container.backend = Some(backend);
        Ok(0)
    }
}

impl System for Naive {
    fn open(&mut self, new: &New) {
        for device in 0..DEVICES.len() {
            self.close_device(device);
        }
        self.process.locked = 0;
        self.container = Some(Container {
            options: Options {
                entry_limit: self.entry_limit,
                budget: new.budget,
                skip_read_only: new.skip_read_only,
                iommu_dirty_tracking: new.iommu_dirty_tracking,
            },
            groups: Vec::new(),
            backend: None,
        });
    }

    fn attach(&mut self, device: DeviceIndex) -> Result<(), AttachError> {
        let failed = |step, errno| AttachError { step, errno };
        if self.attached(device) {
            return Err(failed("open", Errno::EBUSY));
        }
        let container = self.container.as_mut();
        let container = container.ok_or(failed("set_container", Errno::EBADF))?;
        if let Some(backend) = &mut container.backend {
            let done = backend.attach(&mut self.process, device);
            done.map_err(|e| failed("set_container", e))?;
        }
        container.groups.push(device);
        Ok(())
    }

    fn detach(&mut self, device: DeviceIndex) -> Answer {
        self.close_device(device);
        if !self.attached(device) {
            return Err(Errno::EBADF);
        }
        let container = self.container.as_mut().ok_or(Errno::EBADF)?;
        container.groups.retain(|d| *d != device);
        if container.groups.is_empty() {
            // With the last group the backend and all mappings go.
            container.backend = None;
            self.process.locked = 0;
        } else if let Some(backend) = &mut container.backend {
            backend.detach(&mut self.process, device);
        }
        Ok(0)
    }

    fn open_device(&mut self, device: DeviceIndex) -> Result<(), Errno> {
        if !self.attached(device) {
            return Err(Errno::EBADF);
        }
        if self.open.contains(&device) {
            return Ok(());
        }
        self.backend()?;
        self.open.push(device);
        self.drivers[device] = Driver::default();
        Ok(())
    }

    fn close_device(&mut self, device: DeviceIndex) {
        if self.open.contains(&device) {
            self.unpin_range(device, 0, u64::MAX);
            self.open.retain(|d| *d != device);
        }
    }

    fn ioctl(&mut self, nr: u32, arg: u64) -> Answer {
        self.any_ioctl(nr, arg)
    }

    fn report(&mut self, arg: &ReportArg, words: &mut [u64]) -> Answer {
        self.typed_report(arg, words)
    }

    fn harvest(&mut self, arg: &ReportArg, words: &mut [u64]) -> Result<u64, Errno> {
        self.typed_harvest(arg, words)
    }

    fn pin(&mut self, device: DeviceIndex, iova: u64, n: i32, prot: u32) -> Result<i32, Errno> {
        self.check_device(device)?;
        let (backend, process) = self.parts()?;
        let done = backend.pin(process, device, iova, n, prot);
        if done.is_ok() {
            self.drivers[device].pinned(iova, n);
        }
        Ok(returned(done, n))
    }

    fn unpin(&mut self, device: DeviceIndex, iova: u64, n: i32) -> Result<i32, Errno> {
        self.check_device(device)?;
        let (backend, process) = self.parts()?;
        backend.unpin(process, iova, n);
        self.drivers[device].unpinned(iova, n);
        Ok(0)
    }

    fn rw(
        &mut self,
        device: DeviceIndex,
        iova: u64,
        len: u64,
        write: bool,
        caller: Caller,
    ) -> Result<i32, Errno> {
        self.check_device(device)?;
        let (backend, process) = self.parts()?;
        let done = backend.rw(process, iova, len, write, caller == Caller::Child);
        Ok(returned(done, 0))
    }

    fn mark(&mut self, iova: u64, len: u64) -> Answer {
        let (backend, _) = self.parts()?;
        backend.mark(iova, len).map(|()| 0)
    }

    fn dma(&mut self, device: DeviceIndex, iova: u64, len: u64, late: bool) -> Answer {
        if !self.attached(device) {
            return Err(Errno::EBADF);
        }
        if DEVICES[device].pgsizes.is_none() {
            return Err(Errno::ENOTTY);
        }
        if len == 0 {
            return Err(Errno::EINVAL);
        }
        let last = iova.checked_add(len - 1).ok_or(Errno::EINVAL)?;
        let Ok((backend, _)) = self.parts() else {
            // No IOMMU maps anything yet.
            return if late { Ok(0) } else { Err(Errno::EFAULT) };
        };
        let group = backend.groups.iter().find(|g| g.device == device);
        let domain = group.and_then(|g| g.domain).ok_or(Errno::EFAULT)?;
        if late {
            backend.late = Some((domain, iova, last));
        } else {
            backend.dma_write(domain, iova, last)?;
        }
        Ok(0)
    }

    fn end_faults(&mut self) {
        if let Ok((backend, _)) = self.parts() {
            backend.late = None;
        }
    }

    fn on_unmap(&mut self, device: DeviceIndex, actions: &[Action]) -> Answer {
        self.check_device(device)?;
        self.drivers[device].actions = actions.to_vec();
        Ok(0)
    }

    fn stat(&self, device: DeviceIndex) -> Stat {
        self.drivers[device].stat()
    }

    fn limit_locked(&mut self, limit: u64, keep_cap: bool) -> String {
        self.process.limit = limit >> 12;
        self.process.lock_cap &= keep_cap;
        String::new()
    }

    fn locked_pages(&self) -> u64 {
        self.process.locked
    }

    fn set_entry_limit(&mut self, limit: u32) {
        self.entry_limit = limit;
    }

    fn map_memory(&mut self, addr: u64, size: u64, write: bool) -> Result<(), Errno> {
        if size == 0 {
            return Err(Errno::EINVAL);
        }
        if !process::is_user_range(addr, size) {
            return Err(Errno::ENOMEM);
        }
        match self.process.user.map(addr, size, write) {
            true => Ok(()),
            false => Err(Errno::EEXIST),
        }
    }

    fn peek(&mut self, addr: u64, buf: &mut [u8]) -> bool {
        let len = buf.len() as u64;
        let readable = self.process.accessible(addr, len, false) == len;
        if readable {
            self.process.user.read(addr, buf);
        }
        readable
    }

    fn poke(&mut self, addr: u64, buf: &[u8]) -> bool {
        self.process.copy_out(addr, buf).is_ok()
    }
}
