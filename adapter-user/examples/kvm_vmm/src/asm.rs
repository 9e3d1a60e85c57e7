// SPDX-License-Identifier: MIT OR Apache-2.0
//! An assembler for the few instructions of x86-64 that the guest is made of.

/// A 64-bit register, by its number.
#[derive(Clone, Copy)]
pub(super) struct Reg(u8);

pub(super) const RAX: Reg = Reg(0);
pub(super) const RCX: Reg = Reg(1);
pub(super) const RDX: Reg = Reg(2);
pub(super) const RBX: Reg = Reg(3);
pub(super) const RSI: Reg = Reg(6);
pub(super) const RDI: Reg = Reg(7);
pub(super) const R9: Reg = Reg(9);

/// When a jump is taken, after `cmp a, b` of unsigned numbers.
#[derive(Clone, Copy)]
pub(super) enum If {
    Equal = 0x84,
    NotEqual = 0x85,
    /// a <= b
    NotAbove = 0x86,
    /// a < b
    Below = 0x82,
}

/// A place in the code.
#[derive(Clone, Copy)]
pub(super) struct Label(usize);

#[derive(Default)]
pub(super) struct Asm {
    code: Vec<u8>,
    /// Where each label is.
    labels: Vec<Option<usize>>,
    /// Distances to fill in: where, and of which label.
    jumps: Vec<(usize, Label)>,
}

impl Asm {
    pub(super) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    pub(super) fn here(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    pub(super) fn label_here(&mut self) -> Label {
        let label = self.label();
        self.here(label);
        label
    }

    /// The code, with every jump's distance filled in.
    pub(super) fn finish(mut self) -> Vec<u8> {
        for (at, label) in self.jumps {
            let to = self.labels[label.0].expect("a label without a place");
            let distance = to as i32 - (at as i32 + 4);
            self.code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
        self.code
    }

    /// REX.W, opcode and ModRM of an instruction on two operands.
    fn two(&mut self, opcode: u8, mode: u8, reg: u8, rm: Reg) {
        let rex = 0x48 | (reg >> 3) << 2 | rm.0 >> 3;
        let modrm = mode << 6 | (reg & 7) << 3 | rm.0 & 7;
        self.code.extend([rex, opcode, modrm]);
    }

    pub(super) fn mov_imm(&mut self, to: Reg, value: u64) {
        self.code.extend([0x48 | to.0 >> 3, 0xb8 | to.0 & 7]);
        self.code.extend(value.to_le_bytes());
    }

    pub(super) fn mov(&mut self, to: Reg, from: Reg) {
        self.two(0x89, 3, from.0, to);
    }

    pub(super) fn add(&mut self, to: Reg, from: Reg) {
        self.two(0x01, 3, from.0, to);
    }

    pub(super) fn sub(&mut self, to: Reg, from: Reg) {
        self.two(0x29, 3, from.0, to);
    }

    pub(super) fn cmp(&mut self, a: Reg, b: Reg) {
        self.two(0x39, 3, b.0, a);
    }

    fn with_imm(&mut self, operation: u8, to: Reg, value: i32) {
        self.two(0x81, 3, operation, to);
        self.code.extend(value.to_le_bytes());
    }

    pub(super) fn add_imm(&mut self, to: Reg, value: i32) {
        self.with_imm(0, to, value);
    }

    pub(super) fn and_imm(&mut self, to: Reg, value: i32) {
        self.with_imm(4, to, value);
    }

    pub(super) fn cmp_imm(&mut self, a: Reg, value: i32) {
        self.with_imm(7, a, value);
    }

    pub(super) fn shl(&mut self, to: Reg, bits: u8) {
        self.two(0xc1, 3, 4, to);
        self.code.push(bits);
    }

    pub(super) fn shr(&mut self, to: Reg, bits: u8) {
        self.two(0xc1, 3, 5, to);
        self.code.push(bits);
    }

    /// Stores 8 bytes at `[base + offset]`.
    pub(super) fn store(&mut self, base: Reg, offset: i32, from: Reg) {
        self.two(0x89, 2, from.0, base);
        self.code.extend(offset.to_le_bytes());
    }

    /// Loads 8 bytes from `[base + offset]`.
    pub(super) fn load(&mut self, to: Reg, base: Reg, offset: i32) {
        self.two(0x8b, 2, to.0, base);
        self.code.extend(offset.to_le_bytes());
    }

    /// Writes the low half of RAX to an I/O port. Changes RDX.
    pub(super) fn out(&mut self, port: u16) {
        self.mov_imm(RDX, port.into());
        self.code.push(0xef);
    }

    /// Reads 4 bytes from an I/O port into RAX. Changes RDX.
    pub(super) fn input(&mut self, port: u16) {
        self.mov_imm(RDX, port.into());
        self.code.push(0xed);
    }

    pub(super) fn halt(&mut self) {
        self.code.push(0xf4);
    }

    pub(super) fn jump(&mut self, label: Label) {
        self.code.push(0xe9);
        self.distance(label);
    }

    pub(super) fn jump_if(&mut self, condition: If, label: Label) {
        self.code.extend([0x0f, condition as u8]);
        self.distance(label);
    }

    fn distance(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.code.extend([0; 4]);
    }
}
