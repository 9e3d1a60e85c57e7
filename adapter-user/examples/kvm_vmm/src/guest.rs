// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest: its memory, and its program.
//!
//! The program counts steps in RBX. Step n writes n + 1 into some pages by each
//! of four ways, the pages of step n mod 64. So at any time the register alone
//! says what every page must hold, and a page that arrived stale is found.

use vm_memory::GuestAddress;

use super::asm::{Asm, If, Label, R9, RAX, RBX, RCX, RDI, RDX, RSI};

pub(super) const PAGE: u64 = 4096;

/// Two pieces of RAM: first address and bytes.
pub(super) const RAM: [(GuestAddress, usize); 2] = [
    (GuestAddress(0), 16 << 20),
    (GuestAddress(512 << 20), 8 << 20),
];

pub(super) const PAGE_TABLES: u64 = 0x1000;
pub(super) const CODE: u64 = 0x10000;

/// After so many steps the same pages are written again.
pub(super) const CYCLE: u64 = 64;

/// Pages that one way of writing is responsible for: where they are, and how
/// many a step writes.
#[derive(Clone, Copy)]
pub(super) struct Area {
    pub(super) gpa: u64,
    pub(super) pages_per_step: u64,
}

impl Area {
    /// The first page of a step.
    pub(super) fn page(self, step: u64) -> u64 {
        self.gpa + step % CYCLE * self.pages_per_step * PAGE
    }
}

/// Written by the guest's CPU: only KVM knows.
pub(super) const CPU: Area = Area {
    gpa: 2 << 20,
    pages_per_step: 16,
};
/// Written by the VMM, through vm-memory.
pub(super) const VMM: Area = Area {
    gpa: 8 << 20,
    pages_per_step: 1,
};
/// Written by the two devices, each behind a virtual IOMMU of its own.
pub(super) const DEVICES: [Area; 2] = [
    Area {
        gpa: 512 << 20,
        pages_per_step: 1,
    },
    Area {
        gpa: 513 << 20,
        pages_per_step: 1,
    },
];
/// Written by devices that the guest knows nothing of, to make it harder.
pub(super) const HAMMERED: u64 = 514 << 20;
pub(super) const HAMMERED_PAGES: u64 = 256;

/// Where a page holds its number.
pub(super) const OFFSETS: [u64; 2] = [8, 4088];

/// The guest writes a step's number: the VMM is to write it into its page.
pub(super) const PORT_VMM: u16 = 0x10;
/// The guest reads what to do: 0 is another step, 1 is to verify.
pub(super) const PORT_COMMAND: u16 = 0x14;
/// The guest writes what it found: 0, or the number of a page that is wrong.
pub(super) const PORT_RESULT: u16 = 0x18;
/// The ports of the first device; those of the second follow.
pub(super) const PORT_DEVICE: u16 = 0x100;
pub(super) const PORTS_PER_DEVICE: u16 = 0x100;

/// Registers of a device: the IOVA page that the next ones are about,
pub(super) const REG_IOVA: u16 = 0;
/// map it to a guest page,
pub(super) const REG_MAP: u16 = 4;
/// the doorbell: write this number there,
pub(super) const REG_DOORBELL: u16 = 8;
/// unmap an IOVA page,
pub(super) const REG_UNMAP: u16 = 12;
/// and how many doorbells are done.
pub(super) const REG_DONE: u16 = 16;

/// First IOVA page of a device's windows, and how many there are.
pub(super) const WINDOWS: u64 = 0x1000;
pub(super) const WINDOW_COUNT: u64 = 16;
/// How many doorbells may wait.
const LAG: i32 = 8;

/// The program, to be at [`CODE`].
pub(super) fn program() -> Vec<u8> {
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

/// RCX becomes the address of the first page of the step in RBX.
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

/// Maps the step's page in a window, rings, waits for a doorbell of some steps
/// ago, and unmaps its window.
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

/// Jumps to `wrong`, with the address in RCX, if a page does not hold the number
/// of the last step that wrote it. RBX steps were made.
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
