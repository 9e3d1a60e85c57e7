// SPDX-License-Identifier: GPL-2.0-only
//! Processes that are killed while they wait: for a page, or for the container's lock.

use std::fs::File;
use std::io::{Read, Write};
use std::time::Instant;

use dirty_script::op::PAGE;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{kill, Signal};
use nix::sys::wait::{waitpid, WaitPidFlag, WaitStatus};
use nix::unistd::{pipe, Pid};

use super::{block, child, container, look, needs, sleeps, wait_under_lock, waiting, Case, Work};
use super::{ABSENT, ASLEEP, CASES, LOOKS};
use crate::ask::{ask, text};
use crate::process;
use crate::real::Real;
use crate::userfault::{page, Userfault};

/// Starts a thread that waits for a page under the lock.
fn hold_lock(real: &Real, pages: &Userfault, real_driver: bool) -> Result<Work, String> {
    let holder = Work::lines(real, 10, &["rw iova=0x40000002000 len=2p"])?;
    wait_under_lock(pages, &holder, ABSENT + 2 * PAGE, real_driver)?;
    Ok(holder)
}

/// A call waits for its page, a thread waits for another page with the lock, and a third
/// thread waits for the lock. Says so in `ready`.
fn victim(case: &Case, mut ready: File) -> Result<(), String> {
    let (real, pages) = container()?;
    let _blocked = block(&real, &pages, case)?;
    let _holder = hold_lock(&real, &pages, false)?;
    let info = [Work::lines(&real, 1, &["info"])?];
    if waiting(&info)?.is_empty() {
        return Err("nobody holds the lock".into());
    }
    ready.write_all(&[1]).map_err(text)?;
    loop {
        look();
    }
}

/// Waits until a process has ended by SIGKILL.
fn ended(pid: Pid) -> Result<(), String> {
    for _ in 0..LOOKS {
        match waitpid(pid, Some(WaitPidFlag::WNOHANG)).map_err(text)? {
            WaitStatus::StillAlive => look(),
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => return Ok(()),
            end => return Err(format!("a process to be killed: {end:?}")),
        }
    }
    Err("a killed process does not end".into())
}

fn kill_victim(case: &Case) -> Result<(), String> {
    let (read, write) = pipe().map_err(text)?;
    let (mut read, write) = (File::from(read), File::from(write));
    let pid = process::child(|| match victim(case, write) {
        Ok(()) => 0,
        Err(e) => {
            println!("{}: {e}", case.name);
            1
        }
    });
    let pid = pid.map_err(text)?;
    if read.read(&mut [0]).map_err(text)? != 1 {
        return Err(format!("{}: there is nothing to kill", case.name));
    }
    let start = Instant::now();
    kill(pid, Signal::SIGKILL).map_err(text)?;
    ended(pid).map_err(|e| format!("{}: {e}", case.name))?;
    let took = start.elapsed();
    println!(
        "absent: killed while it waits, {}: gone after {took:.1?}",
        case.name
    );
    Ok(())
}

/// Whether a process goes on sleeping.
fn asleep(pid: Pid) -> bool {
    let mut looks = 0..ASLEEP;
    looks.all(|_| {
        look();
        sleeps(&format!("/proc/{pid}/stat"))
    })
}

/// Another process waits for the lock, and is killed.
fn lock_waiter(real_driver: bool) -> Result<(), String> {
    let (mut real, pages) = container()?;
    let waiter = process::child(|| loop {
        // So that it does not outlive a failure.
        let _ = set_pdeathsig(Signal::SIGKILL);
        if ask(&mut real, "info").is_err() {
            return 1;
        }
    });
    let waiter = waiter.map_err(text)?;
    let holder = hold_lock(&real, &pages, real_driver)?;
    if !(0..LOOKS).any(|_| asleep(waiter)) {
        return Err("nobody waits for the lock".into());
    }
    kill(waiter, Signal::SIGKILL).map_err(text)?;
    if real_driver {
        if !asleep(waiter) {
            return Err("control: the process could be killed".into());
        }
        println!("absent: control: a process that waits for the lock cannot be killed");
    } else {
        ended(waiter)?;
        println!("absent: a process that waits for the lock can be killed");
    }
    // The lock is still the holder's.
    let info = [Work::lines(&real, 1, &["info"])?];
    if waiting(&info)?.is_empty() {
        return Err("who was killed has given away the holder's lock".into());
    }
    let mut next = ABSENT + 2 * PAGE;
    pages.give(next, &page(&[])).map_err(text)?;
    if real_driver {
        next += PAGE;
        needs(&pages, &holder, next)?;
        pages.give(next, &page(&[])).map_err(text)?;
    }
    let answer = holder.end()?;
    for info in info {
        info.end()?;
    }
    if real_driver {
        ended(waiter)?;
    }
    match answer.ends_with("ret=0") {
        true => Ok(()),
        false => Err(answer),
    }
}

pub(super) fn run(real_driver: bool) -> Result<(), String> {
    // Only the module: with the real driver, who waits for the lock cannot be killed.
    let cases = CASES.iter().filter(|_| !real_driver);
    // Nobody can kill a kernel thread, under either driver.
    for case in cases.filter(|case| !case.call.0.contains("kthread")) {
        kill_victim(case)?;
    }
    child(|| lock_waiter(real_driver))
}
