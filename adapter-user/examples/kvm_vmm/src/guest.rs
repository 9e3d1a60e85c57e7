// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest: the layout of its memory, and its program.
//!
//! The program counts steps in RBX. Step n writes the number n + 1 in four ways,
//! each into its own pages for step n mod 64. So RBX alone tells what every page
//! must hold, and the program can verify all of them.

use vm_memory::GuestAddress;

use crate::asm::{Asm, If, Label, R9, RAX, RBX, RCX, RDI, RDX, RSI};

pub(crate) const PAGE: u64 = 4096;

/// The two ranges of RAM: first address and bytes.
pub(crate) const RAM: [(GuestAddress, usize); 2] = [
    (GuestAddress(0), 16 << 20),
    (GuestAddress(512 << 20), 8 << 20),
];

pub(crate) const PAGE_TABLES: u64 = 0x1000;
pub(crate) const CODE: u64 = 0x10000;

/// The program writes the same pages again after this many steps.
pub(crate) const CYCLE: u64 = 64;

/// The pages that are written in one way.
#[derive(Clone, Copy)]
pub(crate) struct Area {
    pub(crate) gpa: u64,
    pub(crate) pages_per_step: u64,
}

impl Area {
    /// The first page that a step writes.
    pub(crate) fn page(self, step: u64) -> u64 {
        self.gpa + step % CYCLE * self.pages_per_step * PAGE
    }
}

/// Written by the guest's CPU: only KVM logs these writes.
pub(crate) const CPU: Area = Area {
    gpa: 2 << 20,
    pages_per_step: 16,
};
/// Written by the VMM, through vm-memory.
pub(crate) const VMM: Area = Area {
    gpa: 8 << 20,
    pages_per_step: 1,
};
/// Written by the two devices, each behind a virtual IOMMU of its own.
pub(crate) const DEVICES: [Area; 2] = [
    Area {
        gpa: 512 << 20,
        pages_per_step: 1,
    },
    Area {
        gpa: 513 << 20,
        pages_per_step: 1,
    },
];
/// Written by the hammers, of which the guest does not know.
pub(crate) const HAMMERED: u64 = 514 << 20;
pub(crate) const HAMMERED_PAGES: u64 = 256;

/// The offsets at which a page holds its number.
pub(crate) const OFFSETS: [u64; 2] = [8, 4088];

/// The guest writes the number of a step here, and the VMM writes its page.
pub(crate) const PORT_VMM: u16 = 0x10;
/// The guest reads what to do: 0 means another step, 1 means verify.
pub(crate) const PORT_COMMAND: u16 = 0x14;
/// The guest writes what it found: 0, or the number of a wrong page.
pub(crate) const PORT_RESULT: u16 = 0x18;
/// The first port of device 0; the ports of device 1 follow.
pub(crate) const PORT_DEVICE: u16 = 0x100;
pub(crate) const PORTS_PER_DEVICE: u16 = 0x100;

/// A device's register: the IOVA page that REG_MAP and REG_DOORBELL use.
pub(crate) const REG_IOVA: u16 = 0;
/// A device's register: maps that IOVA page to a guest page.
pub(crate) const REG_MAP: u16 = 4;
/// A device's register, the doorbell: writes a number to that IOVA page.
pub(crate) const REG_DOORBELL: u16 = 8;
/// A device's register: unmaps an IOVA page.
pub(crate) const REG_UNMAP: u16 = 12;
/// A device's register: how many doorbells it has served.
pub(crate) const REG_DONE: u16 = 16;

/// The first IOVA page of a device's windows.
pub(crate) const WINDOWS: u64 = 0x1000;
/// How many windows of one page a device has.
pub(crate) const WINDOW_COUNT: u64 = 16;
/// How many doorbells may be pending.
const LAG: i32 = 8;

/// Assembles the program, which runs at [`CODE`].
pub(crate) fn program() -> Vec<u8> {
    let mut asm = Asm::default();
    let wrong = asm.label();
    asm.mov_imm(RBX, 0);
    let step = asm.label_here();
    write_as_cpu(&mut asm);
    asm.mov(RAX, RBX);
    asm.out(PORT_VMM);
    for (index, area) in (0..).zip(DEVICES) {
        let port = PORT_DEVICE + index * PORTS_PER_DEVICE;
        write_by_device(&mut asm, port, area);
    }
    asm.add_imm(RBX, 1);
    asm.input(PORT_COMMAND);
    asm.cmp_imm(RAX, 0);
    asm.jump_if(If::Equal, step);

    for index in 0..DEVICES.len() as u16 {
        let wait = asm.label_here();
        asm.input(PORT_DEVICE + index * PORTS_PER_DEVICE + REG_DONE);
        asm.cmp(RAX, RBX);
        asm.jump_if(If::NotEqual, wait);
    }
    for area in [CPU, VMM].into_iter().chain(DEVICES) {
        verify(&mut asm, area, wrong);
    }
    asm.mov_imm(RAX, 0);
    asm.out(PORT_RESULT);
    asm.jump(step);

    asm.here(wrong);
    asm.mov(RAX, RCX);
    asm.shr(RAX, 12);
    asm.out(PORT_RESULT);
    asm.halt();
    asm.finish()
}

/// Sets RCX to the address of the first page of the step in RBX.
fn address_of_step(asm: &mut Asm, area: Area) {
    let shift = (area.pages_per_step * PAGE).trailing_zeros();
    asm.mov(RCX, RBX);
    asm.and_imm(RCX, CYCLE as i32 - 1);
    asm.shl(RCX, shift as u8);
    asm.mov_imm(RDI, area.gpa);
    asm.add(RCX, RDI);
}

fn write_as_cpu(asm: &mut Asm) {
    address_of_step(asm, CPU);
    asm.mov(RAX, RBX);
    asm.add_imm(RAX, 1);
    asm.mov_imm(R9, CPU.pages_per_step);
    let page = asm.label_here();
    for offset in OFFSETS {
        asm.store(RCX, offset as i32, RAX);
    }
    asm.add_imm(RCX, PAGE as i32);
    asm.add_imm(R9, -1);
    asm.cmp_imm(R9, 0);
    asm.jump_if(If::NotEqual, page);
}

/// Maps the step's page in a window and rings the doorbell. Then waits until the
/// doorbell of [`LAG`] steps ago is served, and unmaps its window.
fn write_by_device(asm: &mut Asm, port: u16, area: Area) {
    let window = |asm: &mut Asm, steps_later: i32| {
        asm.mov(RAX, RBX);
        asm.add_imm(RAX, steps_later);
        asm.and_imm(RAX, WINDOW_COUNT as i32 - 1);
        asm.add_imm(RAX, WINDOWS as i32);
    };
    window(asm, 0);
    asm.out(port + REG_IOVA);
    address_of_step(asm, area);
    asm.mov(RAX, RCX);
    asm.shr(RAX, 12);
    asm.out(port + REG_MAP);
    asm.mov(RAX, RBX);
    asm.add_imm(RAX, 1);
    asm.out(port + REG_DOORBELL);

    let wait = asm.label_here();
    asm.input(port + REG_DONE);
    asm.add_imm(RAX, LAG);
    asm.cmp(RAX, RBX);
    asm.jump_if(If::NotAbove, wait);
    let early = asm.label();
    asm.cmp_imm(RBX, LAG);
    asm.jump_if(If::Below, early);
    window(asm, -LAG);
    asm.out(port + REG_UNMAP);
    asm.here(early);
}

/// Jumps to `wrong`, with the page's address in RCX, if a page does not hold the
/// number of the last step that wrote it. RBX holds the number of steps made.
fn verify(asm: &mut Asm, area: Area, wrong: Label) {
    asm.mov_imm(RDI, 0); // the step modulo the cycle
    asm.mov_imm(RCX, area.gpa);
    let step = asm.label_here();
    // RDX = RBX - (RBX - 1 - RDI) % CYCLE
    asm.mov(RAX, RBX);
    asm.add_imm(RAX, -1);
    asm.sub(RAX, RDI);
    asm.and_imm(RAX, CYCLE as i32 - 1);
    asm.mov(RDX, RBX);
    asm.sub(RDX, RAX);
    asm.mov_imm(R9, area.pages_per_step);
    let page = asm.label_here();
    for offset in OFFSETS {
        asm.load(RSI, RCX, offset as i32);
        asm.cmp(RSI, RDX);
        asm.jump_if(If::NotEqual, wrong);
    }
    asm.add_imm(RCX, PAGE as i32);
    asm.add_imm(R9, -1);
    asm.cmp_imm(R9, 0);
    asm.jump_if(If::NotEqual, page);
    asm.add_imm(RDI, 1);
    asm.cmp_imm(RDI, CYCLE as i32);
    asm.jump_if(If::NotEqual, step);
}
