// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty migrate` as a user runs it.

use std::process::{Command, Output};

use adapter_user as _;
use serde_json::Value;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vfio-dirty"))
        .arg("migrate")
        .args(args)
        .output()
        .unwrap()
}

/// Runs the program with a small guest and little to do: enough to lose pages, and quick in a
/// debug build. Where the kernel cannot track the CPUs' writes, only devices write.
fn migrate(args: &[&str]) -> Output {
    let mut all = vec!["--memory", "16M"];
    for (option, value) in [("--rate", "500"), ("--max-rounds", "4")] {
        if !args.contains(&option) {
            all.extend([option, value]);
        }
    }
    all.extend(args);
    let output = run(&all);
    if stderr(&output).contains("run with --no-cpu") {
        all.push("--no-cpu");
        return run(&all);
    }
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn assert_code(output: &Output, code: i32) {
    assert_eq!(
        output.status.code(),
        Some(code),
        "{}\n{}",
        stdout(output),
        stderr(output)
    );
}

#[test]
fn the_destination_gets_the_same_memory() {
    let output = migrate(&[]);
    assert_code(&output, 0);
    let text = stdout(&output);
    let closing = text.lines().last().unwrap();
    assert!(closing.ends_with("all 4,096 pages equal"), "{closing}");
    for word in [
        "pages sent in",
        "downtime",
        "pages/s reported dirty",
        "unmaps",
    ] {
        assert!(closing.contains(word), "{closing}");
    }
}

#[test]
fn devices_alone_are_migrated_too() {
    assert_code(&migrate(&["--no-cpu"]), 0);
}

#[test]
fn a_guest_that_writes_too_much_is_stopped_after_the_last_round() {
    let output = migrate(&["--downtime", "1", "--max-rounds", "1", "--rate", "1000000"]);
    assert_code(&output, 0);
    assert!(stdout(&output).contains("guest was stopped anyway"));
}

/// A guest that is busy for some rounds: whatever a tracker does not report is
/// then missing at the end.
const BUSY: [&str; 8] = [
    "--memory",
    "64M",
    "--downtime",
    "2",
    "--max-rounds",
    "8",
    "--rate",
    "20000",
];

/// Loses a tracker; devices alone write where the kernel tracks no CPU.
fn lose(tracker: &str, args: &[&str]) -> Output {
    let args = [&BUSY[..], &["--lose", tracker], args].concat();
    let output = run(&args);
    if tracker != "cpu" && stderr(&output).contains("run with --no-cpu") {
        return run(&[&args[..], &["--no-cpu"]].concat());
    }
    output
}

#[track_caller]
fn assert_lost(tracker: &str, writer: &str) {
    let output = lose(tracker, &[]);
    assert_code(&output, 1);
    let text = stdout(&output);
    if tracker == "cpu" && !text.contains("DIFFERENT in ") {
        // The one other way to fail: a kernel without the tracker, said aloud.
        assert!(stderr(&output).contains("run with --no-cpu"), "{text}");
        return;
    }
    assert!(text.contains("DIFFERENT in "), "{text}");
    assert!(text.contains(writer), "{text}");
}

#[test]
fn without_get_bitmap_device_writes_are_lost() {
    assert_lost("device", "  device ");
}

#[test]
fn without_the_harvest_at_unmap_writes_to_windows_are_lost() {
    assert_lost("unmap", "  device behind the virtual IOMMU");
}

#[test]
fn without_pagemap_scan_cpu_writes_are_lost() {
    assert_lost("cpu", "  cpu");
}

#[test]
fn json_is_one_document() {
    let output = migrate(&["--json", "--max-rounds", "1"]);
    assert_code(&output, 0);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["verdict"], "equal");
    assert_eq!(document["differing_pages"], 0);
    assert_eq!(document["memory_bytes"], 16 << 20);

    let rounds = document["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 2);
    assert_eq!(rounds[0]["dirty_pages"], 4096);
    assert_eq!(rounds[0]["guest_stopped"], false);
    assert_eq!(rounds[1]["guest_stopped"], true);
    assert!(rounds[1]["found_by"]["device"].as_u64().unwrap() > 0);
    let sent: u64 = rounds
        .iter()
        .filter_map(|round| round["pages_sent"].as_u64())
        .sum();
    assert_eq!(document["pages_sent"], sent);
}

#[test]
fn json_names_what_differs() {
    let output = lose("device", &["--json"]);
    assert_code(&output, 1);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["verdict"], "different");
    assert_eq!(document["lose"], "device");
    let first = document["first_differences"].as_array().unwrap();
    assert!((1..=10).contains(&first.len()));
    for page in first {
        assert!(page["address"].as_str().unwrap().starts_with("0x"));
        assert!(page["last_writer"].as_str().unwrap().starts_with("device"));
    }
}

#[test]
fn the_plot_is_an_svg() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rounds.svg");
    assert_code(&migrate(&["--plot", path.to_str().unwrap()]), 0);
    let svg = std::fs::read_to_string(path).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    assert!(svg.contains("Live migration of 16 MiB"));
}

#[test]
fn bad_usage_is_refused() {
    let bad: [&[&str]; 14] = [
        &["--memory", "5000"],
        &["--memory", "8M"],
        &["--memory", "lots"],
        &["--memory", "17179869183G"],
        &["--max-rounds", "0"],
        &["--downtime", "0"],
        &["--rate", "0"],
        &["--cpu-threads", "0"],
        &["--cpu-threads", "2", "--no-cpu"],
        &["--lose", "cpu", "--no-cpu"],
        &["--lose", "everything"],
        &["--plot", "/no/such/folder/rounds.svg"],
        &["--plot", ""],
        &["--unknown"],
    ];
    for args in bad {
        let output = run(args);
        assert_code(&output, 2);
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(!output.stderr.is_empty(), "{args:?}");
    }
}

#[test]
fn the_receiving_end_does_not_run_by_itself() {
    let output = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"))
        .arg("migrate-destination")
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert_code(&output, 2);
}
