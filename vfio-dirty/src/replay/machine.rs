// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs scripts on real memory: the memory of this process, real pins, and a
//! container of `adapter-user`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapter_user::{
    charged_pages, Container, Device, Errno, Error, Group, GroupId, IommuSpec, Options, Prot,
};
use dirty_script::op::{Action, Caller, DeviceIndex, DeviceSpec, New, ReportArg, DEVICES};
use dirty_script::{returned, Answer, AttachError, Driver, Stat, System};

use super::arena;
use super::process;

/// A device of the scripts.
#[derive(Default)]
struct Slot {
    /// Whether its group is in the container.
    attached: bool,
    driver: Arc<Mutex<Driver>>,
    device: Option<Arc<Device>>,
}

impl Slot {
    fn driver(&self) -> MutexGuard<'_, Driver> {
        lock(&self.driver)
    }
}

fn lock(driver: &Mutex<Driver>) -> MutexGuard<'_, Driver> {
    driver.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The container and the devices of one case.
pub(crate) struct Machine {
    container: Option<Container>,
    slots: [Slot; DEVICES.len()],
    entry_limit: u32,
}

impl Machine {
    pub(crate) fn new(entry_limit: u32) -> Self {
        Machine {
            container: None,
            slots: Default::default(),
            entry_limit,
        }
    }

    pub(crate) fn close(&mut self) {
        for index in 0..DEVICES.len() {
            self.close_device(index);
            self.slots[index].attached = false;
        }
        self.container = None;
    }

    fn container(&self) -> Result<&Container, Errno> {
        self.container.as_ref().ok_or(Errno::EBADF)
    }

    /// A device that can pin.
    fn device(&self, index: DeviceIndex) -> Result<(&Arc<Device>, &Slot), Errno> {
        let slot = &self.slots[index];
        match &slot.device {
            None => Err(Errno::EBADF),
            Some(_) if !DEVICES[index].pins => Err(Errno::ENOTTY),
            Some(device) => Ok((device, slot)),
        }
    }
}

fn group(index: DeviceIndex, spec: &DeviceSpec) -> Group {
    let id = GroupId(index as u64);
    let Some(pgsize_bitmap) = spec.pgsizes else {
        return Group::emulated(id);
    };
    let mut iommu = IommuSpec::default();
    iommu.pgsize_bitmap = pgsize_bitmap;
    iommu.aperture = spec.aperture;
    iommu.reserved = spec.reserved.to_vec();
    Group::iommu(id, iommu)
}

/// The dma_unmap callback of a device. It holds no lock while it calls the
/// container.
fn dma_unmap(container: &Container, driver: &Mutex<Driver>, device: &Device, iova: u64, size: u64) {
    let actions = lock(driver).dma_unmap(iova, size);
    for action in actions {
        // A callback returns nothing, so failures stay unseen, as in Linux.
        match action {
            Action::Unpin => unpin_range(driver, device, iova, size),
            Action::Start => drop(container.start()),
            Action::Stop => drop(container.stop()),
            Action::Pin => {
                if device.pin_pages(iova, Prot::READ, &mut [0]).is_ok() {
                    lock(driver).pinned(iova, 1);
                }
            }
        }
    }
}

fn unpin_range(driver: &Mutex<Driver>, device: &Device, iova: u64, size: u64) {
    let pins = lock(driver).take(iova, size);
    pins.iter().for_each(|at| device.unpin_pages(*at, 1));
}

impl System for Machine {
    fn open(&mut self, new: &New) {
        self.close();
        let mut options = Options::default();
        options.dma_entry_limit = self.entry_limit;
        options.bitmap_budget = new.budget;
        options.skip_read_only = new.skip_read_only;
        options.iommu_dirty_tracking = new.iommu_dirty_tracking;
        self.container = Some(Container::new(options));
    }

    fn attach(&mut self, index: DeviceIndex) -> Result<(), AttachError> {
        let failed = |step, errno| AttachError { step, errno };
        if self.slots[index].attached {
            return Err(failed("open", Errno::EBUSY));
        }
        let container = self.container();
        let container = container.map_err(|e| failed("set_container", e))?;
        let added = container.add_group(group(index, &DEVICES[index]));
        added.map_err(|e| failed("set_container", e.errno()))?;
        self.slots[index].attached = true;
        Ok(())
    }

    fn detach(&mut self, index: DeviceIndex) -> Answer {
        self.close_device(index);
        if !std::mem::take(&mut self.slots[index].attached) {
            return Err(Errno::EBADF);
        }
        let removed = self.container()?.remove_group(GroupId(index as u64));
        removed.map(|()| 0).map_err(Error::errno)
    }

    fn open_device(&mut self, index: DeviceIndex) -> Result<(), Errno> {
        let slot = &self.slots[index];
        if !slot.attached {
            return Err(Errno::EBADF);
        }
        if slot.device.is_some() {
            return Ok(()); // the same device, opened again
        }
        let container = self.container()?.clone();
        let driver = Arc::<Mutex<Driver>>::default();
        let on_unmap = DEVICES[index].dma_unmap.then(|| {
            // A weak handle, because the device keeps the container alive.
            let (container, driver) = (container.downgrade(), Arc::clone(&driver));
            let call = move |device: &Device, iova, size| {
                if let Some(container) = container.upgrade() {
                    dma_unmap(&container, &driver, device, iova, size);
                }
            };
            Box::new(call) as adapter_user::OnUnmap
        });
        let device = container.open_device(GroupId(index as u64), on_unmap);
        let slot = &mut self.slots[index];
        slot.device = Some(device.map_err(Error::errno)?);
        slot.driver = driver;
        Ok(())
    }

    fn close_device(&mut self, index: DeviceIndex) {
        let slot = &mut self.slots[index];
        if let Some(device) = slot.device.take() {
            unpin_range(&slot.driver, &device, 0, u64::MAX);
        }
    }

    fn ioctl(&mut self, nr: u32, arg: u64) -> Answer {
        let container = self.container()?;
        // SAFETY: scripts name memory of the arena, which nobody else uses.
        unsafe { container.ioctl(nr, arg) }.map_err(Error::errno)
    }

    fn report(&mut self, arg: &ReportArg, words: &mut [u64]) -> Answer {
        let container = self.container()?;
        let done = match arg.fill {
            Some(_) => container.dirty_bitmap(arg.iova, arg.size, arg.pgsize, words),
            None => container.dirty_bitmap_zeroed(arg.iova, arg.size, arg.pgsize, words),
        };
        done.map(|()| 0).map_err(Error::errno)
    }

    fn harvest(&mut self, arg: &ReportArg, words: &mut [u64]) -> Result<u64, Errno> {
        let container = self.container()?;
        let done = container.unmap_dirty(arg.iova, arg.size, arg.pgsize, words);
        done.map_err(Error::errno)
    }

    fn pin(&mut self, index: DeviceIndex, iova: u64, n: i32, prot: u32) -> Result<i32, Errno> {
        let (device, slot) = self.device(index)?;
        // The core refuses more pages than one call may pin, and those fit.
        let mut pfns = vec![0; (n as u32).min(1 << 16) as usize];
        let pinned = device.pin_pages(iova, Prot(prot), &mut pfns);
        if pinned.is_ok() {
            slot.driver().pinned(iova, n);
        }
        Ok(returned(pinned.map_err(Error::errno), n))
    }

    fn unpin(&mut self, index: DeviceIndex, iova: u64, n: i32) -> Result<i32, Errno> {
        let (device, slot) = self.device(index)?;
        device.unpin_pages(iova, u64::try_from(n).unwrap_or(0));
        slot.driver().unpinned(iova, n);
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
        let (device, _) = self.device(index)?;
        let mut data = vec![0x5a; len as usize];
        let mut work = || {
            let done = match (write, caller) {
                (false, _) => device.read(iova, &mut data),
                (true, Caller::KernelThread) => device.write_as_kernel_thread(iova, &data),
                (true, _) => device.write(iova, &data),
            };
            returned(done.map_err(Error::errno), 0)
        };
        match caller {
            Caller::Child => process::in_child(work),
            _ => Ok(work()),
        }
    }

    fn mark(&mut self, iova: u64, len: u64) -> Answer {
        let container = self.container()?;
        container.mark(iova, len).map(|()| 0).map_err(Error::errno)
    }

    fn on_unmap(&mut self, index: DeviceIndex, actions: &[Action]) -> Answer {
        let (_, slot) = self.device(index)?;
        slot.driver().actions = actions.to_vec();
        Ok(0)
    }

    fn stat(&self, index: DeviceIndex) -> Stat {
        self.slots[index].driver().stat()
    }

    fn limit_locked(&mut self, limit: u64, keep_cap: bool) -> String {
        process::limit_locked(limit, keep_cap)
    }

    fn locked_pages(&self) -> u64 {
        charged_pages()
    }

    fn set_entry_limit(&mut self, limit: u32) {
        self.entry_limit = limit;
    }

    fn map_memory(&mut self, addr: u64, size: u64, write: bool) -> Result<(), Errno> {
        arena::map_memory(addr, size, write)
    }

    fn peek(&mut self, addr: u64, buf: &mut [u8]) -> bool {
        arena::read(addr, buf).is_ok()
    }

    fn poke(&mut self, addr: u64, buf: &[u8]) -> bool {
        arena::write(addr, buf).is_ok()
    }
}
