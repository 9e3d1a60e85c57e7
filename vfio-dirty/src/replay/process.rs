// SPDX-License-Identifier: MIT OR Apache-2.0
//! Work in a forked process, and what it may lock. The program has one thread
//! when it forks.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};

use dirty_core::Errno;
use nix::sys::resource::{setrlimit, Resource};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{fork, pipe, ForkResult, Pid};

/// Ends this process without a word to anything its parent owns.
fn exit(code: i32) -> ! {
    // SAFETY: ends the process; no destructor of the parent's values runs.
    unsafe { nix::libc::_exit(code) }
}

/// Starts a child that does `work` and exits with what it returns.
pub(crate) fn child(work: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // SAFETY: the process has one thread, so that the child finds every lock
    // free and may do whatever the parent may.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            exit(code.unwrap_or(101))
        }
    }
}

/// Runs `work` in a child; it answers 0 or a negative errno.
pub(crate) fn in_child(work: impl FnOnce() -> i32) -> Result<i32, Errno> {
    let pid = child(|| -work()).map_err(|e| Errno(e as i32))?;
    match waitpid(pid, None) {
        Ok(WaitStatus::Exited(_, code)) => Ok(-code),
        _ => Err(Errno::ESRCH),
    }
}

/// How a child that wrote its output ended.
pub(crate) enum End {
    Exited(i32),
    Died(String),
}

/// Runs `work` in a child that writes to a pipe; gives all it wrote to `take`.
pub(crate) fn piped(
    work: impl FnOnce(File) -> i32,
    take: &mut dyn FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<End> {
    let (read, write) = pipe()?;
    let (mut read, write) = (File::from(read), File::from(write));
    let pid = child(|| work(write))?;
    // The child's copy of the write end is the only one now: `write` moved
    // into the closure, which this process has dropped.
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

/// Limits the bytes that this process may lock, and gives up the right to lock
/// more unless it keeps it. Returns what failed, as transcripts have it.
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
