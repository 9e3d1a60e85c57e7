// SPDX-License-Identifier: MIT OR Apache-2.0
//! An assembler for the few x86-64 instructions that the guest's program uses.

/// The number of a 64-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Reg(u8);

pub(crate) const RAX: Reg = Reg(0);
pub(crate) const RCX: Reg = Reg(1);
pub(crate) const RDX: Reg = Reg(2);
pub(crate) const RBX: Reg = Reg(3);
pub(crate) const RSI: Reg = Reg(6);
pub(crate) const RDI: Reg = Reg(7);
pub(crate) const R9: Reg = Reg(9);

/// The condition of a jump after `cmp a, b` of unsigned numbers.
#[derive(Clone, Copy)]
pub(crate) enum If {
    Equal = 0x84,
    NotEqual = 0x85,
    /// a <= b
    NotAbove = 0x86,
    /// a < b
    Below = 0x82,
}

/// A position in the code.
#[derive(Clone, Copy)]
pub(crate) struct Label(usize);

#[derive(Default)]
pub(crate) struct Asm {
    code: Vec<u8>,
    /// The position of each label that has one.
    labels: Vec<Option<usize>>,
    /// The distances to fill in: their positions, and the labels they lead to.
    jumps: Vec<(usize, Label)>,
}

impl Asm {
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    pub(crate) fn here(&mut self, label: Label) {
        self.labels[label.0] = Some(self.code.len());
    }

    pub(crate) fn label_here(&mut self) -> Label {
        let label = self.label();
        self.here(label);
        label
    }

    /// Fills in the distance of every jump and returns the code.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        for (at, label) in self.jumps {
            let to = self.labels[label.0].expect("a label without a position");
            let distance = to as i32 - (at as i32 + 4);
            self.code[at..at + 4].copy_from_slice(&distance.to_le_bytes());
        }
        self.code
    }

    /// Emits REX.W, opcode and ModRM of an instruction with two operands.
    fn two(&mut self, opcode: u8, mode: u8, reg: u8, rm: Reg) {
        let rex = 0x48 | (reg >> 3) << 2 | rm.0 >> 3;
        let modrm = mode << 6 | (reg & 7) << 3 | rm.0 & 7;
        self.code.extend([rex, opcode, modrm]);
    }

    pub(crate) fn mov_imm(&mut self, to: Reg, value: u64) {
        self.code.extend([0x48 | to.0 >> 3, 0xb8 | to.0 & 7]);
        self.code.extend(value.to_le_bytes());
    }

    pub(crate) fn mov(&mut self, to: Reg, from: Reg) {
        self.two(0x89, 3, from.0, to);
    }

    pub(crate) fn add(&mut self, to: Reg, from: Reg) {
        self.two(0x01, 3, from.0, to);
    }

    pub(crate) fn sub(&mut self, to: Reg, from: Reg) {
        self.two(0x29, 3, from.0, to);
    }

    pub(crate) fn cmp(&mut self, a: Reg, b: Reg) {
        self.two(0x39, 3, b.0, a);
    }

    fn with_imm(&mut self, operation: u8, to: Reg, value: i32) {
        self.two(0x81, 3, operation, to);
        self.code.extend(value.to_le_bytes());
    }

    pub(crate) fn add_imm(&mut self, to: Reg, value: i32) {
        self.with_imm(0, to, value);
    }

    pub(crate) fn and_imm(&mut self, to: Reg, value: i32) {
        self.with_imm(4, to, value);
    }

    pub(crate) fn cmp_imm(&mut self, a: Reg, value: i32) {
        self.with_imm(7, a, value);
    }

    pub(crate) fn shl(&mut self, to: Reg, bits: u8) {
        self.two(0xc1, 3, 4, to);
        self.code.push(bits);
    }

    pub(crate) fn shr(&mut self, to: Reg, bits: u8) {
        self.two(0xc1, 3, 5, to);
        self.code.push(bits);
    }

    /// Stores 8 bytes at `[base + offset]`.
    pub(crate) fn store(&mut self, base: Reg, offset: i32, from: Reg) {
        self.two(0x89, 2, from.0, base);
        self.code.extend(offset.to_le_bytes());
    }

    /// Loads 8 bytes from `[base + offset]`.
    pub(crate) fn load(&mut self, to: Reg, base: Reg, offset: i32) {
        self.two(0x8b, 2, to.0, base);
        self.code.extend(offset.to_le_bytes());
    }

    /// Writes the low 32 bits of RAX to an I/O port. Changes RDX.
    pub(crate) fn out(&mut self, port: u16) {
        self.mov_imm(RDX, port.into());
        self.code.push(0xef);
    }

    /// Reads 32 bits from an I/O port into RAX. Changes RDX.
    pub(crate) fn input(&mut self, port: u16) {
        self.mov_imm(RDX, port.into());
        self.code.push(0xed);
    }

    pub(crate) fn halt(&mut self) {
        self.code.push(0xf4);
    }

    pub(crate) fn jump(&mut self, label: Label) {
        self.code.push(0xe9);
        self.distance(label);
    }

    pub(crate) fn jump_if(&mut self, condition: If, label: Label) {
        self.code.extend([0x0f, condition as u8]);
        self.distance(label);
    }

    fn distance(&mut self, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.code.extend([0; 4]);
    }
}
