// SPDX-License-Identifier: MIT OR Apache-2.0
//! The bytes that the source sends: pages, then the state of the CPU and the
//! devices, and a checksum of each page.

use std::io::{self, Read, Write};

use kvm_bindings::kvm_regs;

use crate::guest::PAGE;

/// The state of a stopped machine except its memory.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) regs: kvm_regs,
    /// For each device the doorbells served, and its windows (IOVA and guest
    /// address).
    pub(crate) devices: Vec<(u64, Vec<(u64, u64)>)>,
    /// The checksum of each page of RAM, in order.
    pub(crate) checksums: Vec<u32>,
}

/// Sent in the place of an address after the last page.
const END: u64 = u64::MAX;

pub(crate) fn send_page(to: &mut impl Write, gpa: u64, bytes: &[u8]) -> io::Result<()> {
    to.write_all(&gpa.to_le_bytes())?;
    to.write_all(bytes)
}

/// Receives all pages and calls `put` with the address and bytes of each.
pub(crate) fn receive_pages<E: From<io::Error>>(
    from: &mut impl Read,
    mut put: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut bytes = vec![0; PAGE as usize];
    loop {
        match number(from)? {
            END => return Ok(()),
            gpa => {
                from.read_exact(&mut bytes)?;
                put(gpa, &bytes)?;
            }
        }
    }
}

pub(crate) fn send_state(to: &mut impl Write, state: &mut State) -> io::Result<()> {
    let mut put = |value: u64| to.write_all(&value.to_le_bytes());
    put(END)?;
    for register in registers(&mut state.regs) {
        put(*register)?;
    }
    put(state.devices.len() as u64)?;
    for (done, windows) in &state.devices {
        put(*done)?;
        put(windows.len() as u64)?;
        for (iova, gpa) in windows {
            put(*iova)?;
            put(*gpa)?;
        }
    }
    for checksum in &state.checksums {
        put((*checksum).into())?;
    }
    to.flush()
}

pub(crate) fn receive_state(from: &mut impl Read, npages: usize) -> io::Result<State> {
    let mut state = State::default();
    for register in registers(&mut state.regs) {
        *register = number(from)?;
    }
    for _ in 0..number(from)? {
        let done = number(from)?;
        let windows = (0..number(from)?).map(|_| Ok((number(from)?, number(from)?)));
        let windows = windows.collect::<io::Result<_>>()?;
        state.devices.push((done, windows));
    }
    let checksums = (0..npages).map(|_| Ok(number(from)? as u32));
    state.checksums = checksums.collect::<io::Result<_>>()?;
    Ok(state)
}

fn number(from: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn registers(regs: &mut kvm_regs) -> [&mut u64; 18] {
    [
        &mut regs.rax,
        &mut regs.rbx,
        &mut regs.rcx,
        &mut regs.rdx,
        &mut regs.rsi,
        &mut regs.rdi,
        &mut regs.rsp,
        &mut regs.rbp,
        &mut regs.r8,
        &mut regs.r9,
        &mut regs.r10,
        &mut regs.r11,
        &mut regs.r12,
        &mut regs.r13,
        &mut regs.r14,
        &mut regs.r15,
        &mut regs.rip,
        &mut regs.rflags,
    ]
}
