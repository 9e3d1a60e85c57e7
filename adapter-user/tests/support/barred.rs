// SPDX-License-Identifier: MIT OR Apache-2.0
//! A process to which the kernel refuses membarrier(2), as a seccomp filter may.

use std::env;
use std::process::Command;
use std::thread;

/// Refuses membarrier(2) to this thread, to the threads and processes that it starts,
/// and to nobody else.
pub(crate) fn bar() {
    const NR: u32 = libc::SYS_membarrier as u32;
    let op = |code: u32, jf, k| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let mut program = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0), // the number of the call
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, NR),
        op(
            libc::BPF_RET | libc::BPF_K,
            0,
            libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
        ),
        op(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: it takes numbers only.
    let done = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(done, 0, "no_new_privs");
    // SAFETY: it reads the filter, which lives until it returns.
    let done = unsafe {
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const filter,
        )
    };
    assert_eq!(done, 0, "a seccomp filter");
    assert!(is_barred());
}

/// Whether the kernel refuses membarrier(2) to this thread.
pub(crate) fn is_barred() -> bool {
    // SAFETY: MEMBARRIER_CMD_QUERY takes numbers only.
    unsafe { libc::syscall(libc::SYS_membarrier, 0, 0, 0) < 0 }
}

/// Runs the test `name` of this executable once more, in a process where membarrier(2)
/// is refused. `module` is the `module_path!` of the test.
pub(crate) fn run(module: &str, name: &str) {
    let name = match module.split_once("::") {
        Some((_crate, module)) => format!("{module}::{name}"),
        None => name.to_owned(),
    };
    let test = thread::spawn(move || {
        bar();
        let exe = env::current_exe().expect("the path of this test");
        let run = Command::new(exe).args(["--exact", &name]).output();
        let run = run.expect("the test starts");
        let said = String::from_utf8_lossy(&run.stdout);
        print!("{said}{}", String::from_utf8_lossy(&run.stderr));
        // A misspelt name would run no test, and succeed.
        assert!(run.status.success() && said.contains("1 passed"));
    });
    test.join().expect("the test passes without membarrier");
}
