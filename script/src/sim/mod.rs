// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core on a simulated host, which can make anything fail that a host may
//! fail.

mod faults;
mod host;
mod iommu;
mod pages;
mod user;

use dirty_core::host::{DeviceId, GroupId, Host, Prot};
use dirty_core::{
    Command, Container, Dest, Errno, Error, Options, Outcome, PageSize, Partial, Progress, Target,
    Type1, Unmap,
};

use crate::op::*;
use crate::{returned, Answer, AttachError, Driver, Stat, System};
use host::{Absent, CountingMemory, SimHost};

pub use user::User;

/// A device of [`DEVICES`] and its group.
#[derive(Default)]
struct Slot {
    attached: bool,
    open: bool,
    driver: Driver,
}

/// The core on a simulated host, whose accounts can be read.
pub struct Sim {
    container: Option<Container<CountingMemory>>,
    host: SimHost,
    mem: CountingMemory,
    slots: [Slot; DEVICES.len()],
    /// Open devices, in the order in which they were opened.
    opened: Vec<DeviceIndex>,
    entry_limit: u32,
    fired: Option<FaultKind>,
}

impl Default for Sim {
    fn default() -> Self {
        let mem = CountingMemory::default();
        Sim {
            container: None,
            host: SimHost::new(mem.faults.clone()),
            mem,
            slots: Default::default(),
            opened: Vec::new(),
            entry_limit: 65535,
            fired: None,
        }
    }
}

impl Sim {
    /// Returns the core on a host whose user memory is never there when it is copied
    /// to under the container's lock. The host waits for the page without the lock,
    /// and makes the call again.
    #[must_use]
    pub fn with_absent_pages() -> Self {
        let mut sim = Sim::default();
        sim.host.absent = Some(Absent::default());
        sim
    }

    /// Returns the fault that the last operation met, and forgets it.
    pub fn take_fired(&mut self) -> Option<FaultKind> {
        self.fired.take()
    }

    /// The memory of the script's process.
    #[must_use]
    pub fn memory(&self) -> &User {
        &self.host.user
    }

    /// The pages that are pinned, each counted as often as it is pinned.
    #[must_use]
    pub fn pinned_pages(&self) -> u64 {
        self.host.pinned
    }

    /// The bytes that the last dma_rw has written.
    #[must_use]
    pub fn bytes_written(&self) -> u64 {
        self.host.written
    }

    /// Whether some dma_unmap callback does more than unpin.
    #[must_use]
    pub fn has_callback_actions(&self) -> bool {
        let plain = |slot: &Slot| matches!(slot.driver.actions[..], [] | [Action::Unpin]);
        !self.slots.iter().all(plain)
    }

    /// Closes everything.
    ///
    /// # Panics
    ///
    /// If the core has not given back everything it took from the host.
    pub fn close(&mut self) {
        for index in 0..DEVICES.len() {
            self.close_device(index);
            self.slots[index].attached = false;
        }
        if let Some(mut container) = self.container.take() {
            container.close(&mut self.host);
        }
        assert!(
            self.host.is_settled(),
            "not given back to the host: {:?}",
            self.host
        );
        assert_eq!(self.mem.live(), 0, "allocations leaked");
    }

    fn container(&mut self) -> Result<&mut Container<CountingMemory>, Errno> {
        self.container.as_mut().ok_or(Errno::EBADF)
    }

    fn backend(&mut self) -> Result<&mut Type1<CountingMemory>, Errno> {
        self.container()?.backend_mut().map_err(Error::errno)
    }

    /// The driver of an open device that can be told to pin.
    fn driver(&mut self, index: DeviceIndex) -> Result<&mut Driver, Errno> {
        let slot = &mut self.slots[index];
        match (slot.open, DEVICES[index].pins) {
            (false, _) => Err(Errno::EBADF),
            (true, false) => Err(Errno::ENOTTY),
            (true, true) => Ok(&mut slot.driver),
        }
    }

    /// The container and the host, for a call with a device.
    fn device(
        &mut self,
        index: DeviceIndex,
    ) -> Result<(&mut Container<CountingMemory>, &mut SimHost, DeviceId), Errno> {
        self.driver(index)?;
        let container = self.container.as_mut().ok_or(Errno::EBADF)?;
        Ok((container, &mut self.host, DeviceId(index as u64)))
    }

    /// Calls the dma_unmap callback of every open device.
    fn notify(&mut self, iova: u64, size: u64) {
        for index in self.opened.clone() {
            if !DEVICES[index].dma_unmap {
                continue;
            }
            for action in self.slots[index].driver.dma_unmap(iova, size) {
                // Callbacks return nothing, so their errors are dropped.
                match action {
                    Action::Unpin => self.unpin_range(index, iova, size),
                    Action::Start => drop(self.track(Type1::start)),
                    Action::Stop => drop(self.track(Type1::stop)),
                    Action::Pin => drop(self.pin(index, iova, 1, Prot::READ.0)),
                }
            }
        }
    }

    /// Starts or stops tracking.
    fn track(
        &mut self,
        call: fn(&mut Type1<CountingMemory>, &mut dyn Host) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let container = self.container.as_mut().ok_or(Error::NoIommu)?;
        call(container.backend_mut()?, &mut self.host)
    }

    fn unpin_range(&mut self, index: DeviceIndex, iova: u64, size: u64) {
        for at in self.slots[index].driver.take(iova, size) {
            if let Some(container) = &mut self.container {
                let device = DeviceId(index as u64);
                let unpinned = container.unpin_pages(&mut self.host, device, at, 1);
                unpinned.expect("an open device");
            }
        }
    }
}

impl System for Sim {
    fn open(&mut self, new: &New) {
        self.close();
        let mut options = Options::default();
        options.dma_entry_limit = self.entry_limit;
        options.bitmap_budget = new.budget;
        options.skip_read_only = new.skip_read_only;
        options.iommu_dirty_tracking = new.iommu_dirty_tracking;
        self.container = Some(Container::new(self.mem.clone(), options));
    }

    fn attach(&mut self, index: DeviceIndex) -> Result<(), AttachError> {
        let failed = |step, errno| AttachError { step, errno };
        if self.slots[index].attached {
            return Err(failed("open", Errno::EBUSY));
        }
        let Some(container) = &mut self.container else {
            return Err(failed("set_container", Errno::EBADF));
        };
        let emulated = DEVICES[index].pgsizes.is_none();
        let attached = container.attach_group(&mut self.host, GroupId(index as u64), emulated);
        attached.map_err(|e| failed("set_container", e.errno()))?;
        self.slots[index].attached = true;
        Ok(())
    }

    fn detach(&mut self, index: DeviceIndex) -> Answer {
        self.close_device(index);
        if !std::mem::take(&mut self.slots[index].attached) {
            return Err(Errno::EBADF);
        }
        let container = self.container.as_mut().ok_or(Errno::EBADF)?;
        let detached = container.detach_group(&mut self.host, GroupId(index as u64));
        detached.map(|()| 0).map_err(Error::errno)
    }

    fn open_device(&mut self, index: DeviceIndex) -> Result<(), Errno> {
        if !self.slots[index].attached {
            return Err(Errno::EBADF);
        }
        if self.slots[index].open {
            return Ok(());
        }
        let (device, group) = (DeviceId(index as u64), GroupId(index as u64));
        let opened = self
            .container()?
            .open_device(device, group, DEVICES[index].dma_unmap);
        opened.map_err(Error::errno)?;
        self.slots[index].open = true;
        self.opened.push(index);
        self.slots[index].driver = Driver::default();
        Ok(())
    }

    fn close_device(&mut self, index: DeviceIndex) {
        if self.slots[index].open {
            self.unpin_range(index, 0, u64::MAX);
            self.slots[index].open = false;
            self.opened.retain(|open| *open != index);
            if let Some(container) = &mut self.container {
                container.close_device(DeviceId(index as u64));
            }
        }
    }

    fn ioctl(&mut self, nr: u32, arg: u64) -> Answer {
        let iommu = self.container()?.iommu_type();
        let command = Command::read(iommu, nr, arg, |addr, buf| {
            self.host.copy_from_user(addr, buf)
        });
        let mut command = command.map_err(Error::errno)?;
        self.host.evict();
        loop {
            let container = self.container.as_mut().ok_or(Errno::EBADF)?;
            match container.run(&mut self.host, &mut command) {
                Ok(Outcome::Done(value)) => return Ok(value),
                Ok(Outcome::Notify { iova, size }) => self.notify(iova, size),
                Err(Error::BadAddress) if self.host.page_came() => {}
                Err(e) => return Err(e.errno()),
            }
        }
    }

    fn report(&mut self, arg: &ReportArg, words: &mut [u64]) -> Answer {
        let pgsize = PageSize::new(arg.pgsize).ok_or(Errno::EINVAL)?;
        let report = match arg.fill {
            Some(_) => Dest::Words(words),
            None => Dest::Zeroed(words),
        };
        let container = self.container.as_mut().ok_or(Errno::EBADF)?;
        let backend = container.backend_mut().map_err(Error::errno)?;
        let done = backend.get_bitmap(&mut self.host, arg.iova, arg.size, pgsize, report);
        done.map(|()| 0).map_err(Error::errno)
    }

    fn harvest(&mut self, arg: &ReportArg, words: &mut [u64]) -> Result<u64, Errno> {
        let pgsize = PageSize::new(arg.pgsize).ok_or(Errno::EINVAL)?;
        let (iova, size) = (arg.iova, arg.size);
        let mut unmap = Unmap::new(Target::Range { iova, size });
        loop {
            let container = self.container.as_mut().ok_or(Errno::EBADF)?;
            let report = match arg.fill {
                Some(_) => Dest::Words(words),
                None => Dest::Zeroed(words),
            };
            let backend = container.backend_mut().map_err(Error::errno)?;
            let progress = backend.unmap_dirty(&mut self.host, &mut unmap, pgsize, report);
            match progress.map_err(Error::errno)? {
                Progress::Done(size) => return Ok(size),
                Progress::Notify { iova, size } => self.notify(iova, size),
            }
        }
    }

    fn pin(&mut self, index: DeviceIndex, iova: u64, n: i32, prot: u32) -> Result<i32, Errno> {
        let (container, host, device) = self.device(index)?;
        let mut pfns = vec![0; (n as u32).min(1 << 10) as usize];
        let pinned = container.pin_pages(host, device, iova, Prot(prot), &mut pfns);
        if pinned.is_ok() {
            self.slots[index].driver.pinned(iova, n);
        }
        Ok(returned(pinned.map_err(Error::errno), n))
    }

    fn unpin(&mut self, index: DeviceIndex, iova: u64, n: i32) -> Result<i32, Errno> {
        let (container, host, device) = self.device(index)?;
        let unpinned = container.unpin_pages(host, device, iova, u64::try_from(n).unwrap_or(0));
        unpinned.map_err(Error::errno)?;
        self.slots[index].driver.unpinned(iova, n);
        Ok(0)
    }

    fn rw(
        &mut self,
        index: DeviceIndex,
        iova: u64,
        len: u64,
        write: bool,
        caller: Caller,
    ) -> Result<i32, Errno> {
        self.host.caller = caller;
        self.host.written = 0;
        self.host.evict();
        let (container, host, device) = self.device(index)?;
        let mut data = vec![0x5a; len as usize];
        let mut at = 0;
        let result = loop {
            let iova = iova.wrapping_add(at as u64);
            let result = match write {
                true => container.write(host, device, iova, &data[at..]),
                false => container.read(host, device, iova, &mut data[at..]),
            };
            match result {
                Err(Partial { done, error }) if error == Error::BadAddress && host.page_came() => {
                    at += done;
                }
                _ => break result,
            }
        };
        self.host.caller = Caller::Process;
        Ok(returned(result.map_err(|stopped| stopped.error.errno()), 0))
    }

    fn mark(&mut self, iova: u64, len: u64) -> Answer {
        let marked = self.backend()?.mark(iova, len);
        marked.map(|()| 0).map_err(Error::errno)
    }

    fn dma(&mut self, index: DeviceIndex, iova: u64, len: u64, late: bool) -> Answer {
        if !self.slots[index].attached {
            return Err(Errno::EBADF);
        }
        if DEVICES[index].pgsizes.is_none() {
            return Err(Errno::ENOTTY);
        }
        let last = len.checked_sub(1).and_then(|more| iova.checked_add(more));
        let last = last.ok_or(Errno::EINVAL)?;
        let group = GroupId(index as u64);
        match late {
            true => self.host.iommus.write_late(group, iova, last),
            false => self.host.iommus.write(group, iova, last)?,
        }
        Ok(0)
    }

    fn on_unmap(&mut self, index: DeviceIndex, actions: &[Action]) -> Answer {
        self.driver(index)?.actions = actions.to_vec();
        Ok(0)
    }

    fn fault(&mut self, kind: FaultKind, n: u64) -> Answer {
        self.mem.faults.arm(kind, n);
        Ok(0)
    }

    fn end_faults(&mut self) {
        self.fired = self.mem.faults.end();
        self.host.iommus.end_late();
    }

    fn stat(&self, index: DeviceIndex) -> Stat {
        self.slots[index].driver.stat()
    }

    fn limit_locked(&mut self, limit: u64, keep_cap: bool) -> String {
        self.host.limit = limit >> 12;
        self.host.lock_cap &= keep_cap;
        String::new()
    }

    fn locked_pages(&self) -> u64 {
        self.host.charged
    }

    fn set_entry_limit(&mut self, limit: u32) {
        self.entry_limit = limit;
    }

    fn map_memory(&mut self, addr: u64, size: u64, write: bool) -> Result<(), Errno> {
        match self.host.user.map(addr, size, write) {
            true => Ok(()),
            false => Err(Errno::EEXIST),
        }
    }

    fn peek(&mut self, addr: u64, buf: &mut [u8]) -> bool {
        self.host.user.read(addr, buf) == buf.len()
    }

    fn poke(&mut self, addr: u64, buf: &[u8]) -> bool {
        self.host.user.write(addr, buf) == buf.len()
    }
}
