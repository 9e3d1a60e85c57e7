// SPDX-License-Identifier: GPL-2.0-only
//! The kernel's own `/dev/vfio/vfio`, groups and devices. The test module's devices pin
//! and write on demand.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use dirty_core::Errno;
use dirty_script::op::{
    Action, Caller, DeviceIndex, FaultKind, New, ReportArg, ARG, ARG_SIZE, DEVICES,
};
use dirty_script::{Answer, AttachError, Stat, System};
use nix::errno::Errno as Raw;
use nix::libc;

use crate::tiommu::Tiommu;
use crate::{arena, process};

pub(crate) const GROUP_SET_CONTAINER: u32 = 0x3b68;
const GROUP_UNSET_CONTAINER: u32 = 0x3b69;
pub(crate) const GROUP_GET_DEVICE_FD: u32 = 0x3b6a;

/// The test module's ioctls, as `emuvfio.h` declares them.
#[repr(C)]
#[derive(Default)]
struct EmuPin {
    iova: u64,
    npage: i32,
    prot: i32,
    ret: i32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct EmuRw {
    iova: u64,
    len: u64,
    write: u32,
    kthread: u32,
    ret: i32,
    pad: u32,
    data: u64,
}

#[repr(C)]
#[derive(Default)]
struct EmuStat {
    unmap_calls: u32,
    npinned: u32,
    last_iova: u64,
    last_len: u64,
}

const EMU_PIN: u32 = 0xc018_45e0;
const EMU_UNPIN: u32 = 0xc018_45e1;
const EMU_RW: u32 = 0xc028_45e2;
const EMU_STAT: u32 = 0x8018_45e3;
const EMU_NOUNPIN: u32 = 0x45e5;

/// A device of the scripts as the VM has it.
#[derive(Default)]
struct Slot {
    /// Its name in its group; `None` if the VM has no such device.
    name: Option<String>,
    /// `/dev/vfio/N`.
    group: String,
    group_file: Option<File>,
    device_file: Option<OwnedFd>,
}

/// A process's files on VFIO.
pub(crate) struct Real {
    container: Option<File>,
    slots: [Slot; DEVICES.len()],
    /// The loaded driver's module parameters.
    parameters: String,
    /// How far the arguments of ioctls are from the scripts' address for them.
    shift: u64,
    /// The test IOMMU while it is to refuse a map.
    refusing: Option<Tiommu>,
    /// Which allocation of the next system call on VFIO is to fail.
    pub(crate) fail: Cell<Option<u32>>,
    /// Whether it did.
    pub(crate) failed: Cell<bool>,
}

pub(crate) fn raw_ioctl(fd: &impl AsRawFd, nr: u32, arg: u64) -> Answer {
    // SAFETY: the kernel checks every address; memory that it writes is either
    // the scripts', of which this program keeps no reference, or a structure
    // that its caller lends.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), nr.into(), arg) };
    u32::try_from(ret).map_err(|_| Errno(Raw::last_raw()))
}

pub(crate) fn address<T>(value: &mut T) -> u64 {
    std::ptr::from_mut(value) as u64
}

pub(crate) fn open(path: &str) -> Result<File, Errno> {
    let file = File::options().read(true).write(true).open(path);
    file.map_err(|e| Errno(e.raw_os_error().unwrap_or(0)))
}

/// The folder of the loaded driver's module parameters.
pub(crate) fn parameters() -> String {
    let folder = |name| format!("/sys/module/{name}/parameters");
    let names = ["vfio_iommu_type1", "vfio_iommu_dirty"].map(folder);
    let loaded = names
        .into_iter()
        .find(|path| fs::exists(path).unwrap_or(false));
    loaded.unwrap_or_default()
}

impl Real {
    /// Finds the devices of `/etc/devs`: a name, the name in its group, and a path.
    pub(crate) fn new(entry_limit: u32) -> io::Result<Self> {
        let mut slots: [Slot; DEVICES.len()] = Default::default();
        for line in fs::read_to_string("/etc/devs")?.lines() {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let [name, in_group, path] = words[..] else {
                continue;
            };
            if let Some(at) = DEVICES.iter().position(|d| d.name == name) {
                let group = fs::read_link(format!("{path}/iommu_group"))?;
                let number = group.file_name().unwrap_or_default().to_string_lossy();
                slots[at].name = Some(in_group.to_string());
                slots[at].group = format!("/dev/vfio/{number}");
            }
        }
        let mut real = Real {
            container: None,
            slots,
            parameters: parameters(),
            shift: 0,
            refusing: None,
            fail: Cell::default(),
            failed: Cell::default(),
        };
        real.set_entry_limit(entry_limit);
        Ok(real)
    }

    /// The same container and devices for the `k`-th other thread, with memory of its
    /// own for arguments.
    pub(crate) fn share(&self, k: u64) -> io::Result<Real> {
        let shift = k * ARG_SIZE;
        arena::map_memory(ARG + shift, ARG_SIZE, true)
            .map_err(|e| io::Error::from_raw_os_error(e.0))?;
        let mut slots: [Slot; DEVICES.len()] = Default::default();
        for (slot, from) in slots.iter_mut().zip(&self.slots) {
            slot.name.clone_from(&from.name);
            slot.group.clone_from(&from.group);
            slot.group_file = from.group_file.as_ref().map(File::try_clone).transpose()?;
            slot.device_file = from
                .device_file
                .as_ref()
                .map(OwnedFd::try_clone)
                .transpose()?;
        }
        Ok(Real {
            container: self.container.as_ref().map(File::try_clone).transpose()?,
            slots,
            parameters: self.parameters.clone(),
            shift,
            refusing: None,
            fail: Cell::default(),
            failed: Cell::default(),
        })
    }

    /// A system call, in which the allocation that `fail` names fails.
    fn call(&self, fd: &impl AsRawFd, nr: u32, arg: u64) -> Answer {
        let Some(n) = self.fail.take() else {
            return raw_ioctl(fd, nr, arg);
        };
        let file = open("/proc/thread-self/fail-nth")?;
        let armed = file.write_at(n.to_string().as_bytes(), 0);
        armed.map_err(|e| Errno(e.raw_os_error().unwrap_or(0)))?;
        let answer = raw_ioctl(fd, nr, arg);
        // The rest of the count: 0 if there was such an allocation.
        let mut left = [0; 8];
        let len = file.read_at(&mut left, 0).unwrap_or(0);
        self.failed.set(left[..len].trim_ascii() == b"0");
        let _ = file.write_at(b"0", 0);
        answer
    }

    /// Where an address of the scripts is for this thread.
    fn place(&self, addr: u64) -> u64 {
        let argument = addr
            .checked_sub(ARG)
            .is_some_and(|offset| offset < ARG_SIZE);
        if argument {
            addr + self.shift
        } else {
            addr
        }
    }

    /// A device's file.
    pub(crate) fn device(&self, index: DeviceIndex) -> Result<&OwnedFd, Errno> {
        let file = self.slots[index].device_file.as_ref();
        file.ok_or(Errno::EBADF)
    }
}

impl System for Real {
    fn open(&mut self, _new: &New) {
        for slot in &mut self.slots {
            slot.device_file = None;
            slot.group_file = None;
        }
        self.container = None;
        self.container = open("/dev/vfio/vfio").ok();
    }

    fn attach(&mut self, index: DeviceIndex) -> Result<(), AttachError> {
        let failed = |step, errno| AttachError { step, errno };
        let group = open(&self.slots[index].group).map_err(|e| failed("open", e))?;
        let container = self.container.as_ref();
        let mut fd = container.map_or(-1, AsRawFd::as_raw_fd);
        let fd = address(&mut fd);
        let added = self.call(&group, GROUP_SET_CONTAINER, fd);
        added.map_err(|e| failed("set_container", e))?;
        self.slots[index].group_file = Some(group);
        Ok(())
    }

    fn detach(&mut self, index: DeviceIndex) -> Answer {
        let slot = &mut self.slots[index];
        slot.device_file = None;
        let group = slot.group_file.take().ok_or(Errno::EBADF)?;
        raw_ioctl(&group, GROUP_UNSET_CONTAINER, 0)
    }

    fn open_device(&mut self, index: DeviceIndex) -> Result<(), Errno> {
        let slot = &mut self.slots[index];
        let group = slot.group_file.as_ref().ok_or(Errno::EBADF)?;
        if slot.device_file.is_some() {
            return Ok(());
        }
        let mut name = slot.name.clone().unwrap_or_default().into_bytes();
        name.push(0);
        let fd = raw_ioctl(group, GROUP_GET_DEVICE_FD, name.as_mut_ptr() as u64)?;
        // SAFETY: the kernel has just opened the file, and nobody else has it.
        slot.device_file = Some(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        Ok(())
    }

    fn close_device(&mut self, index: DeviceIndex) {
        self.slots[index].device_file = None;
    }

    fn ioctl(&mut self, nr: u32, arg: u64) -> Answer {
        let arg = self.place(arg);
        self.call(self.container.as_ref().ok_or(Errno::EBADF)?, nr, arg)
    }

    fn report(&mut self, _arg: &ReportArg, _words: &mut [u64]) -> Answer {
        Err(Errno::EOPNOTSUPP)
    }

    fn harvest(&mut self, _arg: &ReportArg, _words: &mut [u64]) -> Result<u64, Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    fn pin(&mut self, index: DeviceIndex, iova: u64, n: i32, prot: u32) -> Result<i32, Errno> {
        let mut arg = EmuPin {
            iova,
            npage: n,
            prot: prot as i32,
            ..EmuPin::default()
        };
        self.call(self.device(index)?, EMU_PIN, address(&mut arg))?;
        Ok(arg.ret)
    }

    fn unpin(&mut self, index: DeviceIndex, iova: u64, n: i32) -> Result<i32, Errno> {
        let mut arg = EmuPin {
            iova,
            npage: n,
            ..EmuPin::default()
        };
        raw_ioctl(self.device(index)?, EMU_UNPIN, address(&mut arg))?;
        Ok(arg.ret)
    }

    fn rw(
        &mut self,
        index: DeviceIndex,
        iova: u64,
        len: u64,
        write: bool,
        caller: Caller,
    ) -> Result<i32, Errno> {
        let device = self.device(index)?;
        if !DEVICES[index].pins {
            return Err(Errno::ENOTTY); // its driver does not know the ioctl
        }
        let mut arg = EmuRw {
            iova,
            len,
            write: write.into(),
            kthread: (caller == Caller::KernelThread).into(),
            ..EmuRw::default()
        };
        let mut work = || {
            let done = raw_ioctl(device, EMU_RW, address(&mut arg));
            done.map_or_else(|e| -e.0, |_| arg.ret)
        };
        match caller {
            Caller::Child => process::in_child(work),
            _ => Ok(work()),
        }
    }

    fn mark(&mut self, _iova: u64, _len: u64) -> Answer {
        Err(Errno::EOPNOTSUPP)
    }

    fn on_unmap(&mut self, index: DeviceIndex, actions: &[Action]) -> Answer {
        let nounpin = match actions {
            [] => 1,
            [Action::Unpin] => 0,
            _ => return Err(Errno::EOPNOTSUPP),
        };
        raw_ioctl(self.device(index)?, EMU_NOUNPIN, nounpin)
    }

    fn fault(&mut self, kind: FaultKind, n: u64) -> Answer {
        match kind {
            FaultKind::Map => {
                let tiommu = Tiommu::open()?;
                tiommu.refuse(n)?;
                self.refusing = Some(tiommu);
                Ok(0)
            }
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    fn end_faults(&mut self) {
        if let Some(tiommu) = self.refusing.take() {
            // It fails only for numbers that are too large.
            let _ = tiommu.refuse(0);
        }
    }

    fn stat(&self, index: DeviceIndex) -> Stat {
        let mut stat = EmuStat::default();
        if let Ok(device) = self.device(index) {
            // A device of another driver counts nothing.
            let _ = raw_ioctl(device, EMU_STAT, address(&mut stat));
        }
        Stat {
            unmap_calls: stat.unmap_calls,
            last: (stat.last_iova, stat.last_len),
            pinned: stat.npinned as usize,
        }
    }

    fn limit_locked(&mut self, limit: u64, keep_cap: bool) -> String {
        process::limit_locked(limit, keep_cap)
    }

    fn locked_pages(&self) -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmLck:"));
        let kilobytes = line.and_then(|l| l.split_ascii_whitespace().next()?.parse::<u64>().ok());
        kilobytes.unwrap_or(0) / 4
    }

    fn set_entry_limit(&mut self, limit: u32) {
        // If that fails, every answer about the limit shows it.
        let _ = fs::write(
            format!("{}/dma_entry_limit", self.parameters),
            limit.to_string(),
        );
    }

    fn map_memory(&mut self, addr: u64, size: u64, write: bool) -> Result<(), Errno> {
        arena::map_memory(addr, size, write)
    }

    fn peek(&mut self, addr: u64, buf: &mut [u8]) -> bool {
        arena::read(self.place(addr), buf).is_ok()
    }

    fn poke(&mut self, addr: u64, buf: &[u8]) -> bool {
        arena::write(self.place(addr), buf).is_ok()
    }
}
