// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest on /dev/kvm is migrated and finds its memory whole. If any one source
//! of dirty pages is left out, it finds stale pages.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

use caps::{CapSet, Capability};

fn migrate(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"));
    command.args(["migrate", "--guest", "kvm"]).args(args);
    command.output().expect("the program runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[&output.stdout[..], &output.stderr[..]].concat()).into_owned()
}

/// Whether this machine runs virtual machines. If not, the program must say so.
fn kvm() -> bool {
    let there = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if there.is_err() {
        let output = migrate(&[]);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        eprintln!("skipped: no /dev/kvm here");
    }
    there.is_ok()
}

fn assert_whole(args: &[&str]) {
    let output = migrate(args);
    let text = text(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    for line in [
        "compared: 0 of 6144 pages differ",
        "the guest's own check when it arrived: passed",
        "the guest's own check when it had gone on: passed",
    ] {
        assert!(text.contains(line), "{text}");
    }
    assert!(text.lines().all(|line| line.len() <= 80), "{text}");
}

#[test]
fn twenty_of_twenty_guests_arrive_whole() {
    if kvm() {
        (0..20).for_each(|_| assert_whole(&[]));
    }
}

#[test]
fn a_guest_beside_four_devices_at_full_speed_arrives_whole() {
    if kvm() {
        assert_whole(&["--stress", "3"]);
    }
}

#[test]
fn without_any_one_source_the_guest_finds_stale_pages() {
    if !kvm() {
        return;
    }
    // The first page of each source, and the number of its pages.
    for (source, first, n) in [
        ("cpu", 0x200, 1024),
        ("vmm", 0x800, 64),
        ("device", 0x20000, 64),
        ("unmap", 0x20100, 64),
    ] {
        for _ in 0..3 {
            let output = migrate(&["--lose", source]);
            let text = text(&output);
            assert_eq!(output.status.code(), Some(1), "{source}: {text}");
            let found = text.split_once("when it arrived: page 0x");
            let found = found.and_then(|(_, rest)| rest.split_once(" is wrong"));
            let (page, _) = found.unwrap_or_else(|| panic!("{source}: {text}"));
            let page = u64::from_str_radix(page, 16).expect("a number");
            assert!((first..first + n).contains(&page), "{source}: {text}");
        }
    }
}

#[test]
fn without_kvm_it_says_so() {
    let output = migrate(&["--kvm", "/dev/no-such-device"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output).contains("no virtual machines here"),
        "{}",
        text(&output)
    );
}

/// Root may open any file, unless CAP_DAC_OVERRIDE is out of its bounding set.
#[test]
fn without_permission_it_says_so() {
    let device = tempfile::NamedTempFile::new().unwrap();
    let path = device.path().to_str().unwrap();
    std::fs::set_permissions(path, Permissions::from_mode(0o000)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"));
    command.args(["migrate", "--guest", "kvm", "--kvm", path]);
    // SAFETY: the closure only makes system calls, for the child alone.
    unsafe {
        command.pre_exec(|| {
            // Fails for other users, who do not have the capability anyway.
            let _ = caps::drop(None, CapSet::Bounding, Capability::CAP_DAC_OVERRIDE);
            Ok(())
        })
    };
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = text(&output);
    assert!(text.contains("may not run virtual machines"), "{text}");
    assert!(text.contains("usermod -aG kvm"), "{text}");
}

#[test]
fn too_few_open_files_are_named_as_the_cause() {
    if !kvm() {
        return;
    }
    let mut failed = 0;
    for limit in 4..20 {
        let output = Command::new("sh")
            .args(["-c", "ulimit -n $0 && exec \"$@\"", &limit.to_string()])
            .args([
                env!("CARGO_BIN_EXE_vfio-dirty"),
                "migrate",
                "--guest",
                "kvm",
            ])
            .output()
            .expect("sh runs");
        if output.status.code() != Some(0) {
            let text = text(&output);
            assert!(
                text.contains("allow more with `ulimit -n"),
                "{limit}: {text}"
            );
            failed += 1;
        }
    }
    assert!(failed > 0);
}

#[test]
fn what_only_threads_have_is_refused() {
    for args in [&["--memory", "1G"][..], &["--rate", "5"], &["--json"]] {
        assert_eq!(migrate(args).status.code(), Some(2));
    }
}
