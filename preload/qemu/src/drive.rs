// SPDX-License-Identifier: MIT OR Apache-2.0
//! Drives the device beside the guest, by the library's control socket.

use crate::qemu::Qemu;
use crate::Result;

/// The engine's register that stops the guest.
const MAILBOX: u32 = 0x28;

/// Stops the guest's work. Its processor goes on.
pub(crate) fn pause(qemu: &mut Qemu) -> Result<()> {
    qemu.control(&format!("set dev0 {MAILBOX} 1"))?;
    qemu.wait("pause of the guest", |qemu| {
        let mailbox = qemu.control(&format!("get dev0 {MAILBOX}"))?;
        Ok((mailbox == "2").then_some(()))
    })
}

/// Lets the guest work again.
pub(crate) fn go_on(qemu: &mut Qemu) -> Result<()> {
    qemu.control(&format!("set dev0 {MAILBOX} 0"))?;
    Ok(())
}

/// Has the engine do a command while the guest does not use it, on every other page.
pub(crate) fn engine(
    qemu: &mut Qemu,
    command: u32,
    iova: u64,
    count: u32,
    value: u32,
) -> Result<()> {
    pause(qemu)?;
    let done = ring(qemu, command, iova, count, value);
    go_on(qemu)?;
    done
}

/// Has the engine do a command on every other page.
pub(crate) fn ring(qemu: &mut Qemu, command: u32, iova: u64, count: u32, value: u32) -> Result<()> {
    let (low, high) = (iova as u32, (iova >> 32) as u32);
    let registers = [low, high, 4096, count, 8192, value, command];
    for (register, value) in registers.iter().enumerate() {
        qemu.control(&format!("set dev0 {} {value}", 4 * register))?;
    }
    match qemu.control("get dev0 0x1c")?.as_str() {
        "1" => Ok(()),
        _ => Err(format!(
            "the engine's command {command} failed: {}",
            qemu.text("trace")
        )
        .into()),
    }
}
