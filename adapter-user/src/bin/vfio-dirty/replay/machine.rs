// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a script drives: a container, devices and their groups.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use adapter_user::uapi::*;
use adapter_user::{Container, Device, Errno, Error, Group, GroupId, IommuSpec, Options, Prot};

use super::arena;
use super::script::{DeviceIndex, BUF, BUF_SIZE, DEVICES};

/// What a device's driver counts, as the recorder's test driver does.
#[derive(Default)]
pub(crate) struct Stat {
    pub(crate) unmap_calls: u32,
    pub(crate) last: (u64, u64),
    /// Iovas of single pins, in order.
    pub(crate) pins: Vec<u64>,
}

/// The driver of an emulated device.
#[derive(Default)]
pub(crate) struct Driver {
    stat: Mutex<Stat>,
    pub(crate) no_unpin: AtomicBool,
}

impl Driver {
    pub(crate) fn stat(&self) -> MutexGuard<'_, Stat> {
        self.stat.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unpin_range(&self, device: &Device, iova: u64, size: u64) {
        let mut stat = self.stat();
        stat.pins.retain(|at| {
            let inside = at.checked_sub(iova).is_some_and(|offset| offset < size);
            if inside {
                device.unpin(*at, 1);
            }
            !inside
        });
    }

    fn dma_unmap(&self, device: &Device, iova: u64, size: u64) {
        let mut stat = self.stat();
        stat.unmap_calls += 1;
        stat.last = (iova, size);
        drop(stat);
        if !self.no_unpin.load(Ordering::Relaxed) {
            self.unpin_range(device, iova, size);
        }
    }
}

/// A device of the scripts.
#[derive(Default)]
pub(crate) struct Slot {
    /// Whether its group is open and in the container.
    attached: bool,
    pub(crate) driver: Arc<Driver>,
    device: Option<Arc<Device>>,
}

/// Everything of one case.
pub(crate) struct Machine {
    container: Option<Container>,
    slots: [Slot; DEVICES.len()],
    pub(crate) entry_limit: u32,
    /// The line that is being answered.
    pub(crate) out: String,
}

/// The result of a system call: a value, or an errno.
pub(crate) type Answer = Result<u32, Errno>;

impl Machine {
    pub(crate) fn new(entry_limit: u32) -> Self {
        Machine {
            container: None,
            slots: Default::default(),
            entry_limit,
            out: String::new(),
        }
    }

    pub(crate) fn say(&mut self, text: std::fmt::Arguments<'_>) {
        // A string takes any text.
        let _ = self.out.write_fmt(text);
    }

    /// Appends ` => value name`.
    pub(crate) fn answer(&mut self, answer: Answer) {
        match answer {
            Ok(value) => self.say(format_args!(" => {value} ok")),
            Err(e) => self.say(format_args!(" => -1 {e}")),
        }
    }

    pub(crate) fn ioctl(&self, nr: u32, arg: u64) -> Answer {
        let container = self.container.as_ref().ok_or(Errno::EBADF)?;
        container.ioctl(nr, arg).map_err(Error::errno)
    }

    /// An ioctl whose argument is `arg`, or what is at `ptr`.
    pub(crate) fn ioctl_with(&self, nr: u32, arg: &mut [u8], ptr: Option<u64>) -> Answer {
        self.ioctl(nr, ptr.unwrap_or(arg.as_mut_ptr() as u64))
    }

    pub(crate) fn close_all(&mut self) {
        for index in 0..DEVICES.len() {
            self.close_device(index);
            self.slots[index].attached = false;
        }
        self.container = None;
    }

    pub(crate) fn open(&mut self) {
        self.close_all();
        self.container = Some(Container::new(Options {
            dma_entry_limit: self.entry_limit,
            ..Options::default()
        }));
    }

    /// Opens the group of a device and puts it into the container; with `set`
    /// chooses the IOMMU type too. Says what failed.
    pub(crate) fn attach(&mut self, index: DeviceIndex, set: Option<u64>) -> bool {
        let name = DEVICES[index];
        let Some(container) = self.container.clone() else {
            self.say(format_args!(" {name}:set_container=EBADF"));
            return false;
        };
        if self.slots[index].attached {
            self.say(format_args!(" {name}:open=EBUSY"));
            return false;
        }
        let id = GroupId(index as u64);
        let group = if name.starts_with("emu") {
            Group::emulated(id)
        } else {
            Group::iommu(id, IommuSpec::default())
        };
        if let Err(e) = container.add_group(group) {
            self.say(format_args!(" {name}:set_container={}", e.errno()));
            return false;
        }
        self.slots[index].attached = true;
        if let Some(kind) = set {
            let answer = self.ioctl(VFIO_SET_IOMMU, kind);
            match answer {
                Ok(_) => self.say(format_args!(" set_iommu({kind})=ok")),
                Err(e) => self.say(format_args!(" set_iommu({kind})={e}")),
            }
            return answer.is_ok();
        }
        true
    }

    /// Opens a device, which resets what its driver counts.
    pub(crate) fn get_device(&mut self, index: DeviceIndex) {
        let name = DEVICES[index];
        let slot = &mut self.slots[index];
        let Some(container) = self.container.as_ref().filter(|_| slot.attached) else {
            self.say(format_args!(" {name}:get_device_fd=EBADF"));
            return;
        };
        let driver = Arc::default();
        // vfio-pci and emu2 have no dma_unmap callback.
        let on_unmap = (!matches!(name, "pci0" | "pci1" | "emu2")).then(|| {
            let driver: Arc<Driver> = Arc::clone(&driver);
            let call = move |d: &Device, iova, size| driver.dma_unmap(d, iova, size);
            Box::new(call) as adapter_user::OnUnmap
        });
        match container.open_device(GroupId(index as u64), on_unmap) {
            Ok(device) => {
                slot.device = Some(device);
                slot.driver = driver;
            }
            Err(e) => self.say(format_args!(" {name}:get_device_fd={}", e.errno())),
        }
    }

    pub(crate) fn close_device(&mut self, index: DeviceIndex) {
        let slot = &mut self.slots[index];
        if let Some(device) = slot.device.take() {
            slot.driver.unpin_range(&device, 0, u64::MAX);
        }
    }

    pub(crate) fn detach(&mut self, index: DeviceIndex) -> Answer {
        self.close_device(index);
        if !std::mem::take(&mut self.slots[index].attached) {
            return Err(Errno::EBADF);
        }
        let container = self.container.as_ref().ok_or(Errno::EBADF)?;
        let removed = container.remove_group(GroupId(index as u64));
        removed.map(|()| 0).map_err(Error::errno)
    }

    /// A device that has the recorder's driver.
    pub(crate) fn device(&self, index: DeviceIndex) -> Result<(&Device, &Driver), Errno> {
        let slot = &self.slots[index];
        match &slot.device {
            None => Err(Errno::EBADF),
            Some(_) if DEVICES[index].starts_with("pci") => Err(Errno::ENOTTY),
            Some(device) => Ok((device, &slot.driver)),
        }
    }

    pub(crate) fn driver(&self, index: DeviceIndex) -> &Driver {
        &self.slots[index].driver
    }

    /// vfio_pin_pages through the device; the count is the kernel's int.
    pub(crate) fn pin(
        &self,
        index: DeviceIndex,
        iova: u64,
        n: i32,
        prot: u32,
    ) -> Result<i32, Errno> {
        let (device, driver) = self.device(index)?;
        // More than the core takes is refused by the core, however many.
        let mut pfns = vec![0; (n as u32).min(1 << 16) as usize];
        Ok(match device.pin(iova, Prot(prot), &mut pfns) {
            Ok(()) => {
                let pages = (0..pfns.len() as u64).map(|k| iova + (k << 12));
                driver.stat().pins.extend(pages);
                n
            }
            Err(e) => -e.errno().0,
        })
    }

    pub(crate) fn unpin(&self, index: DeviceIndex, iova: u64, n: i32) -> Result<i32, Errno> {
        let (device, driver) = self.device(index)?;
        let n = u64::try_from(n).unwrap_or(0);
        device.unpin(iova, n);
        let mut stat = driver.stat();
        for at in (0..n).map(|k| iova.wrapping_add(k << 12)) {
            if let Some(found) = stat.pins.iter().position(|pin| *pin == at) {
                stat.pins.remove(found);
            }
        }
        Ok(0)
    }

    /// vfio_dma_rw through the device.
    pub(crate) fn rw(
        &self,
        index: DeviceIndex,
        iova: u64,
        len: u64,
        write: bool,
        kthread: bool,
    ) -> Result<i32, Errno> {
        let (device, _) = self.device(index)?;
        let mut data = vec![0x5a; len as usize];
        let done = match (write, kthread) {
            (false, _) => device.read(iova, &mut data),
            (true, false) => device.write(iova, &data),
            (true, true) => device.write_as_kernel_thread(iova, &data),
        };
        Ok(done.map_or_else(|e| -e.errno().0, |()| 0))
    }

    /// Fills the buffer that bitmaps go to.
    pub(crate) fn fill(&mut self, fill: u8, bsize: u64) {
        let len = if bsize < 60000 { bsize + 64 } else { BUF_SIZE };
        // The buffer is mapped: see `arena::map_all`.
        let _ = arena::write(BUF, &vec![fill; len as usize]);
    }

    /// Appends the words at `data` that can be read.
    pub(crate) fn dump(&mut self, data: u64, bsize: u64, words: u64) {
        let words = match words {
            0 => (bsize.wrapping_add(7) / 8 + 1).min(6),
            n => n,
        };
        self.say(format_args!(" bm="));
        for k in 0..words {
            let comma = if k == 0 { "" } else { "," };
            let mut word = [0; 8];
            if arena::read(data.wrapping_add(8 * k), &mut word).is_err() {
                self.say(format_args!("{comma}<unmapped>"));
                break;
            }
            self.say(format_args!("{comma}{:x}", u64::from_ne_bytes(word)));
        }
    }
}
