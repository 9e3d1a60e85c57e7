// SPDX-License-Identifier: MIT OR Apache-2.0
//! The receiving side: the guest goes on here and verifies its own memory.

use std::io::{stdin, BufReader};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::thread;

use vm_memory::{Bytes, GuestAddress};

use crate::guest::CYCLE;
use crate::machine::{Cpu, Machine, Stop};
use crate::memory::{checksums, pages};
use crate::wire::{receive_pages, receive_state, State};
use crate::Result;

/// Receives a guest on standard input, lets it go on, and prints what it finds.
pub(crate) fn receive(kvm: &str) -> Result<ExitCode> {
    let (machine, mut cpu) = Machine::new(kvm, None)?;
    let mut pipe = BufReader::new(stdin().lock());
    receive_pages(&mut pipe, |gpa, bytes| -> Result<()> {
        Ok(machine.memory.write_slice(bytes, GuestAddress(gpa))?)
    })?;
    let state = receive_state(&mut pipe, pages(&machine.memory).count())?;
    drop(pipe);
    let there = checksums(&machine.memory)?;
    let wrong = there.iter().zip(&state.checksums).filter(|(a, b)| a != b);
    let wrong = wrong.count();
    println!("compared: {wrong} of {} pages differ", there.len());
    restore(&machine, &cpu, state)?;

    // The source paused it just before it verifies its memory.
    let mut good = verified(&machine, &mut cpu, "when it arrived")? && wrong == 0;
    if good {
        go_on(&machine, &mut cpu)?;
        good = verified(&machine, &mut cpu, "when it had gone on")?;
    }
    Ok(match good {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn restore(machine: &Machine, cpu: &Cpu, state: State) -> Result<()> {
    cpu.set(Some(state.regs))?;
    for (device, (done, windows)) in machine.devices.iter().zip(state.devices) {
        device.restore(done, windows)?;
    }
    Ok(())
}

fn verified(machine: &Machine, cpu: &mut Cpu, when: &str) -> Result<bool> {
    match machine.run(cpu)? {
        Stop::Verified(0) => println!("the guest's own check {when}: passed"),
        Stop::Verified(page) => {
            println!("the guest's own check {when}: page {page:#x} is wrong");
            return Ok(false);
        }
        Stop::Paused => return Err("the guest paused by itself".into()),
    }
    Ok(true)
}

/// Lets the guest make enough steps to write every page twice.
fn go_on(machine: &Machine, cpu: &mut Cpu) -> Result<()> {
    let end = machine.steps.load(Ordering::Relaxed) + 2 * CYCLE;
    thread::scope(|scope| {
        scope.spawn(|| {
            while machine.steps.load(Ordering::Acquire) < end {
                thread::yield_now();
            }
            machine.pause.store(true, Ordering::Release);
        });
        match machine.run(cpu)? {
            Stop::Paused => Ok(()),
            stop => Err(format!("the guest did not go on: {stop:?}").into()),
        }
    })
}
