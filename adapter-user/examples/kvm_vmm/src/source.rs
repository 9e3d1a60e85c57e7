// SPDX-License-Identifier: MIT OR Apache-2.0
//! The sending side of the migration.

use std::io::{BufReader, BufWriter, Read, Write};
use std::process::{ChildStdin, Command, ExitCode, Stdio};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use adapter_user::guest::{Range, Report, Tracker};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{CYCLE, PAGE};
use crate::hammer::Hammers;
use crate::machine::{Cpu, Machine, Stop};
use crate::memory::{checksums, pages, Memory};
use crate::wire::{send_page, send_state, State};
use crate::{Args, Lose, Result};

/// The least number of rounds while the guest runs.
const ROUNDS: u32 = 3;

/// Runs the guest and migrates it to a process started with `destination`. The
/// result is a success if the guest arrived whole.
pub(crate) fn migrate(args: &Args, destination: &[&str]) -> Result<ExitCode> {
    let (machine, cpu) = Machine::new(&args.kvm, args.lose)?;
    let machine = Arc::new(machine);
    machine.load()?;
    cpu.set(None)?;
    add_kvm_log(&machine, args);

    let mut child = Command::new(std::env::current_exe()?)
        .args(destination)
        .args(["--kvm", &args.kvm])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut pipe = BufWriter::new(child.stdin.take().ok_or("no pipe")?);
    let hammers = Hammers::start(&machine, args.hammers)?;
    let running = run(&machine, cpu);
    wait(&machine, &running, 2 * CYCLE)?;

    start_logs(&machine, &hammers)?;
    let started = Instant::now();
    let steps = machine.steps.load(Ordering::Acquire);
    let mut sent = 0;
    for at in pages(&machine.memory) {
        sent += send(
            &mut pipe,
            &machine.memory,
            Range {
                gpa: at.0,
                size: PAGE,
            },
        )?;
    }
    let mut report = Report::new();
    let mut rounds = 0;
    while rounds < ROUNDS || started.elapsed() < Duration::from_secs(args.seconds) {
        rounds += 1;
        // Long enough that every page is written again.
        wait(
            &machine,
            &running,
            steps + CYCLE * u64::from(rounds.min(ROUNDS)),
        )?;
        sent += round(&mut pipe, &machine.memory, &machine.tracker, &mut report)?;
    }

    let paused = Instant::now();
    machine.pause.store(true, Ordering::Release);
    let (cpu, stop) = running
        .join()
        .map_err(|_| "the thread of the CPU panicked")??;
    if stop != Stop::Paused {
        return Err(format!("the guest did not pause: {stop:?}").into());
    }
    let maps = hammers.stop()?;
    machine.devices.iter().for_each(|device| device.drain());
    let last = round(&mut pipe, &machine.memory, &machine.tracker, &mut report)?;
    send_state(&mut pipe, &mut state(&machine, &cpu)?)?;
    drop(pipe);
    println!(
        "sent {sent} pages in {} rounds while the guest ran, then {last} in {:.1} ms\n\
         the guest made {} steps, and other devices made {maps} mappings",
        rounds + 1,
        paused.elapsed().as_secs_f64() * 1e3,
        machine.steps.load(Ordering::Relaxed),
    );

    let mut told = String::new();
    BufReader::new(child.stdout.take().ok_or("no pipe")?).read_to_string(&mut told)?;
    print!("{told}");
    Ok(match child.wait()?.success() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// Adds KVM's log of what the CPU writes as a source of the tracker.
fn add_kvm_log(machine: &Machine, args: &Args) {
    if args.lose == Some(Lose::Kvm) {
        return;
    }
    let vm = Arc::clone(&machine.vm);
    machine.tracker.add_source("kvm", move |report| {
        for slot in report.slots() {
            let log = vm.get_dirty_log(slot.id, slot.size as usize)?;
            report.or_slot(slot.id, &log)?;
        }
        Ok(())
    });
}

/// Runs the CPU in a thread.
fn run(machine: &Arc<Machine>, mut cpu: Cpu) -> JoinHandle<Result<(Cpu, Stop)>> {
    let machine = Arc::clone(machine);
    thread::spawn(move || {
        let stop = machine.run(&mut cpu)?;
        Ok((cpu, stop))
    })
}

/// Waits until the guest has made `steps` steps.
fn wait<T>(machine: &Machine, running: &JoinHandle<T>, steps: u64) -> Result<()> {
    while machine.steps.load(Ordering::Acquire) < steps {
        if running.is_finished() {
            return Err("the guest stopped by itself".into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Starts every log. All memory must be copied after this.
fn start_logs(machine: &Machine, hammers: &Hammers) -> Result<()> {
    machine.set_log(true)?;
    for log in machine
        .devices
        .iter()
        .filter_map(|device| device.log.as_ref())
    {
        log.start_all(PAGE)?;
    }
    for log in &hammers.logs {
        log.set_tracking(true)?;
    }
    machine.tracker.start()?;
    Ok(())
}

/// One round: one call tells what is dirty, and those pages are sent.
fn round(
    pipe: &mut BufWriter<ChildStdin>,
    memory: &Memory,
    tracker: &Tracker,
    report: &mut Report,
) -> Result<u64> {
    tracker.take(report)?;
    let mut sent = 0;
    for range in report.ranges(PAGE)? {
        sent += send(pipe, memory, range)?;
    }
    pipe.flush()?;
    report.clear();
    Ok(sent)
}

fn send(pipe: &mut impl Write, memory: &Memory, range: Range) -> Result<u64> {
    let mut bytes = [0; PAGE as usize];
    for at in (0..range.size).step_by(PAGE as usize) {
        memory.read_slice(&mut bytes, GuestAddress(range.gpa + at))?;
        send_page(pipe, range.gpa + at, &bytes)?;
    }
    Ok(range.size / PAGE)
}

fn state(machine: &Machine, cpu: &Cpu) -> Result<State> {
    Ok(State {
        regs: cpu.regs()?,
        devices: machine
            .devices
            .iter()
            .map(|device| device.state())
            .collect(),
        checksums: checksums(&machine.memory)?,
    })
}
