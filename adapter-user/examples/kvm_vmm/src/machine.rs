// SPDX-License-Identifier: MIT OR Apache-2.0
//! A machine: one CPU, its RAM, and two devices that do DMA.

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;

use adapter_user::guest::Tracker;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::dma::Dma;
use crate::guest::{
    program, CODE, DEVICES, OFFSETS, PAGE_TABLES, PORTS_PER_DEVICE, PORT_COMMAND, PORT_DEVICE,
    PORT_RESULT, PORT_VMM, VMM,
};
use crate::memory::{self, DeviceMemory, Memory};
use crate::{Lose, Result};

/// KVM_MEM_LOG_DIRTY_PAGES
const LOG_DIRTY_PAGES: u32 = 1;

pub(crate) struct Machine {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) memory: Memory,
    pub(crate) tracker: Tracker,
    pub(crate) devices: Vec<Dma>,
    /// Guest RAM once more, for DMA.
    pub(crate) device_memory: Arc<DeviceMemory>,
    /// Steps that the guest has made in this process.
    pub(crate) steps: Arc<AtomicU64>,
    /// Asks the guest to verify its memory at the end of the step.
    pub(crate) pause: Arc<AtomicBool>,
    lose: Option<Lose>,
}

/// The machine's CPU; it belongs to the thread that runs it.
pub(crate) struct Cpu {
    vcpu: VcpuFd,
}

/// Why the CPU stopped.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// It was asked to pause, and is about to verify its memory.
    Paused,
    /// The guest verified its memory and says which page is wrong; 0: none.
    Verified(u32),
}

impl Machine {
    pub(crate) fn new(kvm: &str, lose: Option<Lose>) -> Result<(Machine, Cpu)> {
        let kvm = Kvm::new_with_path(CString::new(kvm)?)?;
        let vm = Arc::new(kvm.create_vm()?);
        let (memory, device_memory) = memory::allocate()?;
        let tracker = Tracker::new(None);
        tracker.add_memory(memory.iter())?;
        let vcpu = vm.create_vcpu(0)?;
        let device_memory = Arc::new(device_memory);
        let device = |index| Dma::new(index, &tracker, &device_memory, lose);
        let machine = Machine {
            devices: (0..DEVICES.len()).map(device).collect::<Result<_>>()?,
            vm,
            memory,
            tracker,
            device_memory,
            steps: Arc::default(),
            pause: Arc::default(),
            lose,
        };
        machine.set_log(false)?;
        Ok((machine, Cpu { vcpu }))
    }

    /// Gives the RAM to KVM, with or without a log of what the CPU writes.
    pub(crate) fn set_log(&self, on: bool) -> Result<()> {
        for slot in self.tracker.slots() {
            let region = kvm_userspace_memory_region {
                slot: slot.id,
                flags: if on { LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: slot.gpa,
                memory_size: slot.bits.len(),
                userspace_addr: slot.host.ok_or("RAM without an address")?,
            };
            // SAFETY: vm-memory keeps this memory mapped for longer than the VM lives.
            unsafe { self.vm.set_user_memory_region(region) }?;
        }
        Ok(())
    }

    /// Writes the program and its page tables into memory.
    pub(crate) fn load(&self) -> Result<()> {
        self.memory.write_slice(&program(), GuestAddress(CODE))?;
        // An identity map of the first GiB in pages of 2 MiB, which are present,
        // writable, accessed and dirty.
        let entry = |at: u64, value: u64| self.memory.write_obj(value, GuestAddress(at));
        entry(PAGE_TABLES, (PAGE_TABLES + 0x1000) | 0x23)?;
        entry(PAGE_TABLES + 0x1000, (PAGE_TABLES + 0x2000) | 0x23)?;
        for at in 0..512 {
            entry(PAGE_TABLES + 0x2000 + at * 8, at << 21 | 0xe3)?;
        }
        Ok(())
    }

    /// Runs the CPU until it pauses or has verified its memory.
    pub(crate) fn run(&self, cpu: &mut Cpu) -> Result<Stop> {
        loop {
            let stop = match cpu.vcpu.run()? {
                VcpuExit::IoOut(port, data) => self.written(port, number(data)?)?,
                VcpuExit::IoIn(port, data) => {
                    let (value, stop) = self.read(port);
                    data.copy_from_slice(&value.to_le_bytes());
                    stop
                }
                other => return Err(format!("the guest ended: {other:?}").into()),
            };
            if let Some(stop) = stop {
                cpu.settle()?;
                return Ok(stop);
            }
        }
    }

    fn written(&self, port: u16, value: u32) -> Result<Option<Stop>> {
        match port {
            PORT_VMM => {
                let page = VMM.page(value.into());
                for offset in OFFSETS {
                    let (number, at) = (u64::from(value) + 1, GuestAddress(page + offset));
                    match self.lose {
                        Some(Lose::Vmm) => self.device_memory.write_obj(number, at)?,
                        _ => self.memory.write_obj(number, at)?,
                    }
                }
            }
            PORT_RESULT => return Ok(Some(Stop::Verified(value))),
            _ => {
                let (device, register) =
                    self.device(port).ok_or("the guest wrote an unknown port")?;
                device.written(register, value)?;
            }
        }
        Ok(None)
    }

    fn read(&self, port: u16) -> (u32, Option<Stop>) {
        if port != PORT_COMMAND {
            let device = self.device(port);
            return (device.map_or(0, |(device, _)| device.done() as u32), None);
        }
        self.steps.fetch_add(1, Ordering::Release);
        match self.pause.load(Ordering::Acquire) {
            true => (1, Some(Stop::Paused)),
            false => (0, None),
        }
    }

    fn device(&self, port: u16) -> Option<(&Dma, u16)> {
        let offset = port.checked_sub(PORT_DEVICE)?;
        let device = self.devices.get(usize::from(offset / PORTS_PER_DEVICE))?;
        Some((device, offset % PORTS_PER_DEVICE))
    }
}

impl Cpu {
    /// Completes the I/O instruction that caused the last exit.
    fn settle(&mut self) -> Result<()> {
        self.vcpu.set_kvm_immediate_exit(1);
        let done = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        match done {
            Err(error) if error.errno() == libc::EINTR => Ok(()),
            other => Err(format!("the CPU does not stop: {other:?}").into()),
        }
    }

    pub(crate) fn regs(&self) -> Result<kvm_regs> {
        Ok(self.vcpu.get_regs()?)
    }

    /// Sets the registers: those of another CPU, or those to start the program.
    /// The guest changes no other state of the CPU.
    pub(crate) fn set(&self, regs: Option<kvm_regs>) -> Result<()> {
        let mut sregs = self.vcpu.get_sregs()?;
        long_mode(&mut sregs);
        self.vcpu.set_sregs(&sregs)?;
        let start = kvm_regs {
            rip: CODE,
            rflags: 2,
            ..Default::default()
        };
        Ok(self.vcpu.set_regs(&regs.unwrap_or(start))?)
    }
}

fn number(data: &[u8]) -> Result<u32> {
    Ok(u32::from_le_bytes(data.try_into()?))
}

fn long_mode(sregs: &mut kvm_sregs) {
    let segment = kvm_segment {
        limit: !0,
        g: 1,
        present: 1,
        s: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11,
        l: 1,
        ..segment
    };
    let data = kvm_segment {
        selector: 16,
        type_: 3,
        db: 1,
        ..segment
    };
    (sregs.ds, sregs.es, sregs.fs) = (data, data, data);
    (sregs.gs, sregs.ss) = (data, data);
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 1 << 5; // PAE
    sregs.cr0 = 1 << 31 | 1; // PG, PE
    sregs.efer = 1 << 10 | 1 << 8; // LMA, LME
}
