// SPDX-License-Identifier: MIT OR Apache-2.0
//! `vfio-dirty migrate` as a user runs it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{kill, Signal};
use nix::unistd::Pid;
use serde_json::Value;

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vfio-dirty"))
        .arg("migrate")
        .args(args)
        .output()
        .unwrap()
}

/// Runs the program with a small guest that writes little, so that a debug build is quick. If the
/// kernel cannot track the writes of CPUs, only devices write.
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
    assert_eq!(text.lines().last(), Some("verdict: all 4,096 pages equal"));
    for word in [
        "pages sent in",
        "downtime ",
        "pages/s reported dirty",
        "unmaps",
    ] {
        assert!(text.contains(word), "{text}");
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

/// A guest that is busy for some rounds, so that pages differ at the end if a
/// tracker does not report them.
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

/// Loses a tracker. If the kernel cannot track the writes of CPUs, only devices
/// write.
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
        // A kernel without this tracker must say so.
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
fn without_its_log_the_writes_of_a_vfio_user_device_are_lost() {
    let output = lose("vfio-user", &["--device", "vfio-user"]);
    assert_code(&output, 1);
    let text = stdout(&output);
    assert!(text.contains("DIFFERENT in "), "{text}");
    assert!(text.contains("  vfio-user device"), "{text}");
    let sentence = "--lose vfio-user threw away the log of the vfio-user device";
    assert!(text.lines().any(|line| line == sentence), "{text}");
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

/// Its pages, its state, and nothing of it when it is not there.
#[test]
fn a_vfio_user_device_is_migrated_too() {
    for (device, count) in [(&["--device", "vfio-user"][..], 5), (&[], 4)] {
        let output = migrate(&[device, &["--json"]].concat());
        assert_code(&output, 0);
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(document["verdict"], "equal");
        assert_eq!(document["devices"], count);
        let last = document["rounds"].as_array().unwrap().last().unwrap();
        let found = last["found_by"]["vfio_user"].as_u64().unwrap();
        assert_eq!(found > 0, count == 5, "{found}");
    }
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
    assert!(!svg.contains("lose") && !svg.contains("(lost)"));
    for column in COLUMNS {
        assert!(svg.contains(&format!("found by {column}")), "{column}");
    }
}

/// The columns of the table that say who found dirty pages.
const COLUMNS: [&str; 4] = ["CPU", "device", "windows", "unmaps"];

#[test]
fn the_table_has_a_column_for_zero_pages() {
    let output = migrate(&["--max-rounds", "1"]);
    assert_code(&output, 0);
    let text = stdout(&output);
    let mut lines = text.lines().skip_while(|line| !line.starts_with("round"));
    let head: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(head[2..6], COLUMNS);
    let first: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    let cell = |name| {
        let at = head.iter().position(|column| *column == name).unwrap();
        first[at].replace(',', "").parse::<u64>().unwrap()
    };
    assert_eq!(cell("dirty"), 4096);
    assert!(cell("zero") > 0);
    assert_eq!(cell("sent") + cell("zero"), 4096);
}

#[test]
fn the_plot_says_what_was_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rounds.svg");
    let output = lose("device", &["--plot", path.to_str().unwrap()]);
    assert_code(&output, 1);
    let svg = std::fs::read_to_string(path).unwrap();
    let sentence = "--lose device threw away the answers of GET_BITMAP for guest RAM";
    assert!(svg.contains(sentence));
    assert!(svg.contains("found by device (lost)"));
    assert!(stdout(&output).lines().any(|line| line == sentence));
}

#[test]
fn an_unwritable_plot_fails_before_the_migration() {
    let folder = tempfile::tempdir().unwrap();
    let output = run(&["--plot", folder.path().to_str().unwrap()]);
    assert_code(&output, 2);
    assert!(output.stdout.is_empty(), "{}", stdout(&output));
    assert!(stderr(&output).contains("cannot be written"));

    // A run that fails for another reason does not create or change the file.
    let path = folder.path().join("rounds.svg");
    let plot = ["--plot", path.to_str().unwrap()];
    let few_files = |limit| with_files(limit, &[&SMALL[..], &plot].concat());
    assert_code(&few_files(5), 1);
    assert!(!path.exists());
    std::fs::write(&path, "old").unwrap();
    assert_code(&few_files(5), 1);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "old");
}

#[test]
fn a_full_device_is_an_error() {
    for args in [&["--json"][..], &[]] {
        let output = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"))
            .arg("migrate")
            .args(SMALL)
            .arg("--no-cpu")
            .args(args)
            .stdout(File::options().write(true).open("/dev/full").unwrap())
            .output()
            .unwrap();
        assert_code(&output, 1);
        let text = stderr(&output);
        assert!(text.starts_with("vfio-dirty: cannot print the "), "{text}");
        assert!(text.contains("No space left on device"), "{text}");
    }
}

/// The smallest migration.
const SMALL: [&str; 6] = ["--memory", "16MiB", "--rate", "500", "--max-rounds", "1"];

fn with_files(limit: u32, args: &[&str]) -> Output {
    Command::new("sh")
        .args(["-c", "ulimit -n $0 && exec \"$@\"", &limit.to_string()])
        .args([env!("CARGO_BIN_EXE_vfio-dirty"), "migrate"])
        .args(args)
        .output()
        .unwrap()
}

#[test]
fn too_few_open_files_are_named_as_the_cause() {
    let mut failed = 0;
    for limit in 4..20 {
        let output = with_files(limit, &SMALL);
        if output.status.code() != Some(0) {
            let text = stderr(&output);
            if text.contains("run with --no-cpu") {
                continue; // the kernel does not track CPUs
            }
            assert_code(&output, 1);
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
fn a_stopped_destination_is_noticed_and_waited_for() {
    let busy = ["--memory", "64M", "--downtime", "1", "--max-rounds", "20"];
    let mut child = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"))
        .arg("migrate")
        .args(busy)
        .args(["--rate", "1000000", "--no-cpu"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    let process = loop {
        line.clear();
        assert!(
            stdout.read_line(&mut line).unwrap() > 0,
            "no process is named"
        );
        let found = line.split_once("process ").and_then(|(_, rest)| {
            let (process, _) = rest.split_once(" receives")?;
            process.parse().ok().map(Pid::from_raw)
        });
        if let Some(process) = found {
            break process;
        }
    };
    kill(process, Signal::SIGSTOP).unwrap();
    line.clear();
    stderr.read_line(&mut line).unwrap();
    let notice =
        format!("the destination process {process} does not answer; waiting for at most 60 s");
    assert!(line.contains(&notice), "{line}");
    kill(process, Signal::SIGCONT).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success(), "{rest}");
    assert!(
        rest.ends_with("verdict: all 16,384 pages equal\n"),
        "{rest}"
    );
}

#[test]
fn bad_usage_is_refused() {
    let bad: [&[&str]; 19] = [
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
        &["--lose", "vfio-user"],
        &["--device", "nvme"],
        &["--device", "vfio-user", "--guest", "kvm"],
        &["--plot", "/no/such/folder/rounds.svg"],
        &["--plot", ""],
        &["--plot", "/"],
        &["--memory", "64MB"],
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
    for part in ["migrate-destination", "serve-stdin"] {
        let output = Command::new(env!("CARGO_BIN_EXE_vfio-dirty"))
            .arg(part)
            .stdin(std::process::Stdio::null())
            .output()
            .unwrap();
        assert_code(&output, 2);
    }
}
