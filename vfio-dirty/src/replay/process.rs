// SPDX-License-Identifier: MIT OR Apache-2.0
//! Forked processes, and how much memory they may lock. The program has one
//! thread when it forks.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};

use dirty_core::Errno;
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{fork, pipe, ForkResult, Pid};

/// Ends this process without running destructors of its parent's values.
fn exit(code: i32) -> ! {
    // SAFETY: the call only ends the process.
    unsafe { nix::libc::_exit(code) }
}

/// Starts a child that runs `work` and exits with its result.
pub(crate) fn child(work: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // SAFETY: the process has one thread, so the child finds every lock free
    // and may do all that the parent may do.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            exit(code.unwrap_or(101))
        }
    }
}

/// Runs `work` in a child. `work` returns 0 or a negative errno.
pub(crate) fn in_child(work: impl FnOnce() -> i32) -> Result<i32, Errno> {
    let pid = child(|| -work()).map_err(|e| Errno(e as i32))?;
    match waitpid(pid, None) {
        Ok(WaitStatus::Exited(_, code)) => Ok(-code),
        _ => Err(Errno::ESRCH),
    }
}

/// How a child ended.
pub(crate) enum End {
    Exited(i32),
    Died(String),
}

/// Runs `work` in a child that writes to a pipe, and calls `take` with all that
/// it writes.
pub(crate) fn piped(
    work: impl FnOnce(File) -> i32,
    take: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<End> {
    let (read, write) = pipe()?;
    let (mut read, write) = (File::from(read), File::from(write));
    let pid = child(|| work(write))?;
    // Only the child still has the write end: `write` moved into the closure,
    // which this process has dropped.
    let mut chunk = vec![0; 1 << 16];
    let mut taken = Ok(());
    loop {
        match read.read(&mut chunk) {
            Ok(0) => break,
            Ok(n) if taken.is_ok() => taken = take(&chunk[..n]),
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let end = match waitpid(pid, None)? {
        WaitStatus::Exited(_, code) => End::Exited(code),
        status => End::Died(format!("{status:?}")),
    };
    taken.map(|()| end)
}

/// Limits the bytes that this process may lock. Unless `keep_cap`, also drops
/// the capability to lock more. Returns failures in the form of transcripts.
pub(crate) fn limit_locked(limit: u64, keep_cap: bool) -> String {
    let mut text = String::new();
    if let Err(e) = setrlimit(Resource::RLIMIT_MEMLOCK, limit, limit) {
        text += &format!(" setrlimit={}", Errno(e as i32));
    }
    let sets = [
        caps::CapSet::Effective,
        caps::CapSet::Inheritable,
        caps::CapSet::Permitted,
    ];
    for set in sets.into_iter().filter(|_| !keep_cap) {
        if let Err(e) = caps::drop(None, set, caps::Capability::CAP_IPC_LOCK) {
            text += &format!(" capset={e}");
        }
    }
    text
}
